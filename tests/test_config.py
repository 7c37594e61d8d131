"""Defaults, presets and warnings of the configuration."""

import contextlib
import dataclasses
import inspect
import re

import pytest

import mezo
from mezo import PRESETS, MeZOConfig, UserError, mezo_finetune, preset
from mezo.api import build_trainer
from mezo.config import looks_like_rate_of_all_parameters, looks_like_wrong_rate
from mezo.names import ELSEWHERE
from tests.conftest import SENTIMENT_ROWS
from tests.test_cli import error_line, run_cli


def test_signature_and_defaults_are_the_promised_ones():
    parameters = inspect.signature(mezo_finetune).parameters
    wanted = {"learning_rate": 1e-6, "batch_size": 64, "num_steps": 10_000, "epsilon": 1e-3,
              "normalize_perturbations": False, "lora_rank": None, "weight_decay": 0.0, "engine": "torch"}  # fmt: skip
    assert {name: parameters[name].default for name in wanted} == wanted
    assert list(parameters)[:2] == ["model_path", "train_dataset"]
    config = MeZOConfig(model_name_or_path="m")
    assert (config.learning_rate, config.batch_size, config.max_steps, config.epsilon) == (1e-6, 64, 10_000, 1e-3)
    assert (config.lora_r, config.lora_alpha, config.num_virtual_tokens) == (8, 16.0, 5)


# MeZO's tables 15 and 16: learning rates, epsilon, batch size, steps, weight decay.
PAPER = {
    "roberta-full": ({1e-7, 1e-6, 1e-5}, 1e-3, 64, 100_000, 0.0),
    "roberta-lora": ({1e-5, 5e-5, 1e-4}, 1e-3, 64, 100_000, 0.1),
    "roberta-prefix": ({1e-2, 5e-3, 1e-3}, 1e-1, 64, 100_000, 0.0),
    "opt-full": ({1e-6, 1e-7}, 1e-3, 16, 20_000, 0.0),
    "opt-lora": ({1e-4, 5e-5}, 1e-2, 16, 20_000, 0.0),
    "opt-prefix": ({1e-2, 1e-3}, 1e-1, 16, 20_000, 0.0),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers(name):
    rates, epsilon, batch_size, steps, decay = PAPER[name]
    entry = preset(name)
    config = entry.config(model_name_or_path="m")
    assert set(entry.learning_rates) == rates
    assert config.learning_rate in rates
    assert (config.epsilon, config.batch_size, config.max_steps, config.weight_decay) == (
        epsilon,
        batch_size,
        steps,
        decay,
    )
    assert config.use_peft == (not name.endswith("full"))
    assert entry.config(model_name_or_path="m", learning_rate=3e-4).learning_rate == 3e-4


def test_presets_cover_the_table_and_unknown_ones_are_named():
    assert PRESETS.keys() == PAPER.keys()
    with pytest.raises(UserError, match="roberta-full"):
        preset("roberta")


def test_config_survives_json_and_is_frozen():
    config = MeZOConfig(model_name_or_path="m", label_words={"0": "bad"}, lora_target_modules=["q"])
    assert MeZOConfig.from_dict(config.to_dict()) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"learning_rate": 1e-6}, False),
        ({"learning_rate": 1e-6, "normalize_perturbations": True}, True),
        ({"learning_rate": 1e-3, "normalize_perturbations": True}, False),
        ({"learning_rate": 1e-3}, True),
        ({"learning_rate": 3e-3, "estimator": "fzoo", "num_queries": 8}, False),  # the length of a step
        ({"learning_rate": 1e-2, "use_peft": True}, False),
        ({"learning_rate": 1.0, "use_peft": True}, True),
        ({"use_peft": True}, True),  # the default is a rate of all parameters
        ({"use_peft": True, "learning_rate": 1e-5}, False),
        ({"use_peft": True, "estimator": "fzoo", "num_queries": 8}, False),
    ],
)
def test_rates_that_belong_to_something_else_are_warned_about(options, warned, model_folder, tmp_path):
    config = MeZOConfig(model_name_or_path=model_folder("bert"), output_dir=str(tmp_path), max_steps=1, **options)
    found = [looks_like_wrong_rate(config), looks_like_rate_of_all_parameters(config)]
    assert sum(warning is not None for warning in found) == warned
    if warned:
        with pytest.warns(UserWarning, match="learning_rate"):
            build_trainer(config, SENTIMENT_ROWS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft_type": "prefix_tuning", "lora_r": 4}, "peft_type, lora_r do nothing without use_peft"),
        ({"lora_target_modules": ["query"]}, "lora_target_modules does nothing without use_peft"),
        ({"eval_steps": 2, "load_best_model_at_end": True}, "eval_steps, load_best_model_at_end do nothing"),
        ({"max_eval_samples": 5}, "max_eval_samples does nothing without rows to evaluate on"),
        ({"eval_steps": 2, "validation_size": 20}, None),
        ({"use_peft": True, "learning_rate": 1e-4, "lora_r": 4}, None),
    ],
)
def test_options_without_effect_are_warned_about(options, said, model_folder, tmp_path):
    config = MeZOConfig(model_name_or_path=model_folder("bert"), output_dir=str(tmp_path), max_steps=1, **options)
    with pytest.warns(UserWarning, match=said) if said else contextlib.nullcontext():
        build_trainer(config, SENTIMENT_ROWS)


