"""The trained parameters of a PyTorch model: canonical names, the direction in them, and their update."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from mezo import philox
from mezo.engines.torch.optimizer import Optimizer
from mezo.engines.torch.rounding import stochastic_round
from mezo.estimator import Record
from mezo.kernels import gpu as gpu_kernels

# Elements handled at once by passes over the weights: 4 MiB of float32 scratch.
CHUNK = 1 << 20


@dataclass
class ParameterSpace:
    """Trained parameters by canonical name, and the distribution of directions in them.

    The canonical name is the parameter's name in the saved model or adapter, so it does not depend on the engine.
    `parameters` holds each tied weight once. With `normalize_perturbations`, z of each tensor has unit norm. `widths`
    holds the standard deviation of z where it is not 1: both projected_grad and z grow with it, so a width of s is a
    learning rate larger by s² for that tensor.
    """

    parameters: Mapping[str, Tensor]
    normalize_perturbations: bool = False
    widths: Mapping[str, float] = field(default_factory=dict)
    optimizer: Optimizer | None = None  # plain SGD if not given; else all parameters are float32
    # Norms of the last direction only: both probes of a step and its update ask for the same seed.
    _norms: dict[int, dict[str, float]] = field(default_factory=dict, repr=False, compare=False)
    _segments: philox.Segments | None = field(default=None, repr=False, compare=False)
    _tables: dict[tuple[str, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)
    _gradient: tuple[Tensor, philox.Segments] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._dtypes = {parameter.dtype for parameter in self.parameters.values()}
        for name, parameter in self.parameters.items():
            assert parameter.is_contiguous(), name

    def num_parameters(self) -> int:
        """Number of trained scalars."""
        return sum(p.numel() for p in self.parameters.values())

    def digest(self) -> str:
        """Hash of the names, types and values of the trained parameters."""
        return tensors_digest(self.parameters)

    def scale(self, name: str, seed: int) -> float:
        """What multiplies z of this tensor: its width, over ‖z‖ with `normalize_perturbations`."""
        width = self.widths.get(name, 1.0)
        if not self.normalize_perturbations:
            return width
        if seed not in self._norms:
            self._norms.clear()
            self._norms[seed] = {}
        norms = self._norms[seed]
        if name not in norms:
            norms[name] = direction_norm(seed, name, self.parameters[name].numel(), self.parameters[name].device)
        return width / norms[name]

    def scales(self, seed: int, names: Iterable[str] | None = None) -> list[float]:
        """`scale` of some tensors, of all if not given; a single one if all have the same."""
        if not self.normalize_perturbations and not self.widths:
            return [1.0]
        return [self.scale(name, seed) for name in (self.parameters if names is None else names)]

    def factors(self, records: Sequence[Record], names: Collection[str]) -> list[list[float]]:
        """What z of each record is multiplied by in the update of each tensor: −lr · coefficient, and its scale."""
        columns = []
        for record in records:
            factor, scales = -record.learning_rate * record.coefficient, self.scales(record.seed, names)
            columns.append([factor * s for s in (scales if len(scales) == len(names) else scales * len(names))])
        return [list(row) for row in zip(*columns, strict=True)]

    def update(self, records: Sequence[Record], weight_decay: float, names: Collection[str] | None = None) -> None:
        """θ ← (1 − lr · weight_decay) θ − lr · Σ coefficient · z for one step's records, one per direction.

        Decay is decoupled and skips vectors (biases and norms). The sum is taken in float32; bfloat16 and float16
        weights are rounded stochastically, so that changes far below their rounding step add up. `names` says which
        parameters, where they are bfloat16 or float16; all if not given.
        """
        learning_rate = records[0].learning_rate
        if self.optimizer is not None:
            assert names is None
            self._update_by(self.optimizer, records, 1.0 - learning_rate * weight_decay)
            return
        if self._dtypes == {torch.float32}:
            assert names is None
            self._update_float32(records, 1.0 - learning_rate * weight_decay)
            return
        chosen = self.parameters if names is None else {name: self.parameters[name] for name in names}
        if self._update_rounded(chosen, records, 1.0 - learning_rate * weight_decay):
            return
        for (name, parameter), factors in zip(chosen.items(), self.factors(records, chosen), strict=True):
            keep = 1.0 - learning_rate * weight_decay if parameter.ndim >= 2 else 1.0
            stream = philox.stream_id("direction", name)
            flat_N = parameter.detach().view(-1)
            for start, stop in chunks(flat_N.numel()):
                weight_C = flat_N[start:stop].to(torch.float32)  # the weights themselves if they are float32
                if keep != 1.0:
                    weight_C.mul_(keep)
                for record, factor in zip(records, factors, strict=True):
                    philox.add_normals(weight_C, factor, record.seed, stream, start, out_N=weight_C)
                if flat_N.dtype != torch.float32:
                    _store_rounded(flat_N[start:stop], weight_C, records[0].seed, name, start)

    def _update_float32(self, records: Sequence[Record], keep: float) -> None:
        """The same bits without scratch, all tensors together."""
        if keep != 1.0:
            torch._foreach_mul_([p.detach() for p in self.parameters.values() if p.ndim >= 2], keep)
        if self._segments is None:
            tensors = list(self.parameters.values())
            self._segments = philox.Segments(tensors, tensors, self.streams())
        for record in records:
            factor = -record.learning_rate * record.coefficient
            self._segments.add_normals([factor * scale for scale in self.scales(record.seed)], record.seed)

    def _update_rounded(self, chosen: Mapping[str, Tensor], records: Sequence[Record], keep: float) -> bool:
        """The same bits in one launch on a GPU, if all parameters are bfloat16 or all float16."""
        tensors = list(chosen.values())
        if not tensors:
            return True
        if not (tensors[0].is_cuda and gpu_kernels.enabled() and len(self._dtypes) == 1):
            return False
        key = tuple(chosen)
        if key not in self._tables:
            if any(p.data_ptr() % 16 for p in tensors):
                return False
            streams, rounding = ([philox.stream_id(of, name) for name in chosen] for of in ("direction", "rounding"))
            self._tables[key] = gpu_kernels.weight_table(tensors, [p.ndim >= 2 for p in tensors], streams, rounding)
        factors = self.factors(records, chosen)
        gpu_kernels.update_many(self._tables[key], tensors[0].dtype, [r.seed for r in records], factors, keep)
        return True

    def _update_by(self, optimizer: Optimizer, records: Sequence[Record], keep: float) -> None:
        """The optimizer sees Σ coefficient · z of the step."""
        tensors = [p.detach() for p in self.parameters.values()]
        sizes = [t.numel() for t in tensors]
        if self._gradient is None:
            assert all(t.dtype == torch.float32 for t in tensors)
            gradient_N = torch.empty(sum(sizes), device=tensors[0].device)
            parts = gradient_N.split(sizes)
            self._gradient = gradient_N, philox.Segments(parts, parts, self.streams())
        gradient_N, segments = self._gradient
        gradient_N.zero_()
        for record in records:
            segments.add_normals([record.coefficient * scale for scale in self.scales(record.seed)], record.seed)
        steps = (optimizer.step(gradient_N) * records[0].learning_rate).split(sizes)
        if keep != 1.0:
            torch._foreach_mul_([t for t in tensors if t.ndim >= 2], keep)
        torch._foreach_sub_(tensors, [step.view_as(t) for step, t in zip(steps, tensors, strict=True)])

    def streams(self) -> list[int]:
        """The direction's stream of each parameter."""
        return [philox.stream_id("direction", name) for name in self.parameters]


