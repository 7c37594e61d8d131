"""Philox and Box-Muller for GPUs in Triton: one pass that reads `base` and writes `base + scale · z`.

Multiplication and addition are fused where the source says so and nowhere else: the bits are those of `mezo.philox`.
With `MEZO_PLAIN_KERNELS=1` in the environment the reference is used instead.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import ModuleType

_NORMALS = 8  # of a counter block
_BLOCKS = 128  # counter blocks of a program: one for each thread
REPEAT = 8  # times that a program of a large tensor does so, where it updates or copies
_REPEAT_FORMING, _REPEAT_BOTH = 2, 4  # where it forms probes, without and with an update
_MANY = 1 << 21  # elements of a large tensor: enough for all of a GPU's processors
_MANY_PIECES = 1 << 13  # pieces of tensors of which each is enough for one program
_MOST_FOLDED = 1 << 30  # elements of a launch that counts them in 32 bits
_ALIGNED = 64  # elements: tensor cores want addresses that are
PIECE = 1 << 16  # elements of a tensor that one row of a table covers; a multiple of what a program covers


@functools.cache
def enabled() -> bool:
    """Whether the Triton kernels are used in this process."""
    return os.environ.get("MEZO_PLAIN_KERNELS", "0") == "0" and importlib.util.find_spec("triton") is not None


def add_normals(out_RW: Tensor, base_RW: Tensor, scale: float, seed: int, stream: int, starts_R: Tensor) -> Tensor:
    """Writes `base + scale · z`, computed in float32, into `out` (contiguous, may be `base`) and returns it."""
    num_rows, width = out_RW.shape
    if out_RW.numel():
        groups = -(-(width + _NORMALS - 1) // (_NORMALS * _BLOCKS))
        with torch.cuda.device(out_RW.device):
            _kernels().add_normals[(groups, num_rows)](
                out_RW, base_RW, starts_R, width, scale, _signed(seed), _signed(stream), BLOCKS=_BLOCKS,
                enable_fp_fusion=False,
            )  # fmt: skip
    return out_RW


class Update(NamedTuple):
    """An update that `perturb` makes first, all on the device: what `update_many` takes, of one tensor."""

    pending_1: Tensor  # int32; if 0, the update has been made
    seeds_R: Tensor  # int64, of each record; rounding is drawn with the first
    factors_R: Tensor  # float32
    keep_1: Tensor  # float32
    decays: bool  # whether `keep` may be other than 1
    rounding: int  # stream


def perturb(
    base_N: Tensor,
    start: int,
    seeds_P: Tensor,
    factors_P: Tensor,
    stream: int,
    *,
    paired: bool,
    out: Tensor | None = None,
    update: Update | None = None,
) -> Tensor:
    """`base + factor · z(seed)` of elements [start, start + N) under each probe, [P, N] of the base's type.

    Args:
        base_N: contiguous values.
        start: index of the first element, a multiple of 8.
        seeds_P: int64 seeds on the device.
        factors_P: float32.
        stream: see `mezo.philox.stream_id`.
        paired: probes 2i and 2i + 1 have the same seed and opposite factors, so z is drawn once for both.
        out: memory to write into, of the base's type and at least P · N elements; new memory if not given.
        update: made in place before; the base is bfloat16 or float16 then.
    """
    (num_probes,), width = seeds_P.shape, len(base_N)
    assert start % _NORMALS == 0 and width < 1 << 31
    repeat = (_REPEAT_FORMING if update is None else _REPEAT_BOTH) if width >= _MANY else 1
    out = base_N.new_empty(num_probes * width) if out is None else out[: num_probes * width]
    out_PN = out.view(num_probes, width)
    groups = -(-width // (_NORMALS * _BLOCKS * repeat))
    arguments = (out_PN, base_N, start // _NORMALS, width, seeds_P, factors_P, _signed(stream))
    sizes = {"PROBES": num_probes, "PAIRED": paired, "BLOCKS": _BLOCKS, "REPEAT": repeat, "enable_fp_fusion": False}
    with torch.cuda.device(base_N.device):
        if update is None:
            _kernels().perturb[(groups,)](*arguments, **sizes)
        else:
            _kernels().update_and_perturb[(groups,)](
                *arguments, update.pending_1, update.seeds_R, update.factors_R, update.keep_1, len(update.seeds_R),
                _signed(update.rounding), DECAYS=update.decays, IS_BFLOAT16=base_N.dtype == torch.bfloat16, **sizes,
            )  # fmt: skip
    return out_PN


def aligned_places(sizes: Sequence[int], step: int = _ALIGNED) -> tuple[list[slice], int]:
    """Places of tensors one after the other, each at a multiple of `step` elements, and the size of them all."""
    *starts, end = 0, *itertools.accumulate(-(-size // step) * step for size in sizes)
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)], end


class Small(NamedTuple):
    """Small tensors of one type that `perturb_many` reads together."""

    table: Tensor  # int64 [tensors, 5] on the device: address, place, size, stream, row of the factors
    places: list[slice]  # in the memory of one probe
    size: int  # of that memory, in elements
    largest: int  # elements of one of them

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor], streams: Sequence[int], numbers: Sequence[int], device: torch.device
    ) -> Small:
        """Args: the tensors; their streams of z; their rows in `factors_KP`; where they are."""
        sizes = [t.numel() for t in tensors]
        places, end = aligned_places(sizes)
        starts = [place.start for place in places]
        columns = ([t.data_ptr() for t in tensors], starts, sizes, list(map(_signed, streams)), numbers)
        table = torch.tensor(columns, dtype=torch.int64).T.contiguous().to(device)
        return cls(table, places, end, max(sizes, default=0))


def perturb_many(small: Small, out_PN: Tensor, seeds_P: Tensor, factors_KP: Tensor, *, paired: bool) -> None:
    """`perturb` of small tensors in one launch, into `out` of their type, `small.size` elements for each probe."""
    groups = -(-small.largest // (_NORMALS * _BLOCKS))
    with torch.cuda.device(out_PN.device):
        _kernels().perturb_many[(groups, len(small.table))](
            out_PN, small.table, small.size, seeds_P, factors_KP, PROBES=len(out_PN), PAIRED=paired, BLOCKS=_BLOCKS,
            enable_fp_fusion=False,
        )  # fmt: skip


def perturb_rows(base_RD: Tensor, ids_PN: Tensor, seeds_P: Tensor, factors_P: Tensor, stream: int) -> Tensor:
    """Rows `ids` of a matrix, perturbed as in `perturb`: [P, N, D]."""
    (num_probes, num_rows), width = ids_PN.shape, base_RD.shape[1]
    out_PND = base_RD.new_empty(num_probes, num_rows, width)
    groups = -(-(width + _NORMALS - 1) // (_NORMALS * _BLOCKS))
    with torch.cuda.device(base_RD.device):
        _kernels().perturb_rows[(groups, num_rows, num_probes)](
            out_PND, base_RD, ids_PN.contiguous(), num_rows, width, seeds_P, factors_P, _signed(stream),
            BLOCKS=_BLOCKS, enable_fp_fusion=False,
        )  # fmt: skip
    return out_PND


def piece_table(
    addresses: Sequence[int],
    seconds: Sequence[int],
    sizes: Sequence[int],
    item_sizes: tuple[int, int],
    streams: Sequence[int],
    rounding_streams: Sequence[int],
    device: torch.device,
    firsts: Sequence[int] | None = None,
) -> Tensor:
    """What `add_normals_many` and `update_many` read, int64 [pieces, 7] on the device.

    Tensors are cut into pieces of `PIECE` elements, so that one launch serves tensors of all sizes. A row holds the
    piece's address, a second address or a number, its size, the stream of z, its first element, the stream of
    rounding and the tensor's number. Tensors that are parts of larger ones begin at elements `firsts` of those.
    """
    rows = []
    for tensor, (address, second, size) in enumerate(zip(addresses, seconds, sizes, strict=True)):
        stream, rounding = (_signed(s[tensor]) for s in (streams, rounding_streams))
        for start in range(0, size, PIECE):
            places = (address + start * item_sizes[0], second + start * item_sizes[1])
            first = start + (0 if firsts is None else firsts[tensor])
            rows.append((*places, min(PIECE, size - start), stream, first, rounding, tensor))
    return torch.tensor(rows, dtype=torch.int64).view(-1, 7).to(device)


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - (word >> 63 << 64)


def seeds_on(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Seeds as kernels read them, int64."""
    return torch.tensor(list(map(_signed, seeds)), device=device)


