"""A forward pass at θ + scale · z that never writes θ.

`PerturbedForward` is a torch function mode: inside it, every torch function that reads a trained parameter receives
θ + scale · z of that parameter instead, formed in scratch memory for that one call. So it holds for any model that is
written in PyTorch functions, for tied weights, and after an exception anywhere there is nothing to restore.

Two functions are taken apart to save time and scratch: embeddings perturb only the rows they gather, and linear layers
go block by block over output features. Attributes such as `shape` read nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mezo import philox
from mezo.engines.torch.space import ParameterSpace, direction_rows
from mezo.estimator import Probe

# Elements of a linear layer's weight that are formed at once: 8 MiB of float32 scratch.
_LINEAR_BLOCK = 1 << 21

_METADATA = frozenset(
    [
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "requires_grad",
        "grad",
        "grad_fn",
        "is_leaf",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_mps",
        "is_xpu",
        "is_nested",
        "is_sparse_csr",
        "is_mkldnn",
        "names",
        "nbytes",
        "itemsize",
        "_version",
        "_backward_hooks",
        "retains_grad",
        "output_nr",
    ]
)
_METADATA_FUNCTIONS = frozenset(
    getattr(Tensor, name)
    for name in [
        "size",
        "dim",
        "stride",
        "numel",
        "nelement",
        "element_size",
        "storage_offset",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "get_device",
        "__len__",
    ]
)


class PerturbedForward(TorchFunctionMode):
    """Context in which reads of the trained parameters see θ + probe.scale · z(probe.seed).

    `read_names` collects the canonical names of the parameters that some function read.
    """

    def __init__(self, space: ParameterSpace, probe: Probe):
        super().__init__()
        self.space = space
        self.probe = probe
        self.read_names: set[str] = set()
        self._scratch = torch.empty(0)
        self._names = {id(p): name for name, p in space.parameters.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not self._reads_values(func):
            return func(*args, **kwargs)
        if func in (F.embedding, F.linear) and self._is_trained(weight := _argument(args, kwargs, 1, "weight")):
            x = _argument(args, kwargs, 0, "input")
            if func is F.embedding and _argument(args, kwargs, 3, "max_norm") is None:
                return self._embedding(x, weight)
            if func is F.linear:
                return self._linear(x, weight, _argument(args, kwargs, 2, "bias"))
        return func(*map(self._substitute, args), **{k: self._substitute(v) for k, v in kwargs.items()})

    def _reads_values(self, func: Callable[..., Any]) -> bool:
        if getattr(func, "__name__", "") == "__get__":
            return getattr(getattr(func, "__self__", None), "__name__", "") not in _METADATA
        return func not in _METADATA_FUNCTIONS

    def _is_trained(self, value: Any) -> bool:
        return id(value) in self._names

    def _substitute(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._perturbed(value) if self._is_trained(value) else value
        if isinstance(value, (list, tuple)) and any(map(self._is_trained, value)):
            return type(value)(map(self._substitute, value))
        return value

    def _scale(self, name: str) -> float:
        self.read_names.add(name)
        return self.probe.scale * self.space.scale(name, self.probe.seed)

    def _perturbed(self, parameter: Tensor) -> Tensor:
        """θ + scale · z in the parameter's dtype."""
        name = self._names[id(parameter)]
        stream = philox.stream_id("direction", name)
        theta_N = parameter.detach().view(-1)
        return (
            philox.add_normals(theta_N, self._scale(name), self.probe.seed, stream, 0)
            .view(parameter.shape)
            .to(parameter.dtype)
        )

    def _embedding(self, ids: Tensor, weight_VD: Tensor) -> Tensor:
        name = self._names[id(weight_VD)]
        rows_R, inverse = torch.unique(ids, return_inverse=True)
        z_RD = direction_rows(self.probe.seed, name, rows_R, weight_VD.shape[1])
        return z_RD.mul_(self._scale(name)).add_(weight_VD.detach()[rows_R]).to(weight_VD.dtype)[inverse]

    def _linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """Blocks of output features, formed one after the other in the same scratch memory."""
        num_out, num_in = weight_OI.shape
        name = self._names[id(weight_OI)]
        stream, scale = philox.stream_id("direction", name), self._scale(name)
        bias_O = None if bias_O is None else self._substitute(bias_O)
        rows = min(num_out, max(1, _LINEAR_BLOCK // num_in))
        if self._scratch.numel() < rows * num_in or self._scratch.device != weight_OI.device:
            self._scratch = torch.empty(rows * num_in, device=weight_OI.device)
        outputs = []
        for first in range(0, num_out, rows):
            theta_RI = weight_OI.detach()[first : first + rows]
            scratch_N = self._scratch[: theta_RI.numel()]
            philox.add_normals(theta_RI.view(-1), scale, self.probe.seed, stream, first * num_in, out_N=scratch_N)
            block_RI = scratch_N.view(theta_RI.shape).to(weight_OI.dtype)
            outputs.append(F.linear(x, block_RI, None if bias_O is None else bias_O[first : first + rows]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    return args[position] if position < len(args) else kwargs.get(name)
