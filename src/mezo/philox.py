"""Random numbers that are a pure function of (seed, stream, name, element index).

The generator is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a 128-bit
counter and a 64-bit key go through ten rounds of multiplication and exclusive-or and come out as four 32-bit words.

    key     = the seed                                       (64 bits)
    counter = (element index // 4, BLAKE2b-64 of stream and parameter name)
    word    = element index % 4

Nothing depends on traversal order, chunking, dtype, device or sharding, and no global random state exists. Normals
come from Box-Muller on words (0, 1) and (2, 3) with the logarithm, sine and cosine written in correctly rounded
float32 operations only (no fused multiply-add, no library transcendental), so that the bits are the same on every
device and for every vector width. This file is the reference; `mezo.kernels` holds faster versions of the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mezo.kernels import cpu as cpu_kernels
from mezo.kernels import gpu as gpu_kernels

RNG_VERSION = "philox4x32-10/box-muller-24/1"

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
# Counter blocks per chunk of the reference: the working set stays inside a core's second-level cache.
_CHUNK_BLOCKS = 1 << 15
# Elements of a segment handled at once where there is no fused kernel.
_SEGMENT_CHUNK = 1 << 20


def stream_id(stream: str, name: str) -> int:
    """64-bit identifier of one stream: a purpose ("direction", "rounding", …) and a parameter name."""
    return int.from_bytes(hashlib.blake2b(f"{stream}\0{name}".encode(), digest_size=8).digest(), "little")


def derive_seed(seed: int, step: int, query: int = 0) -> int:
    """Seed (64 bits) of a step's `query`-th direction, a pure function of the run's seed."""
    words: list[int] = philox_words(seed, stream_id("seed", str(query)), torch.tensor([step]))[0].tolist()
    return words[1] << 32 | words[0]


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


def _log(k_N: Tensor) -> Tensor:
    """ln(k · 2⁻²⁴) of integers k in [1, 2²⁴]: Cephes' logf, float32."""
    bits = k_N.to(torch.float32).view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    x = (bits - (exponent << 23)).view(torch.float32) - 1.0
    e = (exponent - 24).to(torch.float32)
    y = torch.full_like(x, 7.0376836292e-2)
    for c in (-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
              -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1):  # fmt: skip
        y = y * x + c
    x2 = x * x
    y = y * x * x2 + e * -2.12194440e-4 - x2 * 0.5
    return x + y + e * 0.693359375


def _cos_sin(k_N: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π · k · 2⁻²⁴ for integers k in [0, 2²⁴): exact reduction to ±π/4, then Cephes' cosf and sinf."""
    quadrant = (k_N + (1 << 21)) >> 22
    t = (k_N - (quadrant << 22)).to(torch.float32) * (2 * math.pi / (1 << 24))
    t2 = t * t
    sin = ((t2 * -1.9515295891e-4 + 8.3321608736e-3) * t2 + -1.6666654611e-1) * t2 * t + t
    cos = ((t2 * 2.443315711809948e-5 + -1.388731625493765e-3) * t2 + 4.166664568298827e-2) * t2 * t2 - t2 * 0.5 + 1.0
    odd = (quadrant & 1) != 0
    cos, sin = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    cos = torch.where(((quadrant + 1) & 2) != 0, -cos, cos)
    sin = torch.where((quadrant & 2) != 0, -sin, sin)
    return cos, sin


def words_to_normals(words_N4: Tensor) -> Tensor:
    """Four standard normals from the four words of each block (Box-Muller on the upper 24 bits), float32 [N, 4]."""
    k_N4 = (words_N4 >> 8).to(torch.int32)
    # torch.sqrt is not correctly rounded in float32 on every CPU; through float64 it is (53 >= 2 * 24 + 2 bits).
    radius_N2 = torch.clamp(_log(k_N4[:, 0::2] + 1) * -2.0, min=0.0).double().sqrt().float()
    cos_N2, sin_N2 = _cos_sin(k_N4[:, 1::2])
    return torch.stack((radius_N2 * cos_N2, radius_N2 * sin_N2), dim=-1).view(-1, 4)


def reference_normals(seed: int, stream: int, starts_R: Tensor, width: int) -> Tensor:
    """Normals of elements [start, start + width) for each start, float32 [R, width]; the readable version."""
    num_blocks = (width + 6) // 4  # enough blocks to cover a row that starts at any of the four words
    out_RW = torch.empty(len(starts_R), width, device=starts_R.device)
    rows_per_chunk = max(1, _CHUNK_BLOCKS // num_blocks)
    for row in range(0, len(starts_R), rows_per_chunk):
        starts = starts_R[row : row + rows_per_chunk]
        for block in range(0, num_blocks, _CHUNK_BLOCKS):
            blocks = torch.arange(block, min(num_blocks, block + _CHUNK_BLOCKS), device=starts.device)
            blocks_RB = (starts // 4)[:, None] + blocks
            z = words_to_normals(philox_words(seed, stream, blocks_RB.flatten())).view(len(starts), -1)
            lane_R = (starts % 4).tolist()
            for i, lane in enumerate(lane_R) if len(set(lane_R)) > 1 else [(slice(None), lane_R[0])]:
                first, last = max(0, 4 * block - lane), min(width, 4 * (block + len(blocks)) - lane)
                out_RW[row : row + rows_per_chunk][i, first:last] = z[
                    i, first + lane - 4 * block : last + lane - 4 * block
                ]
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
        Two tensors of float32; on a GPU of the base's type, rounded to nearest.
    """
    starts = torch.full((1,), start, device=base_N.device)  # not copied from the CPU, which would wait for the GPU
    if _kernel(base_N.device) is gpu_kernels.add_normals:
        return gpu_kernels.add_normals_both(base_N, scale, seed, stream, starts)
    if _kernel(base_N.device) is cpu_kernels.add_normals and base_N.dtype == torch.float32:
        return cpu_kernels.add_normals_both(base_N, scale, seed, stream, starts)
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
        """outs ← bases + scale · z(seed), each with its scale; the bits of `add_normals`."""
        if self._table is not None and len(set(scales)) == 1:
            gpu_kernels.add_normals_many(self._table, scales[0], seed)
            return
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
