"""Objectives: from log-probabilities of target tokens to one loss per example.

Every objective of this version has one shape. An example is one or more token sequences; each sequence names the
tokens whose log-probabilities are read, and the option that each of them speaks for. An option's score is the mean
log-probability of its tokens (that is: length-normalised).

    completion             one sequence, one option; loss = −score
    label words, choices   one sequence per option; loss = cross-entropy over the scores of all options
    masked label word      one sequence, all options read at [MASK]; the same cross-entropy
    classification head    one sequence, classes in place of tokens; the same cross-entropy

Engines only compute log-probabilities; the functions here do the rest and know no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """One log-probability to read: that of `token` in the model's output at `position`, counted for `option`."""

    position: int
    token: int
    option: int


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One row of input with its targets; `input_ids` holds no padding.

    An activated LoRA acts from position `adapter_start` on; no target is read before it.
    """

    input_ids: tuple[int, ...]
    targets: tuple[Target, ...]
    adapter_start: int = field(default=0, repr=False)  # follows from the config; `repr` is what data_digest hashes

    @property
    def read_start(self) -> int:
        """First position whose output is read."""
        return min(t.position for t in self.targets)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt whose answer is generated: for F1 and exact match against the right answers, or for a reward.

    `columns` are the row that a reward function is told of, `prompt` as text or messages among them.
    """

    prompt: tuple[int, ...]
    answers: tuple[str, ...] = ()
    columns: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Example:
    """One training example. `label` is the right option, or None for a completion.

    `question` is what to generate from; where that is trained, there are no sequences. For evaluation alone:
    `also_right` are further options that count as right.
    """

    sequences: tuple[TokenSequence, ...]
    label: int | None = None
    also_right: tuple[int, ...] = field(default=(), repr=False)  # no part of what is trained; see `adapter_start`
    question: Question | None = field(default=None, repr=False)

    @property
    def num_tokens(self) -> int:
        """Input tokens of all sequences, or of the prompt alone."""
        if not self.sequences:
            return len(self.question.prompt) if self.question is not None else 0
        return sum(len(s.input_ids) for s in self.sequences)

    @property
    def weight(self) -> int:
        """Weight in a batch's mean: answer tokens for completions (the mean is per token), else 1."""
        return len(self.sequences[0].targets) if self.label is None and self.sequences else 1


class TargetScores(NamedTuple):
    """What an engine returns for a batch: T targets in the order of examples, sequences, targets."""

    logprobs_T: Tensor  # float32
    greedy_T: Tensor  # bool: the target is the most probable token


def common_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    """Length of the longest beginning that all rows share."""
    low, high = min(rows), max(rows)  # in lexical order the others lie between them
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def option_scores(examples: Sequence[Example], logprobs_T: Tensor) -> Tensor:
    """Mean log-probability of each option's tokens, float32 [N, max options]; −inf where there is no such option."""
    index = [(n, t.option) for n, e in enumerate(examples) for s in e.sequences for t in s.targets]
    assert len(index) == len(logprobs_T)
    example_T, option_T = torch.tensor(index).T.to(logprobs_T.device)
    shape = (len(examples), int(option_T.max()) + 1)
    sums_NO = torch.zeros(shape, device=logprobs_T.device).index_put_(
        (example_T, option_T), logprobs_T, accumulate=True
    )
    counts_NO = torch.zeros_like(sums_NO).index_put_(
        (example_T, option_T), torch.ones_like(logprobs_T), accumulate=True
    )
    return torch.where(counts_NO > 0, sums_NO / counts_NO, -torch.inf)


def example_losses(examples: Sequence[Example], logprobs_T: Tensor) -> Tensor:
    """Loss of each example in nats, float32 [N]."""
    scores_NO = option_scores(examples, logprobs_T)
    labels = torch.tensor([e.label or 0 for e in examples], device=logprobs_T.device)
    chosen_N = scores_NO.gather(1, labels[:, None])[:, 0]
    if all(e.label is None for e in examples):
        return -chosen_N
    return scores_NO.logsumexp(dim=1) - chosen_N


def batch_loss(examples: Sequence[Example], losses_N: Tensor) -> float:
    """Weighted mean of the examples' losses, in float64."""
    weights_N = torch.tensor([e.weight for e in examples], dtype=torch.float64)
    return float((losses_N.double().cpu() * weights_N).sum() / weights_N.sum())


def correct(examples: Sequence[Example], scores: TargetScores) -> Tensor:
    """For each example 1.0 or 0.0 (right option), or the share of greedy tokens of a completion; float64 [N]."""
    if examples[0].label is None:
        greedy = scores.greedy_T.double().split([e.weight for e in examples])
        return torch.stack([g.mean() for g in greedy])
    return 1.0 - error_rates(examples, scores.logprobs_T).double()


def error_rates(examples: Sequence[Example], logprobs_T: Tensor) -> Tensor:
    """For each example 0.0 if the best option is right, else 1.0; float32 [N]."""
    predicted_N = option_scores(examples, logprobs_T).argmax(dim=1).tolist()
    return torch.tensor(
        [float(p != e.label and p not in e.also_right) for p, e in zip(predicted_N, examples, strict=True)]
    )
