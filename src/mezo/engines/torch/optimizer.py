"""Momentum and Adam for small float32 parameters, all N in one vector: from Σ coefficient · z to what is subtracted.

All sums and products are rounded one by one and roots go through float64, so that a state is a function of the records,
bit for bit, on every device.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezo.config import MeZOConfig
from mezo.errors import UserError

STATE_FILE = "optimizer.safetensors"


class Optimizer(Protocol):
    """Gradient estimates to steps. `state` holds float32 tensors, for a checkpoint."""

    state: dict[str, Tensor]

    def step(self, gradient_N: Tensor) -> Tensor:
        """What the learning rate multiplies."""
        ...


class Momentum:
    """m ← β m + (1 − β) g; the step is m. The mean keeps plain SGD's learning rate. (LOZO-M, arXiv 2410.07698.)"""

    def __init__(self, beta: float):
        self._beta = beta
        self.state: dict[str, Tensor] = {}

    def step(self, gradient_N: Tensor) -> Tensor:
        """See `Optimizer.step`."""
        self.state["m"] = _mean(self.state.get("m"), gradient_N, self._beta)
        return self.state["m"]


class Adam:
    """Kingma and Ba, arXiv 1412.6980, algorithm 1."""

    def __init__(self, beta1: float, beta2: float, epsilon: float):
        self._beta1, self._beta2, self._epsilon = beta1, beta2, epsilon
        self.state: dict[str, Tensor] = {}

    def step(self, gradient_N: Tensor) -> Tensor:
        """See `Optimizer.step`."""
        state = self.state
        first_N = state["m"] = _mean(state.get("m"), gradient_N, self._beta1)
        second_N = state["v"] = _mean(state.get("v"), gradient_N * gradient_N, self._beta2)
        count = state["t"] = state.get("t", torch.zeros(1)) + 1
        steps = int(count)
        # Products with a number's inverse, by which a GPU replaces divisions: the bits are those of any device.
        root_N = (second_N * (1 / (1 - self._beta2**steps))).double().sqrt().float()
        return first_N * (1 / (1 - self._beta1**steps)) / (root_N + self._epsilon)


def _mean(before_N: Tensor | None, value_N: Tensor, beta: float) -> Tensor:
    share_N = value_N * (1 - beta)
    return share_N if before_N is None else before_N * beta + share_N


def make_optimizer(config: MeZOConfig) -> Momentum | Adam | None:
    """The optimizer that the config names; None for plain SGD."""
    if config.optim == "momentum":
        return Momentum(config.momentum)
    return Adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon) if config.optim == "adam" else None


def save_state(state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes the state beside a checkpoint's weights."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / STATE_FILE)


def load_state(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """The state that `save_state` wrote.

    Raises:
        UserError: it is missing.
    """
    if not (folder / STATE_FILE).exists():
        raise UserError(f"{folder} has no {STATE_FILE}: it cannot be resumed with this optim")
    tensors: dict[str, Tensor] = load_file(folder / STATE_FILE)
    return {name: t if name == "t" else t.to(device) for name, t in tensors.items()}
