"""Parameters under dense directions, θ + scale · z(seed): formed in scratch where they are read.

Shapes: P probes, N rows × positions of one probe, I inputs and O outputs of a layer, D entries of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mezo import philox
from mezo.engines.torch.buffer import ProbeBuffers
from mezo.engines.torch.deferred import Block, DeferredUpdate, is_capturing
from mezo.engines.torch.space import ParameterSpace, direction_rows
from mezo.estimator import Probe
from mezo.kernels import gpu

# Elements of a linear layer's weight that are formed at once. On a CPU 8 MiB of scratch for each probe; on a GPU
# a small share of the model, which leaves memory as it is, but enough for one matrix product to fill it.
_LINEAR_BLOCK = 1 << 21
_LINEAR_BLOCK_GPU, _LINEAR_BLOCKS_GPU = (1 << 23, 1 << 27), 120  # least and most; of a model
# Elements that a GPU forms at once under all of the probes that see them, if that is more than two blocks.
_MOST_FORMED = 1 << 25
_FEW = 2  # probes whose products a GPU makes one after the other
_ALIGNED = 64  # outputs of a block: tensor cores want addresses that are


class Dense:
    """θ + scale · z(seed), formed in scratch for each read; z is drawn once for two probes that share it."""

    def __init__(self, space: ParameterSpace, probes: Sequence[Probe]):
        self.space = space
        self.probes = probes
        self.num_probes = len(probes)
        self.read_names: set[str] = set()
        self._names = {id(p): name for name, p in space.parameters.items()}
        self._block = _LINEAR_BLOCK

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
        rows = _rows_of_block(self._block, num_out, num_in)
        y_PNO = x_PNI.new_empty(*x_PNI.shape[:2], num_out)
        for first in range(0, num_out, rows):
            stop = min(num_out, first + rows)
            step = self._at_once(rows * num_in)
            for probe in range(0, self.num_probes, step):
                some = slice(probe, probe + step)
                formed = self._formed(weight, first * num_in, stop * num_in, some)
                bias_PB = None if bias_PO is None else bias_PO[some, first:stop]
                self._multiply(x_PNI[some], formed, bias_PB, y_PNO[some, :, first:stop])
        return y_PNO

    def _at_once(self, size: int) -> int:
        """Under how many probes so many elements are formed at once."""
        return self.num_probes

    def _multiply(
        self, x_PNI: Tensor, formed: Sequence[Tensor] | Tensor, bias_PO: Tensor | None, out_PNO: Tensor
    ) -> None:
        """out ← x Wᵀ + b, probe by probe."""
        for p, formed_N in enumerate(formed):
            weight_IO = formed_N.view(-1, x_PNI.shape[2]).T
            if bias_PO is None:
                torch.mm(x_PNI[p], weight_IO, out=out_PNO[p])
            else:
                torch.addmm(bias_PO[p], x_PNI[p], weight_IO, out=out_PNO[p])

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
        formed = self._formed(parameter, 0, parameter.numel(), slice(0, self.num_probes))
        return torch.stack(list(formed)).view(self.num_probes, *parameter.shape)

    def _read(self, parameter: Tensor) -> str:
        name = self._names[id(parameter)]
        self.read_names.add(name)
        return name

    def _formed(self, parameter: Tensor, start: int, stop: int, some: slice) -> Sequence[Tensor] | Tensor:
        """Elements [start, stop) under each of some probes, in the parameter's type."""
        name = self._read(parameter)
        stream = philox.stream_id("direction", name)
        theta_N = parameter.detach().view(-1)[start:stop]
        formed: list[Tensor] = []
        probes = self.probes[some]
        while len(formed) < len(probes):
            (seed, scale), *rest = probes[len(formed) :]
            factor = scale * self.space.scale(name, seed)
            if rest and rest[0] == (seed, -scale):
                formed += philox.add_normals_both(theta_N, factor, seed, stream, start)
            else:
                formed.append(philox.add_normals(theta_N, factor, seed, stream, start))
        return [formed_N.to(parameter.dtype) for formed_N in formed]


