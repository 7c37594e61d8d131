"""Where a run's loss goes, and what its own steps predicted.

A step along z with projected_grad g changes the loss by about −learning_rate · g · (z·∇L), which is −learning_rate · g²
where g is the true slope. The sum over the run is the decrease that its steps predict. What is not seen of it was noise
of the batches in g, or curvature. If the spread of the losses would hide all of it, the run was too short or its rate
too low, however good the directions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mezo.config import MeZOConfig, looks_like_wrong_rate
from mezo.doctor.finding import Finding, short
from mezo.doctor.losses import SOLVED, numbers
from mezo.doctor.run import Floats, Run

FEWEST_STEPS = 20
_CERTAIN = 2.5  # standard errors from zero that count as a trend


def steps(run: Run) -> list[Finding]:
    """Whether the run is finished, and whether there is enough to judge."""
    done, goal = run.num_steps, run.max_steps
    resume = f"mezo train … --output_dir {run.config.output_dir} --resume_from_checkpoint"
    if run.aborted:
        evidence = f"The run broke off after {done:,} of {goal:,} steps, as it does at a loss that is not finite."
        advice = f"A new run with --learning_rate {short(run.config.learning_rate / 10)}"
        return [Finding("problem", "steps", evidence, advice), *rate_of_paper(run, lower=True)]
    if done < FEWEST_STEPS:
        further = resume if done < goal else f"{resume} --max_steps {10 * FEWEST_STEPS}"
        return [Finding("note", "steps", f"{done} of {goal:,} steps; below {FEWEST_STEPS} nothing is judged.", further)]
    if done < goal:
        return [Finding("note", "steps", f"{done:,} of {goal:,} steps so far.", f"If it is not running: {resume}")]
    return []


# --- convergence ------------------------------------------------------------------------------------------------------


class Trend(NamedTuple):
    """A line through the means of blocks of steps, and the losses at both ends."""

    slope: float  # per step
    error: float  # standard error of the slope
    first: float  # mean of the first fifth
    last: float
    drop: float  # first tenth less last half, in standard errors

    @property
    def falls(self) -> bool:
        """Whether the loss surely falls; early and then no more is falling too."""
        return self.slope < -_CERTAIN * self.error or self.drop > 4

    @property
    def rises(self) -> bool:
        """Whether it surely rises."""
        return not self.falls and self.slope > _CERTAIN * self.error


def trend(loss_S: Floats) -> Trend:
    """The trend of at least `FEWEST_STEPS` losses. Blocks take up what neighbouring steps have in common."""
    blocks = _blocks(loss_S, 20)
    mean_B = np.array([block.mean() for block in blocks])
    x_B = np.arange(len(blocks)) - (len(blocks) - 1) / 2
    slope = float(x_B @ mean_B / (x_B @ x_B))
    rest_B = mean_B - mean_B.mean() - slope * x_B
    error = math.sqrt(float(rest_B @ rest_B) / (len(blocks) - 2) / float(x_B @ x_B))
    error *= 1 + 2 / (len(blocks) - 2)  # as for Student: few blocks know their own spread badly
    size, fifth = len(loss_S) / len(blocks), len(loss_S) // 5
    gap, gap_error = _gap(loss_S[: max(3, len(loss_S) // 10)], loss_S[len(loss_S) // 2 :])
    drop = gap / gap_error if gap_error else 0.0
    return Trend(slope / size, error / size, float(loss_S[:fifth].mean()), float(loss_S[-fifth:].mean()), drop)


def _blocks(loss_S: Floats, most: int) -> list[Floats]:
    return np.array_split(loss_S, min(most, len(loss_S) // 5))


def _gap(a: Floats, b: Floats) -> tuple[float, float]:
    """Difference of two means and its standard error."""
    return float(a.mean() - b.mean()), math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))


def predicted_decrease(run: Run) -> float | None:
    """Σ learning_rate · coefficient · slope along z; None where the optimizer has a memory."""
    return float(_predicted_S(run).sum()) if run.config.optim == "sgd" else None


def _predicted_S(run: Run) -> Floats:
    predicted_S: Floats = (run.rate_S[:, None] * run.coefficient_SQ * run.slope_SQ).sum(axis=1)
    return predicted_S


def convergence(run: Run) -> list[Finding]:
    """Whether the loss falls, and if not, why."""
    t, predicted = trend(run.loss_S), predicted_decrease(run)
    line = (
        f"The loss goes from {t.first:.4g} to {t.last:.4g}, {1000 * t.slope:+.2g} ± {1000 * t.error:.1g} in 1,000 steps"
    )
    if t.last < SOLVED:
        return [Finding("ok", "convergence", f"{line}: there is little left of it.")]
    if t.falls and t.first - t.last >= 0.01 * t.first:
        return [Finding("ok", "convergence", f"{line}{_signal(run, t)}.")]
    if any(finding.severity != "ok" for finding in numbers(run)):
        advice = "First what is said of projected_grad under numbers"
        return [Finding("warning", "convergence", f"{line}: it does not fall.", advice)]
    return _why(run, t, predicted, line)


def _signal(run: Run, t: Trend) -> str:
    """Gradient against noise: projected_grad² holds both, the decrease that comes of it only the gradient."""
    if run.config.optim != "sgd":
        return ""
    total_S, fifth, seen = _predicted_S(run).cumsum(), run.num_steps // 5, t.first - t.last
    text = f"; the run's own steps predict a decrease of {total_S[-1]:.2g}"
    between = float(total_S[-fifth:].mean() - total_S[:fifth].mean())
    if not 0 < seen < between:
        return text
    return f"{text}, of which {100 * seen / between:.2g} % is seen: the rest is noise of batches, or curvature"


def _why(run: Run, t: Trend, predicted: float | None, line: str) -> list[Finding]:
    """Why a loss does not fall, by where it goes instead."""
    rate = run.config.learning_rate
    if rising(rate, run.loss_S):
        return rate_of_paper(run, lower=True)  # `stability` says the rest
    if t.rises:
        rises = Finding("warning", "convergence", f"{line}: it rises.", f"--learning_rate {short(rate / 3)}")
        return [rises, *rate_of_paper(run, lower=True)]
    if t.falls:
        advice = _longer(run, 0.1 * t.first / max(t.first - t.last, 1e-3 * t.first))
        creeps = Finding("warning", "convergence", f"{line}: it falls, by less than a hundredth.", advice)
        return [creeps, *rate_of_paper(run, lower=False)]
    return [*_flat(run, t, predicted, f"{line}: not to tell from zero."), *_size(run), *_distance(run)]


def _flat(run: Run, t: Trend, predicted: float | None, line: str) -> list[Finding]:
    """Whether the steps were too small or too noisy, and the mend."""
    config, visible = run.config, _CERTAIN * t.error * run.num_steps
    if predicted is None:
        advice = f"--max_steps {3 * run.num_steps} --resume_from_checkpoint"
        return [
            Finding("warning", "convergence", line, advice),
            *rate_of_paper(run, lower=True),
            *rate_of_paper(run, lower=False),
        ]
    figures = f"The steps predict a decrease of {predicted:.2g}, the spread of the losses hides {visible:.2g}"
    level = float(run.loss_S[: len(run.loss_S) // 5 + 1].mean())
    if predicted > max(level, visible) and looks_like_wrong_rate(config) is None:
        evidence = f"{line} {figures}: more than the whole loss, so steps are too long for its curvature"
        rates = run.preset.learning_rates
        usual = sorted(rates)[len(rates) // 2] if _comparable(config) else config.learning_rate / 30
        advice = f"--learning_rate {short(min(usual, config.learning_rate / 10))}"
        return [Finding("problem", "stability", f"{evidence}.", advice)]
    if predicted < 3 * visible:
        advice = f"{figures}: {_longer(run, max(visible / predicted, 1.5) if predicted else math.inf)}"
        return [Finding("warning", "convergence", line, advice), *rate_of_paper(run, lower=False)]
    batches, rate = 4 * config.gradient_accumulation_steps, short(config.learning_rate / 3)
    advice = (
        f"{figures}: projected_grad is mostly noise of batches of {config.batch_size}, or steps are too long. "
        f"--gradient_accumulation_steps {batches}, or --learning_rate {rate}"
    )
    return [Finding("warning", "convergence", line, advice), *rate_of_paper(run, lower=True)]


def _longer(run: Run, factor: float) -> str:
    """A higher rate as far as the paper goes, else more steps.

    Args:
        run: the run.
        factor: by which the predicted decrease is too small to be seen.
    """
    rate = run.config.learning_rate
    highest = max(run.preset.learning_rates) if _comparable(run.config) else 10 * rate
    if highest > 1.5 * rate:
        return f"the rate is too low or the run too short. --learning_rate {short(min(10 * rate * factor, highest))}"
    # What is predicted grows with the number of steps, what is hidden shrinks with its root.
    enough = min(run.num_steps * factor ** (2 / 3), max(_paper(run, "max_steps"), 2 * run.num_steps))
    return f"the run is too short. --max_steps {float(short(enough)):.0f} --resume_from_checkpoint"


def rate_of_paper(run: Run, lower: bool) -> list[Finding]:
    """Whether the rate of a run that does not converge is far above (or below) the paper's."""
    config, rates = run.config, run.preset.learning_rates
    middle, rate = sorted(rates)[len(rates) // 2], config.learning_rate
    swapped = looks_like_wrong_rate(config)
    if swapped is not None and lower is not config.normalize_perturbations:
        usual = 1e-3 if config.normalize_perturbations else middle
        return [Finding("warning", "convergence", f"{swapped}.", f"--learning_rate {short(usual)}")]
    far = rate > 10 * max(rates) if lower else rate < min(rates) / 10
    if swapped is None and far and _comparable(config):
        evidence = f"learning_rate {rate:g} is far from {min(rates):g} … {max(rates):g} of {run.preset.source}."
        return [Finding("warning", "convergence", evidence, f"--learning_rate {short(middle)}")]
    return []


def _size(run: Run) -> list[Finding]:
    """Steps and batch of a run that does not converge against the paper's."""
    config, goal, batch = run.config, _paper(run, "max_steps"), _paper(run, "per_device_train_batch_size")
    more = [f"--max_steps {goal}"] if run.num_steps < goal / 2 else []
    if config.batch_size < batch / 2:
        more.append(f"--gradient_accumulation_steps {math.ceil(batch / config.per_device_train_batch_size)}")
    if not more:
        return []
    evidence = f"{run.num_steps:,} steps of {config.batch_size} rows; {run.preset.source}: {goal:,} of {batch}."
    return [Finding("note", "convergence", evidence, " ".join(more))]


def _distance(run: Run) -> list[Finding]:
    """An epsilon of a run that does not converge, far above the paper's."""
    usual, own = float(str(run.preset.values["epsilon"])), run.config.epsilon
    if run.config.normalize_perturbations or own <= 30 * usual:
        return []
    evidence = f"epsilon {own:g} is far above the {usual:g} of {run.preset.source}."
    return [Finding("warning", "epsilon", evidence, f"--epsilon {usual:g}")]


def _comparable(config: MeZOConfig) -> bool:
    """Whether the paper's learning rates mean something for these directions and coefficients."""
    return config.estimator in ("spsa", "1.5-spsa") and config.optim == "sgd" and not config.normalize_perturbations


def _paper(run: Run, name: str) -> int:
    return int(str(run.preset.values[name]))


# --- stability --------------------------------------------------------------------------------------------------------


def stability(run: Run) -> list[Finding]:
    """Divergence, spikes, outliers."""
    loss_S, slope_R, rate = run.loss_S, run.slope_SQ.ravel(), run.config.learning_rate
    risen = rising(rate, loss_S)
    if any(finding.severity == "problem" for finding in risen):
        return risen  # the rest follows from it
    found = [*risen, *spikes(rate, loss_S), *outliers(run.config, slope_R)]
    evidence = (
        f"No rise, no spikes; the largest |projected_grad| is {relative_size(slope_R).max():.1f} times the median."
    )
    return found or [Finding("ok", "stability", evidence)]


def exploded(loss_S: Floats) -> NDArray[np.bool_]:
    """Losses of a height that no batch explains."""
    return loss_S > 10 * max(float(loss_S[0]), 1.0)


def explosion(rate: float, loss_S: Floats) -> Finding:
    """A finding about `exploded` losses. What comes after them, a dead model say, follows from it.

    Args:
        rate: learning rate.
        loss_S: losses, one of them exploded.
    """
    out_S = exploded(loss_S)
    evidence = (
        f"{out_S.sum()} of {len(loss_S):,} losses are more than ten times the first, {loss_S[0]:.4g}, up to "
        f"{loss_S.max():.3g}; the first of them is number {np.argmax(out_S)}."
    )
    return Finding("problem", "stability", evidence, f"A new run with --learning_rate {short(rate / 10)}")


def rising(rate: float, loss_S: Floats) -> list[Finding]:
    """Whether the loss stands far above where it was lowest.

    Args:
        rate: learning rate.
        loss_S: at least `FEWEST_STEPS` losses.
    """
    blocks = _blocks(loss_S, 10)
    lowest = int(np.argmin([block.mean() for block in blocks]))
    low, first = float(blocks[lowest].mean()), float(blocks[0].mean())
    gap, error = _gap(loss_S[-(len(loss_S) // 5) :], blocks[lowest])
    # Six, because the lowest of ten is low by chance too, and a run is looked at after every log entry.
    if gap < max(6 * error, 0.2 * low, 0.05 * first):
        return []
    diverged = low + gap > 1.2 * first
    evidence = (
        f"The loss began at {first:.4g}, was lowest ({low:.4g}) after {100 * (lowest + 1) / len(blocks):.0f} % of "
        f"these steps and rose to {low + gap:.4g}: learning_rate {rate:g} is beyond what is stable here."
    )
    advice = f"A new run with --learning_rate {short(rate / (10 if diverged else 3))}"
    return [Finding("problem" if diverged else "warning", "stability", evidence, advice)]


def spikes(rate: float, loss_S: Floats) -> list[Finding]:
    """Steps whose loss is far above that of their neighbours and of the beginning, in factors."""
    log_S = np.log(np.maximum(loss_S, 1e-12))
    blocks = np.array_split(log_S, max(1, min(20, len(loss_S) // 20)))
    start = float(np.median(blocks[0]))
    out_S = np.concatenate([(block - np.median(block) > 10 * _spread(block)) & (block > start) for block in blocks])
    if not out_S.any():
        return []
    evidence = (
        f"{out_S.sum()} of {len(loss_S):,} losses are more than 10 robust standard deviations above their neighbours, "
        f"up to {loss_S[out_S].max():.4g} against {math.exp(float(np.median(log_S))):.4g}; the first is step "
        f"{np.argmax(out_S)}."
    )
    return [Finding("warning", "stability", evidence, f"--learning_rate {short(rate / 3)}, or look at the rows")]


def _spread(values: Floats) -> float:
    """Standard deviation from the median distance, which outliers do not move; of log losses never below 2 %."""
    return max(float(1.4826 * np.median(np.abs(values - np.median(values)))), 0.02)


def relative_size(slope_R: Floats) -> Floats:
    """|projected_grad| over its neighbours' median: a gradient that shrinks over the run has no outliers."""
    blocks = np.array_split(np.abs(slope_R), max(1, len(slope_R) // 50))
    middle = float(np.median(np.abs(slope_R))) or 1.0
    return np.concatenate([block / (float(np.median(block)) or middle) for block in blocks])


def outliers(config: MeZOConfig, slope_R: Floats) -> list[Finding]:
    """Whether few directions make most of the movement."""
    if len(slope_R) < 100 or config.clip_quantile is not None or config.estimator == "es":
        return []
    size_R = np.sort(relative_size(slope_R))
    largest, squares = size_R[-(len(size_R) // 100) :], float(size_R @ size_R)
    share = float(largest @ largest) / squares if squares else 0.0
    if size_R[-1] < 20 or share < 0.3:
        return []
    evidence = (
        f"|projected_grad| reaches {size_R[-1]:.0f} times its median; the largest 1 % of directions make "
        f"{100 * share:.0f} % of all squared movement (of normal ones 8 %)."
    )
    lower = f"--learning_rate {short(config.learning_rate / 3)}"
    advice = f"--clip_quantile 0.9, or {lower}" if config.estimator == "spsa" else lower
    return [Finding("warning", "stability", evidence, advice)]
