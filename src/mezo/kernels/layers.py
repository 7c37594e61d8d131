"""Parts of a layer under several probes at once: readable versions, and one launch of Triton on a GPU.

Shapes: P probes, N rows × positions of one probe, O outputs of a layer, D entries of a vector, r the rank.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mezo.kernels import gpu

if TYPE_CHECKING:
    from types import ModuleType

_ROWS, _OUTPUTS = 16, 256  # of a program


class LowRankSum(NamedTuple):
    """y + h Lᵀ + bias under each probe, of which y alone has been computed: the rest goes into what reads it."""

    y_PNO: Tensor
    h_PNr: Tensor  # x V; rows may lie further apart than r
    left_POr: Tensor  # L, float32
    bias_PO: Tensor | None  # of any floating type

    def finish_(self) -> None:
        """Adds the rest to y."""
        self._write(self.y_PNO)

    def then(
        self,
        function: str = "",
        *,
        scale: float = 1.0,
        plus_PNO: Tensor | None = None,
        times_PNO: Tensor | None = None,
    ) -> Tensor:
        """f(the sum) · scale + plus, or · times, in one pass over memory, in float32; f is relu, silu or nothing."""
        return self._write(torch.empty_like(self.y_PNO), function, scale, plus_PNO, times_PNO)

    def _write(
        self,
        out_PNO: Tensor,
        function: str = "",
        scale: float = 1.0,
        plus_PNO: Tensor | None = None,
        times_PNO: Tensor | None = None,
    ) -> Tensor:
        if out_PNO.is_cuda and gpu.enabled():
            return self._on_gpu(out_PNO, function, scale, plus_PNO, times_PNO)
        value_PNO = torch.baddbmm(self.y_PNO.float(), self.h_PNr.float(), self.left_POr.mT)
        if self.bias_PO is not None:
            value_PNO += self.bias_PO[:, None]
        if function:
            value_PNO = {"relu": F.relu, "silu": F.silu}[function](value_PNO)
        if scale != 1.0:
            value_PNO *= scale
        if times_PNO is not None:
            value_PNO *= times_PNO
        return out_PNO.copy_(value_PNO if plus_PNO is None else value_PNO.add_(plus_PNO))

    def _on_gpu(
        self, out_PNO: Tensor, function: str, scale: float, plus_PNO: Tensor | None, times_PNO: Tensor | None
    ) -> Tensor:
        y_PNO, h_PNr, left_POr, bias_PO = self
        num_probes, num_rows, num_out = y_PNO.shape
        assert y_PNO.is_contiguous() and left_POr.stride()[1:] == (left_POr.shape[2], 1)
        assert h_PNr.stride(2) == 1 and h_PNr.stride(0) == num_rows * h_PNr.stride(1)
        bias = y_PNO if bias_PO is None else bias_PO
        other = next((t.contiguous() for t in (plus_PNO, times_PNO) if t is not None), y_PNO)
        grid = (-(-num_rows // _ROWS), -(-num_out // _OUTPUTS), num_probes)
        with torch.cuda.device(y_PNO.device):
            _kernels().low_rank_sum[grid](
                out_PNO, y_PNO, other, h_PNr, left_POr, bias, num_rows, num_out, h_PNr.stride(1),
                left_POr.stride(0), bias.stride(0), bias.stride(-1), float(scale), RANK=left_POr.shape[2],
                HAS_BIAS=bias_PO is not None, FUNCTION=function, PLUS=plus_PNO is not None,
                TIMES=times_PNO is not None, ROWS=_ROWS, OUTPUTS=_OUTPUTS,
            )  # fmt: skip
        return out_PNO


def layer_norm(x_PND: Tensor, weight_PD: Tensor, bias_PD: Tensor | None, eps: float) -> Tensor:
    """Layer norm with weights of each probe; the result is rounded once."""
    if x_PND.is_cuda and gpu.enabled():
        return _norm_on_gpu(x_PND.contiguous(), weight_PD, bias_PD, eps)
    biases = [None] * len(x_PND) if bias_PD is None else list(bias_PD)
    size = x_PND.shape[-1:]
    parts = [F.layer_norm(x, size, w, b, eps) for x, w, b in zip(x_PND, weight_PD, biases, strict=True)]
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _norm_on_gpu(x_PND: Tensor, weight_PD: Tensor, bias_PD: Tensor | None, eps: float) -> Tensor:
    num_probes, num_rows, size = x_PND.shape
    out_PND = torch.empty_like(x_PND)
    bias = weight_PD if bias_PD is None else bias_PD
    with torch.cuda.device(x_PND.device):
        _kernels().layer_norm[(num_probes * num_rows,)](
            out_PND, x_PND, weight_PD, bias, num_rows, size, weight_PD.stride(0), bias.stride(0), eps,
            HAS_BIAS=bias_PD is not None, SIZE=1 << (size - 1).bit_length(),
        )  # fmt: skip
    return out_PND


@functools.cache
def _kernels() -> ModuleType:
    from mezo.kernels import _layers_triton

    return _layers_triton
