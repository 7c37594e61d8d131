"""What a step costs on the user's model and machine: `mezo bench`.

Side by side in one process, on the same random rows: two plain forward passes, a step of mezo, and a step of the
original algorithm as the paper writes it (arXiv 2305.17333, algorithm 1: the weights are moved by +ε, −2ε and +ε in
place and then updated, z drawn again each time from a reseeded generator). All compute logits only where the loss
reads them. On a GPU also two forward passes as CUDA graphs, as a step of mezo has them on short batches.

With low-rank directions each step bears its share of a window's end, where what was collected goes into the weights and
new directions are drawn. On a GPU the memory of plain passes is that of a process which holds the weights alone.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from mezo.api import check_movable, trainable_engine
from mezo.config import MeZOConfig
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.loading import (
    LoadedModel,
    device_for,
    is_encoder,
    load_model,
    load_model_config,
    load_tokenizer,
    with_safetensors,
)
from mezo.errors import UserError
from mezo.estimator import UNPERTURBED, Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence, batch_loss, example_losses

_EPSILON, _LEARNING_RATE = 1e-3, 1e-9
# Compilation, allocator, capture of a CUDA graph; a step also learns what its passes read.
_WARM_UP, _WARM_UP_OF_OTHERS = 4, 2
_COPY_BYTES_GPU, _COPY_BYTES_CPU = 1 << 31, 1 << 28


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Times two plain forward passes, a step of mezo and a step of the original algorithm on random rows.

    Args:
        model_name_or_path: Folder or Hub name of the model.
        random_weights: Read only the model's configuration and fill the weights at random: the same speed and memory.
        rows: Rows of a batch.
        tokens: Tokens of a row.
        use_peft: Train LoRA instead of all parameters.
        lora_r: Rank of LoRA.
        direction: dense, low_rank or subspace, see `mezo train`.
        direction_rank: Rank of low_rank.
        num_queries: Directions of a step of mezo, each with both signs.
        repeats: Timed repetitions of each; the median is reported.
        dtype: Weights' type.
        attn_implementation: transformers' attention: sdpa, eager, …
        use_cpu: Stay on the CPU even if there is a GPU.
        trust_remote_code: Run modelling code that comes with the model.
        json: Print one JSON object per line instead of a table.
    """

    model_name_or_path: str
    random_weights: bool = False
    rows: int = 16
    tokens: int = 128
    use_peft: bool = False
    lora_r: int = 8
    direction: Literal["dense", "low_rank", "subspace"] = "dense"
    direction_rank: int = 2
    num_queries: int = 1
    repeats: int = 10
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str | None = None
    use_cpu: bool = False
    trust_remote_code: bool = False
    json: bool = False

    def config(self) -> MeZOConfig:
        """The same as options of a run."""
        return MeZOConfig(
            model_name_or_path=self.model_name_or_path, use_peft=self.use_peft, lora_r=self.lora_r,
            direction=self.direction, direction_rank=self.direction_rank, dtype=self.dtype,
            attn_implementation=self.attn_implementation, use_cpu=self.use_cpu,
            trust_remote_code=self.trust_remote_code, per_device_train_batch_size=self.rows,
            per_device_eval_batch_size=self.rows,
        )  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Args:
        what: what was run.
        milliseconds: median of the repetitions.
        low: 20th percentile.
        high: 80th percentile.
        ratio: median over that of two plain forward passes.
        tokens_per_second: input tokens of the batch, under both signs of every direction, per second.
        traffic: bytes of weights that the method reads and writes, per second, in GB; of the method's definition, not
            of a counter.
        bandwidth: the same as a share of the machine's copy bandwidth.
        peak_memory: MiB, at its highest during the repetitions, all that the engine keeps included (but for the plain
            passes); of the GPU, or of the process on a CPU.
    """

    what: str
    milliseconds: float
    low: float
    high: float
    ratio: float
    tokens_per_second: float
    traffic: float
    bandwidth: float
    peak_memory: float


def run(options: BenchOptions) -> list[Measurement]:
    """Measures everything; the methods take turns, so that a change of clock speed meets all of them."""
    if options.tokens < 2 or min(options.rows, options.num_queries) < 1 or options.repeats < 2:
        raise UserError("bench needs at least 1 row of 2 tokens, 1 query and 2 repeats")
    engine = make_bench_engine(options)
    examples = make_examples(options, engine)
    bare = TorchEngine(engine._transformer, engine.tokenizer)  # no low-rank part, no copies
    plain = engine if engine._lora is not None else bare
    methods: dict[str, Callable[[int], object]] = {
        "two plain forwards": lambda _: two_forwards(engine, bare, examples),
        "a step of mezo": lambda step: mezo_step(engine, examples, step, options.num_queries),
        "original algorithm": lambda step: original_step(engine, examples, step, plain),
    }
    if engine.model.device.type == "cuda":
        methods["two forwards, captured"] = lambda _: two_forwards(engine, bare, examples, captured=True)
    weight_bytes = sum(p.numel() * p.element_size() for p in engine.model.parameters())
    copies = copy_bandwidth(engine.model.device)
    times: dict[str, list[float]] = {name: [] for name in methods}
    plain_peak, peaks = _plain_peak(engine, bare, examples), dict.fromkeys(methods, 0.0)
    with engine.deferring():
        for repeat in range(options.repeats + _WARM_UP):
            for name, method in methods.items():
                if name != "a step of mezo" and repeat < _WARM_UP - _WARM_UP_OF_OTHERS:
                    continue
                _reset_peak(engine.model.device)
                seconds = timed(lambda method=method, repeat=repeat: method(repeat), engine.model.device)  # type: ignore[misc]
                if repeat >= _WARM_UP:
                    times[name].append(seconds)
                    kept = engine.graph_bytes / 2**20 if name == "a step of mezo" else 0.0  # not counted as allocated
                    peaks[name] = max(peaks[name], _peak(engine.model.device) + kept)
    peaks["two plain forwards"] = plain_peak
    if engine._low_rank is not None:
        _reset_peak(engine.model.device)
        ends, steps = window_ends(engine), engine._low_rank.refresh_steps
        times["a step of mezo"] = [t + statistics.median(ends) / steps for t in times["a step of mezo"]]
        times["end of a window"], peaks["end of a window"] = ends, _peak(engine.model.device)
    base = statistics.median(times["two plain forwards"])
    # Over the weights; whether updates went along with passes shows only now.
    original = 2.0 + 8.0 * (not options.use_peft)
    passes = {"a step of mezo": _passes(options, engine, examples), "original algorithm": original}
    directions = {"a step of mezo": options.num_queries, "end of a window": 0}
    rows = []
    for name, seconds_of in times.items():
        median = statistics.median(seconds_of)
        quantiles = statistics.quantiles(seconds_of, n=5, method="inclusive")  # two repeats are enough
        traffic = passes.get(name, 2.0) * weight_bytes / median / 1e9
        tokens = 2 * options.rows * options.tokens * directions.get(name, 1)
        rows.append(
            Measurement(
                name, median * 1e3, quantiles[0] * 1e3, quantiles[3] * 1e3, median / base,
                tokens / median, traffic, traffic / copies, peaks[name],
            )
        )  # fmt: skip
    return rows


def make_bench_engine(options: BenchOptions) -> TorchEngine:
    """The engine that `mezo train` would use, with random weights if that is asked for."""
    config = options.config() if options.random_weights else with_safetensors(options.config())
    model_config = load_model_config(config)
    encoder = is_encoder(model_config)
    kind = "masked_lm" if encoder else "causal_lm"
    if not options.random_weights:
        check_movable(config, model_config)
        return trainable_engine(config, kind, load_model(config, kind), load_tokenizer(config))
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(options.dtype, torch.float32)
    auto = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
    more = {} if options.attn_implementation is None else {"attn_implementation": options.attn_implementation}
    with device_for(config):
        model = auto.from_config(model_config, dtype=dtype, **more).eval().requires_grad_(False)
    return trainable_engine(config, kind, LoadedModel(model, []), load_tokenizer(config))


def make_examples(options: BenchOptions, engine: TorchEngine) -> list[Example]:
    """Random rows whose last token is the answer; on an encoder a token in the middle."""
    size = engine.model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size // 2, size, (options.rows, options.tokens), generator=generator).tolist()
    position = options.tokens // 2 if is_encoder(engine.model.config) else options.tokens - 2
    return [Example((TokenSequence(tuple(row), (Target(position, row[-1], 0),)),)) for row in ids]


def two_forwards(
    engine: TorchEngine, bare: TorchEngine, examples: Sequence[Example], *, captured: bool = False
) -> None:
    """The bare model twice, without an adapter; kernel by kernel, or as a CUDA graph where the engine would."""
    adapter = engine.model.disable_adapter() if isinstance(engine.model, PeftModel) else nullcontext()
    with adapter:
        for _ in range(2):
            if captured:
                batch_loss(examples, bare.losses(examples, [UNPERTURBED])[0])
            else:
                _plain_loss(bare, examples)


def mezo_step(engine: TorchEngine, examples: Sequence[Example], step: int, num_queries: int = 1) -> None:
    """Probes, losses, coefficients and update, as in training."""
    estimator = TwoPoint(seed=0, epsilon=_EPSILON, num_queries=num_queries)
    probes = estimator.probes(step)
    losses = [batch_loss(examples, losses_N) for losses_N in engine.losses(examples, probes)]
    outcomes = enumerate(estimator.outcomes(probes, losses))
    engine.update([Record(step, *o, _LEARNING_RATE, 0, len(examples), n, num_queries) for n, o in outcomes])


def window_ends(engine: TorchEngine, count: int = 3) -> list[float]:
    """Seconds that the end of a window of low-rank directions takes, the next one's directions included."""
    state = engine._low_rank
    assert state is not None
    estimator = TwoPoint(seed=1, epsilon=_EPSILON)
    seconds: list[float] = []

    def update(step: int) -> None:
        seed = estimator.probes(step)[0].seed
        engine.update([Record(step, seed, 0.0, 0.0, 1.0, _LEARNING_RATE, 0, 1)])

    def end(step: int) -> None:
        update(step)
        state.probes(estimator.probes(step + 1))

    for step in range(0, 2 * (count + 1), 2):
        update(step)
        state.steps = state.refresh_steps - 1  # as many updates leave nothing else to fold than one
        seconds.append(timed(functools.partial(end, step + 1), engine.model.device))
    return seconds[1:]  # the first compiles kernels


