"""How much of a batch's gradient is signal: the gradient over all training rows, and what batches scatter around it.

    python benchmarks/gradient_signal.py --models FOLDER --data FOLDER [--tasks minilm-mlm/sst2 …] [--output FILE.csv]

Of the training rows of benchmarks/methods.py: the squared norm of their mean gradient, and the mean squared distance of
a row's gradient from it, by kinds of parameters, of the model as it is and after some steps of AdamW. A batch of B rows
has 1/B of that scatter, which a forward pass along any direction sees as well, however many directions a step has.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import plain_rows  # noqa: F401  before mezo: stands in for a package that may be missing
import torch
from methods import differentiable_loss, options_of_task, split
from methods_settings import TASKS, Job
from provenance import provenance, write

from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.data import permutation
from mezo.objective import Example

STEPS, BATCH, RATE = 50, 16, 5e-6


def kind_of(name: str) -> str:
    """Of a parameter, by its name."""
    if "embed" in name or name.endswith("decoder.bias"):
        return "embeddings"
    if "norm" in name.lower():
        return "norms"
    if name.endswith("bias"):
        return "biases"
    if any(part in name for part in ("query", "key", "q_proj", "k_proj")):
        return "queries and keys"
    return "other matrices"


def signal_and_scatter(engine: Any, examples: list[Example]) -> dict[str, tuple[float, float]]:
    """Squared norm of the mean gradient, and mean squared distance from it, by kind and of all."""
    parameters = {name: p for name, p in engine.model.named_parameters() if p.requires_grad}
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
    squares: dict[str, float] = defaultdict(float)
    for example in examples:
        engine.model.zero_grad()
        differentiable_loss(engine, [example]).backward()
        for name, p in parameters.items():
            if p.grad is not None:
                mean[name] += p.grad / len(examples)
                squares[name] += p.grad.square().sum().item() / len(examples)
    found: dict[str, tuple[float, float]] = {}
    for name, gradient in mean.items():
        signal = gradient.square().sum().item()
        for kind in (kind_of(name), "all"):
            before = found.get(kind, (0.0, 0.0))
            found[kind] = (before[0] + signal, before[1] + squares[name] - signal)
    return found


def train(engine: Any, examples: list[Example]) -> None:
    """A few steps of AdamW, from which on most rows are right."""
    order = permutation(len(examples), 0)
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=RATE, weight_decay=0.0)
    for first in range(0, STEPS * BATCH, BATCH):
        batch = [examples[order[n % len(order)]] for n in range(first, first + BATCH)]
        optimizer.zero_grad()
        differentiable_loss(engine, batch).backward()
        optimizer.step()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", type=Path, required=True)
    arguments.add_argument("--data", type=Path, required=True)
    arguments.add_argument("--tasks", nargs="+", choices=TASKS, default=["minilm-mlm/sst2", "reviews-llama/sst2"])
    arguments.add_argument("--rows", type=int, default=1000)
    arguments.add_argument("--output", type=Path)
    chosen = arguments.parse_args()
    rows: list[dict[str, Any]] = []
    for name in chosen.tasks:
        task = TASKS[name]
        training, _, _ = split(Job(name, "mezo", 0.0, 0, "train"), chosen)
        config = MeZOConfig(output_dir="unused", **options_of_task(name, chosen.models))
        trainer = build_trainer(config, training)
        for state in ("as it is", "trained"):
            if state == "trained":
                train(trainer.engine, trainer.train_examples)
            for kind, (signal, scatter) in signal_and_scatter(trainer.engine, trainer.train_examples).items():
                in_batch = scatter / task["batch"] / signal
                rows.append(
                    {"task": name, "state": state, "parameters": kind, "signal": f"{signal:.4g}",
                     "scatter": f"{scatter:.4g}", "batch": task["batch"], "scatter_over_signal": f"{in_batch:.3g}",
                     **provenance()}
                )  # fmt: skip
                print(f"{name:18} {state:9} {kind:17} signal {signal:9.3g}, scatter of a row {scatter:9.3g}, of a "
                      f"batch of {task['batch']} over the signal {in_batch:7.2f}", flush=True)  # fmt: skip
    if chosen.output:
        write(chosen.output, rows)


if __name__ == "__main__":
    main()
