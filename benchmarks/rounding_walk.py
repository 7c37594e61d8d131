"""What rounding the weights costs a long run in bfloat16: its own steps, replayed in float32.

    python benchmarks/rounding_walk.py JOURNAL --models FOLDER --data FOLDER [--steps 10000] [--output FILE.csv]

JOURNAL is that of a run of benchmarks/methods.py (`--parts long --long_method "mezo, bf16"`, MiniLM, SST-2). Its steps
are made on float32 weights and every `--every` steps evaluated on the rows that the run was. Beside that: the mean size
of a weight's update, the median last place of the model's weights in bfloat16, and how far each weight has walked by
then, by its updates and by their rounding, as a standard deviation: an update u is rounded to a neighbour at a distance
of one last place p with a mean square error of p·|u| where u is small.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from methods import options_of_task, split
from methods_settings import Job
from provenance import provenance, write

from mezo import journal
from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.evaluation import evaluate

TASK = "minilm-mlm/sst2"
MEAN_SIZE = math.sqrt(2 / math.pi)  # of a normal number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=2_500)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    steps = journal.read(options.journal).steps[: options.steps]
    train, held_out, reported = split(Job(TASK, "mezo", 0.0, 0, "train"), options)
    named = options_of_task(TASK, options.models)
    config = MeZOConfig(per_device_eval_batch_size=256, output_dir="unused", **named)
    trainer = build_trainer(config, train, held_out + reported)
    engine, examples = trainer.engine, trainer.eval_examples or []
    sizes = torch.cat([p.detach().abs().flatten() for p in engine.space.parameters.values()])
    last_places = 2.0 ** (sizes[sizes > 0].log2().floor() - 7)
    rows: list[dict[str, Any]] = []
    for number, records in enumerate(steps, 1):
        engine.update(records)
        if number % options.every == 0:
            coefficients = [r.learning_rate * r.coefficient for step in steps[:number] for r in step]
            update = MEAN_SIZE * statistics.fmean(map(abs, coefficients))
            metrics = {name: evaluate(engine, part) for name, part in
                       (("held_out", examples[: len(held_out)]), ("reported", examples[len(held_out) :]))}  # fmt: skip
            row = {
                "step": number, "accuracy": round(metrics["reported"].accuracy, 4),
                "loss": round(metrics["reported"].loss, 4), "held_out_loss": round(metrics["held_out"].loss, 4),
                "mean_update": f"{update:.3g}", "median_last_place": f"{last_places.median():.3g}",
                "walk_of_updates": f"{math.sqrt(sum(c * c for c in coefficients)):.3g}",
                "walk_of_rounding": f"{math.sqrt(number * update * last_places.mean().item()):.3g}",
            }  # fmt: skip
            rows.append({**row, **provenance()})
            print(row, flush=True)
    if options.output is not None:
        write(options.output, rows)


if __name__ == "__main__":
    main()
