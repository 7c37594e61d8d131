"""Accuracy against forward passes and seconds, for plain MeZO and the methods that want to beat it.

    python benchmarks/methods.py --models FOLDER --data FOLDER --output FILE.csv
        [--tasks minilm-mlm/sst2 …] [--methods mezo …] [--forwards 4000] [--seeds 0] [--jobs 1] [--final]

Every method gets the same number of forward passes and the same number of learning rates, half a decade apart. 1,000
training rows, of which 200 are held out: they choose the learning rate (`--final` then runs the best one of a finished
FILE.csv for all `--seeds`); the official validation rows are only reported. Rows of FILE.csv are appended when a run
ends, and runs that it holds already are left out, so that an interrupted measurement goes on.
"""

import argparse
import csv
import multiprocessing
import tempfile
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from transformers import TrainerCallback

from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.errors import NonFiniteLossError
from mezo.evaluation import evaluate

SENTIMENT = {"0": "terrible", "1": "great"}
TASKS: dict[str, dict[str, Any]] = {
    "minilm-mlm/sst2": {
        "model": "minilm-mlm", "data": ("SST-2/train.jsonl.gz", "SST-2/validation.jsonl.gz"), "batch": 64,
        "template": "{text} It was [MASK].", "label_words": SENTIMENT, "max_length": 128,
    },
    "reviews-llama/sst2": {
        "model": "reviews-llama", "data": ("SST-2/train.jsonl.gz", "SST-2/validation.jsonl.gz"), "batch": 16,
        "template": "{text}\nSentiment:", "label_words": {"0": "negative", "1": "positive"}, "max_length": 256,
    },
}  # fmt: skip
LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 16.0}
LOW_RANK = {"direction": "low_rank", "direction_rank": 2, "direction_refresh_steps": 50}
# Options, and the largest of the learning rates.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "mezo": ({}, 1e-4),
    "mezo lora": ({**LORA, "epsilon": 1e-2}, 1e-2),
    "mezo prefix": ({"use_peft": True, "peft_type": "prefix_tuning", "epsilon": 1e-1}, 1e-1),
    "mezo, 4 queries": ({"num_queries": 4}, 3e-4),
    "mezo, clipped": ({"clip_quantile": 0.9}, 1e-4),
    "mezo, linear": ({"lr_scheduler_type": "linear"}, 1e-4),
    "lozo": (LOW_RANK, 1e-4),
    "lozo, momentum": ({**LOW_RANK, "optim": "momentum"}, 1e-4),
    "lozo, adam": ({**LOW_RANK, "optim": "adam"}, 3e-3),
    "subspace, adam, 4 queries": (
        {**LOW_RANK, "direction": "subspace", "direction_rank": 16, "optim": "adam", "num_queries": 4},
        3e-3,
    ),
    "fzoo, 8 queries": ({"estimator": "fzoo", "num_queries": 8}, 1e-3),
    "fzoo lora, 8 queries": ({**LORA, "epsilon": 1e-2, "estimator": "fzoo", "num_queries": 8}, 3e-2),
    "1.5-spsa, 16 queries": ({"estimator": "1.5-spsa", "num_queries": 16}, 1e-3),
    "es, 8 queries": ({"estimator": "es", "num_queries": 8}, 3e-3),
    "adam lora, 4 queries": ({**LORA, "epsilon": 1e-2, "optim": "adam", "num_queries": 4}, 1e-2),
}
NUM_RATES = 4


class Curve(TrainerCallback):
    """Evaluates on held-out and reported rows every so many steps; their time does not count."""

    def __init__(self, every: int, reported: list[Any]):
        self.every, self.reported = every, reported
        self.points: list[dict[str, float]] = []
        self.trainer: Any = None
        self.seconds, self.started = 0.0, time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.started
        if state.global_step % self.every == 0:
            self.measure(state.global_step)

    def measure(self, step: int) -> None:
        held_out = evaluate(self.trainer.engine, self.trainer.eval_examples)
        reported = evaluate(self.trainer.engine, self.reported)
        self.points.append(
            {"step": step, "forwards": step * self.trainer._num_probes, "seconds": round(self.seconds, 2),
             "held_out_accuracy": round(held_out.accuracy, 4), "held_out_loss": round(held_out.loss, 4),
             "accuracy": round(reported.accuracy, 4), "loss": round(reported.loss, 4)}
        )  # fmt: skip


