"""LoRA on a base model in float32, 8 and 4 bits: accuracy and loss by step, milliseconds a step, size of the weights.

    python benchmarks/quantised.py --model FOLDER --train FILE --validation FILE --output FILE.csv
        [--weights float32 8 4] [--steps 100] [--seeds 0] [--rows 800]

SST-2's rows on a decoder, `{text}` and `Sentiment:`, FZOO with 8 queries at the rate of `method: auto`; what is not
quantised is in float32. Validation rows are only reported. A step's time is the median of the steps.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from methods_settings import TASKS
from provenance import provenance, write
from transformers import TrainerCallback

from mezo.api import build_trainer
from mezo.config import MeZOConfig

TASK = TASKS["reviews-llama/sst2"]
EVALUATIONS = 5
BITS: dict[str, dict[str, Any]] = {"float32": {}, "8": {"load_in_8bit": True}, "4": {"load_in_4bit": True}}


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def run(weights: str, seed: int, options: argparse.Namespace, folder: str) -> list[dict[str, Any]]:
    """Rows of the CSV file, one an evaluation."""
    config = MeZOConfig.from_dict(
        {
            "model_name_or_path": options.model, "dtype": "float32", "use_peft": True, "method": "auto", "seed": seed,
            "dataset_name": options.train, "eval_dataset_name": options.validation, "max_train_samples": options.rows,
            **{name: TASK[name] for name in ("template", "label_words", "max_length")}, "max_steps": options.steps,
            "per_device_train_batch_size": TASK["batch"], "per_device_eval_batch_size": 64,
            "eval_steps": max(1, options.steps // EVALUATIONS), "eval_on_start": True, "save_steps": 10**6,
            "disable_tqdm": True, "output_dir": folder, **BITS[weights],
        }
    )  # fmt: skip
    clock = Clock()
    trainer = build_trainer(config, callbacks=[clock])
    model = trainer.engine.model
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.quant_state.absmax for p in model.parameters() if hasattr(p, "quant_state")]
    tensors += [p.SCB for p in model.parameters() if getattr(p, "SCB", None) is not None]
    size = sum(t.numel() * t.element_size() for t in tensors) / 2**20
    trainer.train()
    milliseconds = 1e3 * statistics.median(clock.seconds)
    return [
        {"weights": weights, "seed": seed, "step": e["step"], "accuracy": round(e["eval_accuracy"], 4),
         "loss": round(e["eval_loss"], 4), "milliseconds_per_step": round(milliseconds), "megabytes": round(size, 1),
         "model": Path(options.model).name, "learning_rate": config.learning_rate, **provenance()}
        for e in trainer.state.log_history if "eval_loss" in e
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--train", "--validation"):
        parser.add_argument(name, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--weights", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", type=int, default=800)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for weights in options.weights:
            with tempfile.TemporaryDirectory() as parent:
                torch.manual_seed(seed)
                rows += run(weights, seed, options, f"{parent}/run")
            print(
                *(f"{r['weights']:>8} {r['step']:4} {r['accuracy']:.4f} {r['loss']:.4f}" for r in rows[-6:]), sep="\n"
            )
            write(options.output, rows)


if __name__ == "__main__":
    main()
