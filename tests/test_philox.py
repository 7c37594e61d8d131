"""The generator against its published vectors; normals against float64; independence of slicing, kernels and dtype."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo import philox
from mezo.kernels import cpu

# Random123's kat_vectors for "philox4x32 10": counter, key, expected words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_words_equal_published_vectors(counter, key, expected):
    block = counter[0] | counter[1] << 32
    blocks = torch.tensor([block - (1 << 64) if block >= 1 << 63 else block])
    words = philox.philox_words(key[0] | key[1] << 32, counter[2] | counter[3] << 32, blocks)
    assert tuple(words[0].tolist()) == expected


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    starts=st.lists(st.integers(0, 2**40), min_size=1, max_size=5),
    width=st.integers(0, 2100),
)
def test_compiled_kernel_is_bit_equal_to_reference(seed, starts, width):
    pytest.importorskip("numba")
    stream = philox.stream_id("direction", "weight")
    starts_R = torch.tensor(starts)
    expected = philox.reference_normals(seed, stream, starts_R, width)
    assert cpu.enabled()
    assert torch.equal(philox.normals(seed, stream, starts_R, width).view(torch.int32), expected.view(torch.int32))


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 2**40), width=st.integers(0, 70_000), scale=st.floats(-1, 1, width=32))
@pytest.mark.parametrize("compiled", [True, False])
def test_both_signs_are_those_of_two_draws(compiled, start, width, scale):
    base = torch.linspace(-0.03, 0.03, width)
    stream = philox.stream_id("direction", "weight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "enabled", lambda: compiled)
        both = philox.add_normals_both(base, scale, 3, stream, start)
        expected = [philox.add_normals(base, s, 3, stream, start) for s in (scale, -scale)]
    assert all(map(torch.equal, both, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [True, False])
def test_add_normals_rounds_product_and_sum_one_after_the_other(dtype, compiled, monkeypatch):
    monkeypatch.setattr(cpu, "enabled", lambda: compiled)
    base = torch.linspace(-0.03, 0.03, 70_001).to(dtype)
    stream = philox.stream_id("direction", "weight")
    z = philox.reference_normals(3, stream, torch.tensor([5]), len(base))[0]
    expected = base.float() + z * 1.7e-3
    before = base.clone()
    assert torch.equal(philox.add_normals(base, 1.7e-3, 3, stream, 5), expected)
    assert torch.equal(base, before)
    if dtype == torch.float32:
        philox.add_normals(base, 1.7e-3, 3, stream, 5, out_N=base)
        assert torch.equal(base, expected)


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 5000), width=st.integers(1, 3000))
@pytest.mark.parametrize("function", [philox.reference_normals, philox.normals])
def test_any_slice_equals_the_slice_of_the_whole(function, start, width):
    stream = philox.stream_id("direction", "weight")
    whole = function(9, stream, torch.tensor([0]), 8000)[0]
    assert torch.equal(function(9, stream, torch.tensor([start]), width)[0], whole[start : start + width])


def test_long_ranges_cross_the_chunks_of_the_reference():
    stream = philox.stream_id("direction", "weight")
    whole = philox.reference_normals(1, stream, torch.tensor([2]), 300_001)[0]
    part = philox.reference_normals(1, stream, torch.tensor([131_000]), 500)[0]
    assert torch.equal(whole[130_998:131_498], part)


def test_tables_are_box_muller_in_float64():
    radius, cos, sin = philox.tables(torch.device("cpu"))
    u = (torch.arange(1 << 16).double() + 0.5) / (1 << 16)
    angle = (torch.arange(1 << 15).double() - 16383) * math.pi / (1 << 15)
    exact = torch.sqrt(-2 * u.log())
    assert (radius - exact).abs().max() < 1.1e-4
    # The polynomials' own errors: seven powers of the angle.
    assert (cos - angle.cos()).abs().max() < 7e-6
    assert (sin - angle.sin()).abs().max() < 7e-7


def test_moments_of_the_tables_are_those_of_a_normal():
    """Over all words, exactly: the sign bit makes every odd moment 0."""
    radius, cos, sin = (t.double() for t in philox.tables(torch.device("cpu")))
    for side in (cos, sin):
        assert radius.square().mean() * side.square().mean() == pytest.approx(1, abs=2e-5)
        assert (radius**4).mean() * (side**4).mean() == pytest.approx(3, abs=5e-4)
    assert radius.square().mean() * (cos * sin).mean() == pytest.approx(0, abs=1e-8)
    assert (radius**4).mean() * (cos * sin).square().mean() == pytest.approx(1, abs=5e-4)


def test_polynomials_round_as_fused_multiply_add():
    """Against exact rational arithmetic, with sums that rounding twice would get wrong."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(500, generator=generator) for _ in range(2))
    c = torch.randn(500, generator=generator) * 2.0 ** torch.arange(500).remainder(60).sub(30)
    # 1 + 2⁻²³ times 1 + 2⁻¹², plus 2⁻⁶⁰: just above the middle between two floats.
    a[0], b[0], c[0] = 1 + 2**-23, 1 + 2**-12 - 2**-24, 2.0**-80
    a[1], b[1], c[1] = 1 + 2**-12, 1 + 2**-12, 2.0**-70
    found = philox._fma(a, b, c)
    for x, y, z, rounded in zip(a.tolist(), b.tolist(), c.tolist(), found, strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        error = abs(Fraction(rounded.item()) - exact)
        for neighbour in (torch.tensor(-math.inf), torch.tensor(math.inf)):
            other = abs(Fraction(torch.nextafter(rounded, neighbour).item()) - exact)
            even = rounded.view(torch.int32).item() % 2 == 0
            assert error < other or (error == other and even)


def test_normals_follow_the_bits_of_their_word():
    radius, cos, sin = philox.tables(torch.device("cpu"))
    words = torch.tensor([[0, 0xFFFFFFFF, 1 << 31, 0x7FFF8000 | 16383]])
    z = philox.words_to_normals(words)[0].view(4, 2)
    assert z.isfinite().all()
    expected = [radius[0] * torch.stack((cos[0], sin[0])), -radius[-1] * torch.stack((cos[-1], sin[-1])),
                -radius[0] * torch.stack((cos[0], sin[0])), torch.stack((radius[-1], torch.tensor(0.0)))]  # fmt: skip
    assert torch.allclose(z, torch.stack(expected), rtol=1e-5, atol=0)
    assert radius[0] == pytest.approx(math.sqrt(2 * 17 * math.log(2)), rel=1e-5)


def test_moments_and_correlations_are_those_of_independent_normals():
    n = 1 << 20
    z = philox.normals(3, philox.stream_id("direction", "a"), torch.tensor([0]), n)[0].double()
    other = philox.normals(3, philox.stream_id("direction", "b"), torch.tensor([0]), n)[0].double()
    next_seed = philox.normals(4, philox.stream_id("direction", "a"), torch.tensor([0]), n)[0].double()
    bound = 5 / math.sqrt(n)  # five standard errors
    assert abs(z.mean()) < bound
    assert abs(z.square().mean() - 1) < bound * math.sqrt(2)
    assert abs((z**4).mean() - 3) < bound * math.sqrt(96)
    for x, y in ((z, other), (z, next_seed), (z[1:], z[:-1]), (z[2:], z[:-2])):
        assert abs((x * y).mean()) < bound


def test_global_random_state_neither_matters_nor_changes():
    stream = philox.stream_id("direction", "w")
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = philox.normals(8, stream, torch.tensor([0]), 100)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, philox.normals(8, stream, torch.tensor([0]), 100))


def test_derived_seeds_differ():
    seeds = {philox.derive_seed(seed, step, query) for seed in (0, 1) for step in range(50) for query in range(3)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(("start", "stop"), [(0, 17), (1, 18), (7, 8), (12345, 12999)])
def test_rounding_bits_and_uniforms_do_not_depend_on_slicing(start, stop):
    stream = philox.stream_id("rounding", "w")
    device = torch.device("cpu")
    bits = philox.rounding_bits(1, stream, 0, 13_000, device)
    assert bits.min() >= 0
    assert bits.max() < 1 << 16
    assert torch.equal(philox.rounding_bits(1, stream, start, stop, device), bits[start:stop])
    uniforms = philox.uniforms(1, stream, 0, 13_000, device)
    assert uniforms.mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(philox.uniforms(1, stream, start, stop, device), uniforms[start:stop])


def test_seeds_are_words_of_the_generator():
    for seed, step, query in ((0, 0, 0), (2**64 - 3, 7, 1), (12345, (1 << 33) + 5, 15)):
        words = philox.philox_words(seed, philox.stream_id("seed", str(query)), torch.tensor([step]))[0].tolist()
        assert philox.derive_seed(seed, step, query) == words[1] << 32 | words[0]
