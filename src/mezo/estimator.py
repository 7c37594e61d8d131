"""From losses to coefficients: which probes a step evaluates, and what multiplies each direction afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mezo.philox import derive_seed


class Probe(NamedTuple):
    """One perturbed copy of the model: θ + scale · z(seed). `scale` is +ε or −ε."""

    seed: int
    scale: float


@dataclass(frozen=True, slots=True)
class Record:
    """What one step did along one direction; the unit of the journal.

    A step with several directions has one record for each, `query` = 0 … `num_queries` − 1. The update is
    θ ← θ − learning_rate · Σ coefficient · z(seed). Losses are float64 means over the batch in nats. `num_tokens` are
    the batch's, which every probe asks for; `computed_tokens` went through the model in this step, under all probes.
    """

    step: int
    seed: int
    loss_plus: float
    loss_minus: float
    coefficient: float
    learning_rate: float
    num_tokens: int
    num_examples: int
    query: int = 0
    num_queries: int = 1
    computed_tokens: int = 0

    @property
    def asked_tokens(self) -> int:
        """Tokens of the batch under all probes of the step."""
        return 2 * self.num_queries * self.num_tokens


class Outcome(NamedTuple):
    """What a step learned about one direction, and what multiplies it in the update."""

    seed: int
    loss_plus: float
    loss_minus: float
    coefficient: float


class Estimator(Protocol):
    """Which probes a step evaluates, and what their losses say. Pure: no state, no tensors."""

    def probes(self, step: int) -> list[Probe]:
        """Probes of step `step`, counted from 0."""
        ...

    def outcomes(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[Outcome]:
        """One outcome per direction, from one batch loss per probe."""
        ...


@dataclass(frozen=True, slots=True)
class TwoPoint:
    """SPSA with one direction: projected_grad = (L(θ + εz) − L(θ − εz)) / 2ε (MeZO, arXiv 2305.17333, definition 1)."""

    seed: int
    epsilon: float

    def probes(self, step: int) -> list[Probe]:
        """[+ε, −ε] along the direction of this step."""
        direction_seed = derive_seed(self.seed, step)
        return [Probe(direction_seed, self.epsilon), Probe(direction_seed, -self.epsilon)]

    def outcomes(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[Outcome]:
        """One outcome, whose coefficient is projected_grad."""
        loss_plus, loss_minus = losses
        return [Outcome(probes[0].seed, loss_plus, loss_minus, (loss_plus - loss_minus) / (2 * self.epsilon))]


def is_finite(record: Record) -> bool:
    """Whether the record may be applied to weights."""
    return math.isfinite(record.loss_plus) and math.isfinite(record.loss_minus) and math.isfinite(record.coefficient)
