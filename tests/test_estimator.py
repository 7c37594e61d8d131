"""Estimators, clipping, schedules and optimizers against numbers worked out by hand or by PyTorch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import get_scheduler

from mezo import MeZOConfig, UserError
from mezo.engines.torch.optimizer import Adam, Momentum
from mezo.engines.torch.space import ParameterSpace, direction
from mezo.estimator import (
    ESTIMATORS,
    CurvatureScaled,
    EvolutionStrategy,
    OneSided,
    Outcome,
    Probe,
    QuantileClip,
    Record,
    TwoPoint,
    scheduled_rate,
)
from mezo.philox import derive_seed
from mezo.trainer import make_estimator

SEEDS = [derive_seed(3, 7, query) for query in range(3)]


def test_probes():
    both = [Probe(SEEDS[0], 0.5), Probe(SEEDS[0], -0.5), Probe(SEEDS[1], 0.5), Probe(SEEDS[1], -0.5)]
    here = Probe(SEEDS[0], 0.0)
    assert TwoPoint(3, 0.5).probes(7) == both[:2]
    assert TwoPoint(3, 0.5, 2).probes(7) == both
    assert EvolutionStrategy(3, 0.5, 2).probes(7) == both
    assert CurvatureScaled(3, 0.5, 2).probes(7) == [*both, here]
    assert OneSided(3, 0.5, 2).probes(7) == [both[0], both[2], here]
    assert len(set(SEEDS)) == 3


def coefficients(estimator, losses):
    outcomes = estimator.outcomes(estimator.probes(7), losses)
    assert [o.seed for o in outcomes] == SEEDS[: estimator.num_queries]
    return [o.coefficient for o in outcomes]


def test_mean_over_queries():
    assert coefficients(TwoPoint(3, 0.5), [2.0, 1.5]) == [0.5]
    assert coefficients(TwoPoint(3, 0.5, 2), [2.0, 1.5, 1.0, 3.0]) == [0.25, -1.0]


def test_one_sided_by_hand():
    """Losses 1, 2, 6 at the probes: mean 3, squared distances 4 + 1 + 9, standard deviation √7; 1.5 at θ."""
    found = coefficients(OneSided(3, 0.5, 3), [1.0, 2.0, 6.0, 1.5])
    assert found == pytest.approx([d / (3 * math.sqrt(7)) for d in (-0.5, 0.5, 4.5)])
    assert coefficients(OneSided(3, 0.5, 2), [1.0, 1.0, 0.5]) == [0.0, 0.0]


def test_one_sided_is_the_published_step():
    """η g / σ with g = (1 / εn) Σ (lᵢ − l₀) uᵢ and σ² = Σ (lᵢ − l̄)² / (n − 1) (arXiv 2506.09034), at η = ε · rate."""
    generator = np.random.default_rng(0)
    u_ND, theta_D, epsilon, rate = generator.standard_normal((5, 7)), generator.standard_normal(7), 1e-2, 0.3
    l_N = [float(np.cos(theta_D + epsilon * u_D).sum()) for u_D in u_ND]
    l_0 = float(np.cos(theta_D).sum())
    g_D = sum((loss - l_0) * u_D for loss, u_D in zip(l_N, u_ND, strict=True)) / (epsilon * 5)
    published_D = epsilon * rate * g_D / math.sqrt(sum((loss - np.mean(l_N)) ** 2 for loss in l_N) / 4)
    estimator = OneSided(3, epsilon, 5)
    outcomes = estimator.outcomes(estimator.probes(7), [*l_N, l_0])
    ours_D = rate * sum(o.coefficient * u_D for o, u_D in zip(outcomes, u_ND, strict=True))
    assert ours_D == pytest.approx(published_D, rel=1e-9)


def test_curvature_by_hand():
    """Along the first direction c = |3 − 2·1 + 2| / 0.25 = 12; along the second 0, where the floor holds."""
    found = coefficients(CurvatureScaled(3, 0.5, 2), [3.0, 2.0, 1.5, 0.5, 1.0])
    assert found == pytest.approx([1.0 / 2 / 12**0.1, 1.0 / 2])


def test_ranks_by_hand():
    """Losses 5, 1 / 9, 4 have ranks 2, 0 / 3, 1; over [−½, ½] they lie 2/3 apart in both pairs."""
    assert coefficients(EvolutionStrategy(3, 0.5, 2), [5.0, 1.0, 9.0, 4.0]) == pytest.approx([1 / 6, 1 / 6])
    assert coefficients(EvolutionStrategy(3, 0.5, 2), [1.0, 1.0, 1.0, 1.0]) == [0.0, 0.0]
    assert coefficients(EvolutionStrategy(3, 0.5, 2), [0.0, 1.0, 1.0, 2.0]) == pytest.approx([-1 / 8, -1 / 8])


@given(st.lists(st.integers(1, 100), min_size=4, max_size=4, unique=True), st.floats(0.5, 2), st.floats(-3, 3))
def test_what_each_estimator_does_not_see(losses, factor, shift):
    scaled = [factor * loss + shift for loss in losses]
    for estimator, changed in ((EvolutionStrategy(3, 0.5, 2), scaled), (OneSided(3, 0.5, 3), scaled)):
        assert coefficients(estimator, changed) == pytest.approx(coefficients(estimator, losses), abs=1e-6)
    two_point = [factor * c for c in coefficients(TwoPoint(3, 0.5, 2), losses)]
    assert coefficients(TwoPoint(3, 0.5, 2), scaled) == pytest.approx(two_point, abs=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_goes_down(name):
    """L = ½‖θ − 1‖² from 0, in 40 dimensions."""
    space = ParameterSpace({"w": torch.zeros(40)})
    config = MeZOConfig(model_name_or_path="m", estimator=name, num_queries=8, epsilon=1e-3, seed=3)
    estimator = make_estimator(config)
    for step in range(400):
        losses = []
        probes = estimator.probes(step)
        for probe in probes:
            at = space.parameters["w"].double() + probe.scale * direction(probe.seed, "w", 0, 40, torch.device("cpu"))
            losses.append(float((at - 1).square().sum() / 2))
        rate = {"fzoo": 0.03 * (1 - step / 400), "es": 0.2 * (1 - step / 400)}.get(name, 0.03)
        space.update([Record(step, *o, rate, 1, 1) for o in estimator.outcomes(probes, losses)], 0.0)
    assert float((space.parameters["w"] - 1).square().sum() / 2) < 2.0  # from 20


def test_clipping_by_a_lagged_quantile():
    clip = QuantileClip(0.5, 20)

    def step(*values):
        return [o.coefficient for o in clip([Outcome(1, 0.0, 0.0, v) for v in values])]

    assert step(100.0) == [100.0]  # nothing to compare with
    assert clip.limit() == math.inf  # one value of a window of 20 is too little
    assert step(-2.0) == [-2.0]
    assert clip.limit() == 51.0
    assert step(-3.0, 60.0) == [-3.0, 51.0]  # its own values do not count yet
    assert clip.limit() == (3 + 60) / 2
    for _ in range(20):
        step(1.0)
    assert clip.limit() == 1.0  # the window has moved on
    assert step(7.0) == [1.0]
    clip.observe([0.0] * 20)
    assert clip.limit() == math.inf  # 0 would stop the run


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_are_transformers(kind, warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=23)
    for step in range(23):
        assert scheduled_rate(0.3, step, 23, kind, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def gradients(steps=12):
    return [torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(steps)]


def test_adam_is_pytorchs():
    theirs = torch.nn.Parameter(torch.zeros(5, 3))
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-6)
    ours, adam = torch.zeros(5, 3), Adam(0.8, 0.95, 1e-6)
    for gradient in gradients():
        theirs.grad = gradient.clone()
        reference.step()
        ours -= 0.01 * adam.step(gradient)
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_momentum_is_pytorchs_with_dampening():
    """PyTorch starts its buffer with the first gradient undamped; ours with a share of it, as every later step."""
    theirs = torch.nn.Parameter(torch.zeros(5, 3))
    reference = torch.optim.SGD([theirs], lr=0.01, momentum=0.9, dampening=0.9)
    momentum, first = Momentum(0.9), torch.zeros(5, 3)
    for n, gradient in enumerate([torch.zeros(5, 3), *gradients()]):
        theirs.grad = gradient.clone()
        reference.step()
        first -= 0.01 * momentum.step(gradient)
        assert torch.allclose(first, theirs, atol=1e-6), n


def test_the_optimizer_sees_the_sum_over_directions():
    seen = []

    class Watching:
        state: dict = {}  # noqa: RUF012

        def step(self, gradient):
            seen.append(gradient.clone().view(4, 3))
            return 2 * gradient

    weights = torch.ones(4, 3)
    space = ParameterSpace({"w": weights}, optimizer=Watching())
    space.update([Record(0, 5, 0.0, 0.0, 0.3, 0.1, 1, 1, 0, 2), Record(0, 6, 0.0, 0.0, -0.7, 0.1, 1, 1, 1, 2)], 0.5)
    z = [direction(seed, "w", 0, 12, torch.device("cpu")).view(4, 3) for seed in (5, 6)]
    assert torch.allclose(seen[0], 0.3 * z[0] - 0.7 * z[1], atol=1e-6)
    assert torch.allclose(weights, torch.ones(4, 3) * 0.95 - 0.1 * 2 * seen[0], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "fzoo"}, "num_queries must be at least 2"),
        ({"estimator": "es"}, "num_queries must be at least 2"),
        ({"clip_quantile": 1.5}, "clip_quantile must be above 0"),
        ({"clip_quantile": 0.9, "estimator": "fzoo", "num_queries": 4}, "scales its coefficients itself"),
        ({"optim": "adam"}, "a state as large as the weights"),
        ({"optim": "adam", "use_peft": True, "engine": "sglang"}, "needs engine torch"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more"),
        ({"estimator": "spas"}, "estimator must be one of"),
    ],
)
def test_settings_that_cannot_work(options, message):
    with pytest.raises(UserError, match=message):
        MeZOConfig.from_dict({"model_name_or_path": "m", **options})
