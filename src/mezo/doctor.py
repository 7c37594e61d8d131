"""What ails a run: findings from the numbers in its journal and log, each with a next step.

The checks are plain functions of arrays. Names: S steps, Q directions of a step, R = S · Q. What they rest on:

A step along z with projected_grad g changes the loss by about −learning_rate · g · (z·∇L). Where g is the true slope
that is −learning_rate · g², and the sum over the run is the decrease that its own numbers predict. What is not seen of
it was noise of the batches in g, or curvature. A predicted decrease that the spread of the losses would hide says that
the run was too short or its rate too low, whatever the direction's quality.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mezo import checkpoint, journal
from mezo.config import PRESETS, MeZOConfig, Preset, looks_like_wrong_rate
from mezo.errors import UserError

Floats = NDArray[np.float64]
Logs = Sequence[Mapping[str, float]]
Severity = Literal["problem", "warning", "note", "ok"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note", "ok")

_EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}  # distance of 1 to the next number
_WEIGHT = 0.02  # size of a typical weight of a language model
_CERTAIN = 2.5  # standard errors from zero that count as a trend
_FEWEST_STEPS = 20
_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Finding:
    """One answer about a run.

    Args:
        severity: problem, warning, note or ok.
        topic: what it is about: numbers, epsilon, convergence, stability, precision, speed or steps.
        evidence: one sentence with this run's numbers.
        advice: what to do next.
    """

    severity: Severity
    topic: str
    evidence: str
    advice: str


@dataclass(frozen=True)
class Run:
    """The numbers of a run.

    Args:
        config: the run's.
        kind: its model's head, see `mezo.encoding.ModelKind`.
        plus_SQ: loss_plus.
        minus_SQ: loss_minus.
        coefficient_SQ: what multiplied z.
        rate_S: learning rate.
        tokens_S: tokens of the batch, once.
        logs: log_history of trainer_state.json.
        max_steps: steps that the run is to have.
        weights_dtype: type of the saved weights; None if there are none.
        aborted: whether it ended in the way that a loss that is not finite ends it.
    """

    config: MeZOConfig
    kind: str
    plus_SQ: Floats
    minus_SQ: Floats
    coefficient_SQ: Floats
    rate_S: Floats
    tokens_S: Floats
    logs: Logs
    max_steps: int
    weights_dtype: str | None = None
    aborted: bool = False

    @property
    def num_steps(self) -> int:
        """Steps in the journal."""
        return len(self.rate_S)

    @property
    def loss_S(self) -> Floats:
        """Mean loss under a step's probes."""
        return ((self.plus_SQ + self.minus_SQ) / 2).mean(axis=1)

    @property
    def slope_SQ(self) -> Floats:
        """Measured derivative of the loss along z: projected_grad, not clipped nor scaled."""
        width = self.config.epsilon * (1 if self.config.estimator == "fzoo" else 2)
        return (self.plus_SQ - self.minus_SQ) / width

    @property
    def preset(self) -> Preset:
        """The paper's setting for this kind of model and parameters."""
        family = "opt" if self.kind == "causal_lm" else "roberta"
        method = ("lora" if self.config.peft_type == "lora" else "prefix") if self.config.use_peft else "full"
        return PRESETS[f"{family}-{method}"]


def read_run(run: str | Path) -> Run:
    """The numbers of a run's folder, or of its journal.

    Raises:
        UserError: there is no run, or its files cannot be read.
    """
    path = Path(run) / checkpoint.JOURNAL_NAME if Path(run).is_dir() else Path(run)
    contents = journal.read(path)
    header, steps = contents.header, contents.steps
    try:
        config = MeZOConfig.from_dict(header["config"])  # type: ignore[arg-type]  # JSON
        kind = str(header["kind"])
    except KeyError as error:
        raise UserError(f"{path}: the journal's header has no {error.args[0]!r}") from None
    state_path = path.parent / checkpoint.STATE_NAME
    try:
        state = json.loads(state_path.read_text()) if state_path.exists() else {}
        logs, max_steps = state.get("log_history", []), state.get("max_steps", config.max_steps)
    except (ValueError, AttributeError):
        raise UserError(f"{state_path}: not a trainer_state.json") from None
    every = [config.save_steps] + ([config.eval_steps] if config.eval_steps else [])
    last = checkpoint.checkpoint_path(path.parent, len(steps))
    return Run(
        config=config,
        kind=kind,
        plus_SQ=np.array([[r.loss_plus for r in records] for records in steps]),
        minus_SQ=np.array([[r.loss_minus for r in records] for records in steps]),
        coefficient_SQ=np.array([[r.coefficient for r in records] for records in steps]),
        rate_S=np.array([records[0].learning_rate for records in steps]),
        tokens_S=np.array([float(records[0].num_tokens) for records in steps]),
        logs=logs,
        max_steps=max_steps,
        weights_dtype=_saved_dtype(path.parent),
        aborted=last.exists() and len(steps) < max_steps and all(len(steps) % n for n in every),
    )


