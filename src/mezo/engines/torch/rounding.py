"""Stochastic rounding of float32 to bfloat16 or float16: right on average, by bits that are a pure function."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT16_MIN_NORMAL = 2.0**-14
_FLOAT16_SUBNORMAL_STEP = 2.0**-24


def stochastic_round(x_N: Tensor, bits_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 `x_N` to one of its two neighbours in `dtype`, with the probability that keeps the mean.

    Args:
        x_N: float32 values.
        bits_N: int32 values uniform in [0, 2¹⁶), see `mezo.philox.rounding_bits`.
        dtype: torch.bfloat16 or torch.float16.
    """
    # Adding random bits below the kept mantissa and truncating rounds away from zero with probability
    # (dropped part) / (one unit in the last place); it carries into the exponent where it should.
    dropped_bits = 16 if dtype == torch.bfloat16 else 13
    mask = (1 << dropped_bits) - 1
    raw_N = x_N.view(torch.int32)
    rounded_N = ((raw_N + (bits_N & mask)) & ~mask).view(torch.float32)
    if dtype == torch.float16:
        steps_N = torch.floor(x_N / _FLOAT16_SUBNORMAL_STEP + bits_N * 2.0**-16) * _FLOAT16_SUBNORMAL_STEP
        rounded_N = torch.where(x_N.abs() < _FLOAT16_MIN_NORMAL, steps_N, rounded_N)
    # Infinities and NaN carry no mantissa to round.
    return torch.where(torch.isfinite(x_N), rounded_N, x_N).to(dtype)
