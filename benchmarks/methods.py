"""Accuracy against forward passes and seconds, for plain MeZO and the methods that want to beat it.

    python benchmarks/methods.py --models FOLDER --data FOLDER --output FILE.csv
        [--parts time methods published long twins] [--tasks minilm-mlm/sst2 …] [--methods mezo …] [--seeds 0 1 2]
        [--jobs 1] [--gpus 1] [--minutes 60] [--plan]

methods: 1,000 training rows, of which a fifth is held out. Every method tries four learning rates, half a decade apart,
for `--forwards` passes with the first seed ("a third": a third of them), and up to two more while the best is the
largest or the smallest; the one that ends with the lowest held-out loss (of first-order methods: the highest held-out
accuracy) runs with the other seeds too. A run of forward passes that gets worse than the untrained model ends there.
The official validation rows (1,000 at most) are only reported. A backward pass counts as two forward passes. published:
plain MeZO at the rates of the models' README, on all 1,000 rows. long: 100,000 steps of plain MeZO, in segments that go
on from the run's journal in `--work`; a bfloat16 model's LoRA takes half the time of all parameters in float32, and
those in bfloat16 lose themselves in rounding.
twins: other types and engines at another method's rate.

time: what a step takes, `--time_steps` of them one method after the other, before anything else; give it a GPU of its
own. Then `--jobs` runs share the device; NVIDIA's Multi-Process Service lets their kernels run beside one another
(`nvidia-cuda-mps-control -d` before). Rows of FILE.csv are appended when a run ends, and runs that it holds already
are left out, so that an interrupted measurement goes on with the same command. No run begins that would not end within
`--minutes`. `--plan` only says what is left to run and about how long it takes. methods_report.py makes tables and
plots of the rows.
"""

import argparse
import contextlib
import functools
import gzip
import json
import logging
import math
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import plain_rows  # noqa: F401  before mezo: stands in for a package that may be missing
import torch
from methods_schedule import Rows, Schedule, estimate, plan, read, steps_of
from methods_settings import (
    FIRST_ORDER,
    LONG_EVERY,
    LONG_SEGMENT,
    LONG_STEPS,
    METHODS,
    PARTS,
    PUBLISHED_EVERY,
    PUBLISHED_STEPS,
    TASKS,
    TWINS,
    Job,
    forwards_per_step,
    options_of,
)
from provenance import provenance
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.data import permutation
from mezo.errors import NonFiniteLossError
from mezo.estimator import UNPERTURBED
from mezo.evaluation import evaluate
from mezo.objective import Example, batch_loss, example_losses


