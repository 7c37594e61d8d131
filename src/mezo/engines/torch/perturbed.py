"""A forward pass under several probes that never writes the weights.

`PerturbedForward` is a torch function mode: inside it, every torch function that reads a trained parameter sees the
parameter under the probes instead. So it holds for any model that is written in PyTorch functions, for tied weights,
and after an exception anywhere there is nothing to restore.

Rows of P probes come probe by probe, as in `mezo.engines.torch.lora`, and every function below knows how to split them
by probe. With one probe any other function may read a parameter too. What a parameter is under the probes is the
business of `Weights`: here dense directions, in `mezo.engines.torch.low_rank` those of low rank.

Shapes: P probes, N rows × positions of one probe, I inputs and O outputs of a layer, D entries of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mezo import philox
from mezo.engines.torch.buffer import ProbeBuffers
from mezo.engines.torch.space import ParameterSpace, direction_rows
from mezo.estimator import Probe
from mezo.kernels.layers import layer_norm

# Elements of a linear layer's weight that are formed at once. On a CPU 8 MiB of scratch for each probe; on a GPU
# a hundredth of the model, which leaves memory as it is, but enough for one matrix product to fill it.
_LINEAR_BLOCK = 1 << 21
_LINEAR_BLOCK_GPU = (1 << 23, 1 << 27)  # least and most
_ALIGNED = 64  # outputs of a block: tensor cores want addresses that are

# Models whose every read of a parameter is one of the functions below, with rows in the first dimension: tested.
BATCHED_MODELS = frozenset("llama mistral qwen2 qwen3 opt gpt2 bert roberta".split())

_METADATA = frozenset(
    "shape dtype device layout ndim requires_grad grad grad_fn is_leaf is_cuda is_cpu is_meta is_sparse is_quantized "
    "is_mps is_xpu is_nested is_sparse_csr is_mkldnn names nbytes itemsize _version _backward_hooks retains_grad "
    "output_nr".split()
)
_METADATA_FUNCTIONS = frozenset(
    getattr(Tensor, name)
    for name in (
        "size dim stride numel nelement element_size storage_offset is_contiguous is_floating_point is_complex "
        "get_device __len__".split()
    )
)
_ELEMENTWISE = frozenset("mul multiply __mul__ __rmul__ add __add__ __radd__".split())


class Weights(Protocol):
    """Trained parameters under P probes. `read_names` collects the canonical names of those that were read."""

    num_probes: int
    read_names: set[str]

    def trains(self, value: object) -> bool:
        """Whether the value is a trained parameter."""
        ...

    def linear(self, x_PNI: Tensor, weight: Tensor, bias_PO: Tensor | None, transposed: bool) -> Tensor:
        """x Wᵀ + b, or x W + b if `transposed`: [P, N, O]."""
        ...

    def rows(self, ids_PN: Tensor, weight: Tensor) -> Tensor:
        """Rows of an embedding: [P, N, D]."""
        ...

    def whole(self, parameter: Tensor) -> Tensor:
        """The parameter under each probe, [P, *shape], in its own type."""
        ...


class PerturbedForward(TorchFunctionMode):
    """Context in which reads of the trained parameters see them under the probes."""

    def __init__(self, weights: Weights):
        super().__init__()
        self.weights = weights
        self._num_probes = weights.num_probes
        self._num_rows = 0  # of all probes, as the last embedding saw them

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
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, *args, **kwargs)
        if self._num_probes > 1 and getattr(func, "__name__", "") in _ELEMENTWISE and len(args) == 2:
            return self._elementwise(func, *args, **kwargs)
        return func(*map(self._substitute, args), **{k: self._substitute(v) for k, v in kwargs.items()})

    def _reads_values(self, func: Callable[..., Any]) -> bool:
        if getattr(func, "__name__", "") == "__get__":
            return getattr(getattr(func, "__self__", None), "__name__", "") not in _METADATA
        return func not in _METADATA_FUNCTIONS

    def _substitute(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self.weights.trains(value):
            assert self._num_probes == 1, "a function that is not known reads a trained parameter"
            return self.weights.whole(value)[0]
        if isinstance(value, (list, tuple)) and any(map(self.weights.trains, value)):
            return type(value)(map(self._substitute, value))
        return value

    def _under_probes(self, parameter: Tensor) -> Tensor:
        if self.weights.trains(parameter):
            return self.weights.whole(parameter)
        return parameter.expand(self._num_probes, *parameter.shape)

    def _by_probe(self, x: Tensor) -> Tensor:
        return x.reshape(self._num_probes, -1, x.shape[-1])

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
        trains = self.weights.trains
        if not trains(weight) and (bias is None or not trains(bias)):
            return torch.addmm(bias, x, weight) if transposed and bias is not None else F.linear(x, weight, bias)
        bias_PO = None if bias is None else self._under_probes(bias)
        x_PNI = self._by_probe(x)
        if trains(weight):
            y_PNO = self.weights.linear(x_PNI, weight, bias_PO, transposed)
        else:
            assert bias_PO is not None
            weight_OI = weight.T if transposed else weight
            y_PNO = torch.stack([F.linear(x_NI, weight_OI, b_O) for x_NI, b_O in zip(x_PNI, bias_PO, strict=True)])
        return y_PNO.view(*x.shape[:-1], y_PNO.shape[-1])

    def _addmm(self, bias: Tensor, x: Tensor, weight: Tensor, **scales: Any) -> Tensor:
        if scales or bias.ndim != 1:
            return torch.addmm(*map(self._substitute, (bias, x, weight)), **scales)
        return self._linear(x, weight, bias, transposed=True)

    def _embedding(
        self,
        ids: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *more: Any,
        **options: Any,
    ) -> Tensor:
        if self._num_probes > 1 and ids.shape[0] > 1:
            self._num_rows = ids.shape[0]
        if not self.weights.trains(weight) or max_norm is not None:
            return F.embedding(ids, self._substitute(weight), padding_idx, max_norm, *more, **options)
        if self._num_probes > 1 and ids.shape[0] == 1:  # positions, the same for all rows
            ids = ids.expand(self._num_rows, *ids.shape[1:])
        out_PND = self.weights.rows(ids.reshape(self._num_probes, -1), weight)
        return out_PND.view(*ids.shape, weight.shape[1])

    def _layer_norm(
        self, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *more: Any,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        return self._norm(F.layer_norm, x, shape, (weight, bias), more, options)

    def _rms_norm(
        self, x: Tensor, shape: Sequence[int], weight: Tensor | None = None, *more: Any, **options: Any
    ) -> Tensor:
        return self._norm(F.rms_norm, x, shape, (weight,), more, options)

    def _norm(
        self,
        function: Callable[..., Tensor],
        x: Tensor,
        shape: Sequence[int],
        parameters: Sequence[Tensor | None],
        more: Sequence[Any],
        options: Mapping[str, Any],
    ) -> Tensor:
        """A norm rounds its result once, weight included, so each probe has its own call."""
        if not any(map(self.weights.trains, parameters)):
            return function(x, shape, *parameters, *more, **options)
        if function is F.layer_norm and parameters[0] is not None and len(shape) == 1:
            weight_PD, bias_PD = (None if p is None else self._under_probes(p) for p in parameters)
            assert weight_PD is not None
            eps = more[0] if more else options.get("eps", 1e-5)
            return layer_norm(self._by_probe(x), weight_PD, bias_PD, eps).view(x.shape)
        under = [None if p is None else self._under_probes(p) for p in parameters]
        parts = [
            function(x_ND, shape, *(None if p is None else p[i] for p in under), *more, **options)
            for i, x_ND in enumerate(self._by_probe(x))
        ]
        return (parts[0] if len(parts) == 1 else torch.stack(parts)).view(x.shape)

    def _elementwise(self, func: Callable[..., Any], a: Any, b: Any, **options: Any) -> Any:
        """A vector of parameters times or plus the last dimension of rows."""
        for parameter, x, order in ((a, b, 1), (b, a, -1)):
            if not self.weights.trains(parameter):
                continue
            fits = isinstance(x, Tensor) and parameter.ndim == 1 and x.ndim > 1 and x.shape[-1] == len(parameter)
            assert fits and not options, "a trained parameter is read in a way that is not known"
            pair = (self.weights.whole(parameter)[:, None], self._by_probe(x))
            return func(*pair[::order]).view(x.shape)
        return func(a, b, **options)


_HANDLERS: Mapping[Any, Callable[..., Tensor]] = {
    F.linear: PerturbedForward._linear,
    F.embedding: PerturbedForward._embedding,
    F.layer_norm: PerturbedForward._layer_norm,
    F.rms_norm: PerturbedForward._rms_norm,
    torch.addmm: PerturbedForward._addmm,
}


class Dense:
    """θ + scale · z(seed), formed in scratch for each read; z is drawn once for two probes that share it."""

    def __init__(self, space: ParameterSpace, probes: Sequence[Probe]):
        self.space = space
        self.probes = probes
        self.num_probes = len(probes)
        self.read_names: set[str] = set()
        self._names = {id(p): name for name, p in space.parameters.items()}
        self._num_parameters = space.num_parameters()

    def trains(self, value: object) -> bool:
        """See `Weights.trains`."""
        return id(value) in self._names

    def linear(self, x_PNI: Tensor, weight: Tensor, bias_PO: Tensor | None, transposed: bool) -> Tensor:
        """See `Weights.linear`. Goes block by block over output features, or at once if transposed."""
        if transposed:
            weights_PIO = self.whole(weight)
            assert bias_PO is not None
            return torch.stack([torch.addmm(*arguments) for arguments in zip(bias_PO, x_PNI, weights_PIO, strict=True)])
        num_out, num_in = weight.shape
        least, most = _LINEAR_BLOCK_GPU
        block = max(least, min(most, self._num_parameters // 100)) if weight.is_cuda else _LINEAR_BLOCK
        rows = max(_ALIGNED, block // num_in // _ALIGNED * _ALIGNED)
        y_PNO = x_PNI.new_empty(*x_PNI.shape[:2], num_out)
        for first in range(0, num_out, rows):
            stop = min(num_out, first + rows)
            for p, formed_N in enumerate(self._formed(weight, first * num_in, stop * num_in)):
                weight_IO, out_NO = formed_N.view(-1, num_in).T, y_PNO[p, :, first:stop]
                if bias_PO is None:
                    torch.mm(x_PNI[p], weight_IO, out=out_NO)
                else:
                    torch.addmm(bias_PO[p, first:stop], x_PNI[p], weight_IO, out=out_NO)
        return y_PNO

    def rows(self, ids_PN: Tensor, weight: Tensor) -> Tensor:
        """See `Weights.rows`. Only the rows that are gathered are perturbed."""
        name = self._read(weight)
        unique_R, inverse_PN = torch.unique(ids_PN, return_inverse=True)
        theta_RD = weight.detach()[unique_R]
        out, z_RD, seed = [], torch.empty(0), None
        for probe, inverse_N in zip(self.probes, inverse_PN, strict=True):
            if probe.seed != seed:
                seed, z_RD = probe.seed, direction_rows(probe.seed, name, unique_R, weight.shape[1])
            factor = probe.scale * self.space.scale(name, probe.seed)
            out.append(z_RD.mul(factor).add_(theta_RD).to(weight.dtype)[inverse_N])
        return torch.stack(out)

    def whole(self, parameter: Tensor) -> Tensor:
        """See `Weights.whole`."""
        return torch.stack(self._formed(parameter, 0, parameter.numel())).view(self.num_probes, *parameter.shape)

    def _read(self, parameter: Tensor) -> str:
        name = self._names[id(parameter)]
        self.read_names.add(name)
        return name

    def _formed(self, parameter: Tensor, start: int, stop: int) -> list[Tensor]:
        """Elements [start, stop) under each probe, in the parameter's type."""
        name = self._read(parameter)
        stream = philox.stream_id("direction", name)
        theta_N = parameter.detach().view(-1)[start:stop]
        formed: list[Tensor] = []
        while len(formed) < self.num_probes:
            (seed, scale), *rest = self.probes[len(formed) :]
            factor = scale * self.space.scale(name, seed)
            if rest and rest[0] == (seed, -scale):
                formed += philox.add_normals_both(theta_N, factor, seed, stream, start)
            else:
                formed.append(philox.add_normals(theta_N, factor, seed, stream, start))
        return [formed_N.to(parameter.dtype) for formed_N in formed]


