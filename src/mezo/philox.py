"""Random numbers that are a pure function of (seed, stream, name, element index).

The generator is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a 128-bit
counter and a 64-bit key go through ten rounds of multiplication and exclusive-or and come out as four 32-bit words.

    key     = the seed                                       (64 bits)
    counter = (element index // 8, BLAKE2b-64 of stream and parameter name)
    word    = element index % 8 // 2

Nothing depends on traversal order, chunking, dtype, device or sharding, and no global random state exists. A word
gives two normals by Box-Muller, r · cos φ and r · sin φ:

    bits 15 to 30   k   r = √(−2 ln((k + ½) / 2¹⁶))
    bits 0 to 14    m   φ = (m − 16383) · π / 2¹⁵, half a circle
    bit 31              the sign of r, the other half

So r, cos φ and sin φ are three short tables. Their entries are polynomials in float32 with fused multiply-add, no
further off than 1.1e-4, which a GPU evaluates faster than it reads tables, with the same bits. |z| ≤ 4.86, and the
moments are those of a normal within 1e-4. This file is the reference; `mezo.kernels` holds faster versions of the same
bits.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mezo.kernels import cpu as cpu_kernels
from mezo.kernels import gpu as gpu_kernels

RNG_VERSION = "philox4x32-10/box-muller-16/2"

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
NORMALS = 8  # of one counter block
# Counter blocks per chunk of the reference: the working set stays inside a core's second-level cache.
_CHUNK_BLOCKS = 1 << 14
# Elements of a segment handled at once where there is no fused kernel.
_SEGMENT_CHUNK = 1 << 20


def stream_id(stream: str, name: str) -> int:
    """64-bit identifier of one stream: a purpose ("direction", "rounding", …) and a parameter name."""
    return int.from_bytes(hashlib.blake2b(f"{stream}\0{name}".encode(), digest_size=8).digest(), "little")


def derive_seed(seed: int, step: int, query: int = 0) -> int:
    """Seed (64 bits) of a step's `query`-th direction, a pure function of the run's seed.

    The first two of `philox_words` of one block, in integers, which take a hundredth of the time.
    """
    stream = stream_id("seed", str(query))
    k0, k1 = seed & _MASK32, seed >> 32
    c0, c1, c2, c3 = step & _MASK32, step >> 32, stream & _MASK32, stream >> 32
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & _MASK32, p0 >> 32 ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c1 << 32 | c0


def philox_words(seed: int, stream: int, blocks_N: Tensor) -> Tensor:
    """Philox 4x32-10 on counters (block, stream) under the key `seed`.

    Args:
        seed: unsigned 64-bit key.
        stream: unsigned 64-bit upper half of the counter.
        blocks_N: int64 lower halves of the counter.

    Returns:
        int64 tensor [N, 4] with values in [0, 2³²).
    """
    k0, k1 = seed & _MASK32, seed >> 32
    c0, c1 = blocks_N & _MASK32, (blocks_N >> 32) & _MASK32
    c2 = torch.full_like(blocks_N, stream & _MASK32)
    c3 = torch.full_like(blocks_N, stream >> 32)
    for _ in range(10):
        # The 64-bit products wrap into negative numbers; masks after each shift remove the sign bits.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK32)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK32)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack((c0, c1 & _MASK32, c2, c3 & _MASK32), dim=-1)


# Coefficients, lowest power first. Radius: −2 ln u in the mantissa 1 ≤ m < 2 of (k + ½) · 2¹⁵, but for a multiple of
# its exponent; then 1 / √(1 − e) in the error e of a first guess of 1 / √s. Angle: sin and cos in units of π / 2¹⁵.
LOG = (221.53724670410156, -5.693475246429443, 4.947486400604248, -2.2754604816436768, 0.5813015103340149,
       -0.06258977949619293)  # fmt: skip
LOG_EXPONENT = -1.6525916635146132e-07  # −2 ln 2 / 2²³: bits of a float read as an integer are 2²³ · its logarithm
GUESS = 0x5F374800
ROOT = (0.9999994039535522, 0.5010913610458374, 0.3762030601501465)
SIN = (9.587347449269146e-05, -1.468590331808739e-13, 6.728349908456157e-23, -1.36728183775711e-32)
COS = (0.9999933242797852, -4.595087865766345e-09, 3.505254773490422e-18, -9.872256228135723e-28)


class Tables(NamedTuple):
    """What Box-Muller needs, float32: r of k [65536], cos φ and sin φ of m [32768]."""

    radius: Tensor
    cos: Tensor
    sin: Tensor


@functools.cache
def tables(device: torch.device) -> Tables:
    """The three tables."""
    if device.type != "cpu":
        return Tables(*(t.to(device) for t in tables(torch.device("cpu"))))
    u_N = ((torch.arange(1 << 16) << 15) | 1 << 14).to(torch.int32).float()
    bits_N = u_N.view(torch.int32)
    mantissa_N = ((bits_N & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    exponent_N = _fma(bits_N.float(), LOG_EXPONENT, LOG[0])
    s_N = _fma(_polynomial(LOG[1:], mantissa_N), mantissa_N, exponent_N)
    guess_N = (GUESS - (s_N.view(torch.int32) >> 1)).view(torch.float32)
    root_N = s_N * guess_N
    radius_N = root_N * _polynomial(ROOT, _fma(-root_N, guess_N, 1.0))
    x_M = torch.arange(1 << 15).float() - 16383.0
    square_M = x_M * x_M
    return Tables(radius_N, _polynomial(COS, square_M), _polynomial(SIN, square_M) * x_M)


def _polynomial(coefficients: Sequence[float], x_N: Tensor) -> Tensor:
    """By Horner's rule with fused multiply-add."""
    value_N = torch.full_like(x_N, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value_N = _fma(value_N, x_N, c)
    return value_N


def _fma(a_N: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """a · b + c in float32, rounded once, from float64.

    The product is exact. The sum is rounded to odd (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums",
    2008), so that rounding it again to float32 gives what rounding the exact sum would.
    """
    product_N, c = a_N.double() * b, torch.as_tensor(c, dtype=torch.float64)
    sum_N = product_N + c
    part_N = sum_N - product_N
    error_N = (product_N - (sum_N - part_N)) + (c - part_N)
    odd_N = torch.nextafter(sum_N, error_N * torch.inf)
    inexact_N = (error_N != 0) & (sum_N.view(torch.int64) & 1 == 0)
    return torch.where(inexact_N, odd_N, sum_N).float()


def words_to_normals(words_N4: Tensor) -> Tensor:
    """Eight standard normals from the four words of each block, float32 [N, 8]."""
    radius, cos, sin = tables(words_N4.device)
    radius_N4 = radius[words_N4 >> 15 & 0xFFFF]
    radius_N4 = torch.where(words_N4 >> 31 == 1, -radius_N4, radius_N4)
    angle_N4 = words_N4 & 0x7FFF
    return torch.stack((radius_N4 * cos[angle_N4], radius_N4 * sin[angle_N4]), dim=-1).view(-1, NORMALS)


def reference_normals(seed: int, stream: int, starts_R: Tensor, width: int) -> Tensor:
    """Normals of elements [start, start + width) for each start, float32 [R, width]; the readable version."""
    num_blocks = (width + 2 * NORMALS - 2) // NORMALS  # enough for a row that starts anywhere in a block
    out_RW = torch.empty(len(starts_R), width, device=starts_R.device)
    rows_per_chunk = max(1, _CHUNK_BLOCKS // num_blocks)
    for row in range(0, len(starts_R), rows_per_chunk):
        starts = starts_R[row : row + rows_per_chunk]
        for block in range(0, num_blocks, _CHUNK_BLOCKS):
            blocks = torch.arange(block, min(num_blocks, block + _CHUNK_BLOCKS), device=starts.device)
            blocks_RB = (starts // NORMALS)[:, None] + blocks
            z = words_to_normals(philox_words(seed, stream, blocks_RB.flatten())).view(len(starts), -1)
            lane_R = (starts % NORMALS).tolist()
            for i, lane in enumerate(lane_R) if len(set(lane_R)) > 1 else [(slice(None), lane_R[0])]:
                offset = NORMALS * block - lane
                first, last = max(0, offset), min(width, offset + NORMALS * len(blocks))
                out_RW[row : row + rows_per_chunk][i, first:last] = z[i, first - offset : last - offset]
    return out_RW


def normals(seed: int, stream: int, starts_R: Tensor, width: int) -> Tensor:
    """As `reference_normals`, by the fastest version for the tensor's device; the same bits."""
    kernel = _kernel(starts_R.device)
    if kernel is None:
        return reference_normals(seed, stream, starts_R, width)
    # −0 + 1 · z is z in every bit.
    out_RW = torch.full((len(starts_R), width), -0.0, device=starts_R.device)
    return kernel(out_RW, out_RW, 1.0, seed, stream, starts_R)


def _kernel(device: torch.device) -> Callable[[Tensor, Tensor, float, int, int, Tensor], Tensor] | None:
    """The compiled `add_normals` for a device, if there is one."""
    if device.type == "cpu" and cpu_kernels.enabled():
        return cpu_kernels.add_normals
    if device.type == "cuda" and gpu_kernels.enabled():
        return gpu_kernels.add_normals
    return None


def add_normals(
    base_N: Tensor, scale: float, seed: int, stream: int, start: int, out_N: Tensor | None = None
) -> Tensor:
    """`base + scale · z` for z of elements [start, start + N), in float32: product and sum rounded one after the other.

    Args:
        base_N: contiguous values of any floating type.
        scale: factor of z, rounded to float32.
        seed: key of the generator.
        stream: see `stream_id`.
        start: index of the first element.
        out_N: float32 tensor to write into and return, possibly `base_N` itself; a new one if not given.
    """
    starts = torch.full((1,), start, device=base_N.device)  # not copied from the CPU, which would wait for the GPU
    kernel = _kernel(base_N.device)
    if kernel is not None and (base_N.dtype == torch.float32 or base_N.device.type == "cuda"):
        out_N = torch.empty_like(base_N, dtype=torch.float32) if out_N is None else out_N
        return kernel(out_N[None], base_N[None], scale, seed, stream, starts)[0]
    sum_N = normals(seed, stream, starts, len(base_N))[0].mul_(scale).add_(base_N)
    return sum_N if out_N is None else out_N.copy_(sum_N)


def add_normals_both(base_N: Tensor, scale: float, seed: int, stream: int, start: int) -> tuple[Tensor, Tensor]:
    """`base + scale · z` and `base − scale · z` from one draw of z: the bits of two calls of `add_normals`.

    Returns:
        Two tensors of float32.
    """
    if _kernel(base_N.device) is cpu_kernels.add_normals and base_N.dtype == torch.float32:
        return cpu_kernels.add_normals_both(base_N, scale, seed, stream, start)
    starts = torch.full((1,), start, device=base_N.device)  # not copied from the CPU, which would wait for the GPU
    moved_N = normals(seed, stream, starts, len(base_N))[0].mul_(scale)
    return base_N + moved_N, base_N - moved_N


class Segments:
    """float32 tensors whose directions are added together; on a GPU that is one launch for all of them.

    Args:
        bases: contiguous tensors, one per parameter.
        outs: tensors of the same sizes to write into, possibly the bases themselves.
        streams: stream of each parameter, see `stream_id`.
    """

    def __init__(self, bases: Sequence[Tensor], outs: Sequence[Tensor], streams: Sequence[int]):
        self._bases = [t.detach().view(-1) for t in bases]
        self._outs = [t.detach().view(-1) for t in outs]
        self._streams = list(streams)
        on_gpu = all(t.is_cuda and t.dtype == torch.float32 for t in (*self._bases, *self._outs))
        self._table = None
        if on_gpu and gpu_kernels.enabled():
            self._table = gpu_kernels.segment_table(self._bases, self._outs, self._streams)

    def add_normals(self, scales: Sequence[float], seed: int) -> None:
        """outs ← bases + scale · z(seed), each with its scale, or all with one; the bits of `add_normals`."""
        if self._table is not None and len(set(scales)) == 1:
            gpu_kernels.add_normals_many(self._table, scales[0], seed)
            return
        scales = scales if len(scales) > 1 else [*scales] * len(self._bases)
        for base_N, out_N, stream, scale in zip(self._bases, self._outs, self._streams, scales, strict=True):
            for start in range(0, len(base_N), _SEGMENT_CHUNK):
                part = slice(start, start + _SEGMENT_CHUNK)
                add_normals(base_N[part], scale, seed, stream, start, out_N=out_N[part])


def uniforms(seed: int, stream: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Uniform numbers in [0, 1), multiples of 2⁻²⁴, of elements [start, stop); float32."""
    return (_words(seed, stream, start, stop, device) >> 8).to(torch.float32) * 2.0**-24


def rounding_bits(seed: int, stream: int, start: int, stop: int, device: torch.device) -> Tensor:
    """16 random bits for each of the elements [start, stop), int32: half a word each, so half the work of normals."""
    words = _words(seed, stream, start // 2, (stop + 1) // 2, device)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten().to(torch.int32)
    return halves[start % 2 : start % 2 + stop - start]


def _words(seed: int, stream: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Words of elements [start, stop), int64."""
    blocks = torch.arange(start // 4, (stop + 3) // 4, device=device)
    return philox_words(seed, stream, blocks).flatten()[start % 4 : start % 4 + stop - start]
