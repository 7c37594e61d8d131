"""What ails a run: findings from the numbers in its journal and log, each with a next step.

The checks are plain functions of arrays. Shapes: S steps, Q directions of a step, R = S · Q.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mezo.config import MeZOConfig
from mezo.doctor.finding import SEVERITIES, Finding
from mezo.doctor.losses import differences, epsilon, not_finite, numbers
from mezo.doctor.progress import FEWEST_STEPS, convergence, exploded, explosion, rate_of_paper, rising, stability, steps
from mezo.doctor.run import Logs, Run, read_run, usual_epsilon
from mezo.doctor.updates import precision, speed

__all__ = ["Finding", "Run", "diagnose", "read_run", "urgent", "while_training"]

_CHECKS: tuple[Callable[[Run], list[Finding]], ...] = (numbers, epsilon, convergence, stability, precision, speed)
_QUIET_STEPS = 1000


def diagnose(run: Run) -> list[Finding]:
    """All findings, the gravest first."""
    finite_SQ = np.isfinite(run.plus_SQ + run.minus_SQ + run.coefficient_SQ)
    finite_S = np.logical_and.reduce(finite_SQ, axis=1)
    findings = [*steps(run), *not_finite(run, finite_S)]
    if finite_S.sum() >= FEWEST_STEPS:
        findings += _judged(_chosen(run, finite_S))
    return sorted(dict.fromkeys(findings), key=lambda finding: SEVERITIES.index(finding.severity))


def _judged(run: Run) -> list[Finding]:
    """All checks; where losses exploded, only whether those before were good for anything."""
    out_S = exploded(run.loss_S)
    if out_S.sum() < 3:
        return [finding for check in _CHECKS for finding in check(run)]
    found = [explosion(run.config.learning_rate, run.loss_S), *rate_of_paper(run, lower=True)]
    before_S = np.arange(run.num_steps) < np.argmax(out_S)
    return found if before_S.sum() < FEWEST_STEPS else [*numbers(_chosen(run, before_S)), *found]


def _chosen(run: Run, chosen_S: NDArray[np.bool_]) -> Run:
    if chosen_S.all():
        return run
    return dataclasses.replace(
        run,
        plus_SQ=run.plus_SQ[chosen_S],
        minus_SQ=run.minus_SQ[chosen_S],
        coefficient_SQ=run.coefficient_SQ[chosen_S],
        rate_S=run.rate_S[chosen_S],
        tokens_S=run.tokens_S[chosen_S],
    )


def while_training(config: MeZOConfig, kind: str, logs: Logs) -> list[Finding]:
    """What the latest log entries of training show to be wrong: losses that are dead or rounded, divergence.

    Args:
        config: the run's.
        kind: its model's head.
        logs: its entries with a loss.
    """
    plus_R, minus_R, loss_S = (
        np.array([entry[name] for entry in logs]) for name in ("loss_plus", "loss_minus", "loss")
    )
    if exploded(loss_S).any():
        return [explosion(config.learning_rate, loss_S)]
    usual = usual_epsilon(config, kind)
    # Below rounding of float32 nothing is left in any type.
    found = differences(config, usual, "float32", plus_R, minus_R) if len(logs) >= 5 else []
    if len(logs) >= FEWEST_STEPS:
        found += rising(config.learning_rate, loss_S)
    return _grave(found)


def urgent(run: Run, findings: Sequence[Finding]) -> list[Finding]:
    """Of a diagnosis what a run that is still training should be told.

    A loss that does not fall yet is no news in the first half, nor in the first thousand steps.

    Args:
        run: the run.
        findings: what `diagnose` says of it.
    """
    early = run.num_steps < max(_QUIET_STEPS, run.max_steps / 2)
    quiet = ("steps", "speed", "convergence") if early else ("steps", "speed")
    return [finding for finding in _grave(findings) if finding.topic not in quiet]


def _grave(findings: Sequence[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity in ("problem", "warning")]
