"""Accuracy against forward passes and seconds, for plain MeZO and the methods that want to beat it.

    python benchmarks/methods.py --models FOLDER --data FOLDER --output FILE.csv
        [--tasks minilm-mlm/sst2 …] [--methods mezo …] [--seeds 0 1 2] [--jobs 1] [--minutes 60]

1,000 training rows, of which 200 are held out. Every method tries the same number of learning rates, half a decade
apart, for `--forwards` passes with the first seed; the one that ends with the lowest held-out loss runs with the other
seeds too. A run that gets worse than the untrained model ends there. The official validation rows are only reported. A
backward pass counts as two forward passes. `--jobs` runs share the device; what a step takes is then measured with
nothing beside it, for `--time_steps` steps. Rows of FILE.csv are appended when a run ends, and runs that it holds
already are left out, so that an interrupted measurement goes on.
"""

import argparse
import csv
import functools
import math
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from provenance import provenance
from transformers import TrainerCallback

from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.data import load_rows, permutation
from mezo.errors import NonFiniteLossError
from mezo.estimator import UNPERTURBED
from mezo.evaluation import evaluate
from mezo.objective import Example, batch_loss, example_losses

SENTIMENT = {"0": "terrible", "1": "great"}
QUESTIONS = {"ABBR": "expression", "ENTY": "entity", "DESC": "description", "HUM": "human", "LOC": "location",
             "NUM": "number"}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "minilm-mlm/sst2": {
        "model": "minilm-mlm", "data": ("SST-2/train.jsonl.gz", "SST-2/validation.jsonl.gz"), "batch": 64,
        "template": "{text} It was [MASK].", "label_words": SENTIMENT, "max_length": 128,
    },
    "minilm-mlm/snli": {
        "model": "minilm-mlm", "data": ("SNLI/train_pool_lmbff.jsonl.gz", "SNLI/validation.jsonl.gz"), "batch": 64,
        "template": "{premise} ? [MASK] , {hypothesis}", "max_length": 128,
        "label_words": {"entailment": "yes", "neutral": "maybe", "contradiction": "no"},
    },
    "minilm-mlm/trec": {
        "model": "minilm-mlm", "data": ("TREC/train.jsonl.gz", "TREC/test.jsonl.gz"), "batch": 64,
        "template": "[MASK] : {text}", "label_words": QUESTIONS, "max_length": 128,
    },
    "minilm-mlm/rte": {
        "model": "minilm-mlm", "data": ("RTE/train.jsonl.gz", "RTE/validation.jsonl.gz"), "batch": 64,
        "template": "{premise} ? [MASK] , {hypothesis}", "max_length": 128,
        "label_words": {"entailment": "yes", "not_entailment": "no"},
    },
    "reviews-llama/sst2": {
        "model": "reviews-llama", "data": ("SST-2/train.jsonl.gz", "SST-2/validation.jsonl.gz"), "batch": 16,
        "template": "{text}\nSentiment:", "label_words": {"0": "negative", "1": "positive"}, "max_length": 256,
    },
}  # fmt: skip
LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 16.0}
LOW_RANK = {"direction": "low_rank", "direction_rank": 2, "direction_refresh_steps": 50}
FIRST_ORDER = "first order"
# Options, and the largest of the learning rates. The order is that of the measurement.
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "mezo": ({}, 1e-4),
    FIRST_ORDER: ({}, 1e-4),
    "lozo, adam": ({**LOW_RANK, "optim": "adam"}, 1e-3),
    "fzoo, 8 queries": ({"estimator": "fzoo", "num_queries": 8}, 3e-3),
    "adam lora, 4 queries": ({**LORA, "epsilon": 1e-2, "optim": "adam", "num_queries": 4}, 1e-2),
    "mezo lora": ({**LORA, "epsilon": 1e-2}, 3e-3),
    "subspace, adam, 4 queries": (
        {**LOW_RANK, "direction": "subspace", "direction_rank": 16, "optim": "adam", "num_queries": 4},
        3e-3,
    ),
    "fzoo lora, 8 queries": ({**LORA, "epsilon": 1e-2, "estimator": "fzoo", "num_queries": 8}, 3e-2),
    f"{FIRST_ORDER} lora": (LORA, 1e-2),
    "lozo": (LOW_RANK, 1e-4),
    "lozo, momentum": ({**LOW_RANK, "optim": "momentum"}, 1e-4),
    "mezo, 4 queries": ({"num_queries": 4}, 3e-4),
    "es, 8 queries": ({"estimator": "es", "num_queries": 8}, 3e-3),
    "1.5-spsa, 16 queries": ({"estimator": "1.5-spsa", "num_queries": 16}, 1e-3),
    "mezo, clipped": ({"clip_quantile": 0.9}, 1e-4),
    "mezo, linear": ({"lr_scheduler_type": "linear"}, 1e-4),
    "mezo prefix": ({"use_peft": True, "peft_type": "prefix_tuning", "epsilon": 1e-1}, 1e-1),
}
NUM_RATES = 4


