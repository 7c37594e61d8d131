"""What can be computed once and stay exact: prefixes that rows share, prompts of an activated LoRA, frozen layers.

Keys and values depend on every weight below them, so they are only good under the weights and the probe that they were
computed with. Shapes: R rows, S positions, L layers, H key/value heads, D dimensions of a head or of the hidden state.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PretrainedConfig

from mezo.estimator import Probe
from mezo.objective import Example, TokenSequence, common_prefix

# Decoders that find keys by mask and position ids alone, so that padding may stand between a prompt and what goes on
# from it: tested. Others count places (MPT, GPT-Neo), take no mask of four dimensions (Bloom) or keep states.
PADDED_CACHES = frozenset(
    "llama mistral mixtral qwen2 qwen3 phi3 gemma gemma2 gemma3_text opt gpt2 gpt_neox gptj".split()
)


def reach(config: PretrainedConfig) -> float:
    """Places within which a decoder's keys may be padded: a sliding window's, all (inf), or none (0)."""
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ())
    if text.model_type not in PADDED_CACHES or not layers <= {"full_attention", "sliding_attention"}:
        return 0.0
    window = getattr(text, "sliding_window", None)
    return math.inf if window is None or layers == {"full_attention"} else float(window)


class TensorStore:
    """Tensors by key within a byte budget; the least recently used goes first.

    Args:
        budget: bytes.
        device: where they lie.
    """

    def __init__(self, budget: int, device: torch.device):
        self._budget = budget
        self._device = device
        self._tensors: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, key: Hashable) -> Tensor | None:
        """The tensor, where it lies, or None."""
        if key not in self._tensors:
            return None
        self._tensors.move_to_end(key)
        return self._tensors[key]

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keeps a tensor, if the budget is not below its size."""
        size = tensor.numel() * tensor.element_size()
        if size > self._budget or key in self._tensors:
            return
        while self.num_bytes + size > self._budget:
            _, dropped = self._tensors.popitem(last=False)
            self.num_bytes -= dropped.numel() * dropped.element_size()
        self._tensors[key] = tensor.to(self._device, copy=True)
        self.num_bytes += size

    def clear(self) -> None:
        """Forgets everything."""
        self._tensors.clear()
        self.num_bytes = 0


@dataclass(frozen=True)
class Stage:
    """One forward pass of a batch that is cut into shared prefixes and the rest.

    Row i holds `chunks[i]` and goes on from keys and values of row `parents[i]` of the stage before.
    """

    chunks: list[tuple[int, ...]]
    parents: list[int]
    starts: list[int]  # position of each chunk's first token
    hidden_RSD: Tensor | None = None  # what frozen layers hand on, where the pass starts above them
    share: float = 1.0  # of all layers that it passes through

    @property
    def num_tokens(self) -> int:
        """Tokens that the pass computes."""
        return sum(map(len, self.chunks))

    @property
    def num_padding(self) -> int:
        """Positions that the pass computes besides."""
        return len(self.chunks) * max(map(len, self.chunks)) - self.num_tokens

    def after(self, done: int) -> Stage:
        """Without the first tokens of each row."""
        hidden_RSD = None if self.hidden_RSD is None else self.hidden_RSD[:, done:]
        chunks, starts = [chunk[done:] for chunk in self.chunks], [start + done for start in self.starts]
        return replace(self, chunks=chunks, starts=starts, hidden_RSD=hidden_RSD)


class Past(NamedTuple):
    """Keys and values of what stands before a stage, and which of them are padding."""

    cache: DynamicCache
    mask_RS: Tensor

    def of_rows(self, parents: Sequence[int], num_probes: int) -> Past:
        """For each row of a next stage that of its parent; probe by probe."""
        rows = len(self.mask_RS) // num_probes
        if list(parents) == list(range(rows)):
            return self
        index = torch.tensor([p * rows + parent for p in range(num_probes) for parent in parents])
        index = index.to(self.mask_RS.device)
        self.cache.batch_select_indices(index)
        return Past(self.cache, self.mask_RS[index])


class Beginning(NamedTuple):
    """Tokens that all rows of a pass began with, and their keys and values [P, H, S, D] in each layer, behind those
    of a trained prefix."""

    probes: tuple[Probe, ...]
    tokens: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]

    def cut(self, same: int) -> Past:
        """The first tokens of it."""
        same += self.layers[0][0].shape[2] - len(self.tokens)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.layers):
            cache.update(keys[:, :, :same], values[:, :, :same], layer)
        return Past(cache, torch.ones(len(self.probes), same, dtype=torch.long, device=self.layers[0][0].device))


def prompt_length(sequences: Sequence[TokenSequence]) -> int:
    """How many tokens all rows begin with and none of them is read at."""
    return common_prefix([s.input_ids[: s.read_start] for s in sequences])


