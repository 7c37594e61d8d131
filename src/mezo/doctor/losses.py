"""Whether a run's losses say anything: finite, apart by more than rounding, and not too far apart."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mezo.config import MeZOConfig
from mezo.doctor.finding import Finding, short
from mezo.doctor.run import Floats, Run

SPACING = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}  # from 1 to the next number
SOLVED = 0.01  # a loss of which little is left


def not_finite(run: Run, finite_S: NDArray[np.bool_]) -> list[Finding]:
    """Losses that are NaN or infinite, in the journal or in evaluations."""
    advice = f"A new run with --learning_rate {short(run.config.learning_rate / 10)}"
    found = []
    if not finite_S.all():
        evidence = (
            f"{(~finite_S).sum()} of {len(finite_S):,} steps have a loss or coefficient that is NaN or infinite, the "
            f"first is step {np.argmin(finite_S)}."
        )
        found.append(Finding("problem", "numbers", evidence, advice))
    wrong = [entry["step"] for entry in run.logs if not math.isfinite(entry.get("eval_loss", 0.0))]
    if wrong:
        found.append(Finding("problem", "numbers", f"The evaluated loss is not finite at step {wrong[0]}.", advice))
    return found


def differences(config: MeZOConfig, usual_epsilon: float, dtype: str, plus_R: Floats, minus_R: Floats) -> list[Finding]:
    """Whether L(θ + εz) and L(θ − εz) differ by more than rounding.

    Args:
        config: the run's.
        usual_epsilon: what such runs have.
        dtype: type of the forward passes.
        plus_R: losses on one side.
        minus_R: losses on the other.
    """
    level, apart_R = float(np.median(plus_R)), np.abs(plus_R - minus_R)
    if level < SOLVED:
        return []
    larger = f"--epsilon {short(usual_epsilon if config.epsilon < usual_epsilon else 10 * config.epsilon)}"
    zeros = float((apart_R == 0).mean())
    rounding = _rounding(dtype, config.batch_size, float(np.median(apart_R)), level, larger)
    if zeros < 0.05:
        return [rounding]
    why, advice = f"epsilon {config.epsilon:g} is below rounding", larger
    if config.objective != "loss":  # counts of right answers, or rewards of texts: steps without a gradient
        why = f"both sides come to the same {config.objective}"
        advice = f"Larger batches: --gradient_accumulation_steps {4 * config.gradient_accumulation_steps}; or {larger}"
    elif config.epsilon > usual_epsilon / 100:
        why = "the trained parameters do not act on the loss, or epsilon is below rounding"
        advice = f"Look at lora_target_modules, trainable_layers, label_words and template; then {larger}"
    same = ", and all losses are the same" if np.ptp(plus_R) == np.ptp(minus_R) == 0 else ""
    evidence = (
        f"projected_grad is exactly 0 in {100 * zeros:.0f} % of directions at a loss of {level:.4g}{same}: {why}."
    )
    is_grave = zeros >= 0.5 or (config.objective == "loss" and rounding.severity == "problem")
    return [Finding("problem" if is_grave else "warning", "numbers", evidence, advice)]


def _rounding(dtype: str, batch_size: int, apart: float, level: float, larger: str) -> Finding:
    """A float32 pass leaves a few units of rounding in the loss; in half precision the rows' average out."""
    full = dtype == "float32"
    unit = SPACING[dtype] * max(level, 1.0) * (4 if full else 1 / math.sqrt(batch_size))
    figures = (
        f"|L+ − L−| is {apart:.2g} in the median, rounding of a loss of {level:.3g} in {dtype} is about {unit:.1g}"
    )
    if apart > 2 * unit:
        return Finding("ok", "numbers", f"{figures}.")
    evidence = f"{figures}: projected_grad is mostly rounding."
    if full:
        return Finding("problem", "numbers", evidence, larger)
    return Finding("note", "numbers", evidence, f"{larger}, or --dtype float32")


def numbers(run: Run) -> list[Finding]:
    """`differences` where the run begins, before it may have solved its task."""
    plus_R, minus_R = run.opening
    return differences(run.config, run.usual_epsilon, run.dtype or "float32", plus_R, minus_R)


def epsilon(run: Run) -> list[Finding]:
    """Whether the probes are so far apart that the loss is not straight between them."""
    plus_R, minus_R = run.opening
    apart, level = float(np.median(np.abs(plus_R - minus_R))), float(np.median(minus_R))
    smaller = f"--epsilon {short(run.config.epsilon / 10)}"
    if level > SOLVED and apart > 0.3 * level:
        evidence = (
            f"|L+ − L−| is {apart:.3g} in the median, {100 * apart / level:.0f} % of the loss ({level:.3g}): epsilon "
            f"{run.config.epsilon:g} leaves the range where the loss is straight."
        )
        return [Finding("warning", "epsilon", evidence, smaller)]
    above = float((plus_R > minus_R).mean())
    if run.config.estimator == "fzoo" and above > 0.8:
        evidence = (
            f"L(θ + εz) is above L(θ) in {100 * above:.0f} % of directions (half were to be expected): curvature "
            f"outweighs the slope at epsilon {run.config.epsilon:g}."
        )
        return [Finding("warning", "epsilon", evidence, smaller)]
    return _probes_against_evaluations(run, smaller)


def _probes_against_evaluations(run: Run, smaller: str) -> list[Finding]:
    """Evaluations are at θ itself; they are of other rows, so only a large gap says anything."""
    for entry in run.logs:
        step = int(entry["step"])
        if "eval_loss" not in entry or not 10 <= step <= run.num_steps:
            continue
        probes, here = float(run.loss_S[step - 10 : step + 10].mean()), float(entry["eval_loss"])
        if probes > 1.5 * here and probes > here + 0.2:
            evidence = (
                f"Around step {step} the loss under probes is {probes:.3g}, at the weights themselves (evaluated) "
                f"{here:.3g}: epsilon {run.config.epsilon:g} may be too large."
            )
            return [Finding("warning", "epsilon", evidence, smaller)]
    return []
