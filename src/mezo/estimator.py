"""From losses to coefficients: which probes a step evaluates, and what multiplies each direction afterwards."""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mezo.philox import derive_seed


class Probe(NamedTuple):
    """One perturbed copy of the model: θ + scale · z(seed). `scale` is +ε or −ε."""

    seed: int
    scale: float


UNPERTURBED = Probe(0, 0.0)


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


class Outcome(NamedTuple):
    """What a step learned about one direction, and what multiplies it in the update.

    `loss_minus` is the loss at θ − εz, or at θ where the estimator is one-sided.
    """

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
class _Queries:
    """n directions a step.

    Args:
        seed: of the run; each step's directions derive from it.
        epsilon: distance of a probe from θ, in units of z.
        num_queries: n.
    """

    seed: int
    epsilon: float
    num_queries: int = 1

    def _both_sides(self, step: int) -> list[Probe]:
        """[+ε, −ε] along each direction of a step."""
        seeds = self._seeds(step)
        return [Probe(seed, scale) for seed in seeds for scale in (self.epsilon, -self.epsilon)]

    def _seeds(self, step: int) -> list[int]:
        return [derive_seed(self.seed, step, query) for query in range(self.num_queries)]

    def _pairs(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[tuple[int, float, float]]:
        """(seed, loss at +ε, loss at −ε) of each direction."""
        return [(p.seed, a, b) for p, a, b in zip(probes[::2], losses[::2], losses[1::2], strict=True)]


class TwoPoint(_Queries):
    """SPSA: the mean over n directions of projected_grad = (L(θ + εz) − L(θ − εz)) / 2ε, times z.

    MeZO, arXiv 2305.17333, definitions 1 (n = 1) and 2. 2n forward passes.
    """

    def probes(self, step: int) -> list[Probe]:
        """See `Estimator.probes`."""
        return self._both_sides(step)

    def outcomes(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[Outcome]:
        """See `Estimator.outcomes`; the coefficient is projected_grad / n."""
        width = 2 * self.epsilon * self.num_queries
        return [Outcome(seed, a, b, (a - b) / width) for seed, a, b in self._pairs(probes, losses)]


class OneSided(_Queries):
    """FZOO: (1 / nσ) Σ (L(θ + εzᵢ) − L(θ)) zᵢ with σ the standard deviation of the n losses L(θ + εzᵢ).

    arXiv 2506.09034 steps by η g / σ with g = (1 / εn) Σ (L(θ + εuᵢ) − L(θ)) uᵢ, uᵢ of random signs. Here zᵢ is normal
    and η is ε · learning_rate: σ is about ε‖∇L‖, so the learning rate is a step's length along z, whatever the loss's
    scale and ε. n + 1 forward passes.
    """

    def probes(self, step: int) -> list[Probe]:
        """See `Estimator.probes`; θ itself comes last, so that the first probe names a direction."""
        seeds = self._seeds(step)
        return [*(Probe(seed, self.epsilon) for seed in seeds), Probe(seeds[0], 0.0)]

    def outcomes(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[Outcome]:
        """See `Estimator.outcomes`; coefficients are 0 where all losses are the same."""
        *moved, here = losses
        width = self.num_queries * statistics.stdev(moved)
        return [
            Outcome(probe.seed, loss, here, (loss - here) / width if width else 0.0)
            for probe, loss in zip(probes[:-1], moved, strict=True)
        ]


class CurvatureScaled(_Queries):
    """1.5-SPSA: the mean over n directions of projected_grad / max(c^α, 1), times z.

    c = |L(θ + εz) − 2L(θ) + L(θ − εz)| / ε² is the curvature along z, which one more forward pass gives for all
    directions; α = 0.1. arXiv 2609.38095, there with random signs for z and ε equal to the learning rate: few steps
    with many probes (n = 40) of large batches (512 rows). 2n + 1 forward passes.
    """

    _ALPHA, _FLOOR = 0.1, 1.0

    def probes(self, step: int) -> list[Probe]:
        """See `Estimator.probes`; θ itself comes last."""
        return [*self._both_sides(step), Probe(self._seeds(step)[0], 0.0)]

    def outcomes(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[Outcome]:
        """See `Estimator.outcomes`."""
        outcomes = []
        for seed, plus, minus in self._pairs(probes[:-1], losses[:-1]):
            curvature = abs(plus - 2 * losses[-1] + minus) / self.epsilon**2
            width = 2 * self.epsilon * self.num_queries * max(curvature**self._ALPHA, self._FLOOR)
            outcomes.append(Outcome(seed, plus, minus, (plus - minus) / width))
        return outcomes


class EvolutionStrategy(_Queries):
    """Evolution strategy with antithetic sampling and rank shaping: Σ (u₊ − u₋) z / 2n.

    u are the ranks of all 2n losses, spread evenly over [−½, ½]; the losses' size plays no role, so any objective will
    do. Salimans et al., arXiv 1703.03864, without their 1 / ε: the learning rate is in units of z. 2n forward passes.
    """

    def probes(self, step: int) -> list[Probe]:
        """See `Estimator.probes`."""
        return self._both_sides(step)

    def outcomes(self, probes: Sequence[Probe], losses: Sequence[float]) -> list[Outcome]:
        """See `Estimator.outcomes`; equal losses share the mean of their ranks."""
        shaped = [rank / (len(losses) - 1) - 0.5 for rank in _ranks(losses)]
        width = 2 * self.num_queries
        return [
            Outcome(seed, plus, minus, (a - b) / width)
            for (seed, plus, minus), a, b in zip(self._pairs(probes, losses), shaped[::2], shaped[1::2], strict=True)
        ]


def _ranks(values: Sequence[float]) -> list[float]:
    """0 for the smallest; equal values share the mean of their places."""
    ordered = sorted(values)
    return [bisect.bisect_left(ordered, v) + (ordered.count(v) - 1) / 2 for v in values]


ESTIMATORS: Mapping[str, type[TwoPoint | OneSided | CurvatureScaled | EvolutionStrategy]] = {
    "spsa": TwoPoint,
    "fzoo": OneSided,
    "1.5-spsa": CurvatureScaled,
    "es": EvolutionStrategy,
}


class QuantileClip:
    """Limits |projected_grad| to a quantile of the ones before it: c ← min(max(c, −q), q).

    q is the quantile of |c| over the last `window` values, those of the step itself not among them, so that an outlier
    cannot raise its own limit. AutoClip (arXiv 2007.14469) does so with gradient norms, over all values up to the
    present one.

    Args:
        quantile: of |projected_grad|, above 0 and at most 1.
        window: how many earlier values count. Until there are a tenth of them nothing is limited.
    """

    def __init__(self, quantile: float, window: int):
        self._quantile = quantile
        self._window: deque[float] = deque(maxlen=window)

    def __call__(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """One step's outcomes, limited; their own values count from the next step on."""
        limit = self.limit()
        clipped = [o._replace(coefficient=min(max(o.coefficient, -limit), limit)) for o in outcomes]
        self.observe([o.coefficient for o in outcomes])
        return clipped

    def limit(self) -> float:
        """The quantile at present, by linear interpolation; infinite while there is too little to tell.

        And where it is 0, as with an objective that counts answers and seldom differs: nothing would move any more.
        """
        values = sorted(self._window)
        if 10 * len(values) < (self._window.maxlen or 0) or not values:
            return math.inf
        place = self._quantile * (len(values) - 1)
        low = math.floor(place)
        high = min(low + 1, len(values) - 1)
        return values[low] + (place - low) * (values[high] - values[low]) or math.inf

    def observe(self, coefficients: Sequence[float]) -> None:
        """Values of a step, unlimited."""
        self._window.extend(map(abs, coefficients))


def scheduled_rate(rate: float, step: int, max_steps: int, kind: str, warmup_steps: int) -> float:
    """Learning rate of step `step`, counted from 0, as transformers' schedulers of the same name give it.

    η s / w in the first w steps; then, with p = (s − w) / (S − w), η, η (1 − p) or η (1 + cos πp) / 2.

    Args:
        rate: the highest.
        step: from 0 to `max_steps` − 1.
        max_steps: of the run.
        kind: constant, linear (down to 0) or cosine (half a period down to 0).
        warmup_steps: steps in which it grows from 0.
    """
    if step < warmup_steps:
        return rate * step / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if kind == "linear":
        return rate * max(0.0, 1.0 - progress)
    return rate * 0.5 * (1.0 + math.cos(math.pi * progress)) if kind == "cosine" else rate


def is_finite(record: Record) -> bool:
    """Whether the record may be applied to weights."""
    return math.isfinite(record.loss_plus) and math.isfinite(record.loss_minus) and math.isfinite(record.coefficient)
