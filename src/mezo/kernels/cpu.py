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
    if out_RW.numel():
        key = (seed & 0xFFFFFFFF, seed >> 32, stream & 0xFFFFFFFF, stream >> 32)
        _compiled(out_RW.numel() > _SERIAL_UP_TO)(
            out_RW.numpy(), base_RW.numpy(), np.float32(scale), starts_R.numpy(), *key
        )
    return out_RW


def add_normals_both(base_N: Tensor, scale: float, seed: int, stream: int, starts_1: Tensor) -> tuple[Tensor, Tensor]:
    """`base + scale · z` and `base − scale · z`, float32."""
    plus_N, minus_N = torch.empty_like(base_N), torch.empty_like(base_N)
    if base_N.numel():
        from mezo.kernels import _cpu_numba

        key = (seed & 0xFFFFFFFF, seed >> 32, stream & 0xFFFFFFFF, stream >> 32)
        parallel = base_N.numel() > _SERIAL_UP_TO
        kernel = _cpu_numba.add_normals_both if parallel else _cpu_numba.add_normals_both_serial
        tensors = (t.numpy()[None] for t in (plus_N, minus_N, base_N))
        kernel(*tensors, np.float32(scale), starts_1.numpy(), *key)
    return plus_N, minus_N


@functools.cache
def _compiled(parallel: bool) -> Callable[..., None]:
    from mezo.kernels import _cpu_numba

    kernel: Callable[..., None] = _cpu_numba.add_normals if parallel else _cpu_numba.add_normals_serial
    return kernel
