"""A long run of a tiny model on the CPU: memory, open files and the time of a step, window by window.

    python benchmarks/soak.py [--steps 20000] [--window 1000] [--output FILE.csv]

Logging, evaluation and checkpoints are on, LoRA is trained with Adam, so that everything that could grow is there:
caches of prompts, logs, optimizer state, files. Resident memory is read from /proc after a collection of garbage. Ends
with status 1 if, after the first fifth of the run, memory grew by more than --max_growth percent, a file stayed open,
or a step got slower by more than --max_slower percent: the last fifth against the second.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from provenance import provenance, write
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mezo import api
from mezo.config import MeZOConfig
from tests.conftest import _MODELS, SENTIMENT_ROWS, make_tokenizer


class Watch(TrainerCallback):
    """A row of figures at the end of each window of steps."""

    def __init__(self, window: int):
        self.window, self.rows = window, list[dict[str, float]]()
        self._times: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, _, state, *__: object, **___: object) -> None:
        self._times.append(time.perf_counter() - self._started)
        if state.global_step % self.window:
            return
        gc.collect()
        low, *_middle, high = statistics.quantiles(self._times, n=5)
        self.rows.append({
            "step": state.global_step, "rss_mib": round(resident(), 1), "open_files": len(os.listdir("/proc/self/fd")),
            "step_ms": round(1e3 * statistics.median(self._times), 3), "p20": round(1e3 * low, 3),
            "p80": round(1e3 * high, 3),
        })  # fmt: skip
        print(*(f"{name} {value}" for name, value in self.rows[-1].items()), sep="  ", flush=True)
        self._times = []


def resident() -> float:
    """MiB of this process in memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def train(folder: Path, steps: int, watch: Watch) -> None:
    kind, build = _MODELS["llama"]
    torch.manual_seed(0)
    build().save_pretrained(folder / "model")
    make_tokenizer(kind).save_pretrained(folder / "model")
    options: dict[str, object] = {
        "model_name_or_path": str(folder / "model"), "output_dir": str(folder / "run"), "max_steps": steps,
        "template": "{text} it was", "label_words": {"0": "terrible", "1": "great"}, "validation_size": 0.2,
        "per_device_train_batch_size": 4, "use_peft": True, "optim": "adam", "learning_rate": 1e-4,
        "logging_steps": 10, "eval_steps": 500, "save_steps": 250, "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    api.build_trainer(MeZOConfig.from_dict(options), SENTIMENT_ROWS, callbacks=[watch]).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=1000)
    parser.add_argument("--max_growth", type=float, default=1.0)
    parser.add_argument("--max_slower", type=float, default=5.0)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "soak.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    watch = Watch(arguments.window)
    with tempfile.TemporaryDirectory() as name:
        train(Path(name), arguments.steps, watch)
    write(Path(arguments.output), [{**row, **provenance()} for row in watch.rows])
    growth, files, slower = change(watch.rows)
    print(f"after the first fifth: {growth:+.2f} % memory, {files:+d} open files, {slower:+.1f} % time of a step")
    if growth > arguments.max_growth or files > 0 or slower > arguments.max_slower:
        raise SystemExit(1)


def change(rows: list[dict[str, float]]) -> tuple[float, int, float]:
    """From the first fifth to the end: percent of memory, open files, percent of a step's time."""
    fifth = max(1, len(rows) // 5)
    settled, last = rows[fifth - 1], rows[-1]
    before, after = (
        statistics.median(row["step_ms"] for row in part) for part in (rows[fifth : 2 * fifth], rows[-fifth:])
    )
    growth = 100 * (last["rss_mib"] / settled["rss_mib"] - 1)
    return growth, int(last["open_files"] - settled["open_files"]), 100 * (after / before - 1)


if __name__ == "__main__":
    main()
