"""The last stage of a batch on static tensors, captured as a CUDA graph.

A small model, a short batch or the few tokens behind a stored prompt are too little work for a GPU to hide what
launching a model's kernels one by one costs. Shapes are rounded up to buckets, so that a few graphs serve a whole data
set, and a bucket is captured when it comes back. On a CPU the same static pass runs without a graph, which is how it
is tested.

Shapes: R rows of one probe, S tokens left of a row, P positions of prompts, Q positions of one probe that are read, T
targets of one probe; the pass itself repeats the rows for every probe.
"""

from __future__ import annotations

import ctypes
import gc
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mezo.engines.torch.batch import Padded, Reads
from mezo.errors import is_out_of_memory

_TOKENS, _POSITIONS, _READS = 8, 64, 32  # buckets
_KEPT = 64
_UNMASKED = "mezo_causal_sdpa"
AttentionInterface.register(_UNMASKED, sdpa_attention_forward)  # and no function that makes a mask for it


class Shape(NamedTuple):
    """What a graph is captured for."""

    probes: int
    paired: bool
    moved: bool  # reads weights under the probes, not the model's own
    rows: int
    tokens: int
    positions: int
    reads: int
    targets: int
    greedy: bool

    @classmethod
    def of(
        cls, probes: int, paired: bool, moved: bool, rows: int, tokens: int, positions: int, reads: int, targets: int,
        greedy: bool, most_tokens: float = math.inf,
    ) -> Shape:  # fmt: skip
        """The bucket of a batch. At most a fifth of the rows is padding, and no row longer than the model takes."""
        rows = _up(rows, 1 << max(0, rows.bit_length() - 3))
        tokens = max(tokens, int(min(_up(tokens, _TOKENS), most_tokens)))
        positions = _up(positions, _POSITIONS)
        return cls(probes, paired, moved, rows, tokens, positions, _up(reads, _READS), _up(targets, _READS), greedy)

    @property
    def places(self) -> int:
        """Rows × tokens of all probes, those of prompts included."""
        return self.probes * self.rows * (self.positions + self.tokens)

    def size_of_prompts(self, prefix: Tensor) -> tuple[int, ...]:
        """Of keys and values of all probes' rows, with room for the tokens left; of one prompt [L, 2, H, P, D]."""
        layers, _, heads, _, width = prefix.shape
        return (layers, 2, self.probes * self.rows, heads, self.positions + self.tokens, width)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


