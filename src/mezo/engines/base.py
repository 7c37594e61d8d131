"""What the trainer asks of an engine. Everything that crosses this line is token ids, scalars and records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mezo.estimator import Probe, Record
from mezo.objective import Example, TargetScores, example_losses

# From log-probabilities of all targets to one loss per example, see `mezo.objective`.
Loss: TypeAlias = "Callable[[Sequence[Example], Tensor], Tensor]"


@dataclass
class Work:
    """Tokens of all training steps so far."""

    asked: int = 0  # of all rows under all probes
    computed: float = 0.0  # that went through the model; through a part of its layers: that part of a token
    padding: float = 0  # positions computed besides


class Engine(Protocol):
    """A model with a parameter space in it. `losses` never changes the weights; `update` is their only mover.

    `model` and `tokenizer` are what callbacks get to see; `model` is None where it lives in another process. `work` is
    what `losses` has cost so far.
    """

    work: Work
    # Saved weights are all there is to go on from only after a multiple of that many steps.
    resumes_every: int

    @property
    def model(self) -> torch.nn.Module | None:
        """The live model, if it is in this process."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        ...

    def losses(self, examples: Sequence[Example], probes: Sequence[Probe], loss: Loss = example_losses) -> Tensor:
        """Loss of each example under each probe: float32 [P, N] on the CPU, in nats with the default `loss`.

        Raises:
            EngineError: one example does not fit into memory, or servers do not answer.
        """
        ...

    def score(self, examples: Sequence[Example]) -> TargetScores:
        """Log-probabilities, in nats, of all targets at the unperturbed weights, on the CPU; in the examples' order."""
        ...

    def generate(
        self, prompts: Sequence[tuple[int, ...]], probes: Sequence[Probe], max_new_tokens: int, stop: str | None
    ) -> list[list[str]]:
        """Greedy continuation of each prompt under each probe, [P][N], up to `stop` or the end of the text."""
        ...

    def update(self, records: Sequence[Record]) -> None:
        """Applies one step's records: θ ← θ − lr · Σ coefficient · z, with decoupled weight decay."""
        ...

    def deferring(self) -> AbstractContextManager[None]:
        """A context in which an update may wait until this object needs the weights: `model` itself may lag behind."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the trained weights (adapter or model) and the tokenizer, loadable by PEFT or transformers."""
        ...

    def load(self, folder: Path) -> None:
        """Takes the trained weights from a folder that `save` wrote."""
        ...

    def save_optimizer(self, folder: Path) -> None:
        """Writes the optimizer's state, if it has one, beside a checkpoint's weights."""
        ...

    def load_optimizer(self, folder: Path) -> None:
        """Takes the state that `save_optimizer` wrote."""
        ...

    def num_parameters(self) -> int:
        """Number of trained scalars."""
        ...

    def digest(self) -> str:
        """Hash of the trained parameters' present values."""
        ...

    def close(self) -> None:
        """Frees what the engine holds."""
        ...
