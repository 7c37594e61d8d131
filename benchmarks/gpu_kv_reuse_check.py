"""Are losses with reuse of keys and values those without it, over whole trajectories? Checks and prints PASS or FAIL.

    python benchmarks/gpu_kv_reuse_check.py torch|sglang [--shape NAME] [--settings TEXT] [--steps 20]
        [--output FILE.csv]

On a GPU in bfloat16 (torch: OPT-1.3B shape; sglang: Llama-1B shape), on a CPU in float32 (tiny ones); random weights.
At each step both signs' losses are computed with reuse and without, of the same rows under the same weights: updates
are made from the losses with reuse and go to both sides, so the two trajectories are one. What is kept from step to
step is kept along all of it. An update goes a fixed length against the sign of projected_grad. A setting passes if

- no row's loss differs by the tolerance or more,
- projected_grad with reuse and without agree: their `concordance` over the steps is at least 0.99,
- a row's loss moves by more than five tolerances, so that keys and values of earlier weights would be seen,
- anything was reused,
- and both sides (on SGLang: the workers and the journal) have the same bits at the end.

Those that begin with "control" reuse what must not be reused, and pass if one of the first two fails. Beside the
difference stands the one between losses without reuse of all rows at once and of the same rows in halves: what another
batch makes of the same numbers.
"""

import argparse
import copy
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_kv_reuse import (
    ALORA,
    DEVICE,
    OPT,
    SETTINGS,
    VOCABULARY,
    NoTokenizer,
    make_examples,
    make_opt,
    make_weights,
    sglang_engine,
    start_sglang,
    with_adapter,
)
from gpu_sglang import SHAPES, make_folder, same_in_workers
from provenance import provenance, write

from mezo.config import MeZOConfig
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.layers import trainable_names
from mezo.engines.torch.reuse import Past, Stage
from mezo.estimator import Probe, Record, TwoPoint
from mezo.objective import Example, batch_loss

# A row's loss is one of 3 tokens, some nats. bfloat16 keeps 8 bits of the hidden states, and rows of another number and
# length take other kernels, which sum in another order; in float32 that order is all. The largest of hundreds of rows.
TOLERANCE = 1e-1 if DEVICE.type == "cuda" else 1e-5
LEAST_CONCORDANCE = 0.99
# ε of an adapter, and of all parameters in units of their size; how many of them an update goes along z.
LORA, DENSE, LENGTH = 1.2e-2, 0.1, 2

Rows = tuple[int, int, int, int, bool]
ACTIVATED, OPTIONS, COMMON = (
    SETTINGS[name]
    for name in (
        "aLoRA, 16 x (397 + 3)",
        "LoRA, 16 x 4 options of 3 to a prompt of 200",
        "LoRA, 1,500 common + 16 x (97 + 3)",
    )
)


