"""The last stage of an activated LoRA's batch on static tensors, captured as a CUDA graph.

After a prompt's keys and values have been taken from the store, a row has a few tokens left: too little work for a GPU
to hide what launching a model's kernels one by one costs. Shapes are rounded up to buckets, so that a few graphs serve
a whole data set. On a CPU the same static pass runs without a graph, which is how it is tested.

Shapes: R rows (sequences × probes), S tokens left of a row, P positions of prompts, Q positions that are read.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_TOKENS, _POSITIONS, _READS = 8, 64, 32  # buckets
_KEPT = 4


class Shape(NamedTuple):
    """What a graph is captured for."""

    probes: int
    rows: int  # of one probe
    tokens: int
    positions: int
    reads: int

    @classmethod
    def of(cls, probes: int, rows: int, tokens: int, positions: int, reads: int) -> Shape:
        """The bucket of a batch."""
        return cls(probes, rows, _up(tokens, _TOKENS), _up(positions, _POSITIONS), _up(reads, _READS))


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


class StaticInputs:
    """Tensors that a graph reads, at the size of its bucket; keys and values lie in `memory`."""

    def __init__(self, shape: Shape, prefix: Tensor, memory: Tensor):
        rows = shape.probes * shape.rows
        layers, _, heads, _, width = prefix.shape
        self.shape = shape
        positions = shape.positions + shape.tokens
        size = (layers, 2, rows, heads, positions, width)
        self.kv_L2RHKD = memory[: math.prod(size)].view(size)
        self.input_ids_RS = torch.zeros(rows, shape.tokens, dtype=torch.long, device=memory.device)
        self.position_ids_RS = torch.zeros_like(self.input_ids_RS)
        self.mask_R1SK = torch.zeros(rows, 1, shape.tokens, positions, dtype=memory.dtype, device=memory.device)
        self.row_Q = torch.zeros(shape.reads, dtype=torch.long, device=memory.device)
        self.position_Q = torch.zeros_like(self.row_Q)

    def fill(self, prefixes: Sequence[Tensor], inputs: dict[str, Tensor], row_Q: Tensor, position_Q: Tensor) -> None:
        """Takes a batch; `prefixes` are the keys and values [L, 2, H, P, D] of one probe's rows."""
        shape = self.shape
        for row, prefix in enumerate(prefixes):
            kv_L2PHKD = self.kv_L2RHKD[:, :, row :: shape.rows]
            kv_L2PHKD[:, :, :, :, : prefix.shape[3]] = prefix[:, :, None]
            kv_L2PHKD[:, :, :, :, prefix.shape[3] :] = 0.0  # never read, but 0 · NaN is NaN
        width = inputs["input_ids"].shape[1]
        self.input_ids_RS[:, :width] = inputs["input_ids"]
        self.position_ids_RS[:, :width] = inputs["position_ids"]
        lengths_R = torch.tensor([p.shape[3] for p in prefixes]).repeat(shape.probes)
        prompt_R1P = (torch.arange(shape.positions) < lengths_R[:, None])[:, None].expand(-1, shape.tokens, -1)
        own_SS = torch.ones(shape.tokens, shape.tokens, dtype=torch.bool).tril().expand(len(lengths_R), -1, -1)
        hidden_RSK = ~torch.cat((prompt_R1P, own_SS), dim=2)
        mask_RSK = torch.zeros(hidden_RSK.shape, dtype=self.mask_R1SK.dtype)
        self.mask_R1SK.copy_(mask_RSK.masked_fill_(hidden_RSK, torch.finfo(mask_RSK.dtype).min)[:, None])
        self.row_Q[: len(row_Q)] = row_Q
        self.position_Q[: len(position_Q)] = position_Q

    def cache(self) -> DynamicCache:
        """The prompts' keys and values, behind which the model writes those of the tokens left."""
        cache = DynamicCache()
        cache.layers = [_FilledLayer(keys, values, self.shape.positions) for keys, values in self.kv_L2RHKD]
        return cache


class _FilledLayer(DynamicLayer):
    """A layer of a cache with room at its end, in place of one that is copied to grow."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._filled = filled

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes behind what is there; returns everything."""
        self.keys[:, :, self._filled :] = key_states
        self.values[:, :, self._filled :] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions before the ones that the model computes."""
        return self._filled


class Graphs:
    """One captured pass for each bucket that was met lately. Only one runs at a time, so all share one memory."""

    def __init__(self, device: torch.device):
        self._device = device
        self._captures = device.type == "cuda"
        self._memory = torch.empty(0)
        self._kept: OrderedDict[Shape, _Pass] = OrderedDict()

    def inputs(self, shape: Shape, prefix: Tensor) -> StaticInputs:
        """The static inputs of a bucket; `prefix` shows the layers, heads, width and dtype of keys and values."""
        if shape not in self._kept:
            layers, _, heads, _, width = prefix.shape
            needed = layers * 2 * shape.probes * shape.rows * heads * (shape.positions + shape.tokens) * width
            if self._memory.numel() < needed:
                self._kept.clear()
                self._memory = torch.empty(0)
                self._memory = torch.empty(needed, dtype=prefix.dtype, device=self._device)
            while len(self._kept) >= _KEPT:
                self._kept.popitem(last=False)
            self._kept[shape] = _Pass(StaticInputs(shape, prefix, self._memory))
        self._kept.move_to_end(shape)
        return self._kept[shape].static

    def run(self, shape: Shape, forward: Callable[[StaticInputs], Tensor]) -> Tensor:
        """The output of `forward` on the bucket's inputs: captured at the first call, replayed afterwards."""
        kept = self._kept[shape]
        if self._captures and kept.graph is None:
            try:
                self._capture(kept, forward)
            except RuntimeError as error:  # a model that waits for the GPU, or chooses by values
                self._captures = False
                warnings.warn(f"this model's pass cannot be captured as a CUDA graph: {error}", stacklevel=2)
        if kept.graph is None:
            return forward(kept.static)
        kept.graph.replay()
        return kept.output

    def _capture(self, kept: _Pass, forward: Callable[[StaticInputs], Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # lazy initialisation must not be captured
                forward(kept.static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept.output = forward(kept.static)
        kept.graph = graph


class _Pass:
    def __init__(self, static: StaticInputs):
        self.static = static
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output = torch.empty(0)
