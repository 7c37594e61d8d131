"""A dense update that waits until the next pass forms the weights under its probes.

An update reads and writes all weights, and so does the forming of probes, a moment later. Together they read them once.
Weights that only linear layers read wait; vectors and embeddings are updated at once. Shapes: R records of a step, K
waiting parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mezo import philox
from mezo.engines.torch.space import ParameterSpace
from mezo.estimator import Record
from mezo.kernels import gpu


class Block(NamedTuple):
    """Elements [start, stop) of a parameter, as a linear layer forms them at once."""

    name: str
    start: int
    stop: int


class DeferredUpdate:
    """The last step's update of the waiting weights, and which of them have not taken it yet.

    Seeds and factors lie in the GPU's memory, so that a CUDA graph of a pass makes the update that is due when it is
    replayed.

    Args:
        space: the trained parameters, all bfloat16 or all float16.
        blocks: what waits: every element of some parameters.
        num_records: R.
        weight_decay: decoupled weight decay, the same at every step.
        device: where the parameters are.
    """

    def __init__(
        self,
        space: ParameterSpace,
        blocks: Collection[Block],
        num_records: int,
        weight_decay: float,
        device: torch.device,
    ):
        self.names = {name: place for place, name in enumerate(dict.fromkeys(block.name for block in sorted(blocks)))}
        self.num_records = num_records
        self._space = space
        self._blocks = frozenset(blocks)
        self._weight_decay = weight_decay
        self._others = [name for name in space.parameters if name not in self.names]
        self._left: set[Block] = set()
        self._graphs: dict[Hashable, frozenset[Block]] = {}
        self._seeds: list[int] = []
        self._factors: dict[str, list[float]] = {}
        self._keep = 1.0
        self._pending_1 = torch.zeros(1, dtype=torch.int32, device=device)
        self._seeds_R = torch.empty(num_records, dtype=torch.int64, device=device)
        self._factors_KR = torch.empty(len(self.names), num_records, device=device)
        self._keep_1 = torch.ones(1, device=device)
        self._table = self._table_of(self._blocks)

    def put_off(self, records: Sequence[Record]) -> None:
        """Updates what does not wait by a step's R records, and keeps them for the rest."""
        self.settle()
        self._space.update(records, self._weight_decay, self._others)
        self._seeds = [r.seed for r in records]
        self._factors = dict(zip(self.names, self._space.factors(records, self.names), strict=True))
        self._keep = 1.0 - records[0].learning_rate * self._weight_decay
        self._seeds_R.copy_(gpu.seeds_on(self._seeds, torch.device("cpu")))
        self._factors_KR.copy_(torch.tensor(list(self._factors.values())))
        self._keep_1.fill_(self._keep)
        self._pending_1.fill_(1)
        self._left = set(self._blocks)

    def due(self, block: Block) -> gpu.Update | None:
        """What the kernel that forms a block under probes is to do first, now or as part of a graph."""
        if block not in self._blocks or (block not in self._left and not is_capturing(self._pending_1)):
            return None
        return gpu.Update(
            self._pending_1, self._seeds_R, self._factors_KR[self.names[block.name]], self._keep_1,
            self._weight_decay != 0.0, philox.stream_id("rounding", block.name),
        )  # fmt: skip

    def taken(self, block: Block) -> None:
        """A kernel was launched that updates the block."""
        self._left.discard(block)
        if not self._left:
            self._pending_1.zero_()

    def captured(self, key: Hashable, blocks: Iterable[Block]) -> None:
        """A graph was made, known by `key`, in which these blocks take the update that is due."""
        self._graphs[key] = frozenset(blocks)

    def replayed(self, key: Hashable) -> None:
        """The graph was launched."""
        for block in self._graphs[key] & self._left:
            self.taken(block)

    def settle(self, *, partly: bool = False) -> None:
        """Updates what still waits; `partly`: only if a part of it does not, which an interrupted pass has updated."""
        if not self._left or (partly and len(self._left) == len(self._blocks)):
            return
        whole = len(self._left) == len(self._blocks)
        blocks = self._blocks if whole else frozenset(self._left)
        table = self._table if whole else self._table_of(blocks)
        factors = [self._factors[block.name] for block in sorted(blocks)]
        dtype = next(iter(self._space.parameters.values())).dtype
        gpu.update_many(table, dtype, self._seeds, factors, self._keep)
        self._left.clear()
        self._pending_1.zero_()

    def _table_of(self, blocks: frozenset[Block]) -> Tensor:
        ordered = sorted(blocks)
        weights = [self._space.parameters[b.name].detach().view(-1)[b.start : b.stop] for b in ordered]
        directions, roundings = ([philox.stream_id(of, b.name) for b in ordered] for of in ("direction", "rounding"))
        return gpu.weight_table(weights, [True] * len(ordered), directions, roundings, [b.start for b in ordered])


def is_capturing(tensor: Tensor) -> bool:
    """Whether what is launched now becomes part of a CUDA graph instead of running."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
