"""Runs that are ended again and again against runs that are not: weights and journals must have the same bits.

    python benchmarks/kill_rounds.py [--rounds 100] [--seed 0] [--load 2] [--steps 150] [--output FILE.csv]

Every parameter space trains a small encoder in child processes that SIGKILL, SIGTERM and Ctrl-C end at random instants;
each child resumes where the last one was ended, beside `--load` processes that compute and write to the same disk. The
rounds are shared out over the spaces. The model and the rows are those of the tests. Ends with status 1 at the first
difference.
"""

import argparse
import csv
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from provenance import provenance
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mezo import journal
from tests import kill_loop
from tests.conftest import _MODELS, SENTIMENT_ROWS, make_tokenizer

Row = dict[str, object]
LOW_RANK = {"direction": "low_rank", "direction_refresh_steps": 20, "learning_rate": 1e-3 - 1e-6}
LORA = {"use_peft": True, "learning_rate": 1e-3}
SPACES: dict[str, dict[str, object]] = {
    "full, dense": {"learning_rate": 5e-4},
    "full, dense, bfloat16": {"learning_rate": 1e-4, "dtype": "bfloat16"},
    "full, low rank": LOW_RANK,
    "full, low rank, momentum": {**LOW_RANK, "optim": "momentum"},
    "full, low rank, adam": {**LOW_RANK, "optim": "adam"},
    "LoRA": LORA,
    "LoRA, momentum, clipped": {**LORA, "optim": "momentum", "clip_quantile": 0.5, "clip_window": 20},
    "LoRA, adam, 2 queries": {**LORA, "optim": "adam", "num_queries": 2},
    "prefix": {"use_peft": True, "peft_type": "prefix_tuning", "learning_rate": 1e-2, "epsilon": 1e-1},
    "prefix, adam": {
        "use_peft": True, "peft_type": "prefix_tuning", "learning_rate": 1e-3, "epsilon": 1e-1, "optim": "adam",
    },
}  # fmt: skip


def make_model(folder: Path) -> None:
    kind, build = _MODELS["bert"]
    torch.manual_seed(0)
    build().save_pretrained(folder)
    make_tokenizer(kind).save_pretrained(folder)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    (path,) = run.glob("*model.safetensors")
    loaded: dict[str, torch.Tensor] = load_file(path)
    return loaded


def same(first: Path, second: Path) -> bool:
    a, b = tensors(first), tensors(second)
    equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return equal and journal.read(first / "journal").steps == journal.read(second / "journal").steps


def burn(path: Path) -> None:
    """Computes and writes until it is ended."""
    data = bytes(1 << 20)
    while True:
        with path.open("wb") as file:
            for _ in range(16):
                file.write(data)
                data = hashlib.sha256(data).digest() * (1 << 15)
            os.fsync(file.fileno())


@contextmanager
def load(count: int, folder: Path) -> Iterator[None]:
    """That many processes beside."""
    context = multiprocessing.get_context("spawn")  # the rounds fork
    processes = [context.Process(target=burn, args=(folder / f"load-{n}",), daemon=True) for n in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def check(
    space: str, options: dict[str, object], folder: Path, num_kills: int, steps: int, generator: random.Random
) -> Row:
    """One space."""
    straight, killed = folder / "straight", folder / "killed"
    common = {
        "model_name_or_path": str(folder.parent / "model"), "dataset_name": str(folder.parent / "rows.jsonl"),
        "template": "{text} it was [MASK] .", "label_words": {"0": "terrible", "1": "great"}, "validation_size": 0.2,
        "per_device_train_batch_size": 4, "eval_steps": 60, "save_steps": 40, "disable_tqdm": True,
        "max_steps": steps, **options,
    }  # fmt: skip
    again = {**common, "output_dir": str(killed), "resume_from_checkpoint": True}
    kill_loop.end_often(again, num_kills, generator, longest=2.5)
    kill_loop.end_often({**common, "output_dir": str(straight)}, 0, generator)
    if not same(straight, killed):
        raise SystemExit(f"{space}: the resumed run differs from the straight one")
    print(f"{space:26} {num_kills:4} rounds ended, {steps:6} steps, same bits", flush=True)
    return {"space": space, "rounds": num_kills, "steps": steps, "result": "same bits"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", type=int, default=2)
    parser.add_argument("--steps", type=int, default=150, help="for each round; fewer where the machine is slow")
    parser.add_argument("--output", type=Path, help="rows, written after each space")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the last bits of a forward pass depend on the number of threads
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    generator, each = random.Random(arguments.seed), -(-arguments.rounds // len(SPACES))
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as name, load(arguments.load, Path(name)):
        apart(make_model, Path(name) / "model")
        rows = "".join(json.dumps(row) + "\n" for row in SENTIMENT_ROWS)
        (Path(name) / "rows.jsonl").write_text(rows)
        for space, options in SPACES.items():
            folder = Path(name) / space.replace(", ", "-").replace(" ", "-")
            folder.mkdir()
            found.append(check(space, options, folder, each, arguments.steps * each, generator))
            if arguments.output:
                apart(write, arguments.output, found, {"seed": arguments.seed, "load": arguments.load})
    print(f"{sum(int(str(row['rounds'])) for row in found)} rounds, no difference")


def apart(function: Callable[..., None], *arguments: object) -> None:
    """In a child: threads that have run in this process, or were counted, break PyTorch in those that it forks."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def write(path: Path, found: list[Row], facts: Row) -> None:
    facts |= provenance()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*found[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in found)


if __name__ == "__main__":
    main()
