"""What a journal's header says about its run, and whether a run may go on from it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import xxhash

from mezo.auto import OPTIONS
from mezo.config import GENERATING, MeZOConfig
from mezo.errors import JournalError
from mezo.journal import FORMAT_VERSION, JsonObject
from mezo.objective import Example
from mezo.philox import RNG_VERSION


def make_header(
    config: MeZOConfig,
    *,
    objective: str,
    kind: str,
    labels: Sequence[str],
    model_digest: str,
    initial_digest: str,
    train_examples: Sequence[Example],
) -> JsonObject:
    """Everything that the weights depend on besides the records: versions, config, hashes of model and data.

    Args:
        config: the run.
        objective: its name.
        kind: the model's head, see `mezo.encoding.ModelKind`.
        labels: names of the options, for a classification head its classes.
        model_digest: hash of the base model before training.
        initial_digest: hash of the trained parameters before training.
        train_examples: encoded training rows.
    """
    packages = ["mezo", "torch", "transformers", "peft", "datasets"]
    packages += ["bitsandbytes"] if config.bits is not None else []
    return {
        "format": FORMAT_VERSION,
        "rng": RNG_VERSION,
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "config": _without_secrets(config),
        "objective": objective,
        "kind": kind,
        "labels": list(labels),
        "model_digest": model_digest,
        "initial_digest": initial_digest,
        "data_digest": _data_digest(train_examples),
    }


def _without_secrets(config: MeZOConfig) -> JsonObject:
    values = config.to_dict()
    values |= {
        name: _cleaned(values[name]) for name in ("sglang_engine_args", "sglang_server_base_url", "dataset_name")
    }
    return {**values, "sglang_api_key": None, "sglang_admin_api_key": None}


def _cleaned(value: object) -> object:
    """Without what looks like a secret: values by their names, and user, password and query of addresses."""
    if isinstance(value, dict):
        return {k: _cleaned(v) for k, v in value.items() if not _SECRET.search(str(k))}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    if isinstance(value, str) and "://" in value:
        parts = urlsplit(value)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return value


# Not max_total_tokens or tokenizer_path: a name ends with the word, or has it before a number.
_SECRET = re.compile(r"(?i)((key|password|secret|credential)s?|token|authorization)(_?\d+)?$")


def check_header(recorded: JsonObject, present: JsonObject, path: Path) -> None:
    """A journal continues only on the model, data order and settings that it was started with."""
    before, now = recorded["config"], present["config"]
    assert isinstance(before, dict) and isinstance(now, dict)
    for key in ("rng", "model_digest", "initial_digest", "data_digest"):
        if recorded[key] != present[key]:
            option = {"model_digest": "model_name_or_path", "data_digest": "dataset_name"}.get(key, "")
            names = f" ({option} {before.get(option)!r} then, {now.get(option)!r} now)" if option else ""
            raise JournalError(f"{path}: the journal's {key} is {recorded[key]}, this run's is {present[key]}{names}")
    chosen = OPTIONS if before.get("method") == now.get("method") == "auto" else ()  # maybe by another version's table
    defaults = {f.name: f.default for f in dataclasses.fields(MeZOConfig) if f.default is not dataclasses.MISSING}
    for key, value in {**defaults, **before}.items():  # options that are younger than the journal
        may_change = key in _MAY_CHANGE or (key == "max_new_tokens" and now["objective"] not in GENERATING)
        if not may_change and now.get(key) != value:
            mend = f"; name {key} to go on" if key in chosen else ""
            raise JournalError(f"{path}: the run was started with {key} {value!r}, now it is {now.get(key)!r}{mend}")


# What a resumed run may set anew: nothing that decides losses, directions or updates of the remaining steps.
_MAY_CHANGE = frozenset(
    f.name
    for f in dataclasses.fields(MeZOConfig)
    if f.name
    in [
        "model_name_or_path",
        "model_revision",
        "trust_remote_code",
        "attn_implementation",
        "engine",
        "use_cpu",
        "sglang_mode",
        "sglang_server_base_url",
        "sglang_api_key",
        "sglang_admin_api_key",
        "sglang_tp_size",
        "sglang_updates",
        "sglang_engine_args",
        "enable_kv_cache_optimization",
        "kv_cache_gb",
        "kv_cache_device",
        "method",
        "task",
        "num_demonstrations",
        "dataset_name",
        "dataset_config",
        "eval_dataset_name",
        "dataset_test_split",
        "max_eval_samples",
        "output_dir",
        "max_steps",
        "per_device_eval_batch_size",
        "max_memory_gb",
        "logging_steps",
        "logging_first_step",
        "eval_steps",
        "eval_on_start",
        "save_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "metric_for_best_model",
        "push_to_hub",
        "hub_model_id",
        "hub_private_repo",
        "resume_from_checkpoint",
        "report_to",
        "run_name",
        "disable_tqdm",
    ]
)


def _data_digest(examples: Sequence[Example]) -> str:
    asked = [e.question for e in examples if e.question is not None]  # what is trained on
    return xxhash.xxh3_128((repr(list(examples)) + (repr(asked) if asked else "")).encode()).hexdigest()
