"""README.md of a checkpoint: the facts of the run, with the metadata the Hub reads."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from transformers import TrainerState

from mezo.config import MeZOConfig
from mezo.evaluation import Metrics
from mezo.journal import JsonObject


def model_card(config: MeZOConfig, header: JsonObject, state: TrainerState, metrics: Metrics | None) -> str:
    """Markdown with a YAML front matter."""
    front = {
        **({"base_model": config.model_name_or_path} if _on_hub(config.model_name_or_path) else {}),
        "library_name": "peft" if config.use_peft else "transformers",
        "tags": ["mezo", "zeroth-order", *(["lora"] if config.use_peft and config.peft_type == "lora" else [])],
    }
    if config.dataset_name is not None and _on_hub(config.dataset_name):
        front["datasets"] = [config.dataset_name]
    method = "all parameters" if not config.use_peft else config.peft_type.replace("_", " ")
    facts = {
        "base model": config.model_name_or_path,
        **({"task": config.task} if config.task is not None else {}),
        "data": config.dataset_name or "given in memory",
        "objective": header["objective"],
        "trained": method + (f", r = {config.lora_r}, alpha = {config.lora_alpha:g}" if method == "lora" else ""),
        "steps": f"{state.global_step} of {config.max_steps}",
        "batch size": config.batch_size,
        "learning rate": f"{config.learning_rate:g}",
        "epsilon": f"{config.epsilon:g}",
        "weight decay": f"{config.weight_decay:g}",
        "normalize_perturbations": config.normalize_perturbations,
        "seed": config.seed,
        "random numbers": header["rng"],
        "versions": ", ".join(f"{k} {v}" for k, v in header["versions"].items()),  # type: ignore[attr-defined]
    }
    if metrics is not None:
        shown = [f"{name} {value:.4f}" for name, value in metrics.measured.items() if name != "num_examples"]
        facts["evaluation"] = f"{', '.join(shown)}, {metrics.num_examples} examples"
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        "Fine-tuned with forward passes only (MeZO, arXiv 2305.17333) by "
        "mezo. The file `journal` beside the final weights holds every step; "
        "`mezo replay` rebuilds the weights from it and the base model.\n\n"
        f"| | |\n|---|---|\n{rows}\n"
    )


def _on_hub(name: str) -> bool:
    """Whether this is a name on the Hub and no path; the Hub refuses a card with paths in its metadata."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and not Path(name).exists()
