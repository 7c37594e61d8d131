"""Parts of a layer under several probes at once: readable versions, and one launch of Triton on a GPU.

Shapes: P probes, N rows × positions of one probe, O outputs of a layer, D entries of a vector, r the rank.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mezo.kernels import gpu

if TYPE_CHECKING:
    from types import ModuleType

_ROWS, _OUTPUTS = 16, 256  # of a program's tile
_TILES = 4  # of a program that also sums over outputs


class After(Protocol):
    """What comes after a `LowRankSum`: it is told what becomes of the sum, and may know what will be read of that."""

    @property
    def right_rO(self) -> Tensor | None:
        """V of the matrix that reads f(the sum), in the type of y and at most 4 rows; None if that is not known."""
        ...

    def finished(self) -> None:
        """The sum itself is read."""
        ...

    def made(self, out_PNO: Tensor, low_PNr: Tensor | None) -> None:
        """f(the sum) is there, and its product with V if that was known."""
        ...


class LowRankSum(NamedTuple):
    """y + h Lᵀ + bias under each probe, of which y alone has been computed: the rest goes into what reads it."""

    y_PNO: Tensor
    h_PNr: Tensor  # x V; rows may lie further apart than r
    left_POr: Tensor  # L, float32
    bias_PO: Tensor | None  # of any floating type
    after: After | None = None

    def finish_(self) -> None:
        """Adds the rest to y."""
        if self.after is not None:
            self.after.finished()
        self._write(self.y_PNO)

    def rest(self) -> Tensor:
        """The rest alone, in the memory of y."""
        return self._write(self.y_PNO, has_y=False)

    def then(
        self,
        function: str = "",
        *,
        scale: float = 1.0,
        plus_PNO: Tensor | None = None,
        times_PNO: Tensor | None = None,
    ) -> Tensor:
        """f(the sum) · scale + plus, or · times, in one pass over memory, in float32; f is relu, silu or nothing."""
        out_PNO = torch.empty_like(self.y_PNO)
        right_rO = None if self.after is None or not on_gpu(out_PNO) else self.after.right_rO
        low_PNr = None
        if right_rO is None:
            self._write(out_PNO, function, scale, plus_PNO, times_PNO)
        else:
            low_PNr = self._write_both(out_PNO, right_rO, function, scale, plus_PNO, times_PNO)
        if self.after is not None:
            self.after.made(out_PNO, low_PNr)
        return out_PNO

    def _write(
        self,
        out_PNO: Tensor,
        function: str = "",
        scale: float = 1.0,
        plus_PNO: Tensor | None = None,
        times_PNO: Tensor | None = None,
        *,
        has_y: bool = True,
    ) -> Tensor:
        if on_gpu(out_PNO):
            num_probes, num_rows, num_out = out_PNO.shape
            tensors, sizes, flags = self._arguments(function, scale, plus_PNO, times_PNO)
            grid = (-(-num_rows // _ROWS), -(-num_out // _OUTPUTS), num_probes)
            with torch.cuda.device(out_PNO.device):
                _kernels().low_rank_sum[grid](
                    out_PNO, *tensors, *sizes, **flags, HAS_Y=has_y, ROWS=_ROWS, OUTPUTS=_OUTPUTS
                )
            return out_PNO
        start_PNO = self.y_PNO.float() if has_y else torch.zeros(self.y_PNO.shape, device=self.y_PNO.device)
        value_PNO = torch.baddbmm(start_PNO, self.h_PNr.float(), self.left_POr.mT)
        if self.bias_PO is not None:
            value_PNO += self.bias_PO[:, None]
        if function:
            value_PNO = {"relu": F.relu, "silu": F.silu}[function](value_PNO)
        if scale != 1.0:
            value_PNO *= scale
        if times_PNO is not None:
            value_PNO *= times_PNO
        return out_PNO.copy_(value_PNO if plus_PNO is None else value_PNO.add_(plus_PNO))

    def _write_both(
        self, out_PNO: Tensor, right_rO: Tensor, function: str, scale: float, plus_PNO: Tensor | None,
        times_PNO: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Writes `out`, and returns its product with V, of the type of y."""
        num_probes, num_rows, num_out = out_PNO.shape
        tensors, sizes, flags = self._arguments(function, scale, plus_PNO, times_PNO)
        assert right_rO.is_contiguous() and right_rO.shape == (flags["RANK"], num_out)
        parts = -(-num_out // (_OUTPUTS * _TILES))
        low_SPNr = torch.empty(parts, num_probes, num_rows, flags["RANK"], device=out_PNO.device)
        grid = (-(-num_rows // _ROWS), parts, num_probes)
        with torch.cuda.device(out_PNO.device):
            _kernels().low_rank_sum_and_product[grid](
                out_PNO, low_SPNr, *tensors, right_rO, *sizes, **flags, ROWS=_ROWS, OUTPUTS=_OUTPUTS, TILES=_TILES
            )
        return low_SPNr.sum(dim=0).to(out_PNO.dtype)

    def _arguments(
        self, function: str, scale: float, plus_PNO: Tensor | None, times_PNO: Tensor | None
    ) -> tuple[tuple[Tensor, ...], tuple[float, ...], dict[str, Any]]:
        """What both kernels take: tensors, sizes, and what they are compiled for."""
        y_PNO, h_PNr, left_POr, bias_PO, _ = self
        _, num_rows, num_out = y_PNO.shape
        assert y_PNO.is_contiguous() and left_POr.stride()[1:] == (left_POr.shape[2], 1)
        assert h_PNr.stride(2) == 1 and h_PNr.stride(0) == num_rows * h_PNr.stride(1)
        bias = y_PNO if bias_PO is None else bias_PO
        other = next((t.contiguous() for t in (plus_PNO, times_PNO) if t is not None), y_PNO)
        strides = (h_PNr.stride(1), left_POr.stride(0), bias.stride(0), bias.stride(-1))
        flags = {
            "RANK": left_POr.shape[2], "HAS_BIAS": bias_PO is not None, "FUNCTION": function,
            "PLUS": plus_PNO is not None, "TIMES": times_PNO is not None,
        }  # fmt: skip
        return (y_PNO, other, h_PNr, left_POr, bias), (num_rows, num_out, *strides, float(scale)), flags


def on_gpu(tensor: Tensor) -> bool:
    """Whether Triton's kernels compute on it."""
    return tensor.is_cuda and gpu.enabled()


def layer_norm(x_PND: Tensor, weight_PD: Tensor, bias_PD: Tensor | None, eps: float) -> Tensor:
    """Layer norm with weights of each probe; the result is rounded once."""
    if on_gpu(x_PND):
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
