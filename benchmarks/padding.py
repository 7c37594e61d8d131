"""How much of a step's passes is padding on real rows, and how many passes a batch is split into.

    python benchmarks/padding.py --models FOLDER --data FOLDER [--output FILE.csv]

The tasks of methods.py, batches as training draws them, both signs of one direction. Nothing is computed: passes are
counted as a CPU makes them, and as a GPU does, whose captured passes are rounded up to buckets; a few tasks of the
paper's table on OPT as OPT-13B in bfloat16 on a GPU would take them (FOLDER/gpt2-tokenizer has its pieces). Beside them
a batch as one pass that is padded to its longest row.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain_rows  # noqa: F401  before mezo: stands in for a package that may be missing
import torch
from gpu_step import SHAPES
from methods import drawn, options_of_task, rows_in, rows_of
from methods_settings import LORA, TASKS
from provenance import provenance, write
from transformers import AutoModelForCausalLM

from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.data import permutation
from mezo.engines.torch.graphs import Graphs, Shape
from mezo.engines.torch.loading import num_weights
from mezo.engines.torch.reuse import Stage

PROBES = 2
LARGE, LARGE_BATCH = "opt-13b", 16
LARGE_TASKS = {"sst2": "SST-2/train.jsonl.gz", "rte": "RTE/train.jsonl.gz", "boolq": "BoolQ/validation.jsonl.gz"}


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


def of_models(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Any, tuple[str, ...]]]:
    """What a row says, the trainer, and machines, for each task of methods.py."""
    for name, task in TASKS.items():
        train = drawn(rows_of(name, arguments.data, False), arguments.rows, 0)
        for trained, options in (("all", {}), ("LoRA", LORA)):
            config = MeZOConfig.from_dict(
                {**options_of_task(name, arguments.models), "max_steps": 1, "output_dir": "unused", "use_cpu": True,
                 "per_device_train_batch_size": task["batch"], **options}
            )  # fmt: skip
            facts = {"task": name, "batch": task["batch"], "trained": trained}
            yield facts, build_trainer(config, train), ("CPU", "GPU")


def of_large_model(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Any, tuple[str, ...]]]:
    """The same of OPT-13B: a small model of its kind, whose passes are cut as the large one's."""
    with torch.device("meta"):
        token_flops = 2 * num_weights(AutoModelForCausalLM.from_config(SHAPES[LARGE]))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(arguments.models / "gpt2-tokenizer", folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        small = type(SHAPES["tiny"])(**{**SHAPES["tiny"].to_dict(), "vocab_size": SHAPES[LARGE].vocab_size})
        AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16).save_pretrained(folder)
        for task, file in LARGE_TASKS.items():
            train = drawn(rows_in(arguments.data / file), arguments.rows, 0)
            for trained, options in (("all", {}), ("low rank", {"direction": "low_rank"}), ("LoRA", LORA)):
                config = MeZOConfig.from_dict(
                    {"model_name_or_path": folder, "task": task, "max_steps": 1, "output_dir": "unused",
                     "dtype": "bfloat16", "use_cpu": True, "per_device_train_batch_size": LARGE_BATCH, **options}
                )  # fmt: skip
                trainer = build_trainer(config, train)
                trainer.engine._token_flops = token_flops
                yield {"task": f"{LARGE}/{task}", "batch": LARGE_BATCH, "trained": trained}, trainer, ("GPU",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = []
    for facts, trainer, machines in itertools.chain(of_models(arguments), of_large_model(arguments)):
        for machine in machines:
            padding, passes, one_pass = counted(
                trainer.engine, trainer.train_examples, facts["batch"], on_gpu=machine == "GPU"
            )
            print(
                f"{facts['task']:20} {facts['trained']:8} {machine}: {padding:5.1f} % in {passes:.1f} passes, "
                f"{one_pass:.1f} % in one"
            )
            found.append(
                {**facts, "machine": machine, "padding_percent": f"{padding:.1f}", "passes": f"{passes:.2f}",
                 "padding_percent_of_one_pass": f"{one_pass:.1f}", **provenance()}
            )  # fmt: skip
        trainer.engine.close()
    if arguments.output is not None:
        write(arguments.output, found)


if __name__ == "__main__":
    main()