class Curve(TrainerCallback):
    """Evaluates on held-out and reported rows every so many steps; the time that this takes does not count.

    What a step takes is the median of the second half of the steps; where directions are held for a window, with its
    share of what the last one's end took longer. A mean would hold the captures of graphs, too.
    """

    def __init__(self, every: int, forwards: int, window: int = 1, worst: float = 0.1):
        self.every, self.forwards, self.window, self.worst = every, forwards, window, worst
        self.points: Rows = []
        self.started, self.times = 0.0, [0.0]

    def begin(self, engine: Any, held_out: list[Example], reported: list[Example], measure: bool) -> None:
        self.engine, self.held_out, self.reported = engine, held_out, reported
        self.first_loss = math.inf
        if measure:
            self.measure(0)
            self.first_loss = self.points[0]["held_out_loss"]

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= not self.step_ended(state.global_step)

    def step_ended(self, step: int) -> bool:
        """Whether to go on."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - self.started)
        if step % self.every:
            return True
        self.measure(step)
        return self.points[-1]["held_out_loss"] < self.first_loss + self.worst

    def measure(self, step: int) -> None:
        held_out, reported = (evaluate(self.engine, rows) for rows in (self.held_out, self.reported))
        seconds = statistics.median(self.times[len(self.times) // 2 :])
        if self.window > 1 and (ends := self.times[self.window :: self.window]):
            seconds += (ends[-1] - seconds) / self.window
        self.points.append(
            {"step": step, "forwards": step * self.forwards, "seconds": round(sum(self.times), 2),
             "milliseconds_per_step": round(1e3 * seconds, 3),
             "held_out_accuracy": round(held_out.accuracy, 4), "held_out_loss": round(held_out.loss, 4),
             "accuracy": round(reported.accuracy, 4), "loss": round(reported.loss, 4)}
        )  # fmt: skip


@functools.cache
def rows_of(task_name: str, data: Path, validation: bool) -> Rows:
    return rows_in(data / TASKS[task_name]["data"][validation])


def rows_in(path: Path) -> Rows:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def drawn(rows: Rows, count: int, seed: int) -> Rows:
    return [rows[i] for i in permutation(len(rows), seed)[:count]]


def split(job: Job, options: argparse.Namespace) -> tuple[Rows, Rows, Rows]:
    """Rows to train on, held out, and reported."""
    rows, reported = (rows_of(job.task, options.data, validation) for validation in (False, True))
    reported = drawn(reported, 1000, 0)
    if job.phase == "published":
        chosen = drawn(rows, options.rows + options.rows // 5, job.seed)
        return chosen[: options.rows], chosen[options.rows :], reported
    chosen = drawn(rows, options.rows, job.seed)
    fifth = len(chosen) // 5
    return chosen[fifth:], chosen[:fifth], reported if job.phase != "time" else reported[:16]


def options_of_task(name: str, models: Path) -> dict[str, Any]:
    """What a config says of a task, in float32."""
    task = TASKS[name]
    named = {option: task[option] for option in ("template", "label_words", "max_length")}
    return {"model_name_or_path": str(models / task["model"]), "dtype": "float32", **named}


def run(job: Job, options: argparse.Namespace) -> Rows:
    """The curve of one run, as rows of the CSV file."""
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    logging.getLogger("mezo").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    began, task, steps = time.perf_counter(), TASKS[job.task], steps_of(job, options)
    train, held_out, reported = split(job, options)
    every = {"time": steps, "published": PUBLISHED_EVERY, "train": max(1, steps // options.points)}
    window = options_of(job.method).get("direction_refresh_steps", 1)
    worst = math.inf if job.method.startswith(FIRST_ORDER) else 0.1
    curve = Curve(min(steps, every.get(job.phase, LONG_EVERY)), forwards_per_step(job.method), window, worst)
    place: Any = tempfile.TemporaryDirectory()
    if job.phase.startswith("long"):
        steps = int(job.phase.split()[1])
        place = contextlib.nullcontext(options.work / f"{job.task}-{job.method}-{job.learning_rate}-{job.seed}")
    with place as folder:
        config = MeZOConfig.from_dict(
            {
                **options_of_task(job.task, options.models),
                "per_device_train_batch_size": task["batch"], "per_device_eval_batch_size": 256,
                "learning_rate": job.learning_rate, "seed": job.seed, "data_seed": job.seed, "output_dir": str(folder),
                "max_steps": steps, "logging_steps": 10**6, "save_steps": options.segment_steps,
                "resume_from_checkpoint": True, "save_total_limit": 1, "disable_tqdm": True, **options_of(job.method),
            }
        )  # fmt: skip
        trainer = build_trainer(config, train, held_out + reported, [curve])
        examples, trainer.eval_examples = trainer.eval_examples or [], None
        from_start = not job.phase.startswith("long") or steps == options.segment_steps
        curve.begin(trainer.engine, examples[: len(held_out)], examples[len(held_out) :], from_start)
        try:
            if job.method.startswith(FIRST_ORDER):
                whole = fine_tune(curve, trainer.engine, trainer.train_examples, job, steps)
            else:
                trainer.train()
                whole = trainer.state.global_step == steps
        except NonFiniteLossError:
            whole = False
        finally:
            trainer.engine.close()
    facts = {**job._asdict(), "budget": options.forwards}
    ended = {"end": "" if whole else "diverged", "wall_seconds": round(time.perf_counter() - began, 2)}
    return [{**facts, **point, **ended, **provenance()} for point in curve.points]


def fine_tune(curve: Curve, engine: Any, examples: list[Example], job: Job, steps: int) -> bool:
    """AdamW; the loss is the engine's, with its gradient. Whether it held."""
    expected = batch_loss(examples[:4], engine.losses(examples[:4], [UNPERTURBED])[0])
    assert abs(differentiable_loss(engine, examples[:4]).item() - expected) < 1e-4
    curve.started = time.perf_counter()
    for step, loss in enumerate(adamw_steps(engine, examples, job.learning_rate, job.seed, steps)):
        if not math.isfinite(loss) or not curve.step_ended(step + 1):
            return False
        curve.started = time.perf_counter()
    return True