def segment_table(bases: Sequence[Tensor], outs: Sequence[Tensor], streams: Sequence[int]) -> Tensor:
    """The table of float32 tensors to read from and to write to."""
    sizes = [base.numel() for base in bases]
    addresses = ([t.data_ptr() for t in bases], [t.data_ptr() for t in outs])
    return piece_table(*addresses, sizes, (4, 4), streams, streams, outs[0].device)


def weight_table(
    weights: Sequence[Tensor],
    decays: Sequence[bool],
    streams: Sequence[int],
    rounding_streams: Sequence[int],
    firsts: Sequence[int] | None = None,
) -> Tensor:
    """The table of bfloat16 or float16 tensors that `update_many` updates; for `firsts` see `piece_table`."""
    sizes, addresses = [w.numel() for w in weights], [w.data_ptr() for w in weights]
    numbers = list(map(int, decays))
    return piece_table(addresses, numbers, sizes, (2, 0), streams, rounding_streams, weights[0].device, firsts)


def add_normals_many(table: Tensor, scale: float, seed: int) -> None:
    """`out = base + scale · z` for all float32 tensors of a `segment_table` in one launch."""
    with torch.cuda.device(table.device):
        parts = PIECE // (_NORMALS * _BLOCKS * REPEAT)
        _kernels().add_normals_many[(len(table) * parts,)](
            table, scale, _signed(seed), PARTS=parts, REPEAT=REPEAT, BLOCKS=_BLOCKS, enable_fp_fusion=False
        )


