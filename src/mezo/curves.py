"""What a run's journal and log entries say over its steps, as arrays to plot.

Losses and projected_grads are read from the journal, step by step; evaluations and speed from the log entries in
trainer_state.json, as far as there is one. Single steps of MeZO are noisy, so that curves are means or medians over
windows of many steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from mezo import checkpoint, journal
from mezo.api import journal_config
from mezo.config import MeZOConfig
from mezo.errors import UserError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CURVE_POINTS, _MEDIAN_POINTS, _MAX_BINS = 1000, 200, 61


class Curve(NamedTuple):
    """Values at steps; step n is the state after n steps."""

    steps: Ints
    values: Floats


@dataclass(frozen=True)
class Run:
    """What is plotted of one run.

    Args:
        name: of its folder.
        config: its settings, from the journal's header.
        losses: mean of loss_plus and loss_minus of each step.
        projected_grads: of each record: the coefficient of its direction times the number of directions in the step.
        first_records: index of each step's first record, and the number of records at the end.
        logged: other figures of the log entries: tokens_per_second and all that begin with eval_.
    """

    name: str
    config: MeZOConfig
    losses: Floats
    projected_grads: Floats
    first_records: Ints
    logged: dict[str, Curve]

    @property
    def num_steps(self) -> int:
        """Steps in the journal."""
        return len(self.losses)

    @property
    def window(self) -> int:
        """Steps that a point of a curve is the mean or median of."""
        return smoothing_window(self.num_steps)


# --- reading ----------------------------------------------------------------------------------------------------------


def load_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Reads runs from their folders or journals; names are made unique by the folders above.

    Raises:
        UserError: no journal, a journal without steps, a state file that cannot be read, a run given twice.
    """
    folders = [path.resolve() if path.is_dir() else path.resolve().parent for path in map(Path, paths)]
    if not folders:
        raise UserError("mezo plot needs the folder of a run: mezo plot RUN [RUN …]")
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise UserError(f"{paths[i]}: this run is given twice")
    journals = [Path(path) / checkpoint.JOURNAL_NAME if Path(path).is_dir() else Path(path) for path in paths]
    named = zip(unique_names(folders), journals, strict=True)
    return [_load_run(name, path) for name, path in named]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many of the last parts as tell them all apart."""
    names, depth = [folder.name for folder in folders], 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
    return names


def _load_run(name: str, path: Path) -> Run:
    contents = journal.read(path)
    if not contents.steps:
        raise UserError(f"{path}: the journal holds no step yet")
    records = [r for step in contents.steps for r in step]
    counts = np.array([len(step) for step in contents.steps])
    first_records = np.concatenate(([0], np.cumsum(counts)))
    means = np.array([(r.loss_plus + r.loss_minus) / 2 for r in records])
    return Run(
        name=name,
        config=journal_config(contents),
        losses=np.add.reduceat(means, first_records[:-1]) / counts,
        projected_grads=np.array([r.coefficient * r.num_queries for r in records]),
        first_records=first_records,
        logged=_read_log(path.parent),
    )


def _read_log(folder: Path) -> dict[str, Curve]:
    """Curves of the state file, of the newest checkpoint's if the run has none of its own yet; else none."""
    places = [folder, *reversed(checkpoint.checkpoints(folder).values())]
    path = next((place / checkpoint.STATE_NAME for place in places if (place / checkpoint.STATE_NAME).exists()), None)
    if path is None:
        return {}
    points: dict[str, list[tuple[int, float]]] = {}
    try:
        for entry in json.loads(path.read_text())["log_history"]:
            for key, value in entry.items():
                if key == "tokens_per_second" or key.startswith("eval_"):
                    points.setdefault(key, []).append((int(entry["step"]), float(value)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path}: not the state of a run ({error!r}); without the file, the journal alone is plotted"
        ) from None
    return {
        key: Curve(np.array([s for s, _ in found]), np.array([v for _, v in found])) for key, found in points.items()
    }


