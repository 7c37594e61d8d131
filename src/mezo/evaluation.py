"""Loss, accuracy, F1 and exact match of the unperturbed model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mezo.engines.base import Engine
from mezo.metrics import exact_match, f1
from mezo.objective import Example, batch_loss, correct, example_losses

_END_OF_ANSWER = "\n"


class Metrics(NamedTuple):
    """Means over examples. `accuracy` is the share of right options, or of greedy answer tokens for completions.

    `f1` and `exact_match` are those of generated answers; None where none are generated.
    """

    accuracy: float
    loss: float
    num_examples: int
    f1: float | None = None
    exact_match: float | None = None

    @property
    def measured(self) -> dict[str, float]:
        """The metrics that there are, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def evaluate(engine: Engine, examples: Sequence[Example], max_new_tokens: int = 50) -> Metrics:
    """Scores all examples at the present weights, and generates the answers of those with a question.

    Args:
        engine: the model.
        examples: what to evaluate.
        max_new_tokens: longest generated answer in tokens; it ends before that with its line.
    """
    scores = engine.score(examples)
    losses_N = example_losses(examples, scores.logprobs_T)
    metrics = Metrics(float(correct(examples, scores).mean()), batch_loss(examples, losses_N), len(examples))
    questions = [e.question for e in examples if e.question is not None]
    if not questions:
        return metrics
    found = engine.generate([q.prompt for q in questions], max_new_tokens, _END_OF_ANSWER)
    pairs = [(text.strip(), q.answers) for text, q in zip(found, questions, strict=True)]
    return metrics._replace(
        f1=sum(f1(*pair) for pair in pairs) / len(pairs),
        exact_match=sum(exact_match(*pair) for pair in pairs) / len(pairs),
    )
