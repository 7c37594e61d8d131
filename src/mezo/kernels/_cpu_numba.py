"""Numba source of `mezo.kernels.cpu`. Importing this file imports Numba; compilation is cached on disk.

Work goes in groups of 64 counter blocks held as structure of arrays, so that LLVM turns every inner loop into vector
instructions. Without `fastmath` LLVM neither reorders nor fuses float operations: the results are IEEE float32, the
same as the reference's.
"""

import math

import numba as nb
import numpy as np
from numba import float32, int32, int64, uint32, uint64

GROUP = 64
PIECE = 128  # groups that one thread takes at a time: 32,768 elements
_ANGLE = np.float32(2 * math.pi / (1 << 24))
_f = np.float32


@nb.njit(inline="always")
def _philox(first_block, k0_, k1_, c2_, c3_, w0, w1, w2, w3):  # type: ignore[no-untyped-def]
    for j in range(GROUP):
        block = uint64(first_block + j)
        c0, c1, c2, c3 = uint32(block), uint32(block >> uint64(32)), uint32(c2_), uint32(c3_)
        k0, k1 = uint32(k0_), uint32(k1_)
        for _ in range(10):
            p0, p1 = uint64(c0) * uint64(0xD2511F53), uint64(c2) * uint64(0xCD9E8D57)
            c0, c1 = uint32(p1 >> uint64(32)) ^ c1 ^ k0, uint32(p1)
            c2, c3 = uint32(p0 >> uint64(32)) ^ c3 ^ k1, uint32(p0)
            k0, k1 = uint32(k0 + uint32(0x9E3779B9)), uint32(k1 + uint32(0xBB67AE85))
        w0[j], w1[j], w2[j], w3[j] = c0, c1, c2, c3


@nb.njit(inline="always")
def _box_muller(wa, wb, za, zb, mantissa, bits):  # type: ignore[no-untyped-def]
    """Normals from GROUP pairs of words; `bits` is `mantissa` seen as int32, both scratch; overwrites `wa`."""
    for j in range(GROUP):
        mantissa[j] = float32(int32(wa[j] >> uint32(8)) + int32(1))
    for j in range(GROUP):
        e = (bits[j] - int32(0x3F3504F3)) >> int32(23)
        bits[j] = bits[j] - (e << int32(23))
        wa[j] = uint32(e)
    for j in range(GROUP):
        x = mantissa[j] - _f(1.0)
        e = float32(int32(wa[j]) - int32(24))
        y = _f(7.0376836292e-2)
        y = y * x + _f(-1.1514610310e-1)
        y = y * x + _f(1.1676998740e-1)
        y = y * x + _f(-1.2420140846e-1)
        y = y * x + _f(1.4249322787e-1)
        y = y * x + _f(-1.6668057665e-1)
        y = y * x + _f(2.0000714765e-1)
        y = y * x + _f(-2.4999993993e-1)
        y = y * x + _f(3.3333331174e-1)
        x2 = x * x
        y = y * x * x2 + e * _f(-2.12194440e-4) - x2 * _f(0.5)
        radius = np.sqrt(max((x + y + e * _f(0.693359375)) * _f(-2.0), _f(0.0)))
        k = int32(wb[j] >> uint32(8))
        quadrant = (k + int32(1 << 21)) >> int32(22)
        t = float32(k - (quadrant << int32(22))) * _ANGLE
        t2 = t * t
        sin = ((t2 * _f(-1.9515295891e-4) + _f(8.3321608736e-3)) * t2 + _f(-1.6666654611e-1)) * t2 * t + t
        cos = (
            ((t2 * _f(2.443315711809948e-5) + _f(-1.388731625493765e-3)) * t2 + _f(4.166664568298827e-2)) * t2 * t2
            - t2 * _f(0.5)
            + _f(1.0)
        )
        odd = (quadrant & int32(1)) != 0
        c, s = (sin, cos) if odd else (cos, sin)
        if ((quadrant + int32(1)) & int32(2)) != 0:
            c = -c
        if (quadrant & int32(2)) != 0:
            s = -s
        za[j], zb[j] = radius * c, radius * s


@nb.njit(inline="always")
def _add_group(out, base, scale, offset, z0, z1, z2, z3):  # type: ignore[no-untyped-def]
    """out[offset + …] = base[offset + …] + scale * z for the elements of one group that lie inside `out`."""
    width = len(out)
    if offset >= 0 and offset + 4 * GROUP <= width:
        for j in range(GROUP):
            i = offset + 4 * j
            out[i] = base[i] + scale * z0[j]
            out[i + 1] = base[i + 1] + scale * z1[j]
            out[i + 2] = base[i + 2] + scale * z2[j]
            out[i + 3] = base[i + 3] + scale * z3[j]
        return
    for j in range(GROUP):
        i = offset + 4 * j
        if 0 <= i < width:
            out[i] = base[i] + scale * z0[j]
        if 0 <= i + 1 < width:
            out[i + 1] = base[i + 1] + scale * z1[j]
        if 0 <= i + 2 < width:
            out[i + 2] = base[i + 2] + scale * z2[j]
        if 0 <= i + 3 < width:
            out[i + 3] = base[i + 3] + scale * z3[j]