class Job(NamedTuple):
    """One run."""

    task: str
    method: str
    learning_rate: float
    seed: int
    phase: str  # train or time


class Curve(TrainerCallback):
    """Evaluates on held-out and reported rows every so many steps; the time that this takes does not count."""

    def __init__(self, every: int, forwards: int, held_out: list[Example], reported: list[Example]):
        self.every, self.forwards = every, forwards
        self.held_out, self.reported = held_out, reported
        self.points: list[dict[str, float]] = []
        self.engine: Any = None
        self.started, self.times = 0.0, [0.0]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= not self.step_ended(state.global_step)

    def step_ended(self, step: int) -> bool:
        """Whether to go on."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.started)
        if step % self.every == 0:
            self.measure(step)
        return self.points[-1]["held_out_loss"] < self.points[0]["held_out_loss"] + 0.1

    def measure(self, step: int) -> None:
        held_out, reported = (evaluate(self.engine, rows) for rows in (self.held_out, self.reported))
        self.points.append(
            {"step": step, "forwards": step * self.forwards, "seconds": round(sum(self.times), 2),
             "milliseconds_per_step": round(1e3 * statistics.median(self.times[len(self.times) // 2 :]), 3),
             "held_out_accuracy": round(held_out.accuracy, 4), "held_out_loss": round(held_out.loss, 4),
             "accuracy": round(reported.accuracy, 4), "loss": round(reported.loss, 4)}
        )  # fmt: skip


@functools.cache
def rows_of(task_name: str, data: Path, validation: bool) -> Any:
    return load_rows(str(data / TASKS[task_name]["data"][validation]), None, "train")


def run(job: Job, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The curve of one run, as rows of the CSV file."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    task, (values, _) = TASKS[job.task], METHODS[job.method]
    rows = rows_of(job.task, options.data, False)
    chosen = permutation(len(rows), job.seed)[: options.rows]
    train, held_out = rows.select(chosen[options.rows // 5 :]), rows.select(chosen[: options.rows // 5])
    validation = rows_of(job.task, options.data, True)
    validation = validation.select(range(min(len(validation), 10 * options.rows)))
    with tempfile.TemporaryDirectory() as folder:
        config = MeZOConfig.from_dict(
            {
                "model_name_or_path": str(options.models / task["model"]), "dtype": "float32",
                "template": task["template"], "label_words": task["label_words"], "max_length": task["max_length"],
                "per_device_train_batch_size": task["batch"], "per_device_eval_batch_size": 256,
                "learning_rate": job.learning_rate, "seed": job.seed, "data_seed": job.seed, "output_dir": folder,
                "max_steps": 1, "logging_steps": 10**6, "save_steps": 10**6, "disable_tqdm": True, **values,
            }
        )  # fmt: skip
        probe = build_trainer(config, train, held_out)
        reported = build_trainer(config, validation).train_examples
        first_order = job.method.startswith(FIRST_ORDER)
        per_step = 3 if first_order else len(probe.estimator.probes(0))
        steps = 5 * len(train) // 16 if first_order else options.forwards // per_step
        every = max(1, steps // options.points)
        if job.phase == "time":
            every = steps = options.time_steps
        curve = Curve(every, per_step, list(probe.eval_examples or []), reported)
        if first_order:
            curve.engine = probe.engine
            end = fine_tune(curve, probe.train_examples, job, steps)
        else:
            config = MeZOConfig.from_dict({**config.to_dict(), "max_steps": steps})
            trainer = build_trainer(config, train, held_out, [curve])
            curve.engine = trainer.engine
            curve.measure(0)
            try:
                trainer.train()
                end = "" if trainer.state.global_step == steps else "diverged"
            except NonFiniteLossError:
                end = "diverged"
    facts = {**job._asdict(), "budget": options.forwards}
    return [{**facts, **point, "end": end, **provenance()} for point in curve.points]


def fine_tune(curve: Curve, examples: list[Example], job: Job, steps: int) -> str:
    """Five epochs of AdamW in batches of 16, the rate falling to 0; the loss is the engine's, with its gradient."""
    engine, order = curve.engine, []
    parameters = [p.requires_grad_() for p in engine.model.parameters() if p.requires_grad]
    expected = batch_loss(examples[:4], engine.losses(examples[:4], [UNPERTURBED])[0])
    assert abs(differentiable_loss(engine, examples[:4]).item() - expected) < 1e-4
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0)
    curve.measure(0)
    for step in range(steps):
        curve.started = time.perf_counter()
        if len(order) < 16:
            order = list(permutation(len(examples), 1000 * job.seed + step))
        batch = [examples[order.pop()] for _ in range(16)]
        optimizer.param_groups[0]["lr"] = job.learning_rate * (1 - step / steps)
        loss = differentiable_loss(engine, batch)
        if not math.isfinite(loss.item()):
            return "diverged"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine._changed()
        if not curve.step_ended(step + 1):
            return "diverged"
    return ""