def chunks(numel: int) -> Iterator[tuple[int, int]]:
    """[start, stop) ranges that cover `numel` elements."""
    for start in range(0, numel, CHUNK):
        yield start, min(numel, start + CHUNK)


def direction(seed: int, name: str, start: int, stop: int, device: torch.device) -> Tensor:
    """z of elements [start, stop) of one parameter, float32."""
    starts = torch.tensor([start], device=device)
    return philox.normals(seed, philox.stream_id("direction", name), starts, stop - start)[0]


def direction_rows(seed: int, name: str, rows_R: Tensor, width: int) -> Tensor:
    """z of whole rows of a matrix parameter, float32 [R, width]."""
    return philox.normals(seed, philox.stream_id("direction", name), rows_R * width, width)


def direction_norm(seed: int, name: str, numel: int, device: torch.device) -> float:
    """‖z‖ of one parameter. Rows of 1024 are summed in float64 and added exactly: no dependence on thread counts."""
    sums: list[float] = []
    for start, stop in chunks(numel):
        z_C = direction(seed, name, start, stop, device).double().square_()
        full = (stop - start) // 1024 * 1024
        sums += z_C[:full].view(-1, 1024).sum(dim=1).tolist()
        sums += z_C[full:].tolist()
    return math.sqrt(math.fsum(sums))


class TensorHasher:
    """xxh3-128 over names, types, shapes and bytes of tensors."""

    def __init__(self) -> None:
        self._hasher = xxhash.xxh3_128()

    def update(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor."""
        self._hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat_N = tensor.detach().reshape(-1 if tensor.ndim else 1).view(torch.uint8)
        for piece in flat_N.split(64 * CHUNK):
            self._hasher.update(piece.cpu().numpy().data)

    def hexdigest(self) -> str:
        """The hash so far."""
        return self._hasher.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hash of the tensors in the order of their names."""
    return named_digest(tensors, tensors.__getitem__)


def named_digest(names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    """The same of tensors that are formed by name, one at a time."""
    hasher = TensorHasher()
    for name in sorted(names):
        hasher.update(name, tensor_of(name))
    return hasher.hexdigest()


def _store_rounded(out_C: Tensor, value_C: Tensor, seed: int, name: str, start: int) -> None:
    bits_C = philox.rounding_bits(seed, philox.stream_id("rounding", name), start, start + len(out_C), out_C.device)
    out_C.copy_(stochastic_round(value_C, bits_C, out_C.dtype))