def adamw_steps(engine: Any, examples: list[Example], learning_rate: float, seed: int, steps: int) -> Iterator[float]:
    """The loss of each step of AdamW in batches of 16, the rate falling to 0; one that is not finite is the last."""
    order: list[int] = []
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    for step in range(steps):
        if len(order) < 16:
            order = permutation(len(examples), 1000 * seed + step)
        batch = [examples[order.pop()] for _ in range(min(16, len(order)))]
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        loss = differentiable_loss(engine, batch)
        if not math.isfinite(loss.item()):
            yield loss.item()
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        engine._changed()
        yield loss.item()


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


def begin(parent: int, gpus: int, started: Any) -> None:
    """In a new process: takes one GPU of several, and ends soon after its parent, which a time limit kills alone."""
    if gpus > 1:
        with started.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = str(started.value % gpus)
            started.value += 1

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def measure(options: argparse.Namespace) -> None:
    """Runs everything that is wanted and ends in time."""
    schedule, until = Schedule(options), time.monotonic() + 60 * options.minutes
    running: dict[Future[Rows], Job] = {}
    context = multiprocessing.get_context("spawn")
    beginning = (os.getpid(), options.gpus, context.Value("i", 0))
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=begin, initargs=beginning) as pool:

        def fill(jobs: list[Job], places: int) -> None:
            seconds = estimate(schedule)
            for job in jobs:
                if len(running) < places and job not in schedule.under_way and time.monotonic() + seconds(job) < until:
                    schedule.under_way.add(job)
                    running[pool.submit(run, job, options)] = job

        def finish_one() -> None:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if future.exception() is not None:
                    print(f"{job}: {future.exception()!r}", flush=True)
                schedule.ended(job, [] if future.exception() is not None else tell(future.result()))

        for job in schedule.untimed():
            fill([job], 1)
            while running:
                finish_one()
        while True:
            fill(list(schedule.todo()), options.jobs)
            if not running:
                break
            finish_one()


def tell(rows: Rows) -> Rows:
    """Says how a run ended."""
    last = rows[-1]
    print(f"{last['phase']:9} {last['task']:18} {last['method']:26} {last['learning_rate']:8.1e} seed {last['seed']} "
          f"{last['forwards']:6} forwards {last['milliseconds_per_step']:7.1f} ms a step {last['wall_seconds']:6.1f} s "
          f"accuracy {last['accuracy']:.4f} loss {last['held_out_loss']:.4f} {last['end']}", flush=True)  # fmt: skip
    return rows


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--models", type=Path, required=True)
    found.add_argument("--data", type=Path, required=True)
    found.add_argument("--output", type=Path, required=True)
    found.add_argument("--work", type=Path, default=Path("methods-long"), help="folder of the long run")
    found.add_argument("--parts", nargs="+", choices=PARTS, default=["time", "methods"])
    found.add_argument("--tasks", nargs="+", choices=TASKS, default=["minilm-mlm/sst2", "reviews-llama/sst2"])
    found.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    found.add_argument("--twins", nargs="+", choices=TWINS, default=[])
    found.add_argument("--rows", type=int, default=1000)
    found.add_argument("--forwards", type=int, default=4000)
    found.add_argument("--points", type=int, default=20, help="evaluations of a run")
    found.add_argument("--time_steps", type=int, default=160)
    found.add_argument("--published_steps", type=int, default=PUBLISHED_STEPS)
    found.add_argument("--long_steps", type=int, default=LONG_STEPS)
    found.add_argument("--segment_steps", type=int, default=LONG_SEGMENT)
    found.add_argument("--long_method", choices=["mezo", "mezo, bf16", "mezo lora, bf16"], default="mezo lora, bf16")
    found.add_argument("--long_rate", type=float, default=3e-4)
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--jobs", type=int, default=1, help="runs side by side")
    found.add_argument("--gpus", type=int, default=1, help="GPUs that they are spread over")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--minutes", type=float, default=math.inf)
    found.add_argument("--plan", action="store_true")
    return found


def main() -> None:
    options = parser().parse_args()
    budgets = {row["budget"] for row in read(options.output)} - {str(options.forwards)}
    if budgets:
        raise SystemExit(f"{options.output} holds runs of {', '.join(sorted(budgets))} forwards; name another file")
    plan(options) if options.plan else measure(options)


if __name__ == "__main__":
    main()