class StaticInputs:
    """Tensors of one probe that a graph reads, at the size of its bucket: one memory, filled with one transfer.

    Args:
        shape: the bucket.
        device: where the model is.
        kv_L2RHKD: memory for keys and values of prompts, of all probes, if rows go on from prompts.
        hidden_RSD: memory for what frozen layers hand on to the rows, if there are any.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        kv_L2RHKD: Tensor | None = None,
        hidden_RSD: Tensor | None = None,
    ):
        rows, queries, targets = (shape.rows,), (shape.reads,), (shape.targets,)
        table = (shape.rows, shape.tokens)
        sizes = [table, table, rows, rows, queries, queries, targets, targets]
        counts = list(map(math.prod, sizes))
        self.shape = shape
        # Pinned: the transfer does not wait. A pass ends with reading its scores, so it has ended before the next fill.
        self._host = torch.zeros(sum(counts), dtype=torch.long, pin_memory=device.type == "cuda")
        self._flat = self._host.to(device)
        on_host, static = (
            [part.view(size) for part, size in zip(flat.split(counts), sizes, strict=True)]
            for flat in (self._host, self._flat)
        )
        self._host_ids_RS, self._host_position_ids_RS, self._host_length_R, self._host_prompt_R = on_host[:4]
        self._ids_RS, self._position_ids_RS, self._length_R, self._prompt_R = static[:4]
        self._host_reads, self.reads = Reads(*on_host[4:]), Reads(*static[4:])
        self._kv_L2RHKD, self.hidden_RSD = kv_L2RHKD, hidden_RSD

    def fill(
        self,
        rows: Padded,
        reads: Reads,
        pad_token_id: int,
        prefixes: Sequence[Tensor] = (),
        hidden_RSD: Tensor | None = None,
    ) -> None:
        """Takes a batch, the keys and values [L, 2, H, P, D] of its rows' prompts, what frozen layers hand on."""
        num_rows, width = rows.input_ids_RS.shape
        self._host_ids_RS.fill_(pad_token_id)
        self._host_ids_RS[:num_rows, :width] = rows.input_ids_RS
        self._host_position_ids_RS[:num_rows, :width] = rows.position_ids_RS
        self._host_length_R.fill_(1)
        self._host_length_R[:num_rows] = rows.mask_RS.sum(dim=1)
        for static, wanted in zip(self._host_reads, reads, strict=True):
            static.zero_()
            static[: len(wanted)] = wanted
        if prefixes:
            self._host_prompt_R.zero_()
            self._host_prompt_R[:num_rows] = torch.tensor([p.shape[3] for p in prefixes])
            self._fill_prompts(prefixes)
        if hidden_RSD is not None:
            assert self.hidden_RSD is not None
            self.hidden_RSD.zero_()
            self.hidden_RSD[:num_rows, :width] = hidden_RSD
        self._flat.copy_(self._host, non_blocking=True)

    def _fill_prompts(self, prefixes: Sequence[Tensor]) -> None:
        assert self._kv_L2RHKD is not None
        for row, prefix in enumerate(prefixes):
            kv_L2PHKD = self._kv_L2RHKD[:, :, row :: self.shape.rows]
            kv_L2PHKD[:, :, :, :, : prefix.shape[3]] = prefix[:, :, None]
            kv_L2PHKD[:, :, :, :, prefix.shape[3] :] = 0.0  # never read, but 0 · NaN is NaN
        for row in range(len(prefixes), self.shape.rows):
            self._kv_L2RHKD[:, :, row :: self.shape.rows] = 0.0

    def arguments(self, dtype: torch.dtype, prefix: DynamicCache | None = None, *, encoder: bool) -> dict[str, Any]:
        """What the model takes, with the keys and values of a trained `prefix` of all probes' rows if there is one.

        A decoder's rows need no mask if nothing stands before them: padding stands behind what is read.
        """
        probes = self.shape.probes
        taken: dict[str, Any] = {"input_ids": self._ids_RS.repeat(probes, 1)}
        past = self._cache() if self._kv_L2RHKD is not None else prefix
        prefix_tokens = 0 if prefix is None else prefix.get_seq_length()
        if encoder or past is not None:
            taken["attention_mask"] = self._mask(dtype, prefix_tokens, encoder)
        if past is not None:
            taken |= {"past_key_values": past, "use_cache": True}
            if not encoder:
                taken["position_ids"] = self._position_ids_RS.repeat(probes, 1) + prefix_tokens
        return taken

    def _mask(self, dtype: torch.dtype, prefix_tokens: int, encoder: bool) -> Tensor:
        """What is added to attention scores [probes · R, 1, S, P + S], P of them a prompt's or a trained prefix's."""
        tokens, device = self.shape.tokens, self._flat.device
        place_S = torch.arange(tokens, device=device)
        if prefix_tokens:
            before_RP = torch.ones(self.shape.rows, prefix_tokens, dtype=torch.bool, device=device)
        else:
            before_RP = torch.arange(self.shape.positions, device=device) < self._prompt_R[:, None]
        if encoder:
            own_RSS = (place_S < self._length_R[:, None])[:, None].expand(-1, tokens, -1)
        else:
            own_RSS = (place_S <= place_S[:, None]).expand(self.shape.rows, -1, -1)
        seen_RSK = torch.cat((before_RP[:, None].expand(-1, tokens, -1), own_RSS), dim=2)
        zeros_RSK = torch.zeros(seen_RSK.shape, dtype=dtype, device=device)
        return zeros_RSK.masked_fill_(~seen_RSK, torch.finfo(dtype).min).repeat(self.shape.probes, 1, 1)[:, None]

    def _cache(self) -> DynamicCache:
        """The prompts' keys and values, behind which the model writes those of the tokens left."""
        assert self._kv_L2RHKD is not None
        cache = DynamicCache()
        cache.layers = [_FilledLayer(keys, values, self.shape.positions) for keys, values in self._kv_L2RHKD]
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


@contextmanager
def unmasked_attention(decoder: PreTrainedModel) -> Iterator[None]:
    """A context in which PyTorch's attention of a decoder is causal and gets no mask.

    While a graph is captured, transformers cannot see that a mask would say nothing else and makes one, with which
    attention takes twice as long. Only for decoders without sliding windows, or rows within them.
    """
    config = decoder.config.get_text_config()
    if config._attn_implementation != "sdpa":
        yield
        return
    config._attn_implementation = _UNMASKED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


