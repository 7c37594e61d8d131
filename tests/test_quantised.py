"""LoRA on quantised weights: losses are those of the dequantised ones, and the journal does not need them."""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from mezo.api import build_trainer, eval_model, merge, replay
from mezo.config import MeZOConfig
from mezo.engines.torch.loading import num_weights
from mezo.errors import UserError
from mezo.estimator import TwoPoint
from tests.conftest import SENTIMENT_ROWS

bitsandbytes = pytest.importorskip("bitsandbytes")

WORDS = {"label_words": {"0": "bad", "1": "good"}}
KINDS = {
    "llama": ({"template": "{text} it was"}, AutoModelForCausalLM),
    "bert": ({"template": "{text} it was [MASK] ."}, AutoModelForMaskedLM),
}


@pytest.fixture
def config(model_folder, tmp_path):
    return MeZOConfig(
        model_name_or_path=model_folder("llama"), use_peft=True, load_in_4bit=True, dtype="float32", max_steps=6,
        per_device_train_batch_size=8, learning_rate=1e-2, epsilon=1e-2, output_dir=str(tmp_path / "run"),
        disable_tqdm=True, **WORDS, **KINDS["llama"][0],
    )  # fmt: skip


def losses_of(config, rows=SENTIMENT_ROWS[:12]):
    trainer = build_trainer(config, rows)
    return trainer.engine, trainer.engine.losses(trainer.train_examples, TwoPoint(3, 1e-1).probes(0))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_dequantised_weights(config, model_folder, tmp_path, kind):
    options, auto_class = KINDS[kind]
    config = dataclasses.replace(config, model_name_or_path=model_folder(kind), **options)
    engine, losses_PN = losses_of(config)
    dequantised = auto_class.from_pretrained(model_folder(kind), dtype=torch.float32)
    count = 0
    for name, module in engine.model.get_base_model().named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            dequantised.get_submodule(name.replace(".base_layer", "")).weight.data.copy_(weight)
            count += 1
    assert count >= 8
    dequantised.save_pretrained(tmp_path / "dequantised")
    AutoTokenizer.from_pretrained(model_folder(kind)).save_pretrained(tmp_path / "dequantised")
    plain = dataclasses.replace(config, load_in_4bit=False, model_name_or_path=str(tmp_path / "dequantised"))
    torch.testing.assert_close(losses_PN, losses_of(plain)[1], atol=1e-5, rtol=0)
    whole = losses_of(dataclasses.replace(plain, model_name_or_path=model_folder(kind)))[1]
    assert (losses_PN - whole).abs().max() > 1e-4  # rounding to 4 bits is seen


def test_saving_leaves_the_weights_as_they_are(config, tmp_path):
    """Widths that bitsandbytes' kernel for CPUs with AVX512-BF16 takes, which loses its scales in a state dict."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, bos_token_id=0, eos_token_id=1, **sizes))
    model.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(config.model_name_or_path).save_pretrained(tmp_path / "wide")
    trainer = build_trainer(dataclasses.replace(config, model_name_or_path=str(tmp_path / "wide")), SENTIMENT_ROWS[:12])
    before = trainer.engine.losses(trainer.train_examples, TwoPoint(3, 1e-1).probes(0))
    trainer.engine.save(tmp_path / "saved")
    trainer.engine.model.state_dict()
    after = trainer.engine.losses(trainer.train_examples, TwoPoint(3, 1e-1).probes(0))
    assert torch.equal(before, after)
    weights = sum(p.numel() for p in model.parameters())
    assert num_weights(trainer.engine.model.get_base_model()) == weights + trainer.engine.num_parameters()


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_run_its_evaluation_and_its_replay_without_the_package(config, tmp_path, monkeypatch, caplog, bits):
    config = dataclasses.replace(config, **{"load_in_4bit": False, bits: True})
    trainer = build_trainer(config, SENTIMENT_ROWS[:64], SENTIMENT_ROWS[64:])
    kinds = {type(m).__name__ for m in trainer.engine.model.modules()}
    assert ("Linear4bit" if bits == "load_in_4bit" else "Linear8bitLt") in kinds
    metrics = trainer.train().metrics
    run = Path(config.output_dir)
    found = eval_model(config, run, SENTIMENT_ROWS[64:])
    assert found.loss == pytest.approx(metrics.loss, abs=1e-6)
    whole = eval_model(dataclasses.replace(config, **{bits: False}), run, SENTIMENT_ROWS[64:])
    assert whole.loss != found.loss and f"--{bits} evaluates on them" in caplog.text
    assert f"base in {bits[8]} bits" in (run / "README.md").read_text()
    assert json.loads((run / "adapter_config.json").read_text())["r"] == 8
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "bitsandbytes" in name else real(name, *a)
    )
    with pytest.raises(UserError, match=rf"{bits} needs bitsandbytes: pip install 'mezo\[quantization\]'"):
        build_trainer(dataclasses.replace(config, output_dir=str(tmp_path / "other")), SENTIMENT_ROWS[:64])
    replay(run, tmp_path / "again")
    again = tmp_path / "again" / "adapter_model.safetensors"
    assert again.read_bytes() == (run / "adapter_model.safetensors").read_bytes()
    merge(run, tmp_path / "merged")  # into the base as it is
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:learning_rate")
def test_a_quantised_checkpoint(config, model_folder, tmp_path):
    folder = tmp_path / "four"
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_folder("llama"), dtype=torch.float32, quantization_config=quantisation, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder("llama")).save_pretrained(folder)
    with pytest.raises(UserError, match="is quantised already; leave it out"):
        losses_of(dataclasses.replace(config, model_name_or_path=str(folder)))
    loaded = dataclasses.replace(config, model_name_or_path=str(folder), load_in_4bit=False)
    torch.testing.assert_close(losses_of(loaded)[1], losses_of(config)[1], atol=1e-5, rtol=0)
    build_trainer(loaded, SENTIMENT_ROWS[:12]).train()
    with pytest.raises(UserError, match="is quantised: an adapter added to it would be rounded"):
        merge(loaded.output_dir, tmp_path / "merged")
    shutil.rmtree(loaded.output_dir)
    with pytest.raises(UserError, match="quantised weights cannot take small steps; use_peft"):
        build_trainer(dataclasses.replace(loaded, use_peft=False), SENTIMENT_ROWS[:12])


@pytest.mark.filterwarnings("ignore:learning_rate")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_peft": False}, "quantised weights cannot take small steps; use_peft"),
        ({"load_in_8bit": True}, "name one of them"),
        ({"engine": "sglang"}, "load_in_8bit are for engine torch"),
    ],
)
def test_what_quantised_weights_cannot_do(config, change, message):
    with pytest.raises(UserError, match=message):
        build_trainer(dataclasses.replace(config, **change), SENTIMENT_ROWS[:12])


def test_a_head_is_not_quantised(config, model_folder):
    headless = dataclasses.replace(
        config, model_name_or_path=model_folder("bert"), template=None, label_words=None, learning_rate=1e-3
    )
    with pytest.raises(UserError, match="a classification head cannot be quantised"):
        build_trainer(headless, SENTIMENT_ROWS[:12])
