"""lm-evaluation-harness on a base model and on the same model with a trained adapter, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mezo.api import load_adapter
from mezo.config import MeZOConfig
from mezo.engines.torch.loading import is_encoder, load_model, load_model_config, load_tokenizer, with_safetensors
from mezo.errors import UserError


@dataclass(frozen=True)
class Figure:
    """One metric of one task; `trained` is None where there is no adapter."""

    task: str
    metric: str
    base: float
    base_stderr: float | None
    trained: float | None
    trained_stderr: float | None


def evaluate_with_harness(
    config: MeZOConfig,
    tasks: Sequence[str],
    *,
    adapter: str | Path | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
) -> list[Figure]:
    """Runs tasks of lm-evaluation-harness, `lm_eval.simple_evaluate`, on decoders.

    Args:
        config: model, type, batch size of the evaluation, `max_eval_samples`.
        tasks: names that the harness knows, or of YAML files in `include_path`.
        adapter: folder of a PEFT adapter for the model.
        include_path: folder with tasks of one's own.
        num_fewshot: in-context examples; the task's number if not given.

    Raises:
        UserError: lm-eval is not installed, the model is an encoder, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError:
        raise UserError("lm_eval needs lm-evaluation-harness: pip install 'mezo[lm-eval]'") from None
    config = with_safetensors(config)
    if is_encoder(load_model_config(config)):
        raise UserError("lm-evaluation-harness evaluates decoders; this model is an encoder")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"lm_eval_include_path: there is no folder {include_path!r}")
    manager = TaskManager(include_path=include_path)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise UserError(
            f"lm_eval: the harness knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them, "
            "--lm_eval_include_path names a folder of one's own"
        )
    tokenizer = load_tokenizer(config)
    model: Any = load_model(config, "causal_lm").model
    base = _results(config, model, tokenizer, tasks, manager, num_fewshot)
    trained: Mapping[str, Mapping[str, Any]] = {}
    if adapter is not None:
        trained = _results(config, load_adapter(model, adapter), tokenizer, tasks, manager, num_fewshot)
    return [
        Figure(task, metric, *_figures(base[task], metric), *_figures(trained.get(task, {}), metric))
        for task in base
        for metric in base[task]
        if "_stderr" not in metric and isinstance(base[task][metric], float)
    ]


def _results(
    config: MeZOConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: Any,
    num_fewshot: int | None,
) -> Mapping[str, Mapping[str, Any]]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness_model = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=config.per_device_eval_batch_size,
        max_length=config.max_length,
    )
    found = simple_evaluate(
        model=harness_model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=config.max_eval_samples,
        log_samples=False,
        bootstrap_iters=100,
    )
    assert found is not None
    results: Mapping[str, Mapping[str, Any]] = found["results"]
    return results


def _figures(result: Mapping[str, Any], metric: str) -> tuple[Any, Any]:
    """A metric and its standard error, which the harness calls `acc,none` and `acc_stderr,none`."""
    name, comma, rest = metric.partition(",")
    error = result.get(f"{name}_stderr{comma}{rest}")
    return result.get(metric), error if isinstance(error, float) else None
