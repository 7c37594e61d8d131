"""Where a step's time goes: kernels of two plain forward passes and of a step of mezo, by kind, side by side.

    python benchmarks/gpu_profile.py [--shape opt-13b] [--methods "low rank" …] [--sizes 16x400 …] [--output FILE.csv]

Milliseconds a step by PyTorch's profiler, which counts the time that kernels run, and beside them the gaps between. On
a CPU they are PyTorch's functions, by their own time.
"""

import argparse
import gc
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_step import METHODS, SHAPES, make_folder
from provenance import provenance, write
from torch.profiler import ProfilerActivity, profile

from mezo.bench import BenchOptions, make_bench_engine, make_examples, mezo_step, two_forwards
from mezo.engines.torch.engine import TorchEngine

KINDS = {
    "low-rank sums": "low_rank_sum",
    "probes and updates": "perturb|update_many|add_normals",
    "attention": "sdpa|flash|fmha|attention|softmax",
    "x V": r"_8x\d+_|splitK",
    "products": "nvjet|gemm|cutlass|mm$|linear",
    "norms": "layer_norm|rms_norm|LayerNorm",
    "copies": "Mem(cpy|set)|copy|fill|Fill|zero_",
}
WARM_UP, STEPS = 6, 3


def kind_of(kernel: str) -> str:
    """The first kind whose pattern is found in the kernel's name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "other")


def profiled(step: Callable[[int], object]) -> tuple[dict[str, tuple[float, int]], dict[str, tuple[float, int]]]:
    """Milliseconds and launches a step, by kind with the gaps among them, and by kernel."""
    on_gpu = torch.cuda.is_available()
    for n in range(WARM_UP):
        step(n)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as measured:
        for n in range(WARM_UP, WARM_UP + STEPS):
            step(n)
        if on_gpu:
            torch.cuda.synchronize()
    events = [e for e in measured.events() if (e.device_type == torch.autograd.DeviceType.CUDA) == on_gpu]
    by_kind: dict[str, list[float]] = defaultdict(list)
    by_kernel: dict[str, list[float]] = defaultdict(list)
    for event in events:
        elapsed = (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e3
        by_kind[kind_of(event.name)].append(elapsed)
        by_kernel[event.name].append(elapsed)
    last, gap = events[0].time_range.start, 0.0
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        gap, last = gap + max(0.0, start - last), max(last, end)
    by_kind["gaps"] = [gap / 1e3]
    kinds, kernels = ({k: (sum(v) / STEPS, len(v) // STEPS) for k, v in by.items()} for by in (by_kind, by_kernel))
    return kinds, kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="opt-13b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["low rank"])
    parser.add_argument("--sizes", nargs="+", default=["16x400", "4x128"], help="rows x tokens")
    parser.add_argument("--kernels", type=int, default=12, help="of a step, the longest ones, to print")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        folder = make_folder(arguments.shape, parent)
        for method, size in ((m, s) for m in arguments.methods for s in arguments.sizes):
            count, tokens = map(int, size.split("x"))
            options = BenchOptions(
                model_name_or_path=folder, random_weights=True, rows=count, tokens=tokens,
                dtype="bfloat16" if torch.cuda.is_available() else "float32", **METHODS[method],
            )  # fmt: skip
            engine = make_bench_engine(options)
            examples, bare = make_examples(options, engine), TorchEngine(engine._transformer, engine.tokenizer)
            plain, _ = profiled(lambda _, e=engine, b=bare, x=examples: two_forwards(e, b, x))  # type: ignore[misc]
            with engine.deferring():
                ours, kernels = profiled(lambda n, e=engine, x=examples: mezo_step(e, x, n))  # type: ignore[misc]
            print(f"\n{arguments.shape}, {method}, {size}: milliseconds and launches of two plain forwards, of a step")
            for kind in sorted({*plain, *ours}, key=lambda k: -ours.get(k, (0.0, 0))[0]):
                base, step = (found.get(kind, (0.0, 0)) for found in (plain, ours))
                print(f"{kind:20} {base[0]:9.2f} {base[1]:6} {step[0]:9.2f} {step[1]:6} {step[0] - base[0]:+9.2f}")
                for what, (milliseconds, launches) in (("two plain forwards", base), ("a step of mezo", step)):
                    rows.append(
                        {"model": arguments.shape, "method": method, "rows": count, "tokens": tokens, "what": what,
                         "kind": kind, "milliseconds": f"{milliseconds:.4g}", "launches": launches, **provenance()}
                    )  # fmt: skip
            for name, (milliseconds, launches) in sorted(kernels.items(), key=lambda k: -k[1][0])[: arguments.kernels]:
                print(f"    {milliseconds:9.2f} {launches:6} {name[:90]}")
            if arguments.output is not None:
                write(arguments.output, rows)
            del engine, bare
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
