"""Momentum, Adam and Muon for small float32 parameters, all N in one vector: from Σ coefficient · z to what is
subtracted.

All sums and products are rounded one by one and roots go through float64, so that a state is a function of the records,
bit for bit, on every device.
"""

from __future__ import annotations

import functools
import math
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
    """m ← β m + (1 − β) g; the step is m. The mean keeps plain SGD's learning rate.

    As LOZO-M (arXiv 2410.07698), which projects m onto the next V, where here it starts anew with each window.
    """

    def __init__(self, beta: float):
        self._beta = beta
        self.state: dict[str, Tensor] = {}

    def step(self, gradient_N: Tensor) -> Tensor:
        """See `Optimizer.step`."""
        self.state["m"] = _mean(self.state.get("m"), gradient_N, self._beta)
        return self.state["m"]


class Adam:
    """m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g²; the step is m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε).

    Kingma and Ba, arXiv 1412.6980, algorithm 1.
    """

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
        root_N = _root(second_N * (1 / (1 - self._beta2**steps)))
        return first_N * (1 / (1 - self._beta1**steps)) / (root_N + self._epsilon)


class Muon(Adam):
    """Orthogonalised momentum for the r × r cores of a subspace, as ZO-Muon (arXiv 2602.17155); Adam for vectors.

    With M ← β M + (1 − β) G of a core, the step is √r · U Vᵀ of M = U Σ Vᵀ, about (Jordan et al., 2024): five
    Newton–Schulz steps X ← a X + (b A + c A²) X, A = X Xᵀ, from M over its Frobenius norm, which leave singular values
    around 1. √r makes an entry 1 in the quadratic mean, so that a learning rate is that of Adam.

    Args:
        momentum: β.
        rank: r.
        adam: β₁, β₂ and ε for vectors.
    """

    coefficients = (3.4445, -4.7750, 2.0315)

    def __init__(self, momentum: float, rank: int, *adam: float):
        super().__init__(*adam)
        self._momentum, self._rank = momentum, rank
        self.num_matrix = 0  # entries of all cores, which come first

    def step(self, gradient_N: Tensor) -> Tensor:
        """See `Optimizer.step`."""
        cores_N, vectors_N = gradient_N[: self.num_matrix], gradient_N[self.num_matrix :]
        mean_N = self.state["cores"] = _mean(self.state.get("cores"), cores_N, self._momentum)
        steps_Krr = orthogonalised(mean_N.view(-1, self._rank, self._rank), self.coefficients)
        return torch.cat(((steps_Krr * math.sqrt(self._rank)).flatten(), super().step(vectors_N)))


def orthogonalised(matrix_Krr: Tensor, coefficients: tuple[float, float, float], steps: int = 5) -> Tensor:
    """U Vᵀ of each of K matrices U Σ Vᵀ, about; a matrix of zeros stays one."""
    a, b, c = coefficients
    norm_K11 = _root(_sum(_sum(matrix_Krr * matrix_Krr, 2), 1))[:, None, None]
    x_Krr = matrix_Krr / (norm_K11 + 1e-15)
    for _ in range(steps):
        gram_Krr = _product(x_Krr, x_Krr.mT)
        x_Krr = x_Krr * a + _product(gram_Krr * b + _product(gram_Krr, gram_Krr) * c, x_Krr)
    return x_Krr


def _product(left_Krr: Tensor, right_Krr: Tensor) -> Tensor:
    """Of stacks of small matrices, one product and one sum after the other."""
    total_Krr = left_Krr[:, :, :1] * right_Krr[:, :1]
    for k in range(1, left_Krr.shape[2]):
        total_Krr = total_Krr + left_Krr[:, :, k : k + 1] * right_Krr[:, k : k + 1]
    return total_Krr


def _sum(value: Tensor, dimension: int) -> Tensor:
    first, *others = value.unbind(dimension)
    return functools.reduce(torch.add, others, first)


def _root(value_N: Tensor) -> Tensor:
    return value_N.double().sqrt().float()


def _mean(before_N: Tensor | None, value_N: Tensor, beta: float) -> Tensor:
    share_N = value_N * (1 - beta)
    return share_N if before_N is None else before_N * beta + share_N


def make_optimizer(config: MeZOConfig) -> Momentum | Adam | None:
    """The optimizer that the config names; None for plain SGD."""
    adam = config.adam_beta1, config.adam_beta2, config.adam_epsilon
    if config.optim == "momentum":
        return Momentum(config.momentum)
    if config.optim == "muon":
        return Muon(config.momentum, config.direction_rank, *adam)
    return Adam(*adam) if config.optim == "adam" else None


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