class Graphs:
    """One captured pass for each bucket that was met lately. Only one runs at a time, so all share one memory.

    A pass that is not captured yet runs in that memory too, on the stream of the captures: beside it, it would need as
    much again. What it leaves there would be written over by the graphs that were captured before, so they are given up
    if it leaves anything. They are given up for a pass that is larger than all before, too: smaller ones fit into its
    blocks, and the other way round the memory would grow by each.

    Args:
        device: where the model is; only on a GPU, with PyTorch's own allocator, passes are captured.
        captures: if not, none are: the model waits for the GPU in each pass.
    """

    def __init__(self, device: torch.device, *, captures: bool = True):
        self._device = device
        self._captures = captures and device.type == "cuda" and torch.cuda.get_allocator_backend() == "native"
        # Of captures, and of what shares their memory.
        self._stream = torch.cuda.Stream(device) if self._captures else None
        self.clear()

    def clear(self) -> None:
        """Gives all memory back."""
        self._memory = torch.empty(0)
        self._kept: OrderedDict[Shape, _Pass] = OrderedDict()
        self._pool: torch.cuda.MemPool | None = None
        self._largest = 0  # places of the largest pass that ran in it

    @property
    def num_bytes(self) -> int:
        """Of the memory that all passes share."""
        return sum(segment["total_size"] for segment in self._segments())

    def inputs(self, shape: Shape, prefix: Tensor | None = None, hidden: Tensor | None = None) -> StaticInputs:
        """The static inputs of a bucket. `prefix`, some prompt's keys and values, or `hidden`, some rows' hidden
        states, show sizes and dtype of what they hold of a store."""
        if shape not in self._kept:
            kv_L2RHKD = None if prefix is None else self._reserved(shape.size_of_prompts(prefix), prefix.dtype)
            hidden_RSD = None
            if hidden is not None:
                hidden_RSD = self._reserved((shape.rows, shape.tokens, hidden.shape[2]), hidden.dtype)
            while len(self._kept) >= _KEPT:
                self._kept.popitem(last=False)
            self._kept[shape] = _Pass(StaticInputs(shape, self._device, kv_L2RHKD, hidden_RSD))
        self._kept.move_to_end(shape)
        return self._kept[shape].static

    def is_captured(self, shape: Shape) -> bool:
        """Whether the bucket's pass is a graph by now."""
        return self._kept[shape].graph is not None

    def run(self, shape: Shape, forward: Callable[[StaticInputs], Tensor]) -> Tensor:
        """The output of `forward` on the bucket's inputs, to be read before the next run.

        Runs it at the first call, captures it at the second, replays it afterwards.
        """
        kept = self._kept[shape]
        kept.calls += 1
        if self._captures and shape.places > self._largest:
            self._give_up()
            self._pool, self._largest = None, shape.places
        if self._captures and kept.graph is None and kept.calls > 1:
            try:
                self._capture(kept, forward)
            except RuntimeError as error:  # a model that waits for the GPU, or chooses by values
                if is_out_of_memory(error):
                    raise
                self._captures = False
                self._give_up()
                _keep_forever(self._pool)
                warnings.warn(f"this model's pass cannot be captured as a CUDA graph: {error}", stacklevel=2)
        if kept.graph is None:
            in_pool = self._captures or self._pool is not None
            return self._run_in_pool(kept, forward) if in_pool else forward(kept.static)
        kept.graph.replay()
        return kept.output

    def _reserved(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """That much of the memory that all buckets fill in turns; where it must grow, what was captured is lost."""
        needed = math.prod(size)
        if self._memory.numel() < needed or self._memory.dtype != dtype:
            self.clear()
            self._memory = torch.empty(needed, dtype=dtype, device=self._device)
        return self._memory[:needed].view(size)

    def _capture(self, kept: _Pass, forward: Callable[[StaticInputs], Tensor]) -> None:
        self._run_in_pool(kept, forward)  # lazy initialisation must not be captured
        graph, pool = torch.cuda.CUDAGraph(), self._pool
        assert pool is not None
        shared: Any = pool.id
        with torch.cuda.graph(graph, pool=shared, stream=self._stream):
            kept.output = forward(kept.static)
        kept.graph, kept.pool = graph, pool

    def _run_in_pool(self, kept: _Pass, forward: Callable[[StaticInputs], Tensor]) -> Tensor:
        """The output of a pass that is launched kernel by kernel."""
        torch.cuda.empty_cache()  # a pool cannot take what other passes left
        with self._in_pool():
            torch.cuda.current_blas_handle()  # its workspace, which is no pass's, before all else
        has_graphs = any(other.graph is not None for other in self._kept.values())
        before = self._held() if has_graphs else set()
        with self._in_pool():
            output = forward(kept.static)
        if has_graphs and self._leaves_more(before, output):
            gc.collect()
            if self._leaves_more(before, output):
                self._give_up()
        return output

    @contextmanager
    def _in_pool(self) -> Iterator[None]:
        """A context on the stream and in the memory of the captured passes."""
        with torch.cuda.device(self._device):
            if self._pool is None:
                torch._C._cuda_clearCublasWorkspaces()  # else a workspace holds on to the memory before this one
                self._pool = torch.cuda.MemPool()
            current = torch.cuda.current_stream()
            assert self._stream is not None
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
                    yield
            finally:
                current.wait_stream(self._stream)

    def _give_up(self) -> None:
        """Forgets what was captured."""
        for kept in self._kept.values():
            kept.graph = kept.pool = None
            kept.output = torch.empty(0)

    def _leaves_more(self, before: set[int], output: Tensor) -> bool:
        return bool(self._held() - before - {output.untyped_storage().data_ptr()})

    def _segments(self) -> list[dict[str, Any]]:
        """What the allocator says of the shared memory."""
        if self._pool is None:
            return []
        return [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(self._pool.id)]

    def _held(self) -> set[int]:
        """Addresses of what lives in the shared memory."""
        blocks = [block for segment in self._segments() for block in segment["blocks"]]
        return {block["address"] for block in blocks if block["state"] == "active_allocated"}


def _keep_forever(pool: object) -> None:
    """A capture that failed goes on holding its memory, and PyTorch ends the process if that is destroyed then."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))


class _Pass:
    def __init__(self, static: StaticInputs):
        self.static = static
        self.graph: torch.cuda.CUDAGraph | None = None
        self.pool: torch.cuda.MemPool | None = None  # lives longer than the graph
        self.output = torch.empty(0)
        self.calls = 0