def run(job: tuple[str, str, float, int, argparse.Namespace]) -> list[dict[str, Any]]:
    task_name, method, rate, seed, options = job
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    task, (values, _) = TASKS[task_name], METHODS[method]
    train, validation = (str(options.data / name) for name in task["data"])
    with tempfile.TemporaryDirectory() as folder:
        config = MeZOConfig.from_dict(
            {
                "model_name_or_path": str(options.models / task["model"]), "dtype": "float32",
                "template": task["template"], "label_words": task["label_words"], "max_length": task["max_length"],
                "per_device_train_batch_size": task["batch"], "per_device_eval_batch_size": 64, "learning_rate": rate,
                "seed": seed, "data_seed": seed, "output_dir": folder, "max_steps": 1, "logging_steps": 10**6,
                "save_steps": 10**6, "disable_tqdm": True, **values,
            }
        )  # fmt: skip
        from mezo.data import load_rows, permutation

        rows = load_rows(train, None, "train")
        chosen = permutation(len(rows), seed)[:1000]
        reported = build_trainer(config, load_rows(validation, None, "validation")).train_examples
        probes = len(build_trainer(config, rows.select(chosen[:10])).estimator.probes(0))
        steps = options.forwards // probes
        config = MeZOConfig.from_dict({**config.to_dict(), "max_steps": steps})
        curve = Curve(max(1, steps // options.points), reported)
        trainer = build_trainer(config, rows.select(chosen[200:]), rows.select(chosen[:200]), [curve])
        curve.trainer = trainer
        curve.measure(0)
        try:
            trainer.train()
            end = ""
        except NonFiniteLossError:
            end = "diverged"
    facts = {"task": task_name, "method": method, "learning_rate": rate, "seed": seed, "budget": options.forwards}
    return [{**facts, **point, "end": end, **provenance()} for point in curve.points]


def jobs(options: argparse.Namespace) -> list[tuple[str, str, float, int, argparse.Namespace]]:
    found = read(options.output)
    have = {(r["task"], r["method"], float(r["learning_rate"]), int(r["seed"])) for r in found}
    wanted = []
    for task in options.tasks:
        for method in options.methods:
            if options.final:
                rate = best_rate(found, task, method)
                wanted += [(task, method, rate, seed, options) for seed in options.seeds]
            else:
                rates = [float(f"{METHODS[method][1] * 10 ** (-n / 2):.1e}") for n in range(NUM_RATES)]
                wanted += [(task, method, rate, options.seeds[0], options) for rate in rates]
    return [job for job in wanted if job[:4] not in have]


def best_rate(found: list[dict[str, str]], task: str, method: str) -> float:
    """The rate whose last held-out loss is the lowest, of those that did not diverge."""
    last: dict[float, float] = {}
    for row in found:
        if (row["task"], row["method"], row["end"]) == (task, method, ""):
            last[float(row["learning_rate"])] = float(row["held_out_loss"])
    return min(last, key=lambda rate: last[rate])


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--forwards", type=int, default=4000)
    parser.add_argument("--points", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--final", action="store_true")
    options = parser.parse_args()
    todo = jobs(options)
    print(f"{len(todo)} runs")
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
        for rows in pool.imap_unordered(run, todo):
            new = not options.output.exists()
            with options.output.open("a", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                if new:
                    writer.writeheader()
                writer.writerows(rows)
            last = rows[-1]
            print(f"{last['task']:20} {last['method']:22} {last['learning_rate']:8.1e} seed {last['seed']} "
                  f"{last['forwards']:6} forwards {last['seconds']:8.1f} s  accuracy {last['accuracy']:.4f} "
                  f"loss {last['held_out_loss']:.4f} {last['end']}", flush=True)  # fmt: skip
    table(read(options.output))


def table(found: list[dict[str, str]]) -> None:
    """The last accuracy of each method at its best rate, by task."""
    ends: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    last = {(r["task"], r["method"], float(r["learning_rate"]), r["seed"]): r for r in found}
    for (task, method, rate, _), row in last.items():
        ends[task, method, rate].append(float(row["accuracy"]))
    for task, method in dict.fromkeys((r["task"], r["method"]) for r in found):
        with_rate = [r for r in found if (r["task"], r["method"], r["end"]) == (task, method, "")]
        if with_rate:
            rate = best_rate(found, task, method)
            shown = ", ".join(f"{100 * a:.1f}" for a in sorted(ends[task, method, rate]))
            print(f"{task:20} {method:22} {rate:8.1e}  {shown}")


if __name__ == "__main__":
    main()
