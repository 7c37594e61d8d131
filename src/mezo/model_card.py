"""README.md of a checkpoint: the facts of the run, how to load it, and the metadata the Hub reads."""

from __future__ import annotations

from pathlib import Path

import yaml
from transformers import TrainerState

from mezo.config import MeZOConfig
from mezo.evaluation import Metrics
from mezo.fingerprint import is_hub_name
from mezo.journal import JsonObject

_KINDS = {
    "causal_lm": ("AutoModelForCausalLM", "text-generation"),
    "masked_lm": ("AutoModelForMaskedLM", "fill-mask"),
    "sequence_classification": ("AutoModelForSequenceClassification", "text-classification"),
}


def model_card(config: MeZOConfig, header: JsonObject, state: TrainerState, metrics: Metrics | None) -> str:
    """Markdown with a YAML front matter."""
    facts = {**_facts(config, header, state), **_evaluation(metrics)}
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"---\n{yaml.safe_dump(_front(config, header), sort_keys=False)}---\n\n"
        "Fine-tuned with forward passes only (MeZO, arXiv 2305.17333) by "
        "mezo. The file `journal` beside the final weights holds every step; "
        "`mezo replay` rebuilds the weights from it and the base model.\n\n"
        f"```python\n{_loading(config, header)}\n```\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )


def _front(config: MeZOConfig, header: JsonObject) -> dict[str, object]:
    front: dict[str, object] = {
        **({"base_model": config.model_name_or_path} if _on_hub(config.model_name_or_path) else {}),
        "library_name": "peft" if config.use_peft else "transformers",
        "pipeline_tag": _KINDS[str(header["kind"])][1],
        "tags": ["mezo", "zeroth-order", *(["lora"] if config.use_peft and config.peft_type == "lora" else [])],
    }
    if config.dataset_name is not None and _on_hub(config.dataset_name):
        front["datasets"] = [config.dataset_name]
    return front


def _facts(config: MeZOConfig, header: JsonObject, state: TrainerState) -> dict[str, object]:
    recorded: dict[str, object] = header["config"]  # type: ignore[assignment]  # JSON; without secrets
    versions: dict[str, str] = header["versions"]  # type: ignore[assignment]
    queries = f", {config.num_queries} directions a step" if config.num_queries > 1 else ""
    return {
        "base model": config.model_name_or_path,
        **({"task": config.task} if config.task is not None else {}),
        "data": recorded["dataset_name"] or "given in memory",
        "objective": header["objective"],
        "trained": _trained(config),
        "steps": f"{state.global_step} of {config.max_steps}",
        "batch size": config.batch_size,
        "learning rate": f"{config.learning_rate:g}, {config.lr_scheduler_type}",
        "epsilon": f"{config.epsilon:g}",
        "estimator": config.estimator + queries,
        "directions": config.direction.replace("_", " "),
        "update": config.optim + (f", clipped at quantile {config.clip_quantile}" if config.clip_quantile else ""),
        "weight decay": f"{config.weight_decay:g}",
        "normalize_perturbations": config.normalize_perturbations,
        "engine": f"{config.engine}, dtype {config.dtype}" + (f", base in {config.bits} bits" if config.bits else ""),
        "seed": config.seed,
        "random numbers": header["rng"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _trained(config: MeZOConfig) -> str:
    if not config.use_peft:
        return "all parameters" if config.trainable_layers is None else f"layers {config.trainable_layers}"
    if config.peft_type == "prefix_tuning":
        return f"prefix tuning, {config.num_virtual_tokens} tokens"
    return f"{config.lora_variant}, r = {config.lora_r}, alpha = {config.lora_alpha:g}"


def _evaluation(metrics: Metrics | None) -> dict[str, str]:
    if metrics is None:
        return {}
    shown = [f"{name} {value:.4f}" for name, value in metrics.measured.items() if name != "num_examples"]
    return {"evaluation": f"{', '.join(shown)}, {metrics.num_examples} examples"}


def _loading(config: MeZOConfig, header: JsonObject) -> str:
    """A program that loads the folder of the card."""
    auto_class, labels = _KINDS[str(header["kind"])][0], header["labels"]
    folder = repr(config.hub_model_id or config.output_dir)
    if not config.use_peft:
        return f"from transformers import {auto_class}\n\nmodel = {auto_class}.from_pretrained({folder})"
    classes = f", num_labels={len(labels)}" if auto_class.endswith("SequenceClassification") else ""  # type: ignore[arg-type]
    return (
        f"from peft import PeftModel\nfrom transformers import {auto_class}\n\n"
        f"base = {auto_class}.from_pretrained({config.model_name_or_path!r}{classes})\n"
        f"model = PeftModel.from_pretrained(base, {folder})"
    )


def _on_hub(name: str) -> bool:
    """Whether this is a name on the Hub and no path; the Hub refuses a card with paths in its metadata."""
    return is_hub_name(name) and not Path(name).exists()
