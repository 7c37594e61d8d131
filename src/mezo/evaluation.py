"""Loss, accuracy, F1 and exact match of the unperturbed model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mezo.blackbox import END_OF_ANSWER, Rewards
from mezo.engines.base import Engine
from mezo.estimator import UNPERTURBED
from mezo.metrics import exact_match, f1
from mezo.objective import Example, Question, batch_loss, correct, example_losses


class Metrics(NamedTuple):
    """Means over examples. `accuracy` is the share of right options, or of greedy answer tokens for completions.

    `f1` and `exact_match` are those of generated answers, `reward` that of generated texts; None where none are
    generated. Where all there is is a reward, `loss` is its negative and `accuracy` None.
    """

    accuracy: float | None
    loss: float
    num_examples: int
    f1: float | None = None
    exact_match: float | None = None
    reward: float | None = None

    @property
    def measured(self) -> dict[str, float]:
        """The metrics that there are, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def evaluate(
    engine: Engine, examples: Sequence[Example], max_new_tokens: int = 50, rewards: Rewards | None = None
) -> Metrics:
    """Scores all examples at the present weights, and generates the answers of those with a question.

    Args:
        engine: the model.
        examples: what to evaluate.
        max_new_tokens: longest generated text in tokens; an answer ends before that with its line.
        rewards: judges what is generated, if the examples are prompts alone.
    """
    if rewards is not None:
        return _rewarded(engine, examples, max_new_tokens, rewards)
    scores = engine.score(examples)
    losses_N = example_losses(examples, scores.logprobs_T)
    metrics = Metrics(float(correct(examples, scores).mean()), batch_loss(examples, losses_N), len(examples))
    questions = [e.question for e in examples if e.question is not None]
    if not questions:
        return metrics
    pairs = answered(engine, questions, max_new_tokens)
    return metrics._replace(
        f1=sum(f1(*pair) for pair in pairs) / len(pairs),
        exact_match=sum(exact_match(*pair) for pair in pairs) / len(pairs),
    )


def answered(engine: Engine, questions: Sequence[Question], max_new_tokens: int) -> list[tuple[str, tuple[str, ...]]]:
    """For each question the answer that the unperturbed model generates, beside the right ones."""
    (found,) = engine.generate([q.prompt for q in questions], [UNPERTURBED], max_new_tokens, END_OF_ANSWER)
    return [(text.strip(), q.answers) for text, q in zip(found, questions, strict=True)]


def _rewarded(engine: Engine, examples: Sequence[Example], max_new_tokens: int, rewards: Rewards) -> Metrics:
    questions = [e.question for e in examples if e.question is not None]
    (found,) = engine.generate([q.prompt for q in questions], [UNPERTURBED], max_new_tokens, None)
    reward = sum(rewards(questions, found)) / len(questions)
    return Metrics(None, -reward, len(questions), reward=reward)
