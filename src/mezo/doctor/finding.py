"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["problem", "warning", "note", "ok"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note", "ok")  # the gravest first


@dataclass(frozen=True)
class Finding:
    """One answer about a run.

    Args:
        severity: problem, warning, note or ok.
        topic: what it is about: steps, numbers, epsilon, convergence, stability, precision or speed.
        evidence: a sentence with this run's numbers.
        advice: what to do next; empty where nothing is to be done.
    """

    severity: Severity
    topic: str
    evidence: str
    advice: str = ""


def short(value: float) -> str:
    """A value to type, with one digit."""
    return f"{float(f'{value:.0e}'):g}"
