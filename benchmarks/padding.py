"""How much of a step's passes is padding on real rows, and how many passes a batch is split into.

    python benchmarks/padding.py --models FOLDER --data FOLDER [--output FILE.csv]

The tasks of methods.py, batches as training draws them, both signs of one direction. Nothing is computed: passes are
counted as a CPU makes them, and as a GPU does, whose captured passes are rounded up to buckets. Beside them a batch as
one pass that is padded to its longest row.
"""

import argparse
from pathlib import Path
from typing import Any

import plain_rows  # noqa: F401  before mezo: stands in for a package that may be missing
import torch
from methods import drawn, options_of_task, rows_of
from methods_settings import LORA, TASKS
from provenance import provenance, write

from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.data import permutation
from mezo.engines.torch.graphs import Graphs, Shape
from mezo.engines.torch.reuse import Stage

PROBES = 2


def counted(engine: Any, examples: list[Any], size: int, *, on_gpu: bool) -> tuple[float, float, float]:
    """Percent of padding, passes a batch, and percent of padding of a batch as one pass."""
    engine._graphs = Graphs(torch.device("cpu")) if on_gpu else None
    tokens = places = passes = batches = one_pass = 0
    order = permutation(len(examples), 0)
    for first in range(0, len(order) - size + 1, size):
        batch = [examples[n] for n in order[first : first + size]]
        longest = max(len(s.input_ids) for e in batch for s in e.sequences)
        one_pass += longest * sum(len(e.sequences) for e in batch)
        batches += 1
        for group in engine._groups(batch, size, PROBES):
            sequences = [s for n in group for s in batch[n].sequences]
            stage = Stage([s.input_ids for s in sequences], [], [])
            shape = (len(sequences), max(map(len, stage.chunks)))
            if on_gpu:
                shape = Shape.of(PROBES, True, True, *shape, 0, 0, 0, False)[3:5]
            tokens += stage.num_tokens
            places += shape[0] * shape[1]
            passes += 1
    return 100 * (1 - tokens / places), passes / batches, 100 * (1 - tokens / one_pass)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = []
    for name, task in TASKS.items():
        train = drawn(rows_of(name, arguments.data, False), arguments.rows, 0)
        for trained, options in (("all", {}), ("LoRA", LORA)):
            config = MeZOConfig.from_dict(
                {**options_of_task(name, arguments.models), "max_steps": 1, "output_dir": "unused", "use_cpu": True,
                 "per_device_train_batch_size": task["batch"], **options}
            )  # fmt: skip
            trainer = build_trainer(config, train)
            for machine in ("CPU", "GPU"):
                padding, passes, one_pass = counted(
                    trainer.engine, trainer.train_examples, task["batch"], on_gpu=machine == "GPU"
                )
                print(
                    f"{name:20} {trained:5} {machine}: {padding:5.1f} % in {passes:.1f} passes, {one_pass:.1f} % in one"
                )
                found.append(
                    {"task": name, "batch": task["batch"], "trained": trained, "machine": machine,
                     "padding_percent": f"{padding:.1f}", "passes": f"{passes:.2f}",
                     "padding_percent_of_one_pass": f"{one_pass:.1f}", **provenance()}
                )  # fmt: skip
            trainer.engine.close()
    if arguments.output is not None:
        write(arguments.output, found)


if __name__ == "__main__":
    main()
