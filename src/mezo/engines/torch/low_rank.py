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

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mezo import philox
from mezo.engines.torch.buffer import ProbeBuffers
from mezo.engines.torch.optimizer import Optimizer
from mezo.engines.torch.rounding import stochastic_round
from mezo.engines.torch.space import CHUNK, ParameterSpace
from mezo.estimator import Probe, Record


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
        # B of each matrix, seen as [all but the last dimension, last], or its core; vectors themselves. float32.
        collected = {
            name: torch.zeros(rank if subspace else _num_rows(p), rank, device=p.device)
            if p.ndim > 1
            else p.detach().float()
            for name, p in space.parameters.items()
        }
        collected = {name: t.clone() for name, t in collected.items()}
        self._collected = ParameterSpace(collected, widths=space.widths, optimizer=optimizer)
        # −0 + x is x: U alone where B is kept apart.
        bases = {name: torch.full_like(t, -0.0) if t.ndim > 1 else t for name, t in collected.items()}
        self.buffers = ProbeBuffers(self._collected, bases)
        self._names = {id(p): name for name, p in space.parameters.items()}
        self._bases: dict[tuple[str, str], Tensor] = {}  # V / √r [I, r] and, of a subspace, U / √r; float32
        self._cast: dict[str, tuple[Tensor, Tensor]] = {}  # B and V / √r in the parameter's type
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
        self._cast.clear()
        self.steps += 1
        if self.steps == self.refresh_steps:
            for name, parameter in self.space.parameters.items():
                parameter.copy_(self.folded(name))
            self.reset()

    def reset(self) -> None:
        """The model's own parameters are the trained weights, from now on."""
        for name, collected in self._collected.parameters.items():
            parameter = self.space.parameters[name]
            if parameter.ndim > 1:
                collected.zero_()
            else:
                collected.copy_(parameter)
        self.buffers.changed()
        if self._collected.optimizer is not None:
            self._collected.optimizer.state.clear()
        self._window_seed, self._keep, self.steps = None, 1.0, 0
        self._bases.clear()
        self._cast.clear()

    @torch.no_grad()
    def folded(self, name: str) -> Tensor:
        """The parameter's present value in its own type, rounded stochastically if that is shorter than float32."""
        parameter, collected = self.space.parameters[name], self._collected.parameters[name]
        if self.steps == 0:
            return parameter.detach()
        assert self._window_seed is not None
        stream = philox.stream_id("rounding", name)
        width = parameter.shape[-1]
        flat_N = parameter.detach().reshape(-1)
        out_N = torch.empty_like(flat_N)
        rows = max(1, CHUNK // width)
        for start in range(0, flat_N.numel(), rows * width):
            stop = min(flat_N.numel(), start + rows * width)
            value_N = collected[start:stop].clone() if parameter.ndim < 2 else self._moved(
                flat_N[start:stop].float(), self._left(name, start // width, stop // width), self.v(name)
            )  # fmt: skip
            if parameter.dtype != torch.float32:
                bits_N = philox.rounding_bits(self._window_seed, stream, start, stop, parameter.device)
                value_N = stochastic_round(value_N, bits_N, parameter.dtype)
            out_N[start:stop] = value_N
        return out_N.view(parameter.shape)

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
        u_Rr = self.u(name)[start:stop]
        b_Rr = torch.zeros_like(u_Rr)
        for k in range(self.rank):
            b_Rr += u_Rr[:, k : k + 1] * collected[k]
        return b_Rr

    def v(self, name: str) -> Tensor:
        """V / √r of a matrix, float32 [I, r]."""
        return self._basis(name, "basis", self.space.parameters[name].shape[-1])

    def u(self, name: str) -> Tensor:
        """U / √r of a matrix in a subspace, float32 [O, r]."""
        return self._basis(name, "left basis", _num_rows(self.space.parameters[name]))

    def _basis(self, name: str, purpose: str, rows: int) -> Tensor:
        if (purpose, name) not in self._bases:
            assert self._window_seed is not None
            starts = torch.zeros(1, dtype=torch.long, device=self.space.parameters[name].device)
            drawn_N = philox.normals(self._window_seed, philox.stream_id(purpose, name), starts, rows * self.rank)[0]
            self._bases[purpose, name] = drawn_N.view(rows, self.rank) / math.sqrt(self.rank)
        return self._bases[purpose, name]

    def spread(self, name: str, core_Prk: Tensor) -> Tensor:
        """What multiplies Vᵀ / √r: the drawn matrices themselves, or U / √r times the drawn cores."""
        return self.u(name) @ core_Prk if self.subspace else core_Prk

    def cast(self, name: str) -> tuple[Tensor, Tensor]:
        """B and V / √r in the parameter's type."""
        if name not in self._cast:
            dtype = self.space.parameters[name].dtype
            left_Rr = self.spread(name, self._collected.parameters[name])
            self._cast[name] = (left_Rr.to(dtype), self.v(name).to(dtype))
        return self._cast[name]

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
            self._bases.clear()
            self._cast.clear()


class LowRankProbes:
    """`mezo.engines.torch.perturbed.Weights` of low-rank directions."""

    def __init__(self, state: LowRank, probes: Sequence[Probe]):
        self._state = state
        self._moved = any(probe.scale != 0.0 for probe in probes)
        self._flat_PN = state.buffers.write(probes)
        self._cast: dict[torch.dtype, Tensor] = {}
        self.num_probes = len(probes)
        self.read_names: set[str] = set()

    def trains(self, value: object) -> bool:
        """See `Weights.trains`."""
        return self._state.trains(value)

    def linear(self, x_PNI: Tensor, weight: Tensor, bias_PO: Tensor | None, transposed: bool) -> Tensor:
        """See `Weights.linear`. W is read once for all probes."""
        left_PRk, right_kC = self._factors(weight)  # of the matrix as it lies, R rows and C columns
        y_PNO = F.linear(x_PNI, weight.T if transposed else weight)
        if self._state.keep != 1.0:
            y_PNO *= self._state.keep
        if transposed:
            y_PNO = torch.baddbmm(y_PNO, torch.bmm(x_PNI, left_PRk), right_kC.expand(self.num_probes, -1, -1))
        else:
            y_PNO = torch.baddbmm(y_PNO, x_PNI @ right_kC.T, left_PRk.mT)
        return y_PNO if bias_PO is None else y_PNO + bias_PO[:, None]

    def rows(self, ids_PN: Tensor, weight: Tensor) -> Tensor:
        """See `Weights.rows`."""
        left_PRk, right_kC = self._factors(weight)
        left_PNk = left_PRk.gather(1, ids_PN[..., None].expand(-1, -1, left_PRk.shape[2]))
        return torch.baddbmm(
            weight.detach()[ids_PN], left_PNk, right_kC.expand(self.num_probes, -1, -1), beta=self._state.keep
        )

    def whole(self, parameter: Tensor) -> Tensor:
        """See `Weights.whole`."""
        if parameter.ndim < 2:
            return self._under_probes(parameter)
        left_PRk, right_kC = self._factors(parameter)
        flat_RC = parameter.detach().reshape(-1, parameter.shape[-1])
        whole_PRC = flat_RC.float() * self._state.keep + (left_PRk @ right_kC).float()
        return whole_PRC.to(parameter.dtype).view(self.num_probes, *parameter.shape)

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[B | scale · U] of each probe [P, R, k] and [V | V]ᵀ / √r [k, C], in the weight's type.

        B and U stay apart, so that a short type rounds the perturbation by its own size and not by that of B.
        """
        u_PRr = self._under_probes(weight)
        b_Rr, v_Cr = self._state.cast(self._state.name(weight))
        b_PRr = b_Rr.expand(self.num_probes, -1, -1)
        if not self._moved:
            return b_PRr, v_Cr.T
        if self._state.is_folded:
            return u_PRr, v_Cr.T
        return torch.cat((b_PRr, u_PRr), dim=2), torch.cat((v_Cr, v_Cr), dim=1).T

    def _under_probes(self, parameter: Tensor) -> Tensor:
        """The vector under each probe, or scale · U of a matrix; in the parameter's type."""
        name, dtype = self._state.name(parameter), parameter.dtype
        self.read_names.add(name)
        if self._state.subspace and parameter.ndim > 1:
            return self._state.spread(name, self._state.buffers.part(self._flat_PN, name)).to(dtype)
        if dtype not in self._cast:
            self._cast[dtype] = self._flat_PN.to(dtype)
        return self._state.buffers.part(self._cast[dtype], name)


def _num_rows(matrix: Tensor) -> int:
    return matrix.numel() // matrix.shape[-1]
