"""Is the torch engine on a GPU the one on the CPU? Checks and prints PASS or FAIL; no model hub, no files.

    python benchmarks/gpu_check.py [--output FILE.csv]

z, probes in scratch and updates must be bit-equal to the CPU's. Losses of a random BERT differ by the order of float32
sums; a short run on the GPU must replay to the same bits from its journal.
"""

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

import torch
from provenance import provenance
from transformers import BertConfig, BertForSequenceClassification

from mezo import philox
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.space import ParameterSpace
from mezo.estimator import Probe, Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence, batch_loss

STREAM = philox.stream_id("direction", "weight")


class NoTokenizer:
    pad_token_id = 0


def words_equal() -> bool:
    blocks = torch.tensor([0, 1, 77, (1 << 33) + 5, (1 << 61) + 3])
    return torch.equal(philox.philox_words(2**64 - 3, STREAM, blocks.cuda()).cpu(),
                       philox.philox_words(2**64 - 3, STREAM, blocks))  # fmt: skip


def normals_equal() -> bool:
    starts = torch.tensor([0, 3, 1021, (1 << 34) + 1])
    for width in (1, 255, 1024, 300_001):
        expected = philox.reference_normals(9, STREAM, starts, width)
        for function in (philox.normals, philox.reference_normals):
            if not torch.equal(function(9, STREAM, starts.cuda(), width).cpu(), expected):
                return False
    return True


def probes_equal(dtype: torch.dtype) -> bool:
    base = torch.linspace(-0.05, 0.05, 123_457).to(dtype)
    return torch.equal(
        philox.add_normals(base.cuda(), 1e-3, 5, STREAM, 7).cpu(), philox.add_normals(base, 1e-3, 5, STREAM, 7)
    )


def both_signs_equal(dtype: torch.dtype) -> bool:
    base = torch.linspace(-0.05, 0.05, 123_457).to(dtype)
    on_gpu = philox.add_normals_both(base.cuda(), 1e-3, 5, STREAM, 7)
    on_cpu = philox.add_normals_both(base, 1e-3, 5, STREAM, 7)
    return all(torch.equal(a.cpu(), b.to(dtype)) for a, b in zip(on_gpu, on_cpu, strict=True))


def updates_equal(dtype: torch.dtype) -> bool:
    start = torch.linspace(-0.05, 0.05, 300 * 411).view(300, 411).to(dtype)
    spaces = [ParameterSpace({"w": start.clone().to(device)}) for device in ("cuda", "cpu")]
    for step in range(20):
        record = Record(step, philox.derive_seed(1, step), 0.0, 0.0, 0.7, 1e-5, 1, 1)
        for space in spaces:
            space.update([record], weight_decay=0.1)
    return torch.equal(spaces[0].parameters["w"].cpu(), spaces[1].parameters["w"])


def segments_equal() -> bool:
    """A LoRA adapter of 128 matrices in one launch: perturbed copies, and updates with weight decay."""
    shapes = [(8, 4096), (4096, 8), (8, 4096), (1024, 8)] * 32
    start = {f"p{i}": torch.linspace(-0.1, 0.1, a * b).view(a, b) for i, (a, b) in enumerate(shapes)}
    spaces = [ParameterSpace({k: t.clone().to(device) for k, t in start.items()}) for device in ("cuda", "cpu")]
    copies = []
    for space in spaces:
        outs = [torch.empty_like(t) for t in space.parameters.values()]
        philox.Segments(list(space.parameters.values()), outs, space.streams()).add_normals(
            [1e-3] * len(outs), 2**63 + 9
        )
        copies.append(torch.cat([t.flatten().cpu() for t in outs]))
        for step in range(3):
            record = Record(step, philox.derive_seed(1, step), 0.0, 0.0, 0.7, 1e-2, 1, 1)
            space.update([record], weight_decay=0.1 * step)
    same = all(torch.equal(t.cpu(), spaces[1].parameters[k]) for k, t in spaces[0].parameters.items())
    return same and torch.equal(*copies)


