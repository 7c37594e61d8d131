"""F1 of generated answers as what is trained, from a decoder that backpropagation has taught to answer some questions.

    python benchmarks/objective_f1.py --model FOLDER --train FILE.jsonl.gz --validation FILE.jsonl.gz --start FOLDER
        --output FILE.csv [--settings "lora, fzoo" …] [--rates 1e-2] [--seeds 0] [--steps 400] [--minutes 60]

SQuAD's rows of at most 120 words. Where `--start` is not there yet, AdamW trains all parameters on the first half of
the training rows and writes the model to it; nothing else is done then. After that each setting goes on from it, or
from whatever model `--start` is, with F1 of the second half's rows as the objective ("loss": their cross-entropy), and
is evaluated on the validation rows, which choose nothing: F1 with its standard error, how much it has gained since the
start with the standard error of that difference over the rows, exact match and cross-entropy. Rows are appended when a
run ends.
"""

import argparse
import dataclasses
import logging
import math
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import plain_rows  # noqa: F401  before mezo: stands in for a package that may be missing
import torch
import yaml
from methods import adamw_steps, rows_in
from methods_schedule import append
from provenance import provenance
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

from mezo.api import build_trainer
from mezo.config import MeZOConfig
from mezo.data import permutation
from mezo.engines.base import Engine
from mezo.evaluation import answered, evaluate
from mezo.metrics import exact_match, f1
from mezo.objective import Example

FILE = Path(__file__).parents[1] / "examples" / "objectives" / "squad-f1.yaml"
TASK = {"task": "squad", "template": "Context: {context}\nQuestion: {question}\nAnswer:", "max_length": 256}
MOST_WORDS = 120
# Of the example's file: evaluation and choice of rows, which this does by itself.
OTHERWISE = ("max_train_samples", "validation_size", "eval_on_start", "eval_steps", "metric_for_best_model")
SPSA = {"estimator": "spsa", "num_queries": 1}
ALL = {"use_peft": False, "epsilon": 1e-3}
# Beside the options of the example's file.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora, fzoo": {},
    "lora, spsa": SPSA,
    "lora, es": {"estimator": "es"},
    "lora, fzoo, loss": {"objective": "loss", "epsilon": 1e-2},
    "all, fzoo": ALL,
    "all, fzoo, epsilon 1e-2": {**ALL, "epsilon": 1e-2},
    "all, spsa": {**ALL, **SPSA},
    "all, es": {**ALL, "estimator": "es"},
    "all, fzoo, loss": {**ALL, "objective": "loss"},
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [row for row in rows_in(path) if len(row["context"].split()) <= MOST_WORDS]


