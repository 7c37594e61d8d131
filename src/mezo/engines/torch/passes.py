"""How a batch is cut into forward passes: what a pass costs in time, and how much of the memory it may take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# A pass of fewer floating-point operations is launched as a CUDA graph: a GPU needs 0.2 to 2 s for more.
STATIC_FLOPS = 2e14
# A pass of as many tokens and floating-point operations fills a GPU; more of both at once are no faster.
FILLING_TOKENS, FILLING_FLOPS = 4096, 5e12
MOST_LOGITS = 1 << 29  # of a pass, where losses read many positions
# Of a token in a large model, where memory is worth more than time: that of several probes' activations, and that of
# captured passes beside an evaluation.
LARGE_FLOPS = 2e9
# A pass is not shorter than about a millisecond, in which a GPU does as many floating-point operations.
LAUNCH_FLOPS, LAUNCH_FLOPS_FLOAT32 = 5e11, 5e10
# What one more pass costs, in tokens: reading the weights, and on a GPU forming them where dense directions are.
PASS_TOKENS, FORMING_TOKENS = 100, 500


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What forward passes of a model cost.

    Args:
        token_flops: floating-point operations of a token.
        on_gpu: whether kernels are launched, and small passes become CUDA graphs.
        is_float32: whether the model is.
        forms_weights: whether the weights under a probe are formed anew in each pass.
        vocab_size: logits of each position that is read; None where a head gives classes.
    """

    token_flops: float
    on_gpu: bool
    is_float32: bool
    forms_weights: bool
    vocab_size: int | None

    def of_pass(self, num_probes: int) -> int:
        """What one more pass costs, in tokens of one probe; a small model's takes as long as launching its kernels."""
        if not self.on_gpu:
            return PASS_TOKENS
        own = FORMING_TOKENS if self.forms_weights else PASS_TOKENS
        flops = LAUNCH_FLOPS_FLOAT32 if self.is_float32 else LAUNCH_FLOPS
        return max(own, int(min(FILLING_TOKENS, flops / self.token_flops) / num_probes))

    def is_small(self, tokens: int) -> bool:
        """Whether a pass of as many tokens may cost more to launch than to run."""
        return self.on_gpu and tokens * self.token_flops < STATIC_FLOPS

    def most_tokens(self, num_probes: int, shapes: Sequence[tuple[int, int]]) -> float:
        """Rows × longest row with which several probes take no more memory than one on all rows, if they fill the GPU.

        Not where the model's weights are formed anew in each pass.
        """
        if not self.on_gpu or self.forms_weights:
            return math.inf
        tokens = sum(rows for rows, _ in shapes) * max(longest for _, longest in shapes)
        filling = max(FILLING_TOKENS, FILLING_FLOPS / self.token_flops)
        return float(max(tokens, filling)) / num_probes

    @property
    def is_large(self) -> bool:
        """Whether memory is worth more than time."""
        return self.on_gpu and self.token_flops > LARGE_FLOPS

    @property
    def most_probes(self) -> float:
        """Probes that go through the model together: of a large one whose weights are formed anew in each pass two,
        the signs of a direction. Further ones would save one reading of the weights and take activations of their own.

        Where probes read the same weights, passes are cut by rows instead; see `most_tokens`.
        """
        return 2 if self.is_large and self.forms_weights else math.inf

    def step(self, shapes: Sequence[tuple[int, int]], most_tokens: float) -> int:
        """What numbers of examples of a pass are multiples of: passes that become graphs shall be of few shapes."""
        tokens = sum(rows * longest for rows, longest in shapes)
        return max(1, len(shapes) // 4) if self.is_small(tokens) and tokens <= most_tokens else 1

    def within_logits(self, reads: Sequence[int], group: Sequence[int], num_probes: int) -> Iterator[list[int]]:
        """A group of examples in parts whose positions that are read have no more logits than fit beside a pass.

        Args:
            reads: positions of each example, of all of them.
            group: indices of those of a pass.
            num_probes: that see the rows at once.
        """
        if self.vocab_size is None:
            yield list(group)
            return
        most = MOST_LOGITS // (num_probes * self.vocab_size)
        part: list[int] = []
        count = 0
        for n in group:
            if part and count + reads[n] > most:
                yield part
                part, count = [], 0
            part, count = [*part, n], count + reads[n]
        yield part


def length_groups(
    shapes: Sequence[tuple[int, int]], pass_cost: int, most_tokens: float = math.inf, step: int = 1, common: int = 0
) -> list[list[int]]:
    """Splits examples into forward passes so that padding and number of passes together cost least.

    Args:
        shapes: rows and longest row, in tokens, of each example.
        pass_cost: what one more pass costs, in tokens.
        most_tokens: rows × longest row of a pass, unless it has one example only.
        step: the number of examples of a pass is a multiple of it, but for the one with the longest rows.
        common: tokens that all rows begin with; a pass computes them once, in one more pass, where that costs less.

    Returns:
        Indices of the examples of each pass, shortest rows first; the order of equal lengths is kept.
    """
    order = sorted(range(len(shapes)), key=lambda n: shapes[n][1])
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first k examples, and where their last pass starts
    for stop in range(1, len(order) + 1):
        longest, rows = shapes[order[stop - 1]][1], 0
        choices: list[tuple[float, int]] = []
        for start in range(stop - 1, -1, -1):
            rows += shapes[order[start]][0]
            if start % step:
                continue
            if choices and rows * longest > most_tokens:
                break
            saved = max(0, common * (rows - 1) - pass_cost)
            choices.append((best[start][0] + rows * longest - saved + pass_cost, start))
        best.append(min(choices))
    groups: list[list[int]] = []
    stop = len(order)
    while stop:
        start = best[stop][1]
        groups.insert(0, order[start:stop])
        stop = start
    return groups
