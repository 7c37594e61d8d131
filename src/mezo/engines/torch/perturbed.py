"""A forward pass under several probes that never writes the weights.

`PerturbedForward` is a torch function mode: inside it, every torch function that reads a trained parameter sees the
parameter under the probes instead. So it holds for any model that is written in PyTorch functions, for tied weights,
and after an exception anywhere there is nothing to restore.

Rows of P probes come probe by probe, as in `mezo.engines.torch.lora`, and every function below knows how to split them
by probe. With one probe any other function may read a parameter too. What a parameter is under the probes is the
business of `Weights`: `mezo.engines.torch.dense` and `mezo.engines.torch.low_rank`.

Shapes: P probes, N rows × positions of one probe, I inputs and O outputs of a layer, D entries of a vector.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol
from weakref import ReferenceType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mezo.kernels.layers import LowRankSum, layer_norm

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
_ACTIVATIONS = frozenset((F.relu, F.silu))
_PRODUCTS = frozenset("mul multiply __mul__ __rmul__".split())
_SUMS = frozenset("add __add__ __radd__".split())


class Weights(Protocol):
    """Trained parameters under P probes. `read_names` collects the canonical names of those that were read."""

    num_probes: int
    read_names: set[str]

    def trains(self, value: object) -> bool:
        """Whether the value is a trained parameter."""
        ...

    def linear(self, x_PNI: Tensor, weight: Tensor, bias_PO: Tensor | None, transposed: bool) -> Tensor | LowRankSum:
        """x Wᵀ + b, or x W + b if `transposed`: [P, N, O]; possibly unfinished."""
        ...

    def rows(self, ids_PN: Tensor, weight: Tensor) -> Tensor:
        """Rows of an embedding: [P, N, D]."""
        ...

    def whole(self, parameter: Tensor) -> Tensor:
        """The parameter under each probe, [P, *shape], in its own type."""
        ...


class PerturbedForward(TorchFunctionMode):
    """Context in which reads of the trained parameters see them under the probes.

    A linear layer may leave its output unfinished: then the next function that reads it finishes it, in the same pass
    over memory if it is one that reads and writes each element anyway. Under several probes an activation is written
    over what it is of, so that the widest tensors of a pass are there once.
    """

    def __init__(self, weights: Weights):
        super().__init__()
        self.weights = weights
        self._num_probes = weights.num_probes
        self._num_rows = 0  # of all probes, as the last embedding saw them
        self._unfinished: dict[int, tuple[ReferenceType[Tensor], LowRankSum]] = {}  # by id of the tensor
        self._last_output: ReferenceType[Tensor] | None = None  # of a linear layer

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if exception[0] is None:  # else nobody reads them, and finishing would count as being read
            for _, parts in list(self._unfinished.values()):
                parts.finish_()
        self._unfinished.clear()

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
        if self._unfinished:
            if func is F.dropout and not kwargs.get("training", True):
                return args[0]
            finished = self._finished_by(func, args)
            if finished is not None:
                return finished
            self._finish(args)
            self._finish(kwargs.values())
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, *args, **kwargs)
        if func in _ACTIVATIONS and len(args) == 1 and args[0] is self._last_linear():
            kwargs = {"inplace": True}
        if self._num_probes > 1 and getattr(func, "__name__", "") in _PRODUCTS | _SUMS and len(args) == 2:
            return self._elementwise(func, *args, **kwargs)
        return func(*map(self._substitute, args), **{k: self._substitute(v) for k, v in kwargs.items()})

    def _last_linear(self) -> Tensor | None:
        return None if self._last_output is None else self._last_output()

    def _reads_values(self, func: Callable[..., Any]) -> bool:
        if getattr(func, "__name__", "") == "__get__":
            return getattr(getattr(func, "__self__", None), "__name__", "") not in _METADATA
        return func not in _METADATA_FUNCTIONS

    def _parts(self, value: Any) -> LowRankSum | None:
        """What is missing of an unfinished tensor."""
        reference, parts = self._unfinished.get(id(value), (None, None))
        return parts if reference is not None and reference() is value else None

    def _leave(self, y: Tensor, parts: LowRankSum) -> Tensor:
        """Leaves `y`, a view of the sum, to be finished; forgotten if it dies before."""
        place = id(y)
        self._unfinished[place] = weakref.ref(y, lambda _: self._unfinished.pop(place, None)), parts
        return y

    def _finish(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                self._finish(value)
            elif isinstance(value, Tensor) and (parts := self._parts(value)) is not None:
                del self._unfinished[id(value)]
                parts.finish_()

    def _finished_by(self, func: Callable[..., Any], args: Sequence[Any]) -> Tensor | None:
        """What the function makes of an unfinished tensor, if it can be made in one pass: relu, silu, sum, product."""
        name = getattr(func, "__name__", "")
        if func in _ACTIVATIONS and (parts := self._parts(args[0])) is not None:
            return parts.then(name).view(args[0].shape)
        if len(args) != 2 or name not in _PRODUCTS | _SUMS:
            return None
        for y, other in (args, args[::-1]):
            parts = self._parts(y)
            if parts is None or other is y:
                continue
            if name in _PRODUCTS and isinstance(other, float):
                return parts.then(scale=other).view(y.shape)
            same = isinstance(other, Tensor) and other.shape == y.shape and other.dtype == y.dtype
            if same and not self.weights.trains(other):
                self._finish([other])
                other_PNO = other.reshape(parts.y_PNO.shape)
                then = parts.then(times_PNO=other_PNO) if name in _PRODUCTS else parts.then(plus_PNO=other_PNO)
                return then.view(y.shape)
        return None

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
            if isinstance(y_PNO, LowRankSum):
                return self._leave(y_PNO.y_PNO.view(*x.shape[:-1], -1), y_PNO)
        else:
            assert bias_PO is not None
            weight_OI = weight.T if transposed else weight
            y_PNO = torch.stack([F.linear(x_NI, weight_OI, b_O) for x_NI, b_O in zip(x_PNI, bias_PO, strict=True)])
        y = y_PNO.view(*x.shape[:-1], y_PNO.shape[-1])
        # Nothing else reads what an activation reads in the models that several probes go through.
        self._last_output = weakref.ref(y) if self._num_probes > 1 else None
        return y

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