def test_every_public_name_can_be_imported():
    for name in mezo.__all__:
        assert getattr(mezo, name) is not None
    with pytest.raises(AttributeError, match="mezo_finetun"):
        mezo.mezo_finetun  # noqa: B018


@pytest.mark.parametrize("use_peft", [False, True])
def test_head_learning_rate_widens_z_of_the_fresh_head_only(use_peft, model_folder, tmp_path):
    options = {"learning_rate": 1e-4, "head_learning_rate": 1e-2, "use_peft": use_peft}
    config = MeZOConfig(model_name_or_path=model_folder("bert"), output_dir=str(tmp_path), **options)
    space = build_trainer(config, SENTIMENT_ROWS).engine.space
    widened = {name.removeprefix("base_model.model.") for name in space.widths}
    assert widened == {"classifier.weight", "classifier.bias"}
    assert set(space.widths.values()) == {10.0}
    words = {"template": "{text} it was [MASK] .", "label_words": {"0": "bad", "1": "good"}}
    with pytest.raises(UserError, match="head_learning_rate"):
        build_trainer(MeZOConfig.from_dict({**config.to_dict(), **words}), SENTIMENT_ROWS)


# What a user of TRL's SFTTrainer writes: of its ModelConfig, ScriptArguments, SFTConfig and TrainingArguments.
TRLS = """
model_name_or_path model_revision dtype torch_dtype attn_implementation trust_remote_code use_peft lora_r lora_alpha
lora_dropout lora_target_modules load_in_4bit load_in_8bit dataset_name dataset_config dataset_train_split
dataset_test_split max_length packing completion_only_loss assistant_only_loss dataset_text_field output_dir
per_device_train_batch_size per_device_eval_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
warmup_steps warmup_ratio weight_decay gradient_accumulation_steps gradient_checkpointing max_grad_norm logging_steps
logging_first_step logging_strategy eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit
load_best_model_at_end metric_for_best_model greater_is_better seed data_seed bf16 fp16 optim adam_beta1 adam_beta2
adam_epsilon report_to run_name push_to_hub hub_model_id hub_strategy hub_private_repo hub_token resume_from_checkpoint
disable_tqdm use_cpu use_vllm vllm_mode vllm_server_base_url
""".split()


def test_a_user_of_trl_finds_his_names_or_is_told_what_they_are_here(capsys):
    fields = {field.name for field in dataclasses.fields(MeZOConfig)}
    assert len(fields & set(TRLS)) > 40
    assert set(TRLS) <= fields | set(ELSEWHERE)
    assert not fields & set(ELSEWHERE)
    with pytest.raises(UserError, match="unknown option 'bf16': here it is dtype bfloat16"):
        MeZOConfig.from_dict({"model_name_or_path": "m", "bf16": True})
    finished = run_cli(capsys, "train", "--model_name_or_path", "m", "--num_train_epochs", 3)
    assert error_line(finished) == "unknown option num_train_epochs: runs are counted in steps: max_steps"


def test_what_other_names_lead_to_exists():
    fields = {field.name for field in dataclasses.fields(MeZOConfig)}
    for key, text in ELSEWHERE.items():
        named = set(re.findall(r"[a-z]+_[a-z_]*[a-z]", text)) - {"projected_grad", "prefix_tuning"}
        assert named <= fields, key
