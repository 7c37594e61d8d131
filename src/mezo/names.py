"""Names of options: the nearest valid one, and what stands here for those of transformers, TRL and MeZO's own code."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_LOG_IN = "log in by hf auth login or set HF_TOKEN"
ELSEWHERE = {
    "assistant_only_loss": "of messages the loss is on the last assistant message",
    "batch_size": "here it is per_device_train_batch_size",
    "bf16": "here it is dtype bfloat16",
    "completion_only_loss": "with prompt and completion the loss is on the completion, with text on everything",
    "dataset": "here it is dataset_name",
    "dataset_text_field": "the column is text; a template names others",
    "eval_strategy": "eval_steps says how often, eval_on_start whether before the first step",
    "evaluation_strategy": "eval_steps says how often, eval_on_start whether before the first step",
    "fp16": "here it is dtype float16",
    "gradient_checkpointing": "there is no backward pass, so no activation is kept",
    "greater_is_better": "metric_for_best_model knows it",
    "hub_strategy": "push_to_hub uploads the finished run",
    "hub_token": _LOG_IN,
    "logging_strategy": "logging_steps says how often",
    "lora_dropout": "there is none: both signs of a probe have to see the same model",
    "lora_rank": "here it is use_peft with lora_r",
    "lr": "here it is learning_rate",
    "max_grad_norm": "clip_quantile limits projected_grad",
    "max_seq_length": "here it is max_length",
    "model": "here it is model_name_or_path",
    "model_name": "here it is model_name_or_path",
    "num_train": "here it is max_train_samples, or num_shots for each label",
    "num_train_epochs": "runs are counted in steps: max_steps",
    "packing": "rows are not packed; prefixes that they share are computed once",
    "perturbation_mode": "here it is estimator: spsa for two sides, fzoo for one",
    "prefix_tuning": "here it is use_peft with peft_type prefix_tuning",
    "save_strategy": "save_steps says how often",
    "task_name": "here it is task",
    "torch_dtype": "here it is dtype",
    "train_file": "here it is dataset_name, which takes files too",
    "use_lora": "here it is use_peft",
    "use_vllm": "here it is engine sglang",
    "vllm_mode": "here it is sglang_mode, with engine sglang",
    "vllm_server_base_url": "here it is sglang_server_base_url, with engine sglang",
    "warmup_ratio": "warmup_steps is a number of steps",
    "zo_eps": "here it is epsilon",
}


def unknown_key_message(key: str, valid: Sequence[str]) -> str:
    """One line about an unknown option, with what it is called here or the nearest valid name."""
    if key in ELSEWHERE:
        return f"unknown option {key!r}: {ELSEWHERE[key]}"
    nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)
    return f"unknown option {key!r}; the nearest valid one is {nearest[0]!r}"
