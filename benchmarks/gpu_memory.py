"""Memory of training on a GPU: over rows of mixed lengths from the first step on, and under `max_memory_gb`.

    python benchmarks/gpu_memory.py [--methods "low rank" …] [--mixed opt-13b] [--limited opt-1.3b] [--output FILE.csv]

Mixed: four batches of 16 rows of 40 to 400 tokens, each three times, so that passes are captured on the way, then an
evaluation and a window's end; the most that was reserved by each of them, captured passes included, against two plain
passes over the same batches while nothing but the weights is there.

Limited: 32 rows of 256 tokens in float32, with half of what training takes beside the weights; losses of steps that go
on from one another, and the memory that was reserved, against a run without a limit. Prints PASS or FAIL. Random
weights of real shapes; nothing is read from a hub.
"""

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_step import METHODS, SHAPES, make_folder
from provenance import provenance, write

from mezo.api import limit_memory
from mezo.bench import BenchOptions, make_bench_engine, make_examples, mezo_step, two_forwards, window_ends
from mezo.engines.torch.engine import TorchEngine
from mezo.estimator import Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence, batch_loss

BATCHES, ROWS, TOKENS, TIMES = 4, 16, (40, 400), 3
MOST = 1.04  # times plain inference
LIMITED_ROWS, LIMITED_TOKENS, STEPS, RATE = 32, 256, 3, 1e-6


def mixed_batches(vocab_size: int) -> list[list[Example]]:
    """Random rows, whose last tokens are the answers; each batch has one of the most tokens."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        lengths = torch.randint(TOKENS[0], TOKENS[1] + 1, (ROWS,), generator=generator).tolist()
        rows = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (*lengths[1:], TOKENS[1])]
        batches.append([Example((TokenSequence(tuple(r), (Target(len(r) - 2, r[-1], 0),)),)) for r in rows])
    return batches


def plain(options: BenchOptions) -> float:
    """Memory of plain inference, in GiB."""
    engine = make_bench_engine(options)
    bare = TorchEngine(engine._transformer, engine.tokenizer)
    start()
    for batch in mixed_batches(engine.model.config.vocab_size):
        two_forwards(engine, bare, batch)
    return torch.cuda.max_memory_reserved() / 2**30


def mixed(options: BenchOptions, plain_gib: float) -> dict[str, Any]:
    """Memory of training."""
    engine = make_bench_engine(options)
    batches = mixed_batches(engine.model.config.vocab_size)
    start()
    with engine.deferring():
        for step, batch in enumerate(batches * TIMES):
            mezo_step(engine, batch, step)
        captured = sum(kept.graph is not None for kept in engine._graphs._kept.values()) if engine._graphs else 0
        captured_gib = engine.graph_bytes / 2**30
        steps_gib = torch.cuda.max_memory_reserved() / 2**30
        engine.score([example for batch in batches for example in batch])
        evaluated_gib = torch.cuda.max_memory_reserved() / 2**30
    if engine._low_rank is not None:
        window_ends(engine, 1)
    peak = torch.cuda.max_memory_reserved() / 2**30
    return {
        "rows": ROWS, "tokens": "{} to {}".format(*TOKENS), "plain_gib": plain_gib, "peak_gib": peak,
        "ratio": peak / plain_gib, "steps_gib": steps_gib, "evaluated_gib": evaluated_gib, "captured": captured,
        "captured_gib": captured_gib, "passed": peak <= MOST * plain_gib,
    }  # fmt: skip


def trained(options: BenchOptions, gigabytes: float | None) -> tuple[torch.Tensor, int, int, bool]:
    """Losses [steps, 2, N] of some steps, each from the weights that the one before left, bytes of the weights and at
    most reserved, and whether passes were cut."""
    torch.manual_seed(0)
    engine = make_bench_engine(options)
    examples, estimator = make_examples(options, engine), TwoPoint(0, 1e-3)
    weights = torch.cuda.memory_allocated()
    start()
    if gigabytes is not None:
        limit_memory(gigabytes, engine.model.device)
    losses = []
    for step in range(STEPS):
        probes = estimator.probes(step)
        losses.append(engine.losses(examples, probes).cpu())
        (outcome,) = estimator.outcomes(probes, [batch_loss(examples, losses_N) for losses_N in losses[-1]])
        engine.update([Record(step, *outcome, RATE, 1, len(examples))])
    cut = engine._most_tokens < float("inf")
    return torch.stack(losses), weights, torch.cuda.max_memory_reserved(), cut


def limited(options: BenchOptions) -> dict[str, Any]:
    """How far losses under a limit are from those without, and whether memory kept to it."""
    expected, weights, unlimited, _ = trained(options, None)
    start()
    limit = (weights + (unlimited - weights) / 2) / 1e9
    try:
        losses, _, reserved, cut = trained(options, limit)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    apart, signs = float((losses - expected).abs().max()), float((expected[:, 0] - expected[:, 1]).abs().max())
    passed = cut and apart < signs / 100 and reserved <= limit * 1e9
    return {
        "rows": options.rows, "tokens": options.tokens, "weights_gb": weights / 1e9, "unlimited_gb": unlimited / 1e9,
        "limit_gb": limit, "reserved_gb": reserved / 1e9, "passes_cut": cut, "losses_apart": apart,
        "signs_apart": signs, "passed": passed,
    }  # fmt: skip


def start() -> None:
    """Frees what nothing holds, and measures from now on."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["low rank", "LoRA", "dense"])
    parser.add_argument("--mixed", choices=SHAPES, default="opt-13b")
    parser.add_argument("--limited", choices=SHAPES, default="opt-1.3b")
    parser.add_argument("--output", type=Path)
    parsed = parser.parse_args()
    columns = ("plain_gib", "peak_gib", "ratio", "steps_gib", "evaluated_gib", "captured", "captured_gib",
               "weights_gb", "unlimited_gb", "limit_gb", "reserved_gb", "passes_cut", "losses_apart", "signs_apart",
               "passed")  # fmt: skip
    rows: list[dict[str, Any]] = []

    def note(check: str, shape: str, method: str, found: dict[str, Any]) -> None:
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}
        print(f"{'PASS' if found['passed'] else 'FAIL'}  {check}, {shape}, {method}: "
              + ", ".join(f"{k} {v}" for k, v in shown.items() if k != "passed"), flush=True)  # fmt: skip
        rows.append({"check": check, "model": shape, "method": method, "rows": shown["rows"],
                     "tokens": shown["tokens"], **{c: shown.get(c, "") for c in columns}, **provenance()})  # fmt: skip
        if parsed.output:
            write(parsed.output, rows)

    with tempfile.TemporaryDirectory() as parent:
        folders = {shape: make_folder(shape, parent) for shape in {parsed.mixed, parsed.limited}}
        of_mixed = {"model_name_or_path": folders[parsed.mixed], "dtype": "bfloat16"}
        plain_gib = plain(BenchOptions(random_weights=True, **of_mixed))
        for method in parsed.methods:
            start()
            options = BenchOptions(random_weights=True, **of_mixed, **METHODS[method])
            note("mixed", parsed.mixed, method, mixed(options, plain_gib))
        for method in parsed.methods:
            start()
            options = BenchOptions(
                model_name_or_path=folders[parsed.limited], random_weights=True, dtype="float32", rows=LIMITED_ROWS,
                tokens=LIMITED_TOKENS, **METHODS[method],
            )  # fmt: skip
            note("limited", parsed.limited, method, limited(options))
    return int(any(not row["passed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
