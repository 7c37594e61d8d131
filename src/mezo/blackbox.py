"""Objectives without a gradient: accuracy, F1, exact match and reward functions.

Two forward passes are all that MeZO needs, so whatever can be computed from a model's outputs can be trained. Accuracy
comes from the options' log-probabilities; the others from what the model generates, greedily, under each probe.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from mezo.config import MeZOConfig
from mezo.engines.base import Engine
from mezo.errors import UserError
from mezo.estimator import Probe
from mezo.metrics import exact_match, f1
from mezo.objective import Example, Question, error_rates, example_losses

# TRL's signature: reward(prompts, completions, **columns) -> one number, or None, for each completion.
RewardFunction: TypeAlias = "Callable[..., Sequence[float | None]]"
LossFunction: TypeAlias = "Callable[[Engine, Sequence[Example], Sequence[Probe]], Tensor]"

END_OF_ANSWER = "\n"


@dataclass(frozen=True)
class Rewards:
    """The weighted sum of reward functions."""

    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]

    def __call__(self, questions: Sequence[Question], texts: Sequence[str]) -> list[float]:
        """The reward of each generated text.

        Raises:
            UserError: a function returned something other than a number, or None, for each.
        """
        prompts = [q.columns["prompt"] for q in questions]
        columns = {name: [q.columns[name] for q in questions] for name in questions[0].columns if name != "prompt"}
        completions = [
            [{"role": "assistant", "content": text}] if isinstance(prompt, list) else text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        sums = [0.0] * len(texts)
        for function, weight in zip(self.functions, self.weights, strict=True):
            found = function(prompts=prompts, completions=completions, **columns)
            try:
                rewards = [0.0 if value is None else float(value) for value in found]
                sums = [s + weight * r for s, r in zip(sums, rewards, strict=True)]
            except (TypeError, ValueError) as error:
                wanted = f"a list of {len(texts)} numbers"
                raise UserError(f"reward function {_name(function)} must return {wanted}: {error}") from None
        return sums


def make_rewards(config: MeZOConfig, functions: Sequence[RewardFunction] = ()) -> Rewards | None:
    """The rewards of a config; `functions` stand for those that it names."""
    found = tuple(functions) or tuple(load_reward(name) for name in config.reward_funcs or ())
    if not found:
        return None
    weights = tuple(config.reward_weights or [1.0] * len(found))
    if len(weights) != len(found):
        raise UserError(f"reward_weights holds {len(weights)} numbers for {len(found)} reward functions")
    return Rewards(found, weights)


def load_reward(name: str) -> RewardFunction:
    """The function `package.module.function`, or `file.py:function`."""
    path, colon, attribute = name.rpartition(":")
    if not colon:
        path, _, attribute = name.rpartition(".")
    try:
        if path.endswith(".py"):
            spec = importlib.util.spec_from_file_location(str(Path(path).absolute()), path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look for theirs there
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(path)
    except Exception as error:  # of code that is not ours
        raise UserError(f"reward_funcs {name!r}: {type(error).__name__}: {error}") from None
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"reward_funcs {name!r}: there is no function {attribute!r} in {path}")
    function: RewardFunction = found
    return function


def reward_names(functions: Sequence[RewardFunction | str]) -> list[str]:
    """What the journal calls these functions."""
    return [function if isinstance(function, str) else _name(function) for function in functions]


def loss_function(config: MeZOConfig, rewards: Rewards | None = None) -> LossFunction:
    """What a step minimises: float32 losses [P, N] of examples under probes."""
    if config.objective == "loss":
        return lambda engine, examples, probes: engine.losses(examples, probes, example_losses)
    if config.objective == "accuracy":
        return lambda engine, examples, probes: engine.losses(examples, probes, error_rates)
    if config.objective == "reward":
        assert rewards is not None
        return _Generated(lambda questions, texts: [-r for r in rewards(questions, texts)], config.max_new_tokens, None)
    score = f1 if config.objective == "f1" else exact_match

    def losses(questions: Sequence[Question], texts: Sequence[str]) -> list[float]:
        return [1.0 - score(text.strip(), q.answers) for q, text in zip(questions, texts, strict=True)]

    return _Generated(losses, config.max_new_tokens, END_OF_ANSWER)


@dataclass(frozen=True)
class _Generated:
    """Losses of what the model says under each probe."""

    losses: Callable[[Sequence[Question], Sequence[str]], list[float]]
    max_new_tokens: int
    stop: str | None

    def __call__(self, engine: Engine, examples: Sequence[Example], probes: Sequence[Probe]) -> Tensor:
        questions = [e.question for e in examples if e.question is not None]
        assert len(questions) == len(examples), "encoded without questions"
        tokens = len(probes) * sum(e.num_tokens for e in examples)
        engine.work.asked += tokens
        engine.work.computed += tokens
        texts_PN = engine.generate([q.prompt for q in questions], probes, self.max_new_tokens, self.stop)
        return torch.tensor([self.losses(questions, texts) for texts in texts_PN], dtype=torch.float32)


def _name(function: RewardFunction) -> str:
    module = getattr(function, "__module__", type(function).__module__)
    return f"{module}.{getattr(function, '__qualname__', type(function).__qualname__)}"
