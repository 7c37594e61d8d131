"""Numba source of `mezo.kernels.cpu`. Importing this file imports Numba; compilation is cached on disk.

Work goes in groups of 64 counter blocks held as structure of arrays, so that LLVM turns the inner loops into vector
instructions. Without `fastmath` LLVM neither reorders nor fuses float operations: the results are IEEE float32, the
same as the reference's.
"""

import numba as nb
import numpy as np
from numba import int64, uint32, uint64

NORMALS = 8  # of a block
GROUP = 64
PIECE = 64  # groups that one thread takes at a time: 32,768 elements


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
def _normals(words, radius, cos, sin, z):  # type: ignore[no-untyped-def]
    """The normals of a group in the order of their elements."""
    for j in range(GROUP):
        for word in range(4):
            w = words[word, j]
            r = radius[(w >> uint32(15)) & uint32(0xFFFF)]
            if w >> uint32(31):
                r = -r
            z[NORMALS * j + 2 * word] = r * cos[w & uint32(0x7FFF)]
            z[NORMALS * j + 2 * word + 1] = r * sin[w & uint32(0x7FFF)]


@nb.njit(inline="always")
def _add_group(out, base, scale, offset, z):  # type: ignore[no-untyped-def]
    """out[offset + …] = base[offset + …] + scale * z for the elements of one group that lie inside `out`."""
    first, last = max(int64(0), -offset), min(int64(NORMALS * GROUP), len(out) - offset)
    for i in range(first, last):
        out[offset + i] = base[offset + i] + scale * z[i]


@nb.njit(inline="always")
def _add_pieces(first_piece, last_piece, plus_RW, minus_RW, base_RW, scale, starts_R, key, tables):  # type: ignore[no-untyped-def]
    """Pieces of PIECE groups each, counted over the groups of all rows; `minus_RW` may have no rows."""
    num_rows, width = base_RW.shape
    groups_per_row = _groups_per_row(width)
    words, z = np.empty((4, GROUP), np.uint32), np.empty(NORMALS * GROUP, np.float32)
    for task in range(first_piece * PIECE, min(num_rows * groups_per_row, last_piece * PIECE)):
        row, group = task // groups_per_row, task % groups_per_row
        first_block = starts_R[row] // NORMALS + group * GROUP
        _philox(first_block, key[0], key[1], key[2], key[3], words)
        _normals(words, tables[0], tables[1], tables[2], z)
        offset = int64(NORMALS * first_block - starts_R[row])
        _add_group(plus_RW[row], base_RW[row], scale, offset, z)
        if len(minus_RW):
            _add_group(minus_RW[row], base_RW[row], -scale, offset, z)


@nb.njit(inline="always")
def _groups_per_row(width):  # type: ignore[no-untyped-def]
    return (width + NORMALS - 1 + NORMALS * GROUP - 1) // (NORMALS * GROUP)


@nb.njit(cache=True, nogil=True)
def add_normals_serial(plus_RW, minus_RW, base_RW, scale, starts_R, key, tables):  # type: ignore[no-untyped-def]
    """plus, minus [r, i] = base[r, i] ± scale * z(start[r] + i); `plus` may be `base`, `minus` may have no rows."""
    num_pieces = (base_RW.shape[0] * _groups_per_row(base_RW.shape[1]) + PIECE - 1) // PIECE
    _add_pieces(0, num_pieces, plus_RW, minus_RW, base_RW, scale, starts_R, key, tables)


@nb.njit(parallel=True, cache=True, nogil=True)
def add_normals(plus_RW, minus_RW, base_RW, scale, starts_R, key, tables):  # type: ignore[no-untyped-def]
    """`add_normals_serial` on all threads."""
    num_pieces = (base_RW.shape[0] * _groups_per_row(base_RW.shape[1]) + PIECE - 1) // PIECE
    for piece in nb.prange(num_pieces):
        _add_pieces(piece, piece + 1, plus_RW, minus_RW, base_RW, scale, starts_R, key, tables)
