"""Full-parameter directions of low rank: z = U Vᵀ / √r for each matrix, an ordinary z for each vector.

U is drawn for each direction, V once for a window of steps (LOZO, Chen et al., arXiv 2410.07698). Both have standard
normal entries, so every entry of z has variance 1 and E[z zᵀ] is the identity, as with dense directions: ε and the
learning rate keep their meaning. (LOZO perturbs with U Vᵀ and divides the update by r; its ε is ours divided by √r.)

Within a window the weights are W + B Vᵀ / √r, where B collects −Σ lr · coefficient · U in float32. So a step writes
nothing but B, of r columns, and a layer evaluates all probes as y = x Wᵀ + (x V / √r)(B ± εU)ᵀ, W read once. At the end
of a window B is folded into the weights with stochastic rounding, and V is drawn anew.

A subspace (SubZero, Yu et al., arXiv 2410.08989) holds U for the window as well and draws only its core: z = U Z Vᵀ / r
with Z of r × r normal entries, again of variance 1. SubZero orthonormalises U and V; with normal entries they are
nearly orthogonal where r is small against the matrix, and the bits are those of any device. What is collected is the
core alone, Σ coefficient · Z, so momentum and Adam have a state of r × r, and several directions a step estimate the
whole r × r gradient.

V comes from the seed of the window's first record, so the weights stay a function of the journal. Between two folds
they are W, B and V together, which no checkpoint of plain weights holds: a resumed run starts from a checkpoint at the
end of a window.

Shapes: P probes, N rows × positions of one probe, I inputs and O outputs of a layer, r the rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mezo import philox
from mezo.engines.torch.buffer import ProbeBuffers
from mezo.engines.torch.optimizer import Muon, Optimizer
from mezo.engines.torch.rounding import stochastic_round
from mezo.engines.torch.space import CHUNK, ParameterSpace, named_digest
from mezo.estimator import Probe, Record
from mezo.kernels import gpu as gpu_kernels
from mezo.kernels.layers import LowRankSum, on_gpu

_COLUMNS = 8  # of the product x V: what tensor cores want at least
_MOST_FUSED = 4  # r with which the function that makes x also computes x V


class LowRank:
    """The state of low-rank directions in a parameter space: what has been collected since the last fold.

    Args:
        space: the trained parameters, without `normalize_perturbations`.
        rank: r.
        refresh_steps: steps of a window.
        optimizer: for B and the vectors; its state starts anew with each window, because of a mean along one V only a
            share of √(r / I) lies along the next.
        subspace: hold U for a window too.
    """

    def __init__(
        self,
        space: ParameterSpace,
        rank: int,
        refresh_steps: int,
        optimizer: Optimizer | None = None,
        *,
        subspace: bool = False,
    ):
        assert not space.normalize_perturbations
        self.subspace = subspace
        self.space = space
        self.rank = rank
        self.refresh_steps = refresh_steps
        matrices = {name: p for name, p in space.parameters.items() if p.ndim > 1}
        vectors = {name: p for name, p in space.parameters.items() if p.ndim < 2}
        device = next(iter(space.parameters.values())).device
        # B of each matrix, seen as [all but the last dimension, last], or its core; vectors themselves. One after the
        # other in one memory, as CUDA graphs need it; float32.
        rows = [rank if subspace else _num_rows(p) for p in matrices.values()]
        self.num_left = sum(rows) * rank  # elements of all B together
        self.flat_N = torch.zeros(self.num_left + sum(p.numel() for p in vectors.values()), device=device)
        parts = self.flat_N.split([n * rank for n in rows] + [p.numel() for p in vectors.values()])
        collected = {
            name: part.detach().view((-1, rank) if name in matrices else vectors[name].shape)
            for name, part in zip([*matrices, *vectors], parts, strict=True)
        }
        for name, vector in vectors.items():
            collected[name].copy_(vector.detach())
        if isinstance(optimizer, Muon):
            optimizer.num_matrix = self.num_left
        self._collected = ParameterSpace(collected, widths=space.widths, optimizer=optimizer)
        # −0 + x is x: U alone where B is kept apart.
        bases = {name: torch.full_like(t, -0.0) if t.ndim > 1 else t for name, t in collected.items()}
        self.buffers = ProbeBuffers(self._collected, bases, aligned=False)
        self._names = {id(p): name for name, p in space.parameters.items()}
        self.right = _Bases({name: p.shape[-1] for name, p in matrices.items()}, "basis", rank, device)  # V
        stops = list(itertools.accumulate(rows))
        self.left_rows = {name: slice(stop - n, stop) for name, stop, n in zip(matrices, stops, rows, strict=True)}
        lefts = {name: _num_rows(p) for name, p in matrices.items()} if subspace else {}
        self.left = _Bases(lefts, "left basis", rank, device)  # U of a subspace
        self.readers = Readers(_COLUMNS // rank)
        self._rights: dict[tuple[tuple[str, ...], torch.dtype], Tensor] = {}
        self._window_seed: int | None = None
        self._keep = 1.0  # what weight decay leaves of W
        self.steps = 0  # since the last fold

    def trains(self, value: object) -> bool:
        """Whether the value is a trained parameter."""
        return id(value) in self._names

    def probes(self, probes: Sequence[Probe]) -> LowRankProbes:
        """The trained parameters under the probes, for `PerturbedForward`."""
        self._open(probes[0].seed)
        return LowRankProbes(self, probes)

    @property
    def is_folded(self) -> bool:
        """Whether the model's own parameters are the trained weights."""
        return self.steps == 0

    @torch.no_grad()
    def update(self, records: Sequence[Record], weight_decay: float) -> None:
        """As `ParameterSpace.update`, along these directions."""
        self._open(records[0].seed)
        self._collected.update(records, weight_decay)
        self.buffers.changed()
        self._keep *= 1.0 - records[0].learning_rate * weight_decay
        self.steps += 1
        if self.steps == self.refresh_steps:
            for name, parameter in self.space.parameters.items():
                self._write_folded(name, parameter.detach().view(-1))
            self.reset()

    def reset(self) -> None:
        """The model's own parameters are the trained weights, from now on."""
        for name, collected in self._collected.parameters.items():
            parameter = self.space.parameters[name]
            if parameter.ndim > 1:
                collected.zero_()
            else:
                collected.copy_(parameter.detach())
        self.buffers.changed()
        if self._collected.optimizer is not None:
            self._collected.optimizer.state.clear()
        self._window_seed, self._keep, self.steps = None, 1.0, 0

    @torch.no_grad()
    def folded(self, name: str) -> Tensor:
        """The parameter's present value in its own type, rounded stochastically if that is shorter than float32."""
        parameter = self.space.parameters[name].detach()
        if self.steps == 0:
            return parameter
        folded = torch.empty_like(parameter)
        self._write_folded(name, folded.view(-1))
        return folded

    def digest(self) -> str:
        """Hash of the present values, of which one at a time is formed."""
        return named_digest(self.space.parameters, self.folded)

    def _write_folded(self, name: str, out_N: Tensor) -> None:
        """The same into memory of that type, perhaps the parameter's own."""
        parameter, collected = self.space.parameters[name], self._collected.parameters[name]
        assert self._window_seed is not None
        stream = philox.stream_id("rounding", name)
        flat_N, width = parameter.detach().view(-1), parameter.shape[-1] if parameter.ndim else 1
        if out_N.is_cuda and gpu_kernels.enabled():
            if parameter.ndim < 2:
                nothing = collected.new_empty(1, 0), collected.new_empty(collected.numel(), 0)
                gpu_kernels.fold(out_N, collected.view(-1), *nothing, 1.0, self._window_seed, stream)
            else:
                left_Rr = self._left(name, 0, _num_rows(parameter))
                gpu_kernels.fold(out_N, flat_N, left_Rr, self.right[name], self._keep, self._window_seed, stream)
            return
        rows = max(1, CHUNK // width)
        for start in range(0, flat_N.numel(), rows * width):
            stop = min(flat_N.numel(), start + rows * width)
            value_N = collected.view(-1)[start:stop].clone() if parameter.ndim < 2 else self._moved(
                flat_N[start:stop].float(), self._left(name, start // width, stop // width), self.right[name]
            )  # fmt: skip
            if parameter.dtype != torch.float32:
                bits_N = philox.rounding_bits(self._window_seed, stream, start, stop, parameter.device)
                value_N = stochastic_round(value_N, bits_N, parameter.dtype)
            out_N[start:stop] = value_N

    def _moved(self, weight_N: Tensor, b_Rr: Tensor, v_Ir: Tensor) -> Tensor:
        """keep · W + B Vᵀ / √r of some rows; every product and sum is rounded, so the bits are those of any device."""
        weight_RI = (weight_N * self._keep).view(len(b_Rr), -1)
        for k in range(self.rank):
            weight_RI += b_Rr[:, k : k + 1] * v_Ir[:, k]
        return weight_RI.view(-1)

    def _left(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of B, exactly: those of U · core / √r in a subspace."""
        collected = self._collected.parameters[name]
        if not self.subspace:
            return collected[start:stop]
        u_Rr = self.left[name][start:stop]
        b_Rr = torch.zeros_like(u_Rr)
        for k in range(self.rank):
            b_Rr += u_Rr[:, k : k + 1] * collected[k]
        return b_Rr

    @property
    def keep(self) -> float:
        """What weight decay leaves of W in this window."""
        return self._keep

    def name(self, parameter: Tensor) -> str:
        """Canonical name."""
        return self._names[id(parameter)]

    def _open(self, seed: int) -> None:
        """A window's V is known from its first direction on."""
        if self.steps == 0 and seed != self._window_seed:
            self._window_seed = seed
            self.right.draw(seed)
            self.left.draw(seed)
            for (names, _), right_kC in self._rights.items():
                self._fill(names, right_kC)

    def right_of(self, names: tuple[str, ...], dtype: torch.dtype) -> Tensor:
        """Vᵀ / √r of matrices of the same width, one below the other: [k, C], always in the same memory; k is r for
        each and 0 up to a multiple of 8."""
        if (names, dtype) not in self._rights:
            rows = -(-len(names) * self.rank // _COLUMNS) * _COLUMNS
            width = len(self.right[names[0]])
            self._rights[names, dtype] = torch.zeros(rows, width, dtype=dtype, device=self.flat_N.device)
            self._fill(names, self._rights[names, dtype])
        return self._rights[names, dtype]

    def _fill(self, names: tuple[str, ...], right_kC: Tensor) -> None:
        for place, name in enumerate(names):
            right_kC[place * self.rank : (place + 1) * self.rank] = self.right[name].T


class _Bases:
    """V / √r of all matrices, one after the other in one memory, float32 [rows of all, r].

    Args:
        rows: of each matrix's basis.
        purpose: names the stream.
        rank: r.
        device: where they lie.
    """

    def __init__(self, rows: Mapping[str, int], purpose: str, rank: int, device: torch.device):
        self._purpose, self._rank = purpose, rank
        stops = list(itertools.accumulate(rows.values()))
        self.slices = {name: slice(stop - rows[name], stop) for name, stop in zip(rows, stops, strict=True)}
        self.flat_Nr = torch.empty(sum(rows.values()), rank, device=device)

    def __getitem__(self, name: str) -> Tensor:
        return self.flat_Nr[self.slices[name]]

    def draw(self, seed: int) -> None:
        """Takes the bases of a window."""
        starts = torch.zeros(1, dtype=torch.long, device=self.flat_Nr.device)
        for name in self.slices:
            basis_Rr = self[name]
            drawn_N = philox.normals(seed, philox.stream_id(self._purpose, name), starts, basis_Rr.numel())[0]
            # Not a division, which a GPU replaces by this product: the bits are those of any device.
            torch.mul(drawn_N.view_as(basis_Rr), 1 / math.sqrt(self._rank), out=basis_Rr)


class Readers:
    """Who reads what, as the passes so far have shown. A pass that shows something new is made again, see `num_known`.

    Which matrices read the same rows (q, k and v; gate and up); which one reads what a function has made of another's
    output (fc2 after fc1's relu); and which outputs are read as they are (k and v), on a GPU.

    Args:
        most: matrices whose x V fits into the columns that the product of one takes anyway. So it has the same shape,
            and the same bits, whether they are known to belong together or not.
    """

    def __init__(self, most: int):
        self._most = most
        self._groups: dict[str, tuple[str, ...]] = {}  # by each member
        self.next: dict[str, str] = {}
        self.read_whole: set[str] = set()

    def of(self, name: str) -> tuple[str, ...]:
        """The matrices that read what this one reads."""
        return self._groups.get(name, (name,))

    def note(self, first: str, name: str) -> None:
        """`name` read the same rows as `first`, which came before."""
        group = (*self.of(first), name)
        if len(group) <= self._most:
            self._groups |= dict.fromkeys(group, group)

    @property
    def num_known(self) -> int:
        """Grows with each thing that a pass shows and that changes the order of sums in the next."""
        return len(self.next) + len(self.read_whole)


class _Values:
    """Values of a tensor, kept alive so that their memory is not given to others."""

    def __init__(self, tensor: Tensor):
        self._tensor, self._version = tensor, tensor._version

    def are(self, x: Tensor) -> bool:
        """Whether these are the same."""
        same = self._tensor.data_ptr() == x.data_ptr() and self._tensor.shape == x.shape
        return same and self._version == x._version


class _Rows(NamedTuple):
    """Rows that were read last, and x V of the matrices that read them."""

    values: _Values
    first: str
    h_PNk: Tensor
    names: tuple[str, ...]


class _Made(NamedTuple):
    """What a function has made of a matrix's output."""

    values: _Values
    name: str


class _After:
    """`mezo.kernels.layers.After` of a matrix's output."""

    def __init__(self, probes: LowRankProbes, name: str):
        self._probes, self._name = probes, name

    @property
    def right_rO(self) -> Tensor | None:
        return self._probes.right_after(self._name)

    def finished(self) -> None:
        self._probes.readers.read_whole.add(self._name)

    def made(self, out_PNO: Tensor, low_PNr: Tensor | None) -> None:
        self._probes.made(self._name, out_PNO, low_PNr)


class LowRankProbes:
    """`mezo.engines.torch.perturbed.Weights` of low-rank directions.

    L = B + scale · U of each matrix stays in float32: in a short type it would lose a U that is small against B.
    """

    def __init__(self, state: LowRank, probes: Sequence[Probe]):
        self._state = state
        self._flat_PN = state.buffers.write(probes)
        self._left_PNr: Tensor | None = None
        self._last: _Rows | None = None
        self._made: _Made | None = None
        self.readers = state.readers
        self._vectors: dict[torch.dtype, Tensor] = {}
        self.num_probes = len(probes)
        self.read_names: set[str] = set()

    def trains(self, value: object) -> bool:
        """See `Weights.trains`."""
        return self._state.trains(value)

    def linear(self, x_PNI: Tensor, weight: Tensor, bias_PO: Tensor | None, transposed: bool) -> Tensor | LowRankSum:
        """See `Weights.linear`. W is read once for all probes."""
        name, rank = self._read(weight), self._state.rank
        if transposed:  # the matrix as it lies has I rows
            left_PIr = self._left(name)
            h_PNr = torch.bmm(x_PNI, left_PIr.to(x_PNI.dtype))
            right_Or = self._state.right_of((name,), weight.dtype)[:rank].T.float().contiguous()
            left_POr = right_Or.expand(self.num_probes, -1, -1)
        else:
            h_PNr, left_POr = self._low(x_PNI, name), self._left(name)
        weight_IO = weight.detach() if transposed else weight.detach().T
        x_MI, keep = x_PNI.flatten(0, 1), self._state.keep
        if name in self.readers.read_whole and on_gpu(x_PNI):  # the product adds itself to the rest
            y_PNO = x_PNI.new_empty(*x_PNI.shape[:2], weight_IO.shape[1])
            LowRankSum(y_PNO, h_PNr, left_POr, bias_PO).rest().flatten(0, 1).addmm_(x_MI, weight_IO, alpha=keep)
            return y_PNO
        y_PNO = torch.matmul(x_MI, weight_IO).view(*x_PNI.shape[:2], -1)
        if keep != 1.0:
            y_PNO *= keep
        return LowRankSum(y_PNO, h_PNr, left_POr, bias_PO, _After(self, name))

    def rows(self, ids_PN: Tensor, weight: Tensor) -> Tensor:
        """See `Weights.rows`."""
        name, rank = self._read(weight), self._state.rank
        left_PNr = self._left(name).gather(1, ids_PN[..., None].expand(-1, -1, rank)).to(weight.dtype)
        right_PrC = self._state.right_of((name,), weight.dtype)[:rank].expand(self.num_probes, -1, -1)
        return weight.detach()[ids_PN].baddbmm_(left_PNr, right_PrC, beta=self._state.keep)

    def whole(self, parameter: Tensor) -> Tensor:
        """See `Weights.whole`."""
        if parameter.ndim < 2:
            return self._vector(parameter)
        name, rank = self._read(parameter), self._state.rank
        right_rC = self._state.right_of((name,), parameter.dtype)[:rank].float()
        flat_RC = parameter.detach().reshape(-1, parameter.shape[-1])
        whole_PRC = flat_RC.float() * self._state.keep + self._left(name) @ right_rC
        return whole_PRC.to(parameter.dtype).view(self.num_probes, *parameter.shape)

    def _low(self, x_PNI: Tensor, name: str) -> Tensor:
        """x V / √r of a matrix [P, N, r], in one product with those that read the same rows."""
        readers, rank = self.readers, self._state.rank
        if self._made is not None and self._made.values.are(x_PNI):
            readers.next.setdefault(self._made.name, name)  # the last of several would be known to the next pass only
        last = self._last if self._last is not None and self._last.values.are(x_PNI) else None
        if last is not None and name not in last.names:
            readers.note(last.first, name)
        if last is None or name not in last.names:
            names = readers.of(name)
            h_PNk = F.linear(x_PNI, self._state.right_of(names, x_PNI.dtype))
            last = _Rows(_Values(x_PNI), name if last is None else last.first, h_PNk, names)
            self._last = last
        place = last.names.index(name) * rank
        return last.h_PNk[..., place : place + rank]

    def right_after(self, name: str) -> Tensor | None:
        """See `After.right_rO`."""
        reader, rank = self.readers.next.get(name), self._state.rank
        if reader is None or rank > _MOST_FUSED or len(self.readers.of(reader)) > 1:
            return None
        return self._state.right_of((reader,), self._state.space.parameters[reader].dtype)[:rank]

    def made(self, name: str, out_PNO: Tensor, low_PNr: Tensor | None) -> None:
        """See `After.made`."""
        self._made = _Made(_Values(out_PNO), name)
        if low_PNr is not None:
            reader = self.readers.next[name]
            self._last = _Rows(self._made.values, reader, low_PNr, (reader,))

    def _left(self, name: str) -> Tensor:
        """L under each probe of a matrix as it lies, float32 [P, rows, r]."""
        if self._left_PNr is None:
            count = self._state.num_left
            left_PN = self._state.flat_N[:count] + self._flat_PN[:, :count]
            self._left_PNr = left_PN.view(self.num_probes, -1, self._state.rank)
        left_PRr = self._left_PNr[:, self._state.left_rows[name]]
        return self._state.left[name] @ left_PRr if self._state.subspace else left_PRr

    def _vector(self, parameter: Tensor) -> Tensor:
        name, dtype, first = self._read(parameter), parameter.dtype, self._state.num_left
        if dtype not in self._vectors:  # a memory of their own, where vectors begin at addresses that GPUs read fast
            self._vectors[dtype] = self._flat_PN[:, first:].to(dtype, copy=True, memory_format=torch.contiguous_format)
        return self._state.buffers.part(self._vectors[dtype], name, first)

    def _read(self, parameter: Tensor) -> str:
        name = self._state.name(parameter)
        self.read_names.add(name)
        return name


def _num_rows(matrix: Tensor) -> int:
    return matrix.numel() // matrix.shape[-1]
