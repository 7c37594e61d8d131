"""The README of a run says what was done, its program loads the result, and serving engines find their names."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainerState

from mezo import MeZOConfig, mezo_finetune
from mezo.model_card import model_card
from tests.conftest import SENTIMENT_ROWS

WORDS = {"label_words": {"0": "bad", "1": "good"}}
PROMPTED = {"template": "{text} it was", **WORDS}
MASKED = {"template": "{text} it was [MASK] .", **WORDS}
LORA, PREFIX = {"use_peft": True}, {"use_peft": True, "peft_type": "prefix_tuning"}


def train(model, folder, **options):
    settings = {"learning_rate": 1e-4, "num_steps": 2, "batch_size": 4, "disable_tqdm": True, **options}
    mezo_finetune(model, SENTIMENT_ROWS[:16], output_dir=folder, **settings)
    return (folder / "README.md").read_text()


def facts(card):
    return dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", card, re.MULTILINE))


@pytest.mark.parametrize(
    ("model", "options", "tag"),
    [
        ("llama", {**PROMPTED, **LORA}, "text-generation"),
        ("llama", {**PROMPTED, **PREFIX}, "text-generation"),
        ("llama", PROMPTED, "text-generation"),
        ("bert", {**MASKED, **LORA}, "fill-mask"),
        ("bert", MASKED, "fill-mask"),
        ("bert", LORA, "text-classification"),
        ("bert", {}, "text-classification"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*newly initialized")
@torch.no_grad()
def test_the_program_of_a_card_loads_the_run(model_folder, tmp_path, model, options, tag):
    card = train(model_folder(model), tmp_path / "run", **options)
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == tag
    names = {}
    with torch.random.fork_rng():  # a base's head is drawn anew before the adapter brings its own
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    inputs = AutoTokenizer.from_pretrained(tmp_path / "run")("the film was good", return_tensors="pt")
    assert names["model"](**inputs).logits.isfinite().all()
    trained = load_file(next((tmp_path / "run").glob("*model.safetensors")))
    if "use_peft" not in options:
        assert all(torch.equal(names["model"].state_dict()[name], tensor) for name, tensor in trained.items())


def test_a_card_names_the_method(model_folder, tmp_path):
    options = {"estimator": "fzoo", "num_queries": 3, "direction": "low_rank", "optim": "momentum"}
    found = facts(train(model_folder("llama"), tmp_path / "a", **PROMPTED, **options))
    assert (found["estimator"], found["directions"]) == ("fzoo, 3 directions a step", "low rank")
    assert (found["update"], found["trained"], found["steps"]) == ("momentum", "all parameters", "2 of 2")
    options = {"clip_quantile": 0.9, "lr_scheduler_type": "cosine", "trainable_layers": "last:1"}
    found = facts(train(model_folder("llama"), tmp_path / "b", **PROMPTED, **options))
    assert (found["update"], found["trained"]) == ("sgd, clipped at quantile 0.9", "layers last:1")
    assert found["learning rate"] == "0.0001, cosine"
    found = facts(train(model_folder("llama"), tmp_path / "c", **PROMPTED, **LORA, lora_variant="alora"))
    assert found["trained"] == "alora, r = 8, alpha = 16"


def test_a_card_shows_no_token_of_an_address():
    config = MeZOConfig(model_name_or_path="m", dataset_name="https://host/data.jsonl?token=secret")
    header = {
        "config": {"dataset_name": "https://host/data.jsonl"}, "kind": "causal_lm", "labels": [], "objective": "o",
        "versions": {}, "rng": "r",
    }  # fmt: skip
    card = model_card(config, header, TrainerState(), None)
    assert "secret" not in card
    assert facts(card)["data"] == "https://host/data.jsonl"


def test_an_adapter_has_the_names_that_vllm_and_sglang_read(model_folder, tmp_path):
    """Both split at `base_model.model.` and `.lora_A.weight`, and refuse modules that are saved whole."""
    train(model_folder("llama"), tmp_path / "run", **PROMPTED, **LORA)
    keys = load_file(tmp_path / "run" / "adapter_model.safetensors")
    name = re.compile(r"base_model\.model\.model\.layers\.\d+\.self_attn\.[qv]_proj\.lora_[AB]\.weight")
    assert keys and all(name.fullmatch(key) for key in keys)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 8, 16, "none")
    assert config["modules_to_save"] is None and not config["use_dora"]
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    shapes = {key.rsplit(".", 2)[1]: tensor.shape for key, tensor in keys.items()}
    assert shapes["lora_A"][0] == shapes["lora_B"][1] == 8
