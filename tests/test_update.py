"""Updates: the formula, stochastic rounding, decay, and independence of how the work is cut."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezo import philox
from mezo.engines.torch import space as space_module
from mezo.engines.torch.rounding import stochastic_round
from mezo.engines.torch.space import ParameterSpace, direction, direction_norm
from mezo.estimator import Probe, Record, TwoPoint


def record(step, coefficient, learning_rate, query=0, num_queries=1, seed=None):
    seed = philox.derive_seed(0, step, query) if seed is None else seed
    return Record(step, seed, 0.0, 0.0, coefficient, learning_rate, 1, 1, query, num_queries)


def z(seed, name, numel):
    return direction(seed, name, 0, numel, torch.device("cpu"))


def test_two_point_estimator_by_hand():
    estimator = TwoPoint(seed=3, epsilon=0.5)
    probes = estimator.probes(7)
    seed = philox.derive_seed(3, 7)
    assert probes == [Probe(seed, 0.5), Probe(seed, -0.5)]
    assert estimator.outcomes(probes, [2.0, 1.25]) == [(seed, 2.0, 1.25, 0.75)]
    assert estimator.probes(8)[0].seed != seed


def test_update_is_sgd_along_all_directions_with_decoupled_decay():
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 5), torch.randn(6)
    before = weight.clone(), bias.clone()
    records = [record(0, 0.3, 0.1, query, 2) for query in range(2)]
    ParameterSpace({"w": weight, "b": bias}).update(records, weight_decay=0.5)
    for name, value, old, decay in (("w", weight, before[0], 0.5), ("b", bias, before[1], 0.0)):
        step = sum(0.3 * z(r.seed, name, old.numel()).double() for r in records).view(old.shape)
        expected = old.double() * (1 - 0.1 * decay) - 0.1 * step
        assert torch.allclose(value.double(), expected, rtol=0, atol=1e-6)  # four float32 roundings near 1


def test_a_width_widens_z_and_multiplies_the_learning_rate_by_its_square():
    """projected_grad is given here, so the update grows by the width; through the losses it grows by it once more."""
    weight, head = torch.zeros(50), torch.zeros(50)
    space = ParameterSpace({"w": weight, "head": head}, widths={"head": 7.0})
    r = record(0, 0.5, 0.1)
    space.update([r], 0.0)
    assert torch.allclose(weight, -0.05 * z(r.seed, "w", 50), rtol=1e-6)
    assert torch.allclose(head, -0.35 * z(r.seed, "head", 50), rtol=1e-6)
    assert space.scale("head", r.seed) == 7.0


def test_normalised_directions_have_unit_norm_per_tensor():
    weight = torch.zeros(300, 7)
    space = ParameterSpace({"w": weight}, normalize_perturbations=True)
    r = record(0, 1.0, 1.0)
    space.update([r], 0.0)
    assert weight.double().norm() == pytest.approx(1.0, abs=1e-6)
    norm = direction_norm(r.seed, "w", weight.numel(), torch.device("cpu"))
    assert norm == pytest.approx(float(z(r.seed, "w", weight.numel()).double().norm()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [64, 1000, 4097])
def test_update_does_not_depend_on_chunks_or_threads(dtype, chunk, monkeypatch):
    torch.manual_seed(0)
    start = torch.randn(70, 143).to(dtype)
    records = [record(0, 0.01, 0.1, query, 2) for query in range(2)]
    whole, pieces = start.clone(), start.clone()
    ParameterSpace({"w": whole}).update(records, weight_decay=0.1)
    monkeypatch.setattr(space_module, "CHUNK", chunk)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ParameterSpace({"w": pieces}).update(records, weight_decay=0.1)
    torch.set_num_threads(threads)
    assert torch.equal(whole, pieces)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_updates_of_a_twentieth_ulp_add_up(dtype):
    """Each update is 1/20 of the rounding step; nearest rounding would lose every one of them."""
    weight = torch.full((4000,), 1.25, dtype=dtype)
    ulp = float(
        torch.nextafter(torch.tensor(1.25, dtype=torch.bfloat16), torch.tensor(2.0, dtype=torch.bfloat16)) - 1.25
    )
    ulp = ulp if dtype == torch.bfloat16 else 2.0**-10
    seeds = [philox.derive_seed(1, step) for step in range(1000)]
    for step, seed in enumerate(seeds):
        # Coefficient times z would have random signs; a constant drift is made by hand through the same store.
        moved = weight.float() - ulp / 20
        bits = philox.rounding_bits(seed, philox.stream_id("rounding", "w"), 0, len(weight), weight.device)
        weight = stochastic_round(moved, bits, dtype)
        del step
    moved = float(1.25 - weight.double().mean()) / ulp
    # Expected 50 ulp; each element is a sum of 1,000 Bernoulli(1/20): s.d. 6.9, of the mean over 4,000 0.11.
    assert moved == pytest.approx(50.0, abs=5 * math.sqrt(1000 * 0.05 * 0.95 / 4000))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_below_rounding_follow_float32_through_the_engine_path(dtype):
    torch.manual_seed(0)
    start = (torch.rand(20_000) + 1.0).to(dtype)
    low, exact = start.clone(), start.double()
    ulp = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    rate = ulp / 20
    for step in range(1000):
        r = record(step, 1.0, rate)
        ParameterSpace({"w": low}).update([r], 0.0)
        exact -= rate * z(r.seed, "w", len(exact)).double()
    change, wanted = low.double() - start.double(), exact - start.double()
    # Rounding adds zero-mean noise; the change must regress on the wanted one with slope 1.
    slope = float((change @ wanted) / (wanted @ wanted))
    noise = float((change - wanted).std() / (wanted.std() * math.sqrt(len(wanted))))
    assert slope == pytest.approx(1.0, abs=5 * noise)
    nearest = start.clone()
    for step in range(20):
        nearest -= (rate * z(philox.derive_seed(0, step), "w", len(nearest))).to(dtype)
    assert (nearest != start).double().mean() < 0.02  # what the naive update does: almost nothing moves


@given(value=st.floats(-70000, 70000, width=32), seed=st.integers(0, 1000))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_gives_a_neighbour_and_keeps_exact_values(value, seed, dtype):
    x = torch.full((64,), value)
    bits = philox.rounding_bits(seed, 1, 0, 64, x.device)
    rounded = stochastic_round(x, bits, dtype)
    nearest = x[:1].to(dtype)
    if not nearest.isfinite().all():
        return
    if float(nearest) == value:
        assert (rounded == nearest).all()
        return
    grid = np.float16 if dtype == torch.float16 else None
    if grid is not None:
        # Overflow to infinity is a neighbour only above the largest float16.
        down, up = sorted(
            (
                float(nearest),
                float(np.nextafter(grid(nearest.item()), grid(math.copysign(np.inf, value - float(nearest))))),
            )
        )
    else:
        toward = torch.tensor([math.copysign(math.inf, value - float(nearest))], dtype=dtype)
        down, up = sorted((float(nearest), float(torch.nextafter(nearest, toward))))
    assert set(rounded.double().tolist()) <= {down, up}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0003, -1.0003, 3.3e-5, -6.1e-6, 5.0e-8, 0.99999, 123.456])
def test_rounding_is_right_on_average(dtype, value):
    n = 1 << 17
    x = torch.full((n,), value)
    rounded = stochastic_round(x, philox.rounding_bits(1, 2, 0, n, x.device), dtype).double()
    # 16 random bits resolve 2⁻¹⁶ of a rounding step (float16 subnormals too); five standard errors on top.
    step = float(rounded.max() - rounded.min())
    assert float(rounded.mean()) == pytest.approx(float(x[0]), abs=step * (5 / math.sqrt(n) / 2 + 2**-13) + 1e-12)


def test_rounding_keeps_infinities_and_nan():
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    for dtype in (torch.bfloat16, torch.float16):
        rounded = stochastic_round(x, torch.full((5,), 0xFFFF, dtype=torch.int32), dtype)
        assert rounded[0] == math.inf
        assert rounded[1] == -math.inf
        assert rounded[2].isnan()
        assert (rounded[3:] == 0).all()


def test_segments_are_the_normals_of_each_parameter(monkeypatch):
    """Tensors larger than a chunk, sizes that are no multiples of 4, a scale for each."""
    monkeypatch.setattr(philox, "_SEGMENT_CHUNK", 64)
    bases = [torch.randn(37), torch.randn(5, 60), torch.randn(3)]
    outs = [torch.empty_like(base) for base in bases]
    streams = [philox.stream_id("direction", str(i)) for i in range(3)]
    scales = [0.5, -0.25, 2.0]
    philox.Segments(bases, outs, streams).add_normals(scales, seed=11)
    for base, out, stream, scale in zip(bases, outs, streams, scales, strict=True):
        z = philox.normals(11, stream, torch.tensor([0]), base.numel())[0].view_as(base)
        assert torch.equal(out, base + scale * z)