def differentiable_loss(engine: Any, examples: list[Example]) -> torch.Tensor:
    """What `batch_loss` of the engine's losses is, for rows of one sequence each."""
    sequences = [s for e in examples for s in e.sequences]
    longest = max(len(s.input_ids) for s in sequences)
    ids = torch.full((len(sequences), longest), engine.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
        mask[row, : len(sequence.input_ids)] = 1
    model = engine.model
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits.log_softmax(dim=-1)
    targets = [(row, t.position, t.token) for row, s in enumerate(sequences) for t in s.targets]
    row_T, position_T, token_T = torch.tensor(targets).T.to(model.device)
    return example_losses(examples, logits[row_T, position_T, token_T]).mean()


def rates(method: str) -> list[float]:
    """The learning rates that are tried, half a decade apart."""
    return [float(f"{METHODS[method][1] * 10 ** (-n / 2):.1e}") for n in range(NUM_RATES)]


def best_rate(found: list[dict[str, str]], task: str, method: str) -> float | None:
    """The rate whose last held-out loss is the lowest with the first seed, of those that did not diverge."""
    runs = [row for row in found if (row["task"], row["method"], row["phase"]) == (task, method, "train")]
    whole = [row for row in runs if row["seed"] == runs[0]["seed"] and not row["end"]]
    last = {float(row["learning_rate"]): float(row["held_out_loss"]) for row in whole}
    return min(last, key=lambda rate: last[rate]) if last else None


def tuning(task: str, method: str, seed: int) -> list[Job]:
    return [Job(task, method, rate, seed, "train") for rate in rates(method)]


def key(row: dict[str, Any]) -> Job:
    """The run of a row."""
    return Job(row["task"], row["method"], float(row["learning_rate"]), int(row["seed"]), row["phase"])


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


class Schedule:
    """Runs in the order of the methods; the other seeds begin when all rates of a method have ended."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.pairs = [(task, method) for method in options.methods for task in options.tasks]
        self.have = {key(row) for row in read(options.output)}
        self.under_way: set[Job] = set()

    def todo(self) -> Iterator[Job]:
        """What may start now, the most wanted first."""
        found = read(self.options.output)
        for task, method in self.pairs:
            tried = tuning(task, method, self.options.seeds[0])
            jobs = tried
            if self.have.issuperset(tried):
                rate = best_rate(found, task, method)
                jobs = [] if rate is None else [Job(task, method, rate, s, "train") for s in self.options.seeds]
            yield from (job for job in jobs if job not in self.have and job not in self.under_way)

    def untimed(self) -> list[Job]:
        """One run of a few steps for every method that has been run; the rate does not matter."""
        pairs = {(job.task, job.method) for job in self.have if job.phase == "train"}
        timed = {(job.task, job.method) for job in self.have if job.phase == "time"}
        return [Job(*pair, rates(pair[1])[-1], self.options.seeds[0], "time") for pair in sorted(pairs - timed)]

    def ended(self, job: Job) -> None:
        self.under_way.discard(job)
        self.have.add(job)


def measure(options: argparse.Namespace) -> None:
    """Runs everything that is wanted, as far as the time goes."""
    schedule, until = Schedule(options), time.monotonic() + 60 * options.minutes
    running: dict[Future[list[dict[str, Any]]], Job] = {}
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:

        def start(job: Job) -> None:
            schedule.under_way.add(job)
            running[pool.submit(run, job, options)] = job

        def finish_one() -> None:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                schedule.ended(job)
                keep(future, job, options.output)

        while True:
            for job in schedule.todo():
                if len(running) >= options.jobs or time.monotonic() > until:
                    break
                start(job)
            if not running:
                break
            finish_one()
        for job in schedule.untimed():
            start(job)
            finish_one()


def keep(future: Future[list[dict[str, Any]]], job: Job, output: Path) -> None:
    """Appends a run's rows and says how it ended."""
    if future.exception() is not None:
        print(f"{job}: {future.exception()}", flush=True)
        return
    rows = future.result()
    append(output, rows)
    last = rows[-1]
    print(f"{job.phase:5} {job.task:18} {job.method:26} {job.learning_rate:8.1e} seed {job.seed} "
          f"{last['forwards']:6} forwards {last['milliseconds_per_step']:7.1f} ms a step  "
          f"accuracy {last['accuracy']:.4f} loss {last['held_out_loss']:.4f} {last['end']}", flush=True)  # fmt: skip


def reached(curve: list[dict[str, str]], accuracy: float) -> dict[str, str]:
    """The first point of a curve with that accuracy."""
    never = {"step": "inf", "forwards": "inf"}
    return next((row for row in curve if float(row["accuracy"]) >= accuracy), never)


class Finals(NamedTuple):
    """The runs of a method on a task at its best rate."""

    curves: list[list[dict[str, str]]]  # one a seed
    step_seconds: float  # with nothing beside it; nan where this was not measured

    def ends(self) -> list[float]:
        """Last accuracies in percent, ascending."""
        return sorted(100 * float(curve[-1]["accuracy"]) for curve in self.curves)

    def until(self, accuracy: float) -> tuple[float, float]:
        """Forward passes and seconds until that accuracy, each in the median of the seeds."""
        points = [reached(curve, accuracy) for curve in self.curves]
        forwards, steps = (statistics.median(float(p[what]) for p in points) for what in ("forwards", "step"))
        return forwards, steps * self.step_seconds


def finals(found: list[dict[str, str]]) -> dict[str, dict[str, Finals]]:
    """By task and method."""
    curves: dict[Job, list[dict[str, str]]] = defaultdict(list)
    for row in found:
        curves[key(row)].append(row)
    result: dict[str, dict[str, Finals]] = defaultdict(dict)
    for task, method in dict.fromkeys((job.task, job.method) for job in curves):
        same = {job: c for job, c in curves.items() if (job.task, job.method) == (task, method)}
        rate = best_rate(found, task, method)
        best = [c for job, c in same.items() if job.phase == "train" and job.learning_rate == rate]
        timed = [c for job, c in same.items() if job.phase == "time"]
        if best:
            seconds = float(timed[0][-1]["milliseconds_per_step"]) / 1e3 if timed else math.nan
            result[task][method] = Finals(best, seconds)
    return result


def table(found: list[dict[str, str]], show: Callable[[str], None] = print) -> None:
    """The last accuracy of every method, and what it takes to plain MeZO's, in the median of the seeds."""
    for task, methods in finals(found).items():
        goal = statistics.median(methods["mezo"].ends()) / 100 if "mezo" in methods else math.inf
        show(f"\n{task}: plain MeZO ends at {100 * goal:.1f}")
        show(f"{'method':26} {'rate':>8} {'accuracy':>8} {'spread':>13} {'forwards':>9} {'seconds':>8}  edge")
        for method, of in methods.items():
            forwards, seconds = of.until(goal)
            rate, ends = float(of.curves[0][0]["learning_rate"]), of.ends()
            edge = "yes" if rate in (rates(method)[0], rates(method)[-1]) else ""
            show(f"{method:26} {rate:8.1e} {statistics.median(ends):8.1f} {ends[0]:6.1f}-{ends[-1]:<6.1f} "
                 f"{forwards:9.0f} {seconds:8.1f}  {edge}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["minilm-mlm/sst2", "reviews-llama/sst2"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--forwards", type=int, default=4000)
    parser.add_argument("--points", type=int, default=20, help="evaluations of a run")
    parser.add_argument("--time_steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    options = parser.parse_args()
    measure(options)
    table(read(options.output))


if __name__ == "__main__":
    main()