@torch.no_grad()
def original_step(engine: TorchEngine, examples: Sequence[Example], step: int, plain: TorchEngine) -> None:
    """Algorithm 1 of the paper, in place; `plain` is an engine of the same parameters that keeps nothing of them."""

    def move(scale: float) -> None:
        torch.manual_seed(step)
        for p in engine.space.parameters.values():
            p.add_(torch.normal(mean=0, std=1, size=p.shape, dtype=p.dtype, device=p.device), alpha=scale)
        engine._changed()

    move(_EPSILON)
    loss_plus = _plain_loss(plain, examples)
    move(-2 * _EPSILON)
    loss_minus = _plain_loss(plain, examples)
    move(_EPSILON)
    move(-_LEARNING_RATE * (loss_plus - loss_minus) / (2 * _EPSILON))


def _plain_loss(engine: TorchEngine, examples: Sequence[Example]) -> float:
    return batch_loss(examples, example_losses(examples, engine._scored(examples).logprobs_T))


def _passes(options: BenchOptions, engine: TorchEngine, examples: Sequence[Example]) -> float:
    """Passes over the weights in a step: low-rank directions read them once a traversal of the model; dense ones are
    read, written to scratch and read again under each sign, and the update reads and writes them, or writes only where
    it goes along with that."""
    probes = TwoPoint(seed=0, epsilon=_EPSILON, num_queries=options.num_queries).probes(0)
    together = [
        (len(some), len(engine._groups(examples, engine.train_batch_size, len(some))))
        for some in engine._together(probes)
    ]
    if options.use_peft or options.direction != "dense":
        return float(sum(traversals for _, traversals in together))
    deferred = engine._keys is not None and engine._keys.deferred is not None
    return (1.0 if deferred else 2.0) + sum(2.5 * num_probes * traversals for num_probes, traversals in together)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def copy_bandwidth(device: torch.device) -> float:
    """GB/s that a large copy reads and writes; the best of five."""
    count = (_COPY_BYTES_GPU if device.type == "cuda" else _COPY_BYTES_CPU) // 4
    source, target = torch.zeros(count, device=device), torch.empty(count, device=device)
    return max(2 * 4 * count / timed(lambda: target.copy_(source), device) for _ in range(5)) / 1e9


def _plain_peak(engine: TorchEngine, bare: TorchEngine, examples: Sequence[Example]) -> float:
    """MiB of two plain passes; on a GPU without what lies beside the model's own weights."""
    device, has_adapter = engine.model.device, isinstance(engine.model, PeftModel)
    two_forwards(engine, bare, examples)  # what is made once
    beside = 0.0
    if device.type == "cuda":
        own = sum(p.nbytes for p in bare.model.parameters() if not (has_adapter and p.requires_grad))
        beside = (torch.cuda.memory_allocated(device) - own) / 2**20
    _reset_peak(device)
    two_forwards(engine, bare, examples)
    return _peak(device) - beside


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew


def _peak(device: torch.device) -> float:
    """MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