def engine_on(device: str, dtype: torch.dtype = torch.float32, low_rank: tuple[int, int] | None = None) -> TorchEngine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, num_labels=3
        )
        model = BertForSequenceClassification(config)
    return TorchEngine(model.eval().to(device, dtype), NoTokenizer(), low_rank=low_rank)


def examples() -> list[Example]:
    lengths = [5 + 3 * i for i in range(16)]
    ids = [torch.randint(1, 30_000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    targets = tuple(Target(0, k, k) for k in range(3))
    return [Example((TokenSequence(tuple(row), targets),), label=i % 3) for i, row in enumerate(ids)]


def losses_close(low_rank: tuple[int, int] | None = None) -> bool:
    probes = [Probe(3, 1e-3), Probe(3, -1e-3)]
    on_gpu, on_cpu = (engine_on(device, low_rank=low_rank).losses(examples(), probes) for device in ("cuda", "cpu"))
    # Sums of up to 512 float32 products in another order, three layers: relative 1e-5 on losses around 1.
    return bool((on_gpu - on_cpu).abs().max() < 1e-5)


def weights_untouched(dtype: torch.dtype) -> bool:
    engine = engine_on("cuda", dtype)
    before = engine.digest()
    engine.losses(examples(), TwoPoint(0, 1e-3).probes(0) * 3)
    return engine.digest() == before


def replays(dtype: torch.dtype, low_rank: tuple[int, int] | None = None) -> bool:
    engine, estimator, records = engine_on("cuda", dtype, low_rank), TwoPoint(0, 1e-3), []
    for step in range(20):
        probes = estimator.probes(step)
        losses = [batch_loss(examples(), losses_N) for losses_N in engine.losses(examples(), probes)]
        records.append(Record(step, *estimator.outcomes(probes, losses)[0], 1e-4, 1, 16))
        engine.update(records[-1:])
    for device in ("cuda", "cpu"):
        fresh = engine_on(device, dtype, low_rank)
        for record in records:
            fresh.update([record])
        if fresh.digest() != engine.digest():
            return False
    return True


def bandwidth() -> float:
    """GB/s read and written by one pass of base + scale·z over 2 GiB of float32, median of 10."""
    base = torch.zeros(1 << 29, device="cuda")
    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        philox.add_normals(base, 1e-3, 5, STREAM, 0, out_N=base)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * base.numel() * 4 / sorted(times)[6] / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(Path(tempfile.gettempdir()) / "gpu_check.csv"))
    path = Path(parser.parse_args().output)
    low = (torch.float32, torch.bfloat16, torch.float16)
    results: dict[str, object] = {"words equal": words_equal(), "normals equal": normals_equal()}
    for dtype in low:
        results[f"probes equal, {dtype}"] = probes_equal(dtype)
        results[f"both signs from one draw equal, {dtype}"] = both_signs_equal(dtype)
        results[f"updates equal, {dtype}"] = updates_equal(dtype)
        results[f"weights untouched, {dtype}"] = weights_untouched(dtype)
        results[f"replay equal on GPU and CPU, {dtype}"] = replays(dtype)
        results[f"low rank: replay equal on GPU and CPU, {dtype}"] = replays(dtype, (2, 6))
    results["128 tensors in one launch equal"] = segments_equal()
    results["losses within 1e-5"] = losses_close()
    results["low rank: losses within 1e-5"] = losses_close((2, 6))
    results["base + scale z, GB/s"] = f"{bandwidth():.0f}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["check", "result", *provenance()])
        for name, result in results.items():
            shown = {True: "PASS", False: "FAIL"}.get(result, result) if isinstance(result, bool) else result
            writer.writerow([name, shown, *provenance().values()])
            print(f"{name:60} {shown}")
    return int(False in results.values())


if __name__ == "__main__":
    sys.exit(main())
