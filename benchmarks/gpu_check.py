"""Is the torch engine on a GPU the one on the CPU? Checks and prints PASS or FAIL; no model hub, no files.

    python benchmarks/gpu_check.py [--output FILE.csv] [--parts checks bandwidth] [--only "part of a name"]

z, probes in scratch and updates must be bit-equal to the CPU's. Losses of a random BERT differ by the order of float32
sums, captured passes from plain ones too; a short run on the GPU must replay to the same bits from its journal.
"""

import argparse
import dataclasses
import functools
import importlib.util
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from provenance import provenance, write
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
)

from mezo import MeZOConfig, philox
from mezo.adapter import add_adapter
from mezo.engines.torch import passes
from mezo.engines.torch.dense import ProbeKeys
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.graphs import Graphs, Shape, StaticInputs
from mezo.engines.torch.loading import load_model
from mezo.engines.torch.low_rank import LowRank
from mezo.engines.torch.space import ParameterSpace
from mezo.estimator import Probe, Record, TwoPoint
from mezo.kernels import gpu
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
    whole = 1 << 22  # meets every entry of the tables
    for width in (1, 255, 1024, 300_001, whole):
        some = starts[:1] if width == whole else starts
        expected = philox.reference_normals(9, STREAM, some, width)
        for function in (philox.normals, philox.reference_normals):
            if not torch.equal(function(9, STREAM, some.cuda(), width).cpu(), expected):
                return False
    return True


def probes_equal(dtype: torch.dtype) -> bool:
    base = torch.linspace(-0.05, 0.05, 123_457).to(dtype)
    return torch.equal(
        philox.add_normals(base.cuda(), 1e-3, 5, STREAM, 7).cpu(), philox.add_normals(base, 1e-3, 5, STREAM, 7)
    )


def all_probes_equal(dtype: torch.dtype) -> bool:
    """Probes formed by one kernel, and rows of them, against the CPU's one after the other."""
    probes = [(5, 1e-3), (5, -1e-3), (2**64 - 3, 0.5), (2**64 - 3, -0.5)]
    seeds, factors = gpu.seeds_on([s for s, _ in probes], torch.device("cuda")), torch.tensor([f for _, f in probes])
    for width in (123_457, 8 * 4096):
        base = torch.linspace(-0.05, 0.05, width).to(dtype)
        expected = [philox.add_normals(base, f, s, STREAM, 1 << 34).to(dtype) for s, f in probes]
        for paired in (True, False):
            found = gpu.perturb(base.cuda(), 1 << 34, seeds, factors.cuda(), STREAM, paired=paired)
            if not torch.equal(found.cpu(), torch.stack(expected)):
                return False
    expected = [philox.add_normals(base, f, s, STREAM, 0).to(dtype).view(64, 512) for s, f in probes]
    tensors = [base.cuda(), base[:77].cuda()]  # the table holds their addresses
    small = gpu.Small.of(tensors, [STREAM, STREAM], [0, 0], torch.device("cuda"))
    found = torch.empty(4, small.size, dtype=dtype, device="cuda")
    gpu.perturb_many(small, found, seeds, factors.cuda()[None], paired=True)
    for place in small.places:
        if not torch.equal(found[:, place].cpu(), torch.stack(expected).view(4, -1)[:, : place.stop - place.start]):
            return False
    ids = torch.randint(0, 64, (4, 100), generator=torch.Generator().manual_seed(0))
    rows = gpu.perturb_rows(base.view(64, 512).cuda(), ids.cuda(), seeds, factors.cuda(), STREAM)
    return torch.equal(rows.cpu(), torch.stack([t[i] for t, i in zip(expected, ids, strict=True)]))


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


def engine_on(
    device: str, dtype: torch.dtype = torch.float32, low_rank: tuple[int, int] | None = None, weight_decay: float = 0.0
) -> TorchEngine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512, num_labels=3,
            vocab_size=3000,
        )  # fmt: skip
        model = BertForSequenceClassification(config)
    return TorchEngine(model.eval().to(device, dtype), NoTokenizer(), low_rank=low_rank, weight_decay=weight_decay)