def halves(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """By contexts, so that none is in both."""
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    first = {contexts[i] for i in permutation(len(contexts), 0)[: len(contexts) // 2]}
    return [r for r in rows if r["context"] in first], [r for r in rows if r["context"] not in first]


def make_start(options: argparse.Namespace, rows: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    """All parameters by AdamW on the answers' tokens, the rate falling to 0."""
    config = MeZOConfig.from_dict(
        {**TASK, "model_name_or_path": str(options.model), "dtype": "float32", "max_new_tokens": 16,
         "per_device_eval_batch_size": 256, "output_dir": f"{options.start}-run", "max_steps": 1}
    )  # fmt: skip
    trainer = build_trainer(config, rows, validation)
    engine: Any = trainer.engine
    steps = max(1, options.start_epochs * len(rows) // 16)
    for step, loss in enumerate(adamw_steps(engine, trainer.train_examples, options.start_rate, 0, steps)):
        if step % max(1, steps // 5) == 0 or step + 1 == steps:
            found, _ = mean_and_error(Answers.of(engine, trainer.eval_examples or [], 16).f1)
            print(f"start: step {step + 1} of {steps}, loss {loss:.3f}, F1 of validation rows {found:.4f}")
    whole = options.start.with_name(f"{options.start.name}.part")
    engine.model.save_pretrained(whole)
    engine.tokenizer.save_pretrained(whole)
    whole.rename(options.start)


@dataclasses.dataclass
class Answers:
    """F1 and exact match of each row."""

    f1: list[float]
    exact: list[float]

    @classmethod
    def of(cls, engine: Engine, examples: list[Example], max_new_tokens: int) -> "Answers":
        questions = [e.question for e in examples if e.question is not None]
        pairs = answered(engine, questions, max_new_tokens)
        return cls([f1(*pair) for pair in pairs], [float(exact_match(*pair)) for pair in pairs])


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


class Curve(TrainerCallback):
    """Answers the validation rows every so many steps; the time that this takes does not count."""

    def __init__(self, every: int, max_new_tokens: int, until: float):
        self.every, self.max_new_tokens, self.until = every, max_new_tokens, until
        self.points: list[dict[str, Any]] = []
        self.seconds = 0.0

    def begin(self, engine: Engine, examples: list[Example]) -> None:
        self.engine, self.examples = engine, examples
        self.first: Answers | None = None
        self.measure(0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.started
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(state.global_step)
            control.should_training_stop |= time.monotonic() > self.until

    def measure(self, step: int) -> None:
        answers = Answers.of(self.engine, self.examples, self.max_new_tokens)
        self.first = self.first or answers
        found, error = mean_and_error(answers.f1)
        gain, gain_error = mean_and_error([a - b for a, b in zip(answers.f1, self.first.f1, strict=True)])
        loss = evaluate(self.engine, [dataclasses.replace(e, question=None) for e in self.examples]).loss
        self.points.append(
            {"step": step, "seconds": round(self.seconds, 1), "f1": round(found, 4), "f1_error": round(error, 4),
             "gain": round(gain, 4), "gain_error": round(gain_error, 4),
             "exact_match": round(statistics.fmean(answers.exact), 4), "loss": round(loss, 4),
             "num_rows": len(answers.f1)}
        )  # fmt: skip


def run(setting: str, rate: float, seed: int, options: argparse.Namespace, rows: Any, validation: Any) -> None:
    """One run, appended to the CSV file."""
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        config = MeZOConfig.from_dict(
            {
                **{name: value for name, value in yaml.safe_load(FILE.read_text()).items() if name not in OTHERWISE},
                **TASK, "model_name_or_path": str(options.start), "dtype": "float32", "learning_rate": rate,
                "seed": seed, "data_seed": seed, "max_steps": options.steps, "save_steps": 10**6,
                "per_device_train_batch_size": options.batch, "per_device_eval_batch_size": 9 * options.batch,
                "logging_steps": 10**6, "disable_tqdm": True, "output_dir": f"{folder}/run", **SETTINGS[setting],
            }
        )  # fmt: skip
        curve = Curve(options.every, config.max_new_tokens, until)
        trainer = build_trainer(config, rows, validation, [curve])
        examples, trainer.eval_examples = trainer.eval_examples or [], None
        curve.begin(trainer.engine, examples)
        trainer.train()
    facts = {
        "start": options.start.name, "setting": setting, "objective": config.objective, "estimator": config.estimator,
        "num_queries": config.num_queries, "use_peft": config.use_peft, "epsilon": config.epsilon,
        "learning_rate": rate, "batch": options.batch, "seed": seed, "train_rows": len(rows),
    }  # fmt: skip
    append(options.output, [{**facts, **point, **provenance()} for point in curve.points])
    shown = " ".join(f"{p['f1']:.3f}" for p in curve.points)
    last = curve.points[-1]
    print(f"{setting:24} {rate:8.1e} batch {options.batch:4} seed {seed}: F1 {shown}; gain {last['gain']:+.4f} ± "
          f"{last['gain_error']:.4f}, loss {curve.points[0]['loss']:.3f} to {last['loss']:.3f}, "
          f"{last['seconds'] / max(1, last['step']):.2f} s a step", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--train", "--validation", "--start", "--output"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["lora, fzoo"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--minutes", type=float, default=math.inf, help="a run ends at the first evaluation after them")
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--start_epochs", type=int, default=3)
    parser.add_argument("--start_rate", type=float, default=3e-4)
    parser.add_argument("--max_rows", type=int, default=None, help="of each kind")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    logging.getLogger("mezo").setLevel(logging.ERROR)
    first, second = (half[: options.max_rows] for half in halves(rows_of(options.train)))
    validation = rows_of(options.validation)[: options.max_rows]
    if not options.start.exists():
        make_start(options, first, validation)
        return
    for seed in options.seeds:
        for setting in options.settings:
            for rate in options.rates:
                run(setting, rate, seed, options, second, validation)


if __name__ == "__main__":
    main()
