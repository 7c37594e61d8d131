"""Philox and Box-Muller for GPUs in Triton: one pass that reads `base` and writes `base + scale · z`.

Fusing multiplication and addition is switched off and the square root is the correctly rounded one: the bits are
those of `mezo.philox`. With `MEZO_PLAIN_KERNELS=1` in the environment the reference is used instead.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import ModuleType

_BLOCKS_PER_PROGRAM = 256


@functools.cache
def enabled() -> bool:
    """Whether the Triton kernels are used in this process."""
    return os.environ.get("MEZO_PLAIN_KERNELS", "0") == "0" and importlib.util.find_spec("triton") is not None


def add_normals(out_RW: Tensor, base_RW: Tensor, scale: float, seed: int, stream: int, starts_R: Tensor) -> Tensor:
    """Writes `base + scale · z`, computed in float32, into `out` (contiguous, may be `base`) and returns it."""
    num_rows, width = out_RW.shape
    if out_RW.numel():
        groups = ((width + 3) // 4 + _BLOCKS_PER_PROGRAM) // _BLOCKS_PER_PROGRAM
        key = (seed & 0xFFFFFFFF, seed >> 32, stream & 0xFFFFFFFF, stream >> 32)
        with torch.cuda.device(out_RW.device):
            _kernels().add_normals[(groups, num_rows)](
                out_RW, base_RW, starts_R, width, scale, *key, BLOCKS=_BLOCKS_PER_PROGRAM, enable_fp_fusion=False
            )
    return out_RW


def add_normals_both(base_N: Tensor, scale: float, seed: int, stream: int, starts_1: Tensor) -> tuple[Tensor, Tensor]:
    """`base + scale · z` and `base − scale · z`, computed in float32 and rounded to the base's type."""
    plus_N, minus_N = torch.empty_like(base_N), torch.empty_like(base_N)
    if base_N.numel():
        groups = ((len(base_N) + 3) // 4 + _BLOCKS_PER_PROGRAM) // _BLOCKS_PER_PROGRAM
        key = (seed & 0xFFFFFFFF, seed >> 32, stream & 0xFFFFFFFF, stream >> 32)
        with torch.cuda.device(base_N.device):
            _kernels().add_normals_both[(groups,)](
                plus_N, minus_N, base_N, starts_1, len(base_N), scale, *key, BLOCKS=_BLOCKS_PER_PROGRAM,
                enable_fp_fusion=False,
            )  # fmt: skip
    return plus_N, minus_N


def segment_table(bases: Sequence[Tensor], outs: Sequence[Tensor], streams: Sequence[int]) -> Tensor:
    """What `add_normals_many` reads: addresses, sizes and streams, int64 [segments, 4] on the device."""
    rows = [
        (base.data_ptr(), out.data_ptr(), base.numel(), stream - (stream >> 63 << 64))
        for base, out, stream in zip(bases, outs, streams, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=outs[0].device)


def add_normals_many(table: Tensor, largest: int, scale: float, seed: int) -> None:
    """`out = base + scale · z` for all float32 tensors of a table in one launch; `largest` is the largest size."""
    groups = ((largest + 3) // 4 + _BLOCKS_PER_PROGRAM - 1) // _BLOCKS_PER_PROGRAM
    with torch.cuda.device(table.device):
        _kernels().add_normals_many[(groups, len(table))](
            table, scale, seed & 0xFFFFFFFF, seed >> 32, BLOCKS=_BLOCKS_PER_PROGRAM, enable_fp_fusion=False
        )


@functools.cache
def _kernels() -> ModuleType:
    from mezo.kernels import _gpu_triton

    return _gpu_triton
