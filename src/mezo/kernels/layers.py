"""Parts of a layer under several probes at once: readable versions, and one launch of Triton on a GPU.

Shapes: P probes, N rows × positions of one probe, O outputs of a layer, D entries of a vector, r the rank.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mezo.kernels import gpu

if TYPE_CHECKING:
    from types import ModuleType

_ROWS, _OUTPUTS = 32, 256  # of a program


def low_rank_offset(h_PNk: Tensor, left_POr: Tensor, bias_PO: Tensor | None) -> Tensor:
    """h Lᵀ + bias under each probe: what is added to x Wᵀ.

    Args:
        h_PNk: x V, of which the first r columns count.
        left_POr: L, float32.
        bias_PO: of any floating type.

    Returns:
        [P, N, O] in the type of h, summed in float32.
    """
    rank = left_POr.shape[2]
    if h_PNk.is_cuda and gpu.enabled():
        return _offset_on_gpu(h_PNk.contiguous(), left_POr.contiguous(), bias_PO)
    h_PNr = h_PNk[..., :rank].float()
    if bias_PO is None:
        return torch.bmm(h_PNr, left_POr.mT).to(h_PNk.dtype)
    return torch.baddbmm(bias_PO[:, None].float(), h_PNr, left_POr.mT).to(h_PNk.dtype)


def layer_norm(x_PND: Tensor, weight_PD: Tensor, bias_PD: Tensor | None, eps: float) -> Tensor:
    """Layer norm with weights of each probe; the result is rounded once."""
    if x_PND.is_cuda and gpu.enabled():
        return _norm_on_gpu(x_PND.contiguous(), weight_PD, bias_PD, eps)
    biases = [None] * len(x_PND) if bias_PD is None else list(bias_PD)
    size = x_PND.shape[-1:]
    parts = [F.layer_norm(x, size, w, b, eps) for x, w, b in zip(x_PND, weight_PD, biases, strict=True)]
    return parts[0][None] if len(parts) == 1 else torch.stack(parts)


def _offset_on_gpu(h_PNk: Tensor, left_POr: Tensor, bias_PO: Tensor | None) -> Tensor:
    (num_probes, num_rows, width), (_, num_out, rank) = h_PNk.shape, left_POr.shape
    out_PNO = h_PNk.new_empty(num_probes, num_rows, num_out)
    bias = h_PNk if bias_PO is None else bias_PO
    grid = (-(-num_rows // _ROWS), -(-num_out // _OUTPUTS), num_probes)
    with torch.cuda.device(h_PNk.device):
        _kernels().low_rank_offset[grid](
            out_PNO, h_PNk, left_POr, bias, num_rows, num_out, width, bias.stride(0), bias.stride(-1),
            RANK=rank, HAS_BIAS=bias_PO is not None, ROWS=_ROWS, OUTPUTS=_OUTPUTS,
        )  # fmt: skip
    return out_PNO


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