def shared_prefixes(
    examples: Sequence[Example], pass_cost: int, known: tuple[int, ...] = (), wanted: tuple[int, ...] = ()
) -> list[Stage]:
    """Stages that compute a prefix common to all rows, and one common to the rows of an example, only once.

    Positions that are read stay in the last stage, which has the sequences of the examples as its rows, in order.

    Args:
        examples: of one batch.
        pass_cost: what one more pass costs, in tokens; a stage that saves less is left out.
        known: tokens that may be gone on from at no cost.
        wanted: tokens that other passes begin with, too, and may go on from.
    """
    sequences = [s for e in examples for s in e.sequences]
    owners = [n for n, e in enumerate(examples) for _ in e.sequences]
    own = [prompt_length(e.sequences) for e in examples]
    prompts = [e.sequences[0].input_ids[:length] for e, length in zip(examples, own, strict=True)]

    def saved_by_grouping(common: int) -> int:
        return sum((len(e.sequences) - 1) * (length - common) for e, length in zip(examples, own, strict=True))

    # A row without any token would attend to nothing.
    common = common_prefix(prompts)
    free = common_prefix([known, prompts[0][:common]])
    grouped = saved_by_grouping(common) > pass_cost and min(own) > 0
    if (common - free) * ((len(examples) if grouped else len(sequences)) - 1) <= pass_cost:
        later = common_prefix([wanted, prompts[0][:common]])
        common = later if later - free > pass_cost else free
        grouped = saved_by_grouping(common) > pass_cost and min(own) > 0
    stages = []
    if common:
        stages.append(Stage([prompts[0][:common]], [0], [0]))
    if grouped:
        stages.append(Stage([p[common:] for p in prompts], [0] * len(prompts), [common] * len(prompts)))
    starts = [own[n] if grouped else common for n in owners]
    parents = owners if grouped else [0] * len(sequences)
    chunks = [s.input_ids[start:] for s, start in zip(sequences, starts, strict=True)]
    return [*stages, Stage(chunks, parents, starts)]


def _lines(stages: Sequence[Stage]) -> list[list[int]]:
    """For each stage, which of its rows each row of the last stage goes on from."""
    found = [list(range(len(stages[-1].chunks)))]
    for stage in reversed(stages[1:]):
        found.insert(0, [stage.parents[row] for row in found[0]])
    return found


def cut_rows(stages: Sequence[Stage], rows: Sequence[Tensor]) -> list[Tensor]:
    """The hidden states [R, S, D] of each stage, from those of whole rows [S, D]; padded on the right."""
    return [
        pad_sequence(
            [
                rows[line.index(row)][start : start + len(chunk)]
                for row, (chunk, start) in enumerate(zip(stage.chunks, stage.starts, strict=True))
            ],
            batch_first=True,
        )
        for stage, line in zip(stages, _lines(stages), strict=True)
    ]


def joined_rows(stages: Sequence[Stage], hidden: Sequence[Tensor]) -> list[Tensor]:
    """Whole rows [S, D] from the hidden states [R, S, D] of each stage."""
    parts = list(zip(stages, _lines(stages), hidden, strict=True))
    return [
        torch.cat([hidden_RSD[line[row], : len(stage.chunks[line[row]])] for stage, line, hidden_RSD in parts])
        for row in range(len(stages[-1].chunks))
    ]


def cache_of_rows(prefixes: Sequence[Tensor], num_probes: int, device: torch.device) -> tuple[DynamicCache, Tensor]:
    """A key/value cache of rows with different prefixes, once for every probe, and its attention mask [P · R, S].

    Args:
        prefixes: keys and values [L, 2, H, S, D] of each row's prefix; they are padded on the right.
        num_probes: P.
        device: where the model is.
    """
    lengths = torch.tensor([p.shape[3] for p in prefixes])
    longest = int(lengths.max())
    layers, _, heads, _, width = prefixes[0].shape
    kv_L2RHSD = prefixes[0].new_zeros((layers, 2, len(prefixes), heads, longest, width), device=device)
    for row, prefix in enumerate(prefixes):
        kv_L2RHSD[:, :, row, :, : prefix.shape[3]] = prefix
    if num_probes > 1:
        kv_L2RHSD = kv_L2RHSD.repeat(1, 1, num_probes, 1, 1, 1)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kv_L2RHSD):
        cache.update(keys, values, layer)
    mask_RS = torch.arange(longest) < lengths[:, None]
    return cache, mask_RS.long().repeat(num_probes, 1).to(device)


def rows_of_cache(cache: DynamicCache, lengths: Sequence[int]) -> list[Tensor]:
    """Keys and values [L, 2, H, S, D] of each row, without its padding."""
    kv_L2RHSD = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers])
    return [kv_L2RHSD[:, :, row, :, :length] for row, length in enumerate(lengths)]