def _saved_dtype(folder: Path) -> str | None:
    """Type of the first tensor in the folder's weights, from the head of the file."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        types = [entry["dtype"] for name, entry in head.items() if name != "__metadata__"]
        return _SAFETENSORS.get(types[0]) if types else None
    return None


def diagnose(run: Run) -> list[Finding]:
    """All findings, the gravest first."""
    finite_S = np.isfinite(run.plus_SQ + run.minus_SQ + run.coefficient_SQ).all(axis=1) if run.num_steps else None
    findings = [*steps(run), *not_finite(run, finite_S)] if finite_S is not None else steps(run)
    if finite_S is not None and finite_S.sum() >= _FEWEST_STEPS:
        good = _only(run, finite_S)
        for check in CHECKS:
            findings += check(good)
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def _only(run: Run, chosen_S: NDArray[np.bool_]) -> Run:
    names = ("plus_SQ", "minus_SQ", "coefficient_SQ", "rate_S", "tokens_S")
    return Run(**{**vars(run), **{name: vars(run)[name][chosen_S] for name in names}})


# --- how far the run got ----------------------------------------------------------------------------------------------


def steps(run: Run) -> list[Finding]:
    """Whether the run is finished, and whether there is enough to judge."""
    n, goal = run.num_steps, run.max_steps
    resume = f"mezo train … --output_dir {run.config.output_dir} --resume_from_checkpoint"
    if run.aborted:
        lower = f"a new run with --learning_rate {_short(run.config.learning_rate / 10)}"
        return [Finding("problem", "steps", f"It broke off after {n:,} of {goal:,} steps, with a checkpoint where none "
                        "was due, as a loss that is not finite does.", f"{lower}; the log names the rows.")]  # fmt: skip
    if n < _FEWEST_STEPS:
        return [Finding("note", "steps", f"{n} of {goal:,} steps: fewer than {_FEWEST_STEPS} say nothing.", resume)]
    if n < goal:
        return [Finding("note", "steps", f"The journal ends after {n:,} of {goal:,} steps.",
                        f"If it is not running: {resume}")]  # fmt: skip
    return []


# --- numbers ----------------------------------------------------------------------------------------------------------


def not_finite(run: Run, finite_S: NDArray[np.bool_]) -> list[Finding]:
    """Losses that are NaN or infinite, in the journal or in evaluations."""
    lower = f"--learning_rate {_short(run.config.learning_rate / 10)} in a new output_dir"
    found = []
    if not finite_S.all():
        first = int(np.argmin(finite_S))
        found.append(Finding("problem", "numbers", f"{(~finite_S).sum()} of {len(finite_S):,} steps have a loss or a "
                             f"coefficient that is NaN or infinite, the first is step {first}.", lower))  # fmt: skip
    wrong = [entry["step"] for entry in run.logs if not math.isfinite(entry.get("eval_loss", 0.0))]
    if wrong:
        found.append(Finding("problem", "numbers", f"The evaluated loss is not finite at step {wrong[0]}.", lower))
    return found


def differences(config: MeZOConfig, epsilon: float, dtype: str | None, plus_R: Floats, minus_R: Floats) -> list[Finding]:
    """Whether L(θ + εz) and L(θ − εz) differ by more than rounding.

    Args:
        config: the run's.
        epsilon: a usual one for this setting.
        dtype: type of the forward passes; float32 if unknown.
        plus_R: losses on one side.
        minus_R: losses on the other.
    """
    level = float(np.median(np.abs(plus_R)))
    apart_R = np.abs(plus_R - minus_R)
    if level < 1e-6:
        return []  # solved: nothing is left to differ
    zeros = float((apart_R == 0).mean())
    small = config.epsilon < epsilon / 100
    mend = f"--epsilon {_short(epsilon)}"
    if zeros >= 0.05:
        if not small:
            mend = ("Check that what is trained acts on the loss: trainable_layers, lora_target_modules, label_words "
                    f"(all the same?), template; then {mend if config.epsilon < epsilon else 'a larger epsilon'}.")  # fmt: skip
        equal = " and all losses are the same" if np.ptp(plus_R) == np.ptp(minus_R) == 0 else ""
        why = f"epsilon {config.epsilon:g} is below rounding" if small else (
            "the trained parameters do not act on the loss, or epsilon is below rounding")  # fmt: skip
        return [Finding("problem" if zeros >= 0.5 else "warning", "numbers", f"projected_grad is exactly 0 in "
                        f"{100 * zeros:.0f} % of directions{equal} (loss {level:.4g}): {why}.", mend)]  # fmt: skip
    return _rounding(config, dtype or "float32", float(np.median(apart_R)), level, mend)


def _rounding(config: MeZOConfig, dtype: str, apart: float, level: float, mend: str) -> list[Finding]:
    """Losses of float32 passes carry a few units of rounding; those of half precision average theirs over the rows."""
    full = dtype == "float32"
    unit = _EPSILON[dtype] * max(level, 1.0) * (4 if full else 1 / math.sqrt(config.batch_size))
    figures = f"|L+ − L−| is {apart:.2g} in the median, rounding of a loss of {level:.3g} in {dtype} about {unit:.2g}"
    if apart > 2 * unit:
        return [Finding("ok", "numbers", f"{figures}.", "")]
    if config.epsilon >= float(mend.split()[-1]):
        mend = f"--epsilon {_short(10 * config.epsilon)}"
    return [Finding("warning" if full else "note", "numbers", f"{figures}: projected_grad is mostly rounding.",
                    mend if full else f"{mend}, or --dtype float32")]  # fmt: skip


def numbers(run: Run) -> list[Finding]:
    """`differences` where the run begins, before it may have solved its task."""
    begin = max(_FEWEST_STEPS, run.num_steps // 5)
    dtype = run.weights_dtype if run.config.dtype == "auto" and not run.config.use_peft else run.config.dtype
    usual = float(str(run.preset.values["epsilon"]))
    if run.config.normalize_perturbations:
        usual = run.config.epsilon * 10  # z is shorter by the root of each tensor's size, which the journal does not hold
    known = dtype if dtype in _EPSILON else None
    return differences(run.config, usual, known, run.plus_SQ[:begin].ravel(), run.minus_SQ[:begin].ravel())


def epsilon(run: Run) -> list[Finding]:
    """Whether the probes are so far away that the loss is no longer straight between them."""
    begin = max(_FEWEST_STEPS, run.num_steps // 5)
    plus_R, minus_R = run.plus_SQ[:begin].ravel(), run.minus_SQ[:begin].ravel()
    apart, level = float(np.median(np.abs(plus_R - minus_R))), float(np.median(minus_R))
    mend = f"--epsilon {_short(run.config.epsilon / 10)}"
    if level > 1e-6 and apart > 0.5 * level:
        return [Finding("warning", "epsilon", f"|L+ − L−| is {apart:.3g} in the median, {100 * apart / level:.0f} % of "
                        f"the loss ({level:.3g}): epsilon {run.config.epsilon:g} leaves the straight part.", mend)]  # fmt: skip
    up = float((plus_R > minus_R).mean())
    if run.config.estimator == "fzoo" and up > 0.8:
        return [Finding("warning", "epsilon", f"L(θ + εz) is above L(θ) in {100 * up:.0f} % of directions, 50 % were "
                        f"to be expected: curvature outweighs slope at epsilon {run.config.epsilon:g}.", mend)]  # fmt: skip
    return _probes_against_evaluations(run, mend)


def _probes_against_evaluations(run: Run, mend: str) -> list[Finding]:
    """Evaluations are at θ itself, on other rows; only a large gap says anything."""
    loss_S = run.loss_S
    for entry in run.logs:
        step = int(entry["step"])
        near_S = loss_S[max(0, step - 25) : step + 25]
        if "eval_loss" in entry and 0 < step <= run.num_steps and len(near_S):
            probes, here = float(near_S.mean()), float(entry["eval_loss"])
            if probes > 1.5 * here and probes - here > 0.2:
                return [Finding("warning", "epsilon", f"Around step {step} the probes' loss is {probes:.3g}, the "
                                f"evaluated one {here:.3g}: epsilon {run.config.epsilon:g} may be too large.", mend)]  # fmt: skip
    return []


# --- convergence ------------------------------------------------------------------------------------------------------


class Trend(NamedTuple):
    """Where the loss goes: a line through means of blocks of steps, and the ends."""

    slope: float  # per step
    error: float  # standard error of the slope
    first: float  # mean of the first fifth
    last: float
    drop: float  # first tenth less last half, in standard errors

    @property
    def direction(self) -> int:
        """−1, 0 or 1: falls, not to tell from zero, rises."""
        if self.slope < -_CERTAIN * self.error or self.drop > 4:
            return -1
        return int(self.slope > _CERTAIN * self.error)


def trend(loss_S: Floats) -> Trend:
    """The trend of at least `_FEWEST_STEPS` losses; blocks take up what neighbouring steps have in common."""
    blocks = np.array_split(loss_S, min(20, len(loss_S) // 5))
    mean_B = np.array([block.mean() for block in blocks])
    x_B = np.arange(len(blocks)) - (len(blocks) - 1) / 2
    slope = float(x_B @ mean_B / (x_B @ x_B))
    rest_B = mean_B - mean_B.mean() - slope * x_B
    error = math.sqrt(float(rest_B @ rest_B) / (len(blocks) - 2) / float(x_B @ x_B))
    length, fifth = len(loss_S) / len(blocks), len(loss_S) // 5
    gap, width = _gap(loss_S[: max(3, len(loss_S) // 10)], loss_S[len(loss_S) // 2 :])
    return Trend(slope / length, error / length, float(loss_S[:fifth].mean()), float(loss_S[-fifth:].mean()),
                 gap / width if width else 0.0)  # fmt: skip


def _gap(a: Floats, b: Floats) -> tuple[float, float]:
    """Difference of two means and its standard error."""
    return float(a.mean() - b.mean()), math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))


def predicted_decrease(run: Run) -> float | None:
    """Σ learning_rate · coefficient · slope along z; None where the optimizer has a memory."""
    if run.config.optim != "sgd":
        return None
    return float((run.rate_S[:, None] * run.coefficient_SQ * run.slope_SQ).sum())


def convergence(run: Run) -> list[Finding]:
    """Whether the loss falls, and if not, why."""
    loss_S = run.loss_S
    t, predicted = trend(loss_S), predicted_decrease(run)
    line = f"The loss goes from {t.first:.4g} to {t.last:.4g}, {_per_thousand(t)}"
    if t.last < 0.01:
        return [Finding("ok", "convergence", f"{line}: there is little left of it.", "")]
    if t.direction < 0:
        share = f"; its steps predict {predicted:.3g} in all" if predicted is not None else ""
        return [Finding("ok", "convergence", f"{line}{share}.", "")]
    if t.direction > 0:
        return []  # `rising` speaks of it
    found = [Finding("warning", "convergence", f"{line}: not to tell from zero.", _flat_advice(run, t, predicted))]
    return [*found, *_setting(run)]


def _per_thousand(t: Trend) -> str:
    return f"{1000 * t.slope:+.2g} ± {1000 * t.error:.1g} in 1,000 steps"


def _flat_advice(run: Run, t: Trend, predicted: float | None) -> str:
    """Too small a step, or too noisy a one: what the predicted decrease says against what could have been seen."""
    config, n = run.config, run.num_steps
    if predicted is None:
        return f"--max_steps {3 * n} --resume_from_checkpoint"
    visible = _CERTAIN * t.error * n
    figures = f"The steps predict a decrease of {predicted:.2g}, the spread of the losses hides one of {visible:.2g}: "
    if predicted < visible:
        factor = visible / predicted if predicted > 0 else 100.0
        rate = min(config.learning_rate * factor, max(run.preset.learning_rates)) if _comparable(config) else (
            10 * config.learning_rate)  # fmt: skip
        if rate > 1.5 * config.learning_rate:
            return f"{figures}too low a rate or too few steps. --learning_rate {_short(rate)}"
        # The predicted decrease grows with n, the visible one shrinks with its root.
        more = _short(min(n * max(factor, 1.0) ** (2 / 3), int(str(run.preset.values["max_steps"]))))
        return f"{figures}too few steps. --max_steps {int(float(more))} --resume_from_checkpoint"
    return (
        f"{figures}projected_grad is mostly noise of batches of {config.batch_size}, or the steps are too long. "
        f"--gradient_accumulation_steps {4 * config.gradient_accumulation_steps}, "
        f"or --learning_rate {_short(config.learning_rate / 3)}"
    )


def _comparable(config: MeZOConfig) -> bool:
    """Whether the paper's learning rates mean something for these directions."""
    return config.estimator in ("spsa", "1.5-spsa") and config.optim == "sgd" and not config.normalize_perturbations


def _setting(run: Run) -> list[Finding]:
    """Where rate and steps of a run that does not converge lie against the paper's."""
    config, preset, found = run.config, run.preset, []
    low, high = min(preset.learning_rates), max(preset.learning_rates)
    swapped = looks_like_wrong_rate(config)
    if swapped is not None:
        usual = 1e-3 if config.normalize_perturbations else high
        found.append(Finding("warning", "convergence", f"{swapped}.", f"--learning_rate {_short(usual)}"))
    elif _comparable(config) and not low / 10 <= config.learning_rate <= high * 10:
        found.append(Finding("warning", "convergence", f"learning_rate {config.learning_rate:g} is far from the "
                             f"{low:g} … {high:g} of {preset.source}.", f"--learning_rate {_short(high)}"))  # fmt: skip
    goal, batch = int(str(preset.values["max_steps"])), int(str(preset.values["per_device_train_batch_size"]))
    if run.num_steps < goal / 2 or config.batch_size < batch / 2:
        found.append(Finding("note", "convergence", f"{run.num_steps:,} steps of {config.batch_size} rows; "
                             f"{preset.source} has {goal:,} steps of {batch}.",
                             f"--max_steps {goal} --per_device_train_batch_size {batch}"))  # fmt: skip
    return found
