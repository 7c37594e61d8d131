"""Numba source of `mezo.kernels.cpu`. Importing this file imports Numba; compilation is cached on disk.

Work goes in groups of 64 counter blocks held as structure of arrays, so that LLVM turns the inner loops into vector
instructions. Without `fastmath` LLVM neither reorders nor fuses float operations by itself: the results are IEEE
float32, the same as the reference's.
"""

import numba as nb
import numpy as np
from numba import float32, int32, int64, types, uint32, uint64
from numba.extending import intrinsic

from mezo.philox import COS, GUESS, LOG, LOG_EXPONENT, NORMALS, ROOT, SIN

GROUP = 64
PIECE = 64  # groups that one thread takes at a time: 32,768 elements
_E0, _L0, _L1, _L2, _L3, _L4, _L5 = map(np.float32, (LOG_EXPONENT, *LOG))
_R0, _R1, _R2 = map(np.float32, ROOT)
_S0, _S1, _S2, _S3 = map(np.float32, SIN)
_C0, _C1, _C2, _C3 = map(np.float32, COS)
_ONE = np.float32(1)


@intrinsic
def _fma(typing_context, a, b, c):  # type: ignore[no-untyped-def]
    """a * b + c, rounded once; LLVM calls the C library where the processor has no such instruction."""
    signature = types.float32(types.float32, types.float32, types.float32)
    return signature, lambda context, builder, sig, arguments: builder.fma(*arguments)


@nb.njit(inline="always")
def _philox(first_block, k0_, k1_, c2_, c3_, words):  # type: ignore[no-untyped-def]
    for j in range(GROUP):
        block = uint64(first_block + j)
        c0, c1, c2, c3 = uint32(block), uint32(block >> uint64(32)), uint32(c2_), uint32(c3_)
        k0, k1 = uint32(k0_), uint32(k1_)
        for _ in range(10):
            p0, p1 = uint64(c0) * uint64(0xD2511F53), uint64(c2) * uint64(0xCD9E8D57)
            c0, c1 = uint32(p1 >> uint64(32)) ^ c1 ^ k0, uint32(p1)
            c2, c3 = uint32(p0 >> uint64(32)) ^ c3 ^ k1, uint32(p0)
            k0, k1 = uint32(k0 + uint32(0x9E3779B9)), uint32(k1 + uint32(0xBB67AE85))
        words[0, j], words[1, j], words[2, j], words[3, j] = c0, c1, c2, c3


@nb.njit(inline="always")
def _normals(words, z, mantissa, bits, radius, radius_bits):  # type: ignore[no-untyped-def]
    """The normals of a group in the order of their elements; see `mezo.philox.tables`.

    `bits` is `mantissa` seen as int32, and `radius_bits` is `radius`; all scratch.
    """
    for word in range(4):
        w = words[word]
        for j in range(GROUP):
            mantissa[j] = float32(int32((w[j] & uint32(0x7FFF8000)) | uint32(0x4000)))
        for j in range(GROUP):
            radius[j] = _fma(float32(bits[j]), _E0, _L0)
            bits[j] = (bits[j] & int32(0x7FFFFF)) | int32(0x3F800000)
        for j in range(GROUP):
            m = mantissa[j]
            h = _fma(_fma(_fma(_fma(_L5, m, _L4), m, _L3), m, _L2), m, _L1)
            radius[j] = _fma(h, m, radius[j])
        for j in range(GROUP):
            bits[j] = int32(GUESS) - (radius_bits[j] >> int32(1))
        for j in range(GROUP):
            root = radius[j] * mantissa[j]
            error = _fma(-root, mantissa[j], _ONE)
            radius[j] = root * _fma(_fma(error, _R2, _R1), error, _R0)
        for j in range(GROUP):
            radius_bits[j] ^= int32(w[j] & uint32(0x80000000))
        for j in range(GROUP):
            x = float32(int32(w[j] & uint32(0x7FFF)) - int32(16383))
            x2 = x * x
            z[NORMALS * j + 2 * word] = radius[j] * _fma(_fma(_fma(_C3, x2, _C2), x2, _C1), x2, _C0)
            z[NORMALS * j + 2 * word + 1] = radius[j] * (_fma(_fma(_fma(_S3, x2, _S2), x2, _S1), x2, _S0) * x)


@nb.njit(inline="always")
def _add_group(out, base, scale, offset, z):  # type: ignore[no-untyped-def]
    """out[offset + …] = base[offset + …] + scale * z for the elements of one group that lie inside `out`."""
    first, last = max(int64(0), -offset), min(int64(NORMALS * GROUP), len(out) - offset)
    out, base, z = out[offset + first : offset + last], base[offset + first : offset + last], z[first:last]
    for i in range(len(out)):
        out[i] = base[i] + scale * z[i]


@nb.njit(inline="always")
def _add_pieces(first_piece, last_piece, plus_RW, minus_RW, base_RW, scale, starts_R, key):  # type: ignore[no-untyped-def]
    """Pieces of PIECE groups each, counted over the groups of all rows; `minus_RW` may have no rows."""
    num_rows, width = base_RW.shape
    groups_per_row = _groups_per_row(width)
    k0, k1, c2, c3 = key
    words, z = np.empty((4, GROUP), np.uint32), np.empty(NORMALS * GROUP, np.float32)
    mantissa, radius = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32)
    bits, radius_bits = mantissa.view(np.int32), radius.view(np.int32)
    for task in range(first_piece * PIECE, min(num_rows * groups_per_row, last_piece * PIECE)):
        row, group = task // groups_per_row, task % groups_per_row
        first_block = starts_R[row] // NORMALS + group * GROUP
        _philox(first_block, k0, k1, c2, c3, words)
        _normals(words, z, mantissa, bits, radius, radius_bits)
        offset = int64(NORMALS * first_block - starts_R[row])
        _add_group(plus_RW[row], base_RW[row], scale, offset, z)
        if len(minus_RW):
            _add_group(minus_RW[row], base_RW[row], -scale, offset, z)


@nb.njit(inline="always")
def _groups_per_row(width):  # type: ignore[no-untyped-def]
    return (width + NORMALS - 1 + NORMALS * GROUP - 1) // (NORMALS * GROUP)


@nb.njit(cache=True, nogil=True)
def add_normals_serial(plus_RW, minus_RW, base_RW, scale, starts_R, key):  # type: ignore[no-untyped-def]
    """plus, minus [r, i] = base[r, i] ± scale * z(start[r] + i); `plus` may be `base`, `minus` may have no rows."""
    num_pieces = (base_RW.shape[0] * _groups_per_row(base_RW.shape[1]) + PIECE - 1) // PIECE
    _add_pieces(0, num_pieces, plus_RW, minus_RW, base_RW, scale, starts_R, key)


@nb.njit(parallel=True, cache=True, nogil=True)
def add_normals(plus_RW, minus_RW, base_RW, scale, starts_R, key):  # type: ignore[no-untyped-def]
    """`add_normals_serial` on all threads."""
    num_pieces = (base_RW.shape[0] * _groups_per_row(base_RW.shape[1]) + PIECE - 1) // PIECE
    for piece in nb.prange(num_pieces):
        _add_pieces(piece, piece + 1, plus_RW, minus_RW, base_RW, scale, starts_R, key)
