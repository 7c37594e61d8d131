"""A grid of learning rates and epsilons, by successive halving (arXiv 1502.07943): `mezo tune`.

All candidates train for a part of the steps; the better ones, by evaluation, go on from their own journals, until the
last round has trained the whole number of steps. One round is the plain grid of the paper.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mezo import checkpoint, journal
from mezo.api import build_trainer, reports_on_test_split
from mezo.cli.options import TuneOptions
from mezo.config import MeZOConfig
from mezo.errors import NonFiniteLossError, UserError

_RESULTS = "tune.json"


@dataclass(frozen=True)
class Trial:
    """A candidate and how many steps it was given; `metric` is None where a loss became NaN or infinite.

    `loss` is that of the evaluation, which decides between equals: few rows give few accuracies.
    """

    learning_rate: float
    epsilon: float
    output_dir: str
    steps: int
    metric: float | None
    loss: float | None = None


def tune(config: MeZOConfig, options: TuneOptions, report: Callable[[Trial], None] = lambda _: None) -> list[Trial]:
    """Trains the candidates in folders under `output_dir`, and leaves `tune.json` there.

    Args:
        config: the run; `metric_for_best_model` decides.
        options: the candidates.
        report: told of each trial as it ends.

    Returns:
        All candidates, best first: those that came further before the others.

    Raises:
        UserError: nothing to evaluate on, or options that cannot work.
    """
    if options.rounds < 1 or options.reduction < 2:
        raise UserError("tune needs at least 1 round and a reduction of at least 2")
    if options.rounds > 1 and config.lr_scheduler_type != "constant":
        raise UserError(f"lr_scheduler_type {config.lr_scheduler_type} ends with each round; use rounds 1 or constant")
    if config.task is not None and reports_on_test_split(config):
        raise UserError(
            f"tune would choose by the rows that task {config.task} reports on; give num_shots or validation_size, or "
            "name dataset_test_split"
        )
    rates = options.learning_rates or tuple(float(f"{config.learning_rate * 10**e:.1e}") for e in (-1, -0.5, 0, 0.5))
    candidates = list(itertools.product(rates, options.epsilons or (config.epsilon,)))
    known = _read(Path(config.output_dir))
    ended: dict[tuple[float, float], Trial] = {}
    for number in range(options.rounds):
        steps = math.ceil(config.max_steps / options.reduction ** (options.rounds - 1 - number))
        found = []
        for rate, epsilon in candidates:
            trial = known.get((rate, epsilon, steps)) or _trial(config, rate, epsilon, steps)
            report(trial)
            found.append(trial)
            known[rate, epsilon, steps] = ended[rate, epsilon] = trial
            _write(Path(config.output_dir), _ranked(config, known.values()))
        kept = [t for t in _ranked(config, found) if t.metric is not None]
        if not kept:
            break
        candidates = [(t.learning_rate, t.epsilon) for t in kept[: math.ceil(len(kept) / options.reduction)]]
    return _ranked(config, ended.values())


def _trial(config: MeZOConfig, rate: float, epsilon: float, steps: int) -> Trial:
    """One candidate, trained to `steps` from wherever its journal ends."""
    folder = Path(config.output_dir) / f"lr-{rate!r}-epsilon-{epsilon!r}"
    run = dataclasses.replace(
        config,
        learning_rate=rate,
        epsilon=epsilon,
        max_steps=steps,
        output_dir=str(folder),
        resume_from_checkpoint=(folder / checkpoint.JOURNAL_NAME).exists(),
    )
    trainer = build_trainer(run)
    try:
        if run.resume_from_checkpoint and len(journal.read(folder / checkpoint.JOURNAL_NAME).steps) > steps:
            raise UserError(f"{folder} has been trained beyond {steps} steps; choose another output_dir")
        if trainer.eval_examples is None:
            raise UserError(
                "tune chooses by evaluation: give num_shots, validation_size, eval_dataset_name or dataset_test_split"
            )
        metrics = trainer.train().metrics
        assert metrics is not None
        found = [metrics.measured.get(name) for name in (config.metric_for_best_model, "loss")]
    except NonFiniteLossError:
        found = [None, None]
    finally:
        trainer.engine.close()
    return Trial(rate, epsilon, str(folder), steps, *(v if v is not None and math.isfinite(v) else None for v in found))


def _ranked(config: MeZOConfig, trials: Iterable[Trial]) -> list[Trial]:
    """Those that came further first, then the better ones; diverged ones last."""
    sign = 1.0 if config.metric_for_best_model == "loss" else -1.0

    def key(trial: Trial) -> tuple[bool, int, float, float]:
        return (
            trial.metric is None,
            -trial.steps,
            sign * (trial.metric or 0.0),
            math.inf if trial.loss is None else trial.loss,
        )

    return sorted(trials, key=key)


def _read(folder: Path) -> dict[tuple[float, float, int], Trial]:
    """What an interrupted search has measured, by learning rate, epsilon and steps."""
    path = folder / _RESULTS
    if not path.exists():
        return {}
    try:
        trials = [Trial(**entry) for entry in json.loads(path.read_text())]
        return {(t.learning_rate, t.epsilon, t.steps): t for t in trials}
    except (ValueError, TypeError):
        raise UserError(f"{path} is damaged; choose another output_dir") from None


def _write(folder: Path, trials: Sequence[Trial]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([dataclasses.asdict(t) for t in trials], indent=2)
    checkpoint.write_text(folder / _RESULTS, text + "\n")