@nb.njit(inline="always")
def _add_pieces(first_piece, last_piece, out_RW, base_RW, scale, starts_R, k0, k1, c2, c3):  # type: ignore[no-untyped-def]
    """Pieces of PIECE groups each, counted over the groups of all rows."""
    num_rows, width = out_RW.shape
    groups_per_row = _groups_per_row(width)
    w0, w1, w2, w3 = (np.empty(GROUP, np.uint32), np.empty(GROUP, np.uint32),
                      np.empty(GROUP, np.uint32), np.empty(GROUP, np.uint32))  # fmt: skip
    z0, z1, z2, z3 = (np.empty(GROUP, np.float32), np.empty(GROUP, np.float32),
                      np.empty(GROUP, np.float32), np.empty(GROUP, np.float32))  # fmt: skip
    mantissa = np.empty(GROUP, np.float32)
    bits = mantissa.view(np.int32)
    for task in range(first_piece * PIECE, min(num_rows * groups_per_row, last_piece * PIECE)):
        row, group = task // groups_per_row, task % groups_per_row
        first_block = starts_R[row] // 4 + group * GROUP
        _philox(first_block, k0, k1, c2, c3, w0, w1, w2, w3)
        _box_muller(w0, w1, z0, z1, mantissa, bits)
        _box_muller(w2, w3, z2, z3, mantissa, bits)
        offset = int64(4 * first_block - starts_R[row])
        _add_group(out_RW[row], base_RW[row], scale, offset, z0, z1, z2, z3)


@nb.njit(inline="always")
def _add_pieces_both(first_piece, last_piece, plus_RW, minus_RW, base_RW, scale, starts_R, k0, k1, c2, c3):  # type: ignore[no-untyped-def]
    """`_add_pieces` with both signs."""
    num_rows, width = base_RW.shape
    groups_per_row = _groups_per_row(width)
    w0, w1, w2, w3 = (np.empty(GROUP, np.uint32), np.empty(GROUP, np.uint32),
                      np.empty(GROUP, np.uint32), np.empty(GROUP, np.uint32))  # fmt: skip
    z0, z1, z2, z3 = (np.empty(GROUP, np.float32), np.empty(GROUP, np.float32),
                      np.empty(GROUP, np.float32), np.empty(GROUP, np.float32))  # fmt: skip
    mantissa = np.empty(GROUP, np.float32)
    bits = mantissa.view(np.int32)
    for task in range(first_piece * PIECE, min(num_rows * groups_per_row, last_piece * PIECE)):
        row, group = task // groups_per_row, task % groups_per_row
        first_block = starts_R[row] // 4 + group * GROUP
        _philox(first_block, k0, k1, c2, c3, w0, w1, w2, w3)
        _box_muller(w0, w1, z0, z1, mantissa, bits)
        _box_muller(w2, w3, z2, z3, mantissa, bits)
        offset = int64(4 * first_block - starts_R[row])
        _add_group(plus_RW[row], base_RW[row], scale, offset, z0, z1, z2, z3)
        _add_group(minus_RW[row], base_RW[row], -scale, offset, z0, z1, z2, z3)


@nb.njit(inline="always")
def _groups_per_row(width):  # type: ignore[no-untyped-def]
    return (width + 3 + 4 * GROUP - 1) // (4 * GROUP)


@nb.njit(cache=True, nogil=True)
def add_normals_serial(out_RW, base_RW, scale, starts_R, k0, k1, c2, c3):  # type: ignore[no-untyped-def]
    """out[r, i] = base[r, i] + scale * z(start[r] + i); `out` may be `base`."""
    num_pieces = (out_RW.shape[0] * _groups_per_row(out_RW.shape[1]) + PIECE - 1) // PIECE
    _add_pieces(0, num_pieces, out_RW, base_RW, scale, starts_R, k0, k1, c2, c3)


@nb.njit(parallel=True, cache=True, nogil=True)
def add_normals(out_RW, base_RW, scale, starts_R, k0, k1, c2, c3):  # type: ignore[no-untyped-def]
    """`add_normals_serial` on all threads."""
    num_pieces = (out_RW.shape[0] * _groups_per_row(out_RW.shape[1]) + PIECE - 1) // PIECE
    for piece in nb.prange(num_pieces):
        _add_pieces(piece, piece + 1, out_RW, base_RW, scale, starts_R, k0, k1, c2, c3)


@nb.njit(cache=True, nogil=True)
def add_normals_both_serial(plus_RW, minus_RW, base_RW, scale, starts_R, k0, k1, c2, c3):  # type: ignore[no-untyped-def]
    """plus, minus = base ± scale * z from one draw of z."""
    num_pieces = (base_RW.shape[0] * _groups_per_row(base_RW.shape[1]) + PIECE - 1) // PIECE
    _add_pieces_both(0, num_pieces, plus_RW, minus_RW, base_RW, scale, starts_R, k0, k1, c2, c3)


@nb.njit(parallel=True, cache=True, nogil=True)
def add_normals_both(plus_RW, minus_RW, base_RW, scale, starts_R, k0, k1, c2, c3):  # type: ignore[no-untyped-def]
    """`add_normals_both_serial` on all threads."""
    num_pieces = (base_RW.shape[0] * _groups_per_row(base_RW.shape[1]) + PIECE - 1) // PIECE
    for piece in nb.prange(num_pieces):
        _add_pieces_both(piece, piece + 1, plus_RW, minus_RW, base_RW, scale, starts_R, k0, k1, c2, c3)