def _rows_of_block(block: int, num_out: int, num_in: int) -> int:
    """Outputs of a linear layer that are formed at once."""
    return min(num_out, max(_ALIGNED, block // num_in // _ALIGNED * _ALIGNED))


class Keys(NamedTuple):
    """What a kernel needs of P probes, on the device."""

    seeds_P: Tensor
    factors_KP: Tensor  # of each parameter
    scratch: Tensor  # memory for any block of a layer under the probes that see it at once
    small_PN: Tensor  # vectors under all probes


class ProbeKeys:
    """Seeds and factors of probes on a GPU; for a number of probes always in the same place, as CUDA graphs need it.

    Args:
        space: the trained parameters.
        device: where they are.
    """

    def __init__(self, space: ParameterSpace, device: torch.device):
        self._space = space
        self._device = device
        least, most = _LINEAR_BLOCK_GPU
        self.block = max(least, min(most, space.num_parameters() // _LINEAR_BLOCKS_GPU))
        self.most_formed = max(_MOST_FORMED, 2 * self.block)
        self._matrices = {p.shape for p in space.parameters.values() if p.ndim == 2}
        self._dtypes = {p.dtype for p in space.parameters.values() if p.ndim == 2}
        vectors = {name: p for name, p in space.parameters.items() if p.ndim < 2}
        self._small_dtype = next((p.dtype for p in vectors.values()), torch.float32)
        small = {name: p for name, p in vectors.items() if p.dtype == self._small_dtype}
        streams = [philox.stream_id("direction", name) for name in small]
        numbers = [number for number, name in enumerate(space.parameters) if name in small]
        self.small = gpu.Small.of(list(small.values()), streams, numbers, device)
        self.places_of_small = dict(zip(small, self.small.places, strict=True))
        self._kept: dict[int, Keys] = {}
        self._written: tuple[Probe, ...] = ()
        # How the passes so far have read each parameter.
        self.linear_blocks: set[Block] = set()
        self.read_otherwise: set[str] = set()
        self.deferred: DeferredUpdate | None = None

    def new_deferred(self, num_records: int, weight_decay: float) -> DeferredUpdate | None:
        """Where updates of this many records wait, now that a pass has shown who reads what; None if they cannot."""
        dtypes = {p.dtype for p in self._space.parameters.values()}
        blocks = {block for block in self.linear_blocks if block.name not in self.read_otherwise}
        if len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float16} or self._space.optimizer is not None:
            return None
        if not blocks or any(self._space.parameters[b.name].data_ptr() % 16 for b in blocks):
            return None
        return DeferredUpdate(self._space, blocks, num_records, weight_decay, self._device)

    def at_once(self, size: int) -> int:
        """Under how many probes so many elements are formed at once; both signs of a direction stay together."""
        return max(2, self.most_formed // size // 2 * 2)

    def write(self, probes: Sequence[Probe]) -> Keys:
        """The keys of the probes; writes them unless they are those of the last call."""
        count = len(probes)
        if count not in self._kept:
            seeds_P = torch.empty(count, dtype=torch.int64, device=self._device)
            factors_KP = torch.empty(len(self._space.parameters), count, device=self._device)
            sizes = [_rows_of_block(self.block, o, i) * i for o, i in self._matrices]
            elements = max((size * min(count, self.at_once(size)) for size in sizes), default=0)
            num_bytes = elements * max((d.itemsize for d in self._dtypes), default=0)
            scratch = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
            small_PN = torch.empty(count, self.small.size, dtype=self._small_dtype, device=self._device)
            self._kept[count] = Keys(seeds_P, factors_KP, scratch, small_PN)
            self._written = ()
        seeds_P, factors_KP, *_ = self._kept[count]
        if tuple(probes) != self._written:
            seeds_P.copy_(gpu.seeds_on([p.seed for p in probes], torch.device("cpu")))
            seeds = {probe.seed for probe in probes}
            scales = {seed: torch.tensor(self._space.scales(seed), dtype=torch.float64) for seed in seeds}
            factors_KP.copy_(torch.stack([scale * scales[seed] for seed, scale in probes], dim=1).expand_as(factors_KP))
            self._written = tuple(probes)
        return self._kept[count]


def is_paired(probes: Sequence[Probe]) -> bool:
    """Whether each two probes are the two signs of one direction."""
    return len(probes) % 2 == 0 and all(a == (b.seed, -b.scale) for a, b in zip(probes[::2], probes[1::2], strict=True))


class DenseOnGPU(Dense):
    """The same bits by one kernel for all probes, which reads the probes from memory: a CUDA graph can replay it."""

    def __init__(self, space: ParameterSpace, keys: ProbeKeys, probes: Sequence[Probe]):
        super().__init__(space, probes)
        self._block = keys.block
        self._paired = is_paired(probes)
        self._places = {name: place for place, name in enumerate(space.parameters)}
        self._of_probes = keys
        self._keys = keys.write(probes)
        self.captured: set[Block] = set()  # in a graph a block takes the update that is due where it is read first
        self._has_small = False

    def rows(self, ids_PN: Tensor, weight: Tensor) -> Tensor:
        """See `Weights.rows`."""
        name = self._read_otherwise(weight)
        factors_P = self._keys.factors_KP[self._places[name]]
        stream = philox.stream_id("direction", name)
        return gpu.perturb_rows(weight.detach(), ids_PN, self._keys.seeds_P, factors_P, stream)

    def whole(self, parameter: Tensor) -> Tensor:
        """See `Weights.whole`."""
        place = self._of_probes.places_of_small.get(self._read_otherwise(parameter))
        if place is None:
            whole_PN = self._under_probes(parameter, 0, parameter.numel(), None)
            return whole_PN.view(self.num_probes, *parameter.shape)
        if not self._has_small:
            self._has_small, keys = True, self._keys
            gpu.perturb_many(self._of_probes.small, keys.small_PN, keys.seeds_P, keys.factors_KP, paired=self._paired)
        return self._keys.small_PN[:, place].view(self.num_probes, *parameter.shape)

    def _at_once(self, size: int) -> int:
        """See `Dense._at_once`."""
        return self._of_probes.at_once(size)

    def _formed(self, parameter: Tensor, start: int, stop: int, some: slice) -> Sequence[Tensor] | Tensor:
        """See `Dense._formed`; in the same memory each time, the first of the probes with the update that is due."""
        block = Block(self._read(parameter), start, stop)
        self._of_probes.linear_blocks.add(block)
        deferred, scratch = self._of_probes.deferred, self._keys.scratch.view(parameter.dtype)
        is_first = some.start == 0 and block not in self.captured
        update = deferred.due(block) if deferred is not None and is_first else None
        formed_PN = self._under_probes(parameter, start, stop, scratch, update, some)
        if update is not None and deferred is not None:
            if is_capturing(parameter):
                self.captured.add(block)
            else:
                deferred.taken(block)
        return formed_PN

    def _multiply(
        self, x_PNI: Tensor, formed: Sequence[Tensor] | Tensor, bias_PO: Tensor | None, out_PNO: Tensor
    ) -> None:
        """Many probes in one launch: products of a small model under nine probes are short ones."""
        if len(formed) <= _FEW or not isinstance(formed, Tensor) or not out_PNO.is_contiguous():
            super()._multiply(x_PNI, formed, bias_PO, out_PNO)
            return
        weight_PIO = formed.view(len(formed), -1, x_PNI.shape[2]).mT
        if bias_PO is None:
            torch.bmm(x_PNI, weight_PIO, out=out_PNO)
        else:
            torch.baddbmm(bias_PO[:, None], x_PNI, weight_PIO, out=out_PNO)

    def _read_otherwise(self, parameter: Tensor) -> str:
        name = self._read(parameter)
        self._of_probes.read_otherwise.add(name)
        deferred = self._of_probes.deferred
        if deferred is not None and name in deferred.names:
            if is_capturing(parameter):
                raise RuntimeError(f"{name} is read in another way than before")
            deferred.settle()
        return name

    def _under_probes(
        self,
        parameter: Tensor,
        start: int,
        stop: int,
        out: Tensor | None,
        update: gpu.Update | None = None,
        some: slice = slice(None),
    ) -> Tensor:
        name = self._names[id(parameter)]
        theta_N = parameter.detach().view(-1)[start:stop]
        seeds_P, factors_P = self._keys.seeds_P[some], self._keys.factors_KP[self._places[name], some]
        stream = philox.stream_id("direction", name)
        return gpu.perturb(theta_N, start, seeds_P, factors_P, stream, paired=self._paired, out=out, update=update)


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
