"""Philox and Box-Muller for CPUs, compiled by Numba (extra `mezo[cpu]`); bit-equal to `mezo.philox`.

Without Numba, or with `MEZO_PLAIN_KERNELS=1` in the environment, the reference is used instead.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Elements that one thread fills in the time it takes to wake the others.
_SERIAL_UP_TO = 1 << 15


@functools.cache
def enabled() -> bool:
    """Whether the compiled kernels are used in this process."""
    return os.environ.get("MEZO_PLAIN_KERNELS", "0") == "0" and importlib.util.find_spec("numba") is not None


def add_normals(out_RW: Tensor, base_RW: Tensor, scale: float, seed: int, stream: int, starts_R: Tensor) -> Tensor:
    """Writes `base + scale · z` into `out` (float32, contiguous; may be `base`) and returns it."""
    _add(out_RW, out_RW[:0], base_RW, scale, seed, stream, starts_R)
    return out_RW


def add_normals_both(base_N: Tensor, scale: float, seed: int, stream: int, start: int) -> tuple[Tensor, Tensor]:
    """`base + scale · z` and `base − scale · z`, float32."""
    plus_N, minus_N = torch.empty_like(base_N), torch.empty_like(base_N)
    _add(plus_N[None], minus_N[None], base_N[None], scale, seed, stream, torch.tensor([start]))
    return plus_N, minus_N


def _add(
    plus_RW: Tensor, minus_RW: Tensor, base_RW: Tensor, scale: float, seed: int, stream: int, starts_R: Tensor
) -> None:
    if base_RW.numel():
        key = (seed & 0xFFFFFFFF, seed >> 32, stream & 0xFFFFFFFF, stream >> 32)
        arrays = (t.numpy() for t in (plus_RW, minus_RW, base_RW))
        kernel = _compiled(base_RW.numel() > _SERIAL_UP_TO)
        kernel(*arrays, np.float32(scale), starts_R.numpy(), key)


@functools.cache
def _compiled(parallel: bool) -> Callable[..., None]:
    from mezo.kernels import _cpu_numba

    kernel: Callable[..., None] = _cpu_numba.add_normals if parallel else _cpu_numba.add_normals_serial
    return kernel
