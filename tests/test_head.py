"""A fresh classification head: what it reads, what is trained of it, and what is saved."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mezo import MeZOConfig, mezo_finetune
from mezo.api import build_trainer
from tests.conftest import SENTIMENT_ROWS, WORDS

POOLERS = {"bert": "bert.pooler.dense", "roberta": "classifier.dense"}


def random_inputs(model: torch.nn.Module, tokenizer, layer: str) -> torch.Tensor:
    """Inputs of a layer over sentences of random words, which the centring has not seen."""
    generator = torch.Generator().manual_seed(1)
    words = [[WORDS[i] for i in torch.randint(len(WORDS), (9,), generator=generator)] for _ in range(40)]
    inputs = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(**tokenizer([" ".join(w) for w in words], return_tensors="pt", padding=True))
    handle.remove()
    return inputs[0]


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_the_head_reads_centred_states(name, model_folder, tmp_path):
    config = MeZOConfig(model_name_or_path=model_folder(name), output_dir=str(tmp_path))
    engine = build_trainer(config, SENTIMENT_ROWS).engine
    layer = engine.model.get_submodule(POOLERS[name])
    h_RD = random_inputs(engine.model, engine.tokenizer, POOLERS[name])
    with torch.no_grad():
        assert torch.allclose(layer(h_RD), h_RD + layer.bias)  # the identity, moved
        assert layer(h_RD).mean(dim=0).norm() < 0.2 * h_RD.mean(dim=0).norm()


def test_random_leaves_the_pooler_of_the_checkpoint(model_folder, tmp_path):
    folder = tmp_path / "with-pooler"
    AutoModelForSequenceClassification.from_pretrained(model_folder("bert"), num_labels=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder("bert")).save_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).bert.pooler.dense.weight
    for head_init, same in (("random", True), ("centered", False)):
        config = MeZOConfig(model_name_or_path=str(folder), output_dir=str(tmp_path / "run"), head_init=head_init)
        model = build_trainer(config, SENTIMENT_ROWS).engine.model  # two labels: the head is fresh
        assert torch.equal(model.bert.pooler.dense.weight, plain) is same


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_adapter_brings_its_centred_head_to_peft(name, model_folder, tmp_path):
    result = mezo_finetune(
        model_path=model_folder(name),
        train_dataset=SENTIMENT_ROWS,
        lora_rank=2,
        learning_rate=1e-3,
        num_steps=3,
        batch_size=8,
        output_dir=tmp_path / "run",
        report_to="none",
    )
    base = AutoModelForSequenceClassification.from_pretrained(model_folder(name), num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(result.model_path)).eval()
    trainer = build_trainer(
        MeZOConfig(
            model_name_or_path=model_folder(name),
            output_dir=str(tmp_path / "other"),
            use_peft=True,
            lora_r=2,
            seed=0,
        ),
        SENTIMENT_ROWS,
    )
    trainer.engine.load(result.model_path)
    batch = trainer.engine.tokenizer("the film was good .", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.engine.model(**batch).logits)
    trained = trainer.engine.space.parameters
    assert any("classifier" in key for key in trained)
    assert not any(".pooler." in key for key in trained)