class ReuseAcrossSigns(TorchEngine):
    """The naive way: every probe goes on from the prompts of the first."""

    def _extend(self, past: Past | None, stage: Stage, num_probes: int) -> Past:
        extended = super()._extend(past, stage, num_probes)
        rows = torch.arange(len(extended.mask_RS) // num_probes, device=DEVICE)
        extended.cache.batch_select_indices(rows.repeat(num_probes))
        return extended


class ReuseAcrossSteps(TorchEngine):
    """Stale: every step goes on from the prompts of the first."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._kept: dict[tuple[tuple[int, ...], ...], Past] = {}

    def _extend(self, past: Past | None, stage: Stage, num_probes: int) -> Past:
        key = tuple(stage.chunks)
        if key not in self._kept:
            self._kept[key] = super()._extend(past, stage, num_probes)
        return copy.deepcopy(self._kept[key])


@dataclass(frozen=True)
class OnTorch:
    """Rows, as in `SETTINGS`, and the engine that reuses."""

    rows: Rows
    engine: type[TorchEngine] = TorchEngine
    store_device: str | None = None
    stored: float = 2.0  # what the store may hold, in units of what there is to be kept
    dense: bool = False  # all parameters of the upper half of the layers in place of an adapter


TORCH = {
    "aLoRA, prompts beside the model": OnTorch(ACTIVATED),
    "aLoRA, prompts in the CPU's memory": OnTorch(ACTIVATED, store_device="cpu"),
    "aLoRA, memory for half of the prompts": OnTorch(ACTIVATED, stored=0.5),
    "LoRA, options of one prompt": OnTorch(OPTIONS),
    "LoRA, a common beginning": OnTorch(COMMON),
    "all parameters of the upper layers": OnTorch((16, 1, 0, 397, False), dense=True),
    "upper layers, options of one prompt": OnTorch(OPTIONS, dense=True),
    "control: prompts of +ε under −ε": OnTorch(OPTIONS, ReuseAcrossSigns),
    "control: prompts of the first step": OnTorch(OPTIONS, ReuseAcrossSteps),
}
SGLANG = {
    "aLoRA": ACTIVATED,
    "LoRA, options of one prompt": OPTIONS,
    "LoRA, a common beginning": COMMON,
    "control: prompts of the first step": OPTIONS,
}


class Found(NamedTuple):
    """What a trajectory showed."""

    difference: float  # the largest of a row's loss
    in_halves: float  # the same without reuse, of the rows at once and in halves
    concordance: float  # of projected_grad
    moved: float  # the most that a row's loss, mean of both signs, went away from its first
    reused: float  # of the tokens asked
    same_weights: bool  # at the end


def counted(engine: Any, examples: list[Example], probes: Sequence[Probe]) -> tuple[torch.Tensor, float]:
    """The losses, and the tokens that were computed for them."""
    before = engine.work.computed
    losses_PN = engine.losses(examples, probes)
    assert losses_PN.isfinite().all(), "a loss is not a number"
    return losses_PN, engine.work.computed - before


def follow(
    on: Any, off: Any, same: Callable[[], bool], examples: list[Example], estimator: TwoPoint, steps: int
) -> Found:
    """Losses of an engine that reuses and of one that does not, along the updates of the first."""
    length = LENGTH * estimator.epsilon
    first = estimator.probes(steps)[0].seed  # of a direction that no step takes

    def update(record: Record) -> None:
        for engine in (on, off):
            engine.update([record])

    update(Record(0, first, 0.0, 0.0, 1.0, length, 0, len(examples)))  # an adapter that starts at 0 does nothing
    asked = 2 * sum(e.num_tokens for e in examples)
    pairs, differences, in_halves, means, reused = [], [], [], [], []
    half = len(examples) // 2
    for step in range(steps):
        probes = estimator.probes(step)
        on_PN, computed = counted(on, examples, probes)
        off_PN, all_computed = counted(off, examples, probes)
        assert all_computed == asked, "the side without reuse did not compute everything"
        reused.append(1 - computed / asked)
        halves_PN = torch.cat([off.losses(part, probes) for part in (examples[:half], examples[half:])], dim=1)
        differences.append((on_PN - off_PN).abs().max().item())
        in_halves.append((halves_PN - off_PN).abs().max().item())
        means.append(off_PN.mean(dim=0))
        (found,), (whole,) = (
            estimator.outcomes(probes, [batch_loss(examples, losses_N) for losses_N in losses_PN])
            for losses_PN in (on_PN, off_PN)
        )
        pairs.append((found.coefficient, whole.coefficient))
        sign = math.copysign(1.0, found.coefficient)
        update(Record(step, *found._replace(coefficient=sign), length, 0, len(examples)))
    moved = max((mean_N - means[0]).abs().max().item() for mean_N in means)
    return Found(max(differences), max(in_halves), concordance(pairs), moved, statistics.fmean(reused), same())


def concordance(pairs: Sequence[tuple[float, float]]) -> float:
    """1 where both of every pair are equal; a shift and a factor lower it too, unlike a correlation.

    L. Lin, A concordance correlation coefficient to evaluate reproducibility, Biometrics 45 (1989), equation 1.
    """
    ours, theirs = zip(*pairs, strict=True)
    shift = statistics.fmean(ours) - statistics.fmean(theirs)
    most = statistics.pvariance(ours) + statistics.pvariance(theirs) + shift**2
    return 1.0 - statistics.fmean((a - b) ** 2 for a, b in pairs) / most


def passes(name: str, found: Found) -> bool:
    """Whether a setting shows what it should."""
    same = found.difference < TOLERANCE and found.concordance >= LEAST_CONCORDANCE
    as_it_should = not same if name.startswith("control") else same and found.moved > 5 * TOLERANCE
    return as_it_should and found.reused > 0 and found.same_weights


def examples_of(rows: Rows, shape: str, vocabulary: int) -> list[Example]:
    """Rows of different lengths; on the tiny shape fewer and shorter ones."""
    _, options, common, own, activated = rows
    if shape == "tiny":
        return make_examples((6, options, common // 10, max(own // 10, 12), activated), vocabulary, 1)
    return make_examples(rows, vocabulary, 3)


def weight_std(width: int) -> float:
    """With it a layer keeps the size of what goes through it, and losses feel the adapter."""
    return 1 / math.sqrt(width)


def on_torch(shape: str, names: list[str], steps: int) -> Iterator[tuple[str, Found]]:
    for number, name in enumerate(names):
        setting = TORCH[name]
        examples = examples_of(setting.rows, shape, VOCABULARY)
        torch.manual_seed(0)
        model = make_opt(shape, init_std=weight_std(OPT[shape]["hidden_size"]))
        layers, width = model.config.num_hidden_layers, model.config.hidden_size
        if setting.dense:
            for parameter in trainable_names(model, f"last:{layers // 2}"):
                model.get_parameter(parameter).requires_grad_(True)
        else:
            model = with_adapter(model)
        # A hidden state, or keys and values of each layer.
        of_token = (1 if setting.dense else 2 * layers) * width * model.dtype.itemsize
        off = TorchEngine(copy.deepcopy(model), NoTokenizer(), share=False)  # type: ignore[arg-type]
        on = setting.engine(
            model,
            NoTokenizer(),  # type: ignore[arg-type]
            store_bytes=int(setting.stored * of_token * sum(e.num_tokens for e in examples)),
            store_device=torch.device(setting.store_device or DEVICE),
        )
        estimator = TwoPoint(number, DENSE * weight_std(width) if setting.dense else LORA)
        yield name, follow(on, off, lambda a=on, b=off: a.digest() == b.digest(), examples, estimator, steps)


class Whole:
    """An SGLang engine with nothing reused; updates reach it through the engine itself."""

    def __init__(self, engine: Any):
        self._engine, self.work = engine, engine.work

    def losses(self, *arguments: Any) -> torch.Tensor:
        self._engine._share_prefixes = False
        try:
            return self._engine.losses(*arguments)
        finally:
            self._engine._share_prefixes = True

    def update(self, records: Sequence[Record]) -> None:
        pass


class Stale:
    """An SGLang engine whose cache key stays the same at every step."""

    def __init__(self, engine: Any):
        self._engine = engine
        self.work, self.update = engine.work, engine.update

    def losses(self, *arguments: Any) -> torch.Tensor:
        self._engine._version = 0
        return self._engine.losses(*arguments)


def on_sglang(shape: str, names: list[str], steps: int) -> Iterator[tuple[str, Found]]:
    folder = make_folder(shape, initializer_range=weight_std(SHAPES[shape]["hidden_size"]))
    torch.manual_seed(0)
    make_weights(folder)
    config = MeZOConfig(model_name_or_path=folder, engine="sglang", **ALORA)
    client = start_sglang(config, dummy=False)
    try:
        for number, name in enumerate(names):
            engine = sglang_engine(client, config)
            on = Stale(engine) if name.startswith("control") else engine
            same = functools.partial(same_in_workers, engine)
            examples = examples_of(SGLANG[name], shape, SHAPES[shape]["vocab_size"])  # type: ignore[arg-type]
            yield name, follow(on, Whole(engine), same, examples, TwoPoint(number, LORA), steps)
            engine._detach()
    finally:
        client.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["torch", "sglang"])
    parser.add_argument("--shape")
    parser.add_argument("--settings", default="", help="only those whose name holds this")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    run, settings, large = {"torch": (on_torch, TORCH, "opt-1.3b"), "sglang": (on_sglang, SGLANG, "llama-1b")}[
        options.engine
    ]
    shape = options.shape or (large if DEVICE.type == "cuda" else "tiny")
    rows = []
    for name, found in run(shape, [name for name in settings if options.settings in name], options.steps):
        row = {
            "setting": name, "engine": options.engine, "model": shape, "steps": options.steps,
            "difference": f"{found.difference:.1e}", "in_halves": f"{found.in_halves:.1e}",
            "tolerance": f"{TOLERANCE:.0e}", "concordance": f"{found.concordance:.5f}",
            "reused_percent": f"{100 * found.reused:.1f}",
            "moved": f"{found.moved:.2g}", "same_weights": found.same_weights,
            "result": "PASS" if passes(name, found) else "FAIL",
        }  # fmt: skip
        rows.append({**row, **provenance()})
        print(
            "{result}  {setting:<39}off by {difference}, halves {in_halves}, concordance {concordance}, "
            "reused {reused_percent} %, moved {moved}".format(**row),
            flush=True,
        )
        if options.output:  # after each, so that a time limit leaves what was measured
            write(options.output, rows)
    return int(any(row["result"] == "FAIL" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
