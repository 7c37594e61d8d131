"""Philox and Box-Muller for CPUs, compiled by Numba (extra `mezo[cpu]`); bit-equal to `mezo.philox`.

Without Numba, or with `MEZO_PLAIN_KERNELS=1` in the environment, the reference is used instead.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def enabled() -> bool:
    """Whether the compiled kernels are used in this process."""
    return os.environ.get("MEZO_PLAIN_KERNELS", "0") == "0" and importlib.util.find_spec("numba") is not None


def normals(seed: int, stream: int, starts_R: Tensor, width: int) -> Tensor:
    """See `mezo.philox.reference_normals`."""
    out_RW = torch.empty(len(starts_R), width)
    if out_RW.numel():
        _compiled()(out_RW.numpy(), starts_R.numpy(), seed & 0xFFFFFFFF, seed >> 32, stream & 0xFFFFFFFF, stream >> 32)
    return out_RW


@functools.cache
def _compiled() -> Callable[..., None]:
    from mezo.kernels import _cpu_numba

    kernel: Callable[..., None] = _cpu_numba.fill_normals
    return kernel