class Copies:
    """The same, formed before the pass as whole copies of all parameters: for small models in float32.

    No kernel of the pass depends on the seed, so a CUDA graph can replay it.

    Args:
        space: the trained parameters.
        buffers: where the copies lie.
        probes: under which they are.
    """

    def __init__(self, space: ParameterSpace, buffers: ProbeBuffers, probes: Sequence[Probe]):
        self.num_probes = len(probes)
        self.read_names: set[str] = set()
        self._names = {id(p): name for name, p in space.parameters.items()}
        self._buffers = buffers
        self._flat_PN = buffers.write(probes)

    def trains(self, value: object) -> bool:
        """See `Weights.trains`."""
        return id(value) in self._names

    def linear(self, x_PNI: Tensor, weight: Tensor, bias_PO: Tensor | None, transposed: bool) -> Tensor:
        """See `Weights.linear`."""
        weight_PIO = self.whole(weight) if transposed else self.whole(weight).mT
        if bias_PO is None:
            return torch.bmm(x_PNI, weight_PIO)
        return torch.baddbmm(bias_PO[:, None], x_PNI, weight_PIO)

    def rows(self, ids_PN: Tensor, weight: Tensor) -> Tensor:
        """See `Weights.rows`."""
        probe_P1 = torch.arange(self.num_probes, device=ids_PN.device)[:, None]
        return self.whole(weight)[probe_P1, ids_PN]

    def whole(self, parameter: Tensor) -> Tensor:
        """See `Weights.whole`."""
        name = self._names[id(parameter)]
        self.read_names.add(name)
        return self._buffers.part(self._flat_PN, name)
