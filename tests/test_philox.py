"""The generator against its published vectors; normals against float64; independence of slicing, kernels and dtype."""

import math

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


def test_normals_are_box_muller_in_float64_within_1e_6():
    words = philox.philox_words(5, philox.stream_id("direction", "w"), torch.arange(1 << 17))
    k = (words >> 8).double()
    radius = torch.sqrt(-2 * torch.log((k[:, 0::2] + 1) * 2.0**-24))
    angle = 2 * math.pi * k[:, 1::2] * 2.0**-24
    expected = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).view(-1, 4)
    # float32 with |z| up to 5.8: one unit in the last place is 4.8e-7.
    assert (philox.words_to_normals(words) - expected).abs().max() < 1e-6


def test_normals_at_the_ends_of_the_word_range_are_finite():
    words = torch.tensor([[0, 0, 0xFFFFFFFF, 0xFFFFFFFF], [0xFFFFFFFF, 0, 0, 0xFFFFFFFF]])
    z = philox.words_to_normals(words)
    assert z.isfinite().all()
    assert z.abs().max() == pytest.approx(math.sqrt(2 * 24 * math.log(2)), rel=1e-6)


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