def examples() -> list[Example]:
    lengths = [5 + 3 * i for i in range(16)]
    ids = [torch.randint(1, 3000, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    targets = tuple(Target(0, k, k) for k in range(3))
    return [Example((TokenSequence(tuple(row), targets),), label=i % 3) for i, row in enumerate(ids)]


def losses_close(low_rank: tuple[int, int] | None = None) -> bool:
    probes = [Probe(3, 1e-3), Probe(3, -1e-3)]
    on_gpu, on_cpu = (engine_on(device, low_rank=low_rank).losses(examples(), probes) for device in ("cuda", "cpu"))
    # Sums of up to 512 float32 products in another order, three layers: relative 1e-5 on losses around 1.
    return bool((on_gpu - on_cpu).abs().max() < 1e-5)


def rows_of(tokens: int) -> list[Example]:
    """Four rows for a decoder, whose last tokens are the answers."""
    ids = torch.randint(1, 999, (4, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [Example((TokenSequence(tuple(row), (Target(tokens - 2, row[-1], 0),)),)) for row in ids]


def decoders_close(devices: Sequence[str] = ("cuda", "cpu")) -> bool:
    """Low rank on OPT and Llama, where what makes fc2's and down's input computes its x V along, against the CPU."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 999}
    for config in (
        OPTConfig(word_embed_proj_dim=128, ffn_dim=1300, **sizes),
        LlamaConfig(intermediate_size=1300, **sizes),
    ):
        losses = []
        for device in devices:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device)
            engine = TorchEngine(model, NoTokenizer(), low_rank=(2, 6))
            losses.append(engine.losses(rows_of(37), [Probe(3, 1e-2), Probe(3, -1e-2)]))
            assert engine._low_rank is not None and len(engine._low_rank.readers.next) == 2
        # Sums of up to 1300 float32 products in another order: relative 1e-5 on losses around 7; signs differ by more.
        if (losses[0] - losses[1]).abs().max() > 1e-4 or (losses[1][0] - losses[1][1]).abs().max() < 1e-2:
            return False
    return True


def graphs_close(low_rank: tuple[int, int] | None = None, *, formed: bool = False) -> bool:
    """Passes that are captured and replayed against plain ones, in a short run over batches of three sizes.

    Dense probes of a small model are whole copies, unless they are `formed` layer by layer as a large one's.
    """
    graphs, plain = (engine_on("cuda", low_rank=low_rank) for _ in range(2))
    plain._graphs = plain._copies = None
    if formed:
        graphs._copies, graphs._keys = None, ProbeKeys(graphs.space, torch.device("cuda"))
    return trajectories_close(graphs, plain, examples())


def prefix_close() -> bool:
    """The same behind a trained prefix, of an encoder and a decoder."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 3000}
    options = MeZOConfig(model_name_or_path="", use_peft=True, peft_type="prefix_tuning")
    for auto, config, kind in (
        (AutoModelForMaskedLM, BertConfig(intermediate_size=512, **sizes), "masked_lm"),
        (AutoModelForCausalLM, LlamaConfig(intermediate_size=512, **sizes), "causal_lm"),
    ):
        engines = []
        for _ in range(2):
            torch.manual_seed(0)
            model = auto.from_config(config, dtype=torch.float32).eval().to("cuda")
            engines.append(TorchEngine(add_adapter(model, options, kind).to("cuda"), NoTokenizer()))
        graphs, plain = engines
        plain._graphs = plain._copies = None
        if not trajectories_close(graphs, plain, [e for tokens in (9, 17, 30, 37) for e in rows_of(tokens)], 1e-1):
            return False
    return True


def quantised_close(bits: int) -> bool:
    """The same for LoRA on weights in 4 bits, whose losses are those of the dequantised ones; in 8, where nothing is
    captured, those of two engines, which put other rows together."""
    from bitsandbytes.functional import dequantize_4bit

    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 3000}
    rows = [e for tokens in (9, 17, 30, 37) for e in rows_of(tokens)]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(LlamaConfig(intermediate_size=512, **sizes)).save_pretrained(folder)
        plain_options = MeZOConfig(model_name_or_path=folder, use_peft=True, dtype="float32")
        options = dataclasses.replace(plain_options, **{f"load_in_{bits}bit": True})

        def engine(options: MeZOConfig, like: torch.nn.Module | None = None) -> TorchEngine:
            model = load_model(options, "causal_lm").model
            for name, module in like.named_modules() if like is not None else ():
                if hasattr(getattr(module, "weight", None), "quant_state"):
                    weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
                    model.get_submodule(name.replace(".base_layer", "")).weight.data.copy_(weight)
            return TorchEngine(add_adapter(model, options, "causal_lm").to("cuda"), NoTokenizer())

        graphs, plain = engine(options), engine(options)
        plain._graphs = plain._copies = None
        if bits == 8:
            probes = TwoPoint(0, 1e-1).probes(0)
            first, again, other = (e.losses(rows, probes) for e in (plain, plain, graphs))
            apart, signs = float((first - other).abs().max()), float((first[0] - first[1]).abs().max())
            print(f"two engines differ by {apart:.1e}, both signs by {signs:.1e}, a second pass by "
                  f"{float((first - again).abs().max()):.1e}")  # fmt: skip
            return torch.equal(first, again) and apart < signs / 10
        dequantised = engine(plain_options, like=graphs.model.get_base_model())
        for epsilon in (1e-3, 1e-1):
            probes = TwoPoint(0, epsilon).probes(0)
            for few in (rows, rows[:1]):  # one row goes by another kernel
                apart = (graphs.losses(few, probes) - dequantised.losses(few, probes)).abs().max()
                print(f"{len(few)} rows, epsilon {epsilon}: {float(apart):.1e} from the dequantised weights' losses")
                if apart > 1e-4:
                    return False
    return trajectories_close(graphs, plain, rows, 1e-1)


def trajectories_close(graphs: TorchEngine, plain: TorchEngine, rows: list[Example], epsilon: float = 1e-3) -> bool:
    """Whether losses and weights stay together, and passes were captured."""
    for step in range(12):
        probes, batch = TwoPoint(0, epsilon).probes(step), rows[: (16, 9, 4)[step % 3]]
        losses = [engine.losses(batch, probes) for engine in (graphs, plain)]
        if (losses[0] - losses[1]).abs().max() > 1e-5:
            return False
        for engine in (graphs, plain):
            engine.update([Record(step, probes[0].seed, 0.0, 0.0, 0.5, 1e-3, 1, len(batch))])
    assert graphs._graphs is not None
    captured = sum(kept.graph is not None for kept in graphs._graphs._kept.values())
    return captured > 0 and graphs.digest() == plain.digest()


def deferred_equal(dtype: torch.dtype, queries: int = 1, *, large: bool = False) -> bool:
    """Updates that wait for the next pass, plain or captured, leave the bits of updates that don't, and the losses.

    Several queries go with weight decay and with layers formed in blocks; those of a `large` model in several passes.
    """
    waiting, prompt = (engine_on("cuda", dtype, weight_decay=0.1 * (queries > 1)) for _ in range(2))
    estimator, rows = TwoPoint(0, 1e-2, queries), examples()
    with mock.patch.object(passes, "LARGE_FLOPS", 0.0 if large else passes.LARGE_FLOPS), waiting.deferring():
        for step in range(14):
            batch, probes = rows[: (16, 9, 4)[step % 3]], estimator.probes(step)
            losses = []
            for engine in (waiting, prompt):
                if queries > 1 and engine._keys is not None:
                    engine._keys.block, engine._keys.most_formed = 1 << 14, 1 << 15
                losses.append(engine.losses(batch, probes))
                seeds = enumerate(probe.seed for probe in probes[::2])
                engine.update([Record(step, s, 0.0, 0.0, 0.5, 2e-2, 1, len(batch), q, queries) for q, s in seeds])
            # The same kernels on the same shapes; weights one update behind would show as some hundredths.
            if (losses[0] - losses[1]).abs().max() > 1e-3:
                return False
            if step in (6, 12) and waiting.digest() != prompt.digest():
                return False
    assert waiting._keys is not None and waiting._keys.deferred is not None and waiting._graphs is not None
    captured = sum(kept.graph is not None for kept in waiting._graphs._kept.values())
    return captured > 0 and waiting.digest() == prompt.digest()


def captured_close(low_rank: tuple[int, int] | None = None, *, last: bool = False) -> bool:
    """Captured passes against the same kernels launched one by one, with layers of real size, of all layers or above
    frozen ones: within a hundredth of what both signs differ by."""
    config = OPTConfig(
        hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_hidden_layers=6, num_attention_heads=32,
        vocab_size=999,
    )  # fmt: skip
    with torch.device("cuda"):
        model = OPTForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    if last:
        model.requires_grad_(False).get_decoder().layers[-1].requires_grad_(True)
    engine = TorchEngine(model, NoTokenizer(), low_rank=low_rank)
    rows = rows_of(128)
    captured, plain = (Graphs(torch.device("cuda")) for _ in range(2))
    plain._captures = False
    apart, signs = 0.0, 0.0
    for step in range(20):
        losses = []
        for engine._graphs in (captured, plain):
            losses.append(engine.losses(rows, TwoPoint(0, 1e-2).probes(step)))
        apart = max(apart, float((losses[0] - losses[1]).abs().max()))
        signs = max(signs, float((losses[1][0] - losses[1][1]).abs().max()))
    print(f"captured and plain passes differ by {apart:.1e}, both signs by {signs:.1e}")
    return apart < signs / 100 and all(kept.graph is not None for kept in captured._kept.values())


def left_behind_is_kept() -> bool:
    """What a pass leaves in the memory of captured ones is not written over by them."""
    graphs, left = Graphs(torch.device("cuda")), []
    large, small = (Shape.of(2, True, True, rows, 8, 0, 1, 1, False) for rows in (8, 4))

    def plain(_: StaticInputs) -> torch.Tensor:
        return torch.full((1 << 20,), 3.0, device="cuda").mul(2).sum().view(1)

    def leaving(static: StaticInputs) -> torch.Tensor:
        left.append(torch.full((1 << 20,), 7.0, device="cuda"))
        return plain(static)

    for shape in (large, small):
        graphs.inputs(shape)
    found = [graphs.run(large, plain).item() for _ in range(3)]
    was_captured = graphs.is_captured(large)
    found.append(graphs.run(small, leaving).item())
    given_up = not graphs.is_captured(large)
    found += [graphs.run(large, plain).item() for _ in range(3)]
    kept = graphs.is_captured(large) and bool((left[0] == 7.0).all())
    return was_captured and given_up and kept and set(found) == {6.0 * (1 << 20)}


def updated_probes_equal(dtype: torch.dtype) -> bool:
    """A large tensor that is updated and then formed under probes by one kernel, against the CPU's two steps."""
    start = torch.linspace(-0.05, 0.05, 3_000_000).to(dtype).view(-1, 1000)
    record = Record(0, 7, 0.0, 0.0, 0.7, 1e-3, 1, 1)
    space = ParameterSpace({"w": start.clone()})
    space.update([record], weight_decay=0.1)
    weights, one = start.cuda().view(-1), torch.ones(1, device="cuda")
    ((factor,),) = space.factors([record], ["w"])
    update = gpu.Update(
        one.int(), gpu.seeds_on([7], one.device), one * factor, one * (1 - 1e-3 * 0.1), True,
        philox.stream_id("rounding", "w"),
    )  # fmt: skip
    seeds, factors = gpu.seeds_on([5, 5], one.device), torch.tensor([1e-3, -1e-3], device="cuda")
    stream, expected = philox.stream_id("direction", "w"), space.parameters["w"].view(-1)
    found_PN = gpu.perturb(weights, 0, seeds, factors, stream, paired=True, update=update)
    probes = [philox.add_normals(expected, f, 5, stream, 0).to(dtype) for f in (1e-3, -1e-3)]
    return torch.equal(weights.cpu(), expected) and torch.equal(found_PN.cpu(), torch.stack(probes))


def weights_untouched(dtype: torch.dtype) -> bool:
    engine = engine_on("cuda", dtype)
    before = engine.digest()
    engine.losses(examples(), TwoPoint(0, 1e-3).probes(0) * 3)
    return engine.digest() == before


def replays(dtype: torch.dtype, low_rank: tuple[int, int] | None = None) -> bool:
    engine, estimator, records = engine_on("cuda", dtype, low_rank), TwoPoint(0, 1e-3), []
    for step in range(7 if low_rank else 4):  # beyond a window
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


def updated(weights: torch.Tensor) -> tuple[Callable[[int], object], int]:
    """An update of weights, and the bytes it moves."""
    space = ParameterSpace({"w": weights})
    record = Record(0, 0, 0.0, 0.0, 0.7, 1e-5, 1, 1)
    step = lambda n: space.update([dataclasses.replace(record, seed=philox.derive_seed(1, n))], 0.0)  # noqa: E731
    return step, 2 * weights.nbytes


def folded(weights: torch.Tensor) -> tuple[Callable[[int], object], int]:
    """Windows of one step of low-rank directions, each folded into the weights, and the bytes that folding moves."""
    state = LowRank(ParameterSpace({"w": weights}), 2, 1)
    record = Record(0, 0, 0.0, 0.0, 0.7, 1e-5, 1, 1)
    step = lambda n: state.update([dataclasses.replace(record, seed=philox.derive_seed(1, n))], 0.0)  # noqa: E731
    return step, 2 * weights.nbytes


def both_signs(weights: torch.Tensor) -> tuple[Callable[[int], object], int]:
    """Both probes of weights formed in scratch, an eighth at a time."""
    seeds, factors = gpu.seeds_on([1, 1], weights.device), torch.tensor([1e-3, -1e-3], device=weights.device)
    parts = weights.view(-1).chunk(8)

    def form(_: int) -> None:
        for i, part in enumerate(parts):
            gpu.perturb(part, i * len(parts[0]), seeds, factors, STREAM, paired=True)

    return form, 3 * weights.nbytes


def updated_and_both_signs(weights: torch.Tensor) -> tuple[Callable[[int], object], int]:
    """The same with an update first."""
    seeds, factors = gpu.seeds_on([1, 1], weights.device), torch.tensor([1e-3, -1e-3], device=weights.device)
    pending, one = torch.ones(1, dtype=torch.int32, device=weights.device), torch.ones(1, device=weights.device)
    update = gpu.Update(pending, gpu.seeds_on([2], weights.device), 1e-5 * one, one, False, STREAM + 1)
    parts = weights.view(-1).chunk(8)

    def form(_: int) -> None:
        for i, part in enumerate(parts):
            gpu.perturb(part, i * len(parts[0]), seeds, factors, STREAM, paired=True, update=update)

    return form, 4 * weights.nbytes


def copied(weights: torch.Tensor) -> tuple[Callable[[int], object], int]:
    """A copy."""
    other = torch.empty_like(weights)
    return lambda _: other.copy_(weights), 2 * weights.nbytes


def bandwidth(what: Callable[[torch.Tensor], tuple[Callable[[int], object], int]], dtype: torch.dtype) -> str:
    """GB/s that something reads and writes of 8 GiB of weights; median of 10."""
    weights = torch.randn((8 << 30) // dtype.itemsize, dtype=dtype, device="cuda").view(-1, 4096)
    step, num_bytes = what(weights)
    times = []
    for n in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(n)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return f"{num_bytes / sorted(times)[6] / 1e9:.0f}"


PER_TYPE: dict[str, Callable[[torch.dtype], bool]] = {
    "probes equal": probes_equal,
    "all probes from one kernel equal": all_probes_equal,
    "updates equal": updates_equal,
    "weights untouched": weights_untouched,
    "replay equal on GPU and CPU": replays,
}

PARTS = ("checks", "bandwidth")


def _shown(result: object) -> object:
    return ("PASS" if result else "FAIL") if isinstance(result, bool) else result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(Path(tempfile.gettempdir()) / "gpu_check.csv"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="right or wrong, and GB/s")
    parser.add_argument("--only", default="", help="part of the checks' names; the file holds these alone")
    options = parser.parse_args()
    path = Path(options.output)
    checks: dict[str, Callable[[], object]] = {"words equal": words_equal, "normals equal": normals_equal}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for what, check in PER_TYPE.items():
            checks[f"{what}, {dtype}"] = functools.partial(check, dtype)
        if dtype != torch.float32:
            checks[f"deferred updates equal, {dtype}"] = functools.partial(deferred_equal, dtype)
            checks[f"deferred updates equal, 2 queries, {dtype}"] = functools.partial(deferred_equal, dtype, 2)
            checks[f"deferred updates equal, 2 queries of a large model, {dtype}"] = functools.partial(
                deferred_equal, dtype, 2, large=True
            )
            checks[f"update and probes from one kernel equal, {dtype}"] = functools.partial(updated_probes_equal, dtype)
        checks[f"low rank: replay equal on GPU and CPU, {dtype}"] = functools.partial(replays, dtype, (2, 6))
        checks[f"update, GB/s, {dtype}"] = functools.partial(bandwidth, updated, dtype)
        checks[f"low rank: end of a window, GB/s, {dtype}"] = functools.partial(bandwidth, folded, dtype)
        checks[f"both signs, GB/s, {dtype}"] = functools.partial(bandwidth, both_signs, dtype)
        if dtype != torch.float32:
            checks[f"update and both signs, GB/s, {dtype}"] = functools.partial(
                bandwidth, updated_and_both_signs, dtype
            )
    checks |= {
        "128 tensors in one launch equal": segments_equal,
        "losses within 1e-5": losses_close,
        "low rank: losses within 1e-5": lambda: losses_close((2, 6)),
        "low rank: losses of decoders within 1e-4": decoders_close,
        "captured passes within 1e-5": graphs_close,
        "dense: captured passes within 1e-5": lambda: graphs_close(formed=True),
        "low rank: captured passes within 1e-5": lambda: graphs_close((2, 6)),
        "prefix: captured passes within 1e-5": prefix_close,
        "what a pass leaves beside captured ones stays": left_behind_is_kept,
        "dense: captured passes as plain ones, 16 bits": captured_close,
        "low rank: captured passes as plain ones, 16 bits": lambda: captured_close((2, 50)),
        "last layer: captured passes as plain ones, 16 bits": lambda: captured_close(last=True),
        "last layer, low rank: captured passes as plain ones, 16 bits": lambda: captured_close((2, 50), last=True),
        "copy, GB/s": functools.partial(bandwidth, copied, torch.float32),
    }
    if importlib.util.find_spec("bitsandbytes") is not None:
        checks |= {f"LoRA on weights in {bits} bits": functools.partial(quantised_close, bits) for bits in (4, 8)}
    results: dict[str, object] = {}
    for name, run in checks.items():
        if options.only not in name or PARTS["GB/s" in name] not in options.parts:
            continue
        started = time.perf_counter()
        try:
            results[name] = run()
        except Exception:  # the others have something to say all the same
            traceback.print_exc()
            results[name] = False
        print(f"{name:60} {_shown(results[name])}   {time.perf_counter() - started:.1f} s", flush=True)
        write(path, [{"check": what, "result": _shown(found), **provenance()} for what, found in results.items()])
    return int(False in results.values())


if __name__ == "__main__":
    sys.exit(main())
