"""Loss and accuracy of the unperturbed model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mezo.engines.base import Engine
from mezo.objective import Example, batch_loss, correct, example_losses


class Metrics(NamedTuple):
    """Means over examples. `accuracy` is the share of right options, or of greedy answer tokens for completions."""

    accuracy: float
    loss: float
    num_examples: int


def evaluate(engine: Engine, examples: Sequence[Example]) -> Metrics:
    """Scores all examples at the present weights."""
    scores = engine.score(examples)
    losses_N = example_losses(examples, scores.logprobs_T)
    return Metrics(float(correct(examples, scores).mean()), batch_loss(examples, losses_N), len(examples))