def update_many(
    table: Tensor, dtype: torch.dtype, seeds: Sequence[int], factors: Sequence[Sequence[float]], keep: float
) -> None:
    """`w = keep · w + Σ factor · z`, stochastically rounded, for all tensors of a `weight_table` in one launch.

    Args:
        table: of tensors of type `dtype` that begin at multiples of 16 bytes, as PyTorch's own do.
        dtype: bfloat16 or float16.
        seeds: of each record; rounding is drawn with the first.
        factors: of each tensor, one for each record.
        keep: factor of the weights that decay.
    """
    factors_TN = torch.tensor(factors, dtype=torch.float32, device=table.device)
    parts = 1 if len(table) >= _MANY_PIECES else PIECE // (_NORMALS * _BLOCKS * REPEAT)
    with torch.cuda.device(table.device):
        _kernels().update_many[(len(table) * parts,)](
            table, seeds_on(seeds, table.device), factors_TN, len(seeds), keep, DECAYS=keep != 1.0,
            IS_BFLOAT16=dtype == torch.bfloat16, PARTS=parts, REPEAT=PIECE // (_NORMALS * _BLOCKS * parts),
            BLOCKS=_BLOCKS, enable_fp_fusion=False,
        )  # fmt: skip


def fold(
    out_N: Tensor, base_N: Tensor, left_Rr: Tensor, right_Ir: Tensor, keep: float, seed: int, rounding: int
) -> None:
    """Writes `keep · base + left · rightᵀ` of a matrix [R, I], stochastically rounded if out's type is shorter.

    Products and sums are rounded one after the other, in float32.

    Args:
        out_N: contiguous float32, bfloat16 or float16; may be the base.
        base_N: contiguous, of any of these types.
        left_Rr: contiguous float32; r may be 0.
        right_Ir: the same.
        keep: factor of the base.
        seed: of rounding.
        rounding: its stream.
    """
    (num_rows, rank), width = left_Rr.shape, len(right_Ir)
    assert width * min(num_rows, _NORMALS) < 1 << 31
    step = max(_NORMALS, _MOST_FOLDED // width // _NORMALS * _NORMALS)  # rows of a launch: whole counter blocks
    for row in range(0, num_rows, step):
        start, size = row * width, min(step, num_rows - row) * width
        repeat = REPEAT if size >= _MANY else 1
        with torch.cuda.device(out_N.device):
            _kernels().fold[(-(-size // (_NORMALS * _BLOCKS * repeat)),)](
                out_N[start:], base_N[start:], left_Rr[row:], right_Ir, start // _NORMALS, size, width, keep,
                _signed(seed), _signed(rounding), RANK=rank, ROUNDS=out_N.dtype != torch.float32,
                IS_BFLOAT16=out_N.dtype == torch.bfloat16, BLOCKS=_BLOCKS, REPEAT=repeat, enable_fp_fusion=False,
            )  # fmt: skip


@functools.cache
def _kernels() -> ModuleType:
    from mezo.kernels import _gpu_triton

    return _gpu_triton