# --- numbers ----------------------------------------------------------------------------------------------------------


def smoothing_window(num_steps: int) -> int:
    """A twentieth of the run, but 2,000 steps at most."""
    return min(max(num_steps // 20, 1), 2000)


def smoothed_loss(run: Run) -> Curve:
    """Mean loss over the window that ends with each step."""
    return moving_mean(run.losses, run.window)


def exploded(curve: Curve) -> bool:
    """Whether a loss rose to more than thirty times where it began."""
    values = curve.values[np.isfinite(curve.values)]
    return len(values) > 0 and bool(values.min() > 0 and values.max() > 30 * max(values[0], 0.1))


def moving_mean(values: Floats, window: int) -> Curve:
    """Means of the `window` values up to the n-th, at no more than 1,000 of all n for which there are so many."""
    ends = spread(window, len(values), _CURVE_POINTS)
    return Curve(ends, sliding_window_view(values, window)[ends - window].mean(axis=1))


def median_size(run: Run) -> Curve:
    """Median of |projected_grad| over the window that ends with each step, at no more than 200 steps."""
    sizes = np.abs(run.projected_grads)
    steps = spread(run.window, run.num_steps, _MEDIAN_POINTS)
    starts, stops = run.first_records[steps - run.window], run.first_records[steps]
    return Curve(steps, np.array([np.median(sizes[a:b]) for a, b in zip(starts, stops, strict=True)]))


def single_losses(run: Run) -> Curve:
    """Losses of single steps, at no more than 1,000 of them."""
    steps = spread(1, run.num_steps, _CURVE_POINTS)
    return Curve(steps, run.losses[steps - 1])


def median_sizes(runs: Sequence[Run]) -> list[float]:
    """Median of |projected_grad| over each whole run; 1 where that is 0."""
    return [float(np.median(np.abs(run.projected_grads))) or 1.0 for run in runs]


def comparable(runs: Sequence[Run]) -> bool:
    """Whether the runs' projected_grads can be read on one linear axis: LoRA's are often far smaller than others."""
    sizes = median_sizes(runs)
    return max(sizes) <= 5 * min(sizes)


def histograms(runs: Sequence[Run]) -> tuple[Floats, list[Floats]]:
    """Edges of bins around 0, and for each run the percentage of its projected_grads in each bin.

    Runs that are not comparable are divided by their median sizes. The bins reach as far as all but a 200th of each
    run's values; the outermost ones hold what lies beyond them too.
    """
    units = [1.0] * len(runs) if comparable(runs) else median_sizes(runs)
    values = [run.projected_grads / unit for run, unit in zip(runs, units, strict=True)]
    limit = max(float(np.quantile(np.abs(v), 0.995)) for v in values) or 1.0
    num_bins = min(max(2 * math.isqrt(min(map(len, values))) + 1, 11), _MAX_BINS)
    edges = np.linspace(-limit, limit, num_bins + 1)
    counts = [np.histogram(np.clip(v, -limit, limit), edges)[0] for v in values]
    return edges, [100 * c / c.sum() for c in counts]


def best_metric(run: Run) -> tuple[str, float, int] | None:
    """Name, value and step of the best evaluation by `metric_for_best_model`, as the trainer chooses it."""
    name = run.config.metric_for_best_model
    steps, values = run.logged.get(f"eval_{name}", Curve(np.array([0]), np.array([math.nan])))
    sign = -1.0 if name == "loss" else 1.0
    ranked = np.where((steps > 0) & np.isfinite(values), sign * values, -math.inf)
    best = int(np.argmax(ranked))
    return None if ranked[best] == -math.inf else (name, float(values[best]), int(steps[best]))


def spread(first: int, last: int, limit: int) -> Ints:
    """`limit` whole numbers from `first` to `last`, or all of them."""
    return np.unique(np.linspace(first, last, min(limit, last - first + 1)).round().astype(np.int64))
