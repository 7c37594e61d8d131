"""Triton kernels in Triton's interpreter, bit for bit against the reference; no GPU is needed."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# The interpreter is chosen when Triton is imported, so each check is a process of its own.
PROLOGUE = """
import contextlib, itertools, numpy, torch
from triton.runtime import interpreter
from mezo import philox
from mezo.kernels import gpu
def fma(self, x, y, z):  # the interpreter's own rounds twice
    a, b, c = (torch.from_numpy(numpy.atleast_1d(t.data)) for t in (x, y, z))
    return interpreter.TensorHandle(philox._fma(a, b, c).numpy().reshape(x.data.shape), x.dtype.scalar)
interpreter.InterpreterBuilder.create_fma = fma
torch.cuda.device = lambda device: contextlib.nullcontext()  # tensors stay on the CPU
SEED, STREAM = 0x0123456789ABCDEF, 0xFEDCBA9876543210
def reference(start, width):
    return philox.reference_normals(SEED, STREAM, torch.tensor([start]), width)[0]
def base(width, dtype):
    return torch.randn(width, generator=torch.Generator().manual_seed(width)).to(dtype)
"""


def interpreted(code):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", PROLOGUE + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_add_normals():
    interpreted("""
cases = ((1, [3], torch.float32), (1500, [0, 1, 2**33 + 2], torch.float32), (77, [5], torch.bfloat16))
for width, starts, dtype in cases:
    base_RW = torch.stack([base(width, dtype)] * len(starts))
    out_RW = torch.empty(base_RW.shape)
    gpu.add_normals(out_RW, base_RW, 1e-3, SEED, STREAM, torch.tensor(starts))
    for out, start in zip(out_RW, starts):
        assert torch.equal(out, base(width, dtype).float() + 1e-3 * reference(start, width))
""")


ROUNDED = """
def rounded(exact, dtype):
    if dtype == torch.bfloat16:  # the interpreter cuts bits off; a GPU rounds to nearest (benchmarks/gpu_check.py)
        exact = (exact.view(torch.int32) & -65536).view(torch.float32)
    return exact.to(dtype)
gpu._MANY = 2000
seeds, factors = gpu.seeds_on([SEED, SEED, 7, 7], torch.device("cpu")), torch.tensor([1e-3, -1e-3, 0.5, -0.5])
"""


def test_perturb():
    """Pairs and single probes, sizes that fill no program, an offset beyond 32 bits."""
    interpreted(
        ROUNDED
        + """
cases = ((1, 0, "float32"), (1500, 2**35 + 8, "float32"), (1030, 16, "bfloat16"), (4000, 0, "float16"))
for (width, start, dtype), probes, paired in itertools.product(cases, (2, 4), (True, False)):
    b = base(width, getattr(torch, dtype))
    found = gpu.perturb(b, start, seeds[:probes], factors[:probes], STREAM, paired=paired)
    for out, seed, factor in zip(found, (SEED, SEED, 7, 7), factors[:probes]):
        z = philox.reference_normals(seed, STREAM, torch.tensor([start]), width)[0]
        assert torch.equal(out, rounded(b.float() + factor * z, b.dtype))
"""
    )


def test_perturb_many():
    """Tensors of several sizes, each with its own factors, one of them longer than a program."""
    interpreted(
        ROUNDED
        + """
for dtype, probes, paired in itertools.product((torch.float32, torch.bfloat16), (1, 4), (True, False)):
    if probes == 1 and paired:
        continue
    tensors = [base(width, dtype) for width in (5, 1500, 64)]
    streams, numbers = [STREAM, 1, 2**63], [2, 0, 3]
    factors_KP = torch.stack([factors * (k + 1) for k in range(4)])[:, :probes].contiguous()
    small = gpu.Small.of(tensors, streams, numbers, torch.device("cpu"))
    assert small.size == 64 + 1536 + 64 and small.largest == 1500
    out = torch.full((probes, small.size), 9.0, dtype=dtype)
    gpu.perturb_many(small, out, seeds[:probes], factors_KP, paired=paired)
    for b, place, stream, number in zip(tensors, small.places, streams, numbers):
        for p, seed in enumerate((SEED, SEED, 7, 7)[:probes]):
            z = philox.reference_normals(seed, stream, torch.tensor([0]), len(b))[0]
            assert torch.equal(out[p, place], rounded(b.float() + factors_KP[number, p] * z, dtype))
    assert (out[:, 5:64] == 9.0).all()  # between them nothing is written
"""
    )


def test_perturb_rows():
    interpreted(
        ROUNDED
        + """
for width, dtype in ((8, torch.float32), (13, torch.float32), (1100, torch.bfloat16)):
    table = base(5 * width, dtype).view(5, width)
    ids = torch.tensor([[0, 3, 3], [4, 1, 0]])
    found = gpu.perturb_rows(table, ids, seeds[1:3], factors[1:3], STREAM)
    for p, (seed, factor) in enumerate(((SEED, factors[1]), (7, factors[2]))):
        z = philox.reference_normals(seed, STREAM, torch.tensor([0]), 5 * width)[0].view(5, width)
        assert torch.equal(found[p], rounded(table.float() + factor * z, dtype)[ids[p]])
"""
    )


def test_dense_probes_of_a_model():
    """One kernel for all probes, reading them from memory, against probes formed one after the other: the same bits."""
    interpreted("""
from transformers import BertConfig, BertForSequenceClassification
from mezo.engines.torch.dense import Dense, DenseOnGPU, ProbeKeys
from mezo.engines.torch.perturbed import PerturbedForward
from mezo.engines.torch.space import ParameterSpace
from mezo.estimator import Probe
torch.manual_seed(0)
config = BertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=80, vocab_size=50)
model = BertForSequenceClassification(config).eval().requires_grad_(False)
space = ParameterSpace(dict(model.named_parameters()), widths={"classifier.weight": 3.0})
keys = ProbeKeys(space, torch.device("cpu"))
pair = [Probe(2**64 - 3, 0.05), Probe(2**64 - 3, -0.05)]
for probes in (pair, [Probe(5, 0.05), Probe(6, 0.05)], [*pair, Probe(7, 0.0)]):
    logits, ids = [], torch.arange(4 * len(probes)).view(-1, 2)
    for weights in (Dense(space, probes), DenseOnGPU(space, keys, probes)):
        with torch.no_grad(), PerturbedForward(weights):
            logits.append(model(ids).logits)
    # More than two probes in one product, which sums in another order.
    assert torch.equal(*logits) if len(probes) == 2 else (logits[0] - logits[1]).abs().max() < 1e-5
    assert (logits[0] - model(ids).logits).abs().max() > 1e-3
probes, ids = [*pair, Probe(5, 0.05), Probe(6, 0.05), Probe(7, 0.0)], torch.arange(10).view(-1, 2)
expected, sizes = Dense(space, probes), []
with torch.no_grad(), PerturbedForward(expected):
    expected = model(ids).logits
both = [ProbeKeys(space, torch.device("cpu")) for _ in range(2)]
both[1].most_formed = 0  # a block under two probes after the other
for keys in both:
    weights = DenseOnGPU(space, keys, probes)
    with torch.no_grad(), PerturbedForward(weights):
        assert (model(ids).logits - expected).abs().max() < 1e-5
    sizes.append(keys.write(probes).scratch.numel())
assert sizes[0] * 2 == sizes[1] * 5
""")


@pytest.mark.parametrize("subspace", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fold(dtype, subspace):
    """A window's end against the reference: several launches, rows of no multiple of 8, vectors, weight decay."""
    interpreted(
        f"dtype, subspace = torch.{dtype}, {subspace}"
        + """
import copy
from mezo.engines.torch.low_rank import LowRank
from mezo.engines.torch.space import ParameterSpace
from mezo.estimator import Record
gpu._MOST_FOLDED, gpu._MANY = 40 * 70, 2000
shapes = {"a": (37, 24), "b": (5, 13), "c": (1, 1), "d": (120, 70), "e": (9,), "f": (), "g": (3, 4, 6)}
def state():
    values = {name: base(max(1, torch.Size(shape).numel()), dtype).view(shape) for name, shape in shapes.items()}
    return LowRank(ParameterSpace(values), 3, 3, subspace=subspace)
def step(state, number):
    state.update([Record(number, 11 + number, 0.0, 0.0, 0.5, 1e-1, 0, 1)], 0.1)
ours, reference = state(), state()
before = {name: p.clone() for name, p in ours.space.parameters.items()}
for number in range(2):
    step(ours, number), step(reference, number)
expected = {name: reference.folded(name) for name in shapes}
step(reference, 2)
torch.Tensor.is_cuda, fold, calls = True, gpu.fold, []
gpu.fold = lambda *arguments: calls.append(len(arguments)) or fold(*arguments)
for name in shapes:
    assert torch.equal(ours.folded(name), expected[name]), name
    assert torch.equal(ours.space.parameters[name], before[name])
step(ours, 2)
for name in shapes:
    assert torch.equal(ours.space.parameters[name], reference.space.parameters[name]), name
    assert not torch.equal(ours.space.parameters[name], before[name]) or name == "c"
assert ours.is_folded and not ours._collected.parameters["d"].any()
assert len(calls) == 2 * len(shapes)
"""
    )


def test_add_normals_many():
    interpreted("""
gpu.PIECE, gpu.REPEAT = 8192, 2
bases = [base(width, torch.float32) for width in (5, 1024, 9100)]
outs = [torch.empty_like(b) for b in bases]
streams = [STREAM, 1, 2**63]
gpu.add_normals_many(gpu.segment_table(bases, outs, streams), -0.5, SEED)
for b, out, stream in zip(bases, outs, streams):
    z = philox.reference_normals(SEED, stream, torch.tensor([0]), len(b))[0]
    assert torch.equal(out, b + -0.5 * z)
""")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_update_many(dtype):
    """Against the readable update, which the CPU takes: two records, decay of matrices only, subnormals, infinities."""
    interpreted(
        f"dtype = torch.{dtype}"
        + """
from mezo.engines.torch.space import ParameterSpace
from mezo.estimator import Record
gpu.PIECE, gpu.REPEAT = 8192, 2
start = {"v": base(5, dtype), "w": base(3000, dtype).view(3, 1000), "x": base(5050, dtype).view(1, 5050) * 1e-6}
start["w"][0, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
records = [Record(0, seed, 0.0, 0.0, c, 1e-3, 1, 1) for seed, c in ((SEED, 0.7), (2**64 - 3, -0.2))]
found, expected = (ParameterSpace({k: t.clone() for k, t in start.items()}, widths={"x": 1e-4}) for _ in range(2))
streams, rounding = ([philox.stream_id(s, k) for k in start] for s in ("direction", "rounding"))
table = gpu.weight_table(list(found.parameters.values()), [False, True, True], streams, rounding)
factors = [[-r.learning_rate * r.coefficient * found.scale(k, r.seed) for r in records] for k in start]
gpu.update_many(table, dtype, [r.seed for r in records], factors, 1 - 1e-3 * 0.1)
expected.update(records, weight_decay=0.1)
for name in start:
    a, b = found.parameters[name], expected.parameters[name]
    assert torch.equal(a.isnan(), b.isnan())  # which of the many NaN it is depends on the machine
    assert torch.equal(a.view(torch.int16)[~a.isnan()], b.view(torch.int16)[~a.isnan()]), name
    assert not torch.equal(a, start[name])
"""
    )


LAYERS = """
from mezo.engines.torch import low_rank
from mezo.kernels import layers
from mezo.kernels.layers import LowRankSum
on_gpu = [True]
layers.on_gpu = low_rank.on_gpu = lambda tensor: on_gpu[0]
generator = torch.Generator().manual_seed(0)
def randn(*size):
    return torch.randn(size, generator=generator)
class Known:
    def __init__(self, right):
        self.right_rO, self.found = right, []
    def made(self, *found):
        self.found = found
"""


def test_low_rank_sum():
    """Strided biases, h between other columns, L of several matrices, sizes that fill no program; what a function makes
    of the sum, its product with what comes next, and the sum without y."""
    interpreted(
        LAYERS
        + """
for probes, rows, out, rank in ((2, 33, 300, 2), (1, 5, 7, 3), (3, 64, 256, 1), (1, 2, 1100, 4)):
    y, other = randn(2, probes, rows, out)
    h, left = randn(probes, rows, 8)[..., 1 : 1 + rank], randn(probes, out + 9, rank)[:, 9:]
    for bias in (None, randn(probes, 2 * out)[:, ::2], torch.ones(out).expand(probes, out)):
        known = Known(randn(rank, out))
        sums, both = LowRankSum(y, h, left, bias), LowRankSum(y, h, left, bias, known)
        cases = ({}, {"function": "relu"}, {"function": "silu", "scale": 0.3}, {"plus_PNO": other},
                 {"times_PNO": other})
        for case in cases:
            on_gpu[0] = False
            expected = sums.then(**case)
            on_gpu[0] = True
            assert (sums.then(**case) - expected).abs().max() < 1e-5
            assert (both.then(**case) - expected).abs().max() < 1e-5
            made, low = known.found
            assert low.shape == (probes, rows, rank) and (low - made @ known.right_rO.T).abs().max() < 1e-3
        short = LowRankSum(y.bfloat16(), h.bfloat16(), left, bias)
        assert (short.then() - sums.then()).abs().max() < 0.1
        exact, copy = sums.then(), LowRankSum(y.clone(), h, left, bias)
        copy.finish_()
        assert (copy.y_PNO - exact).abs().max() < 1e-5
        assert (copy.rest() + y - exact).abs().max() < 1e-5
"""
    )


@pytest.mark.parametrize("name", ["OPT", "Llama"])
def test_low_rank_passes(name):
    """What a pass shows of its readers makes the next one fuse more, with the same losses; the first is made again, so
    that each pass's bits are the same."""
    interpreted(
        LAYERS
        + f"name = '{name}'"
        + """
import transformers
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.graphs import Graphs
from mezo.estimator import Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence
config = getattr(transformers, name + "Config")(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, max_position_embeddings=20,
    **({"word_embed_proj_dim": 16, "ffn_dim": 48} if name == "OPT" else {"intermediate_size": 48}),
)
torch.manual_seed(0)
model = getattr(transformers, name + "ForCausalLM")(config).eval()
class Tokenizer:
    pad_token_id = 1
rows = [[5 + n + i for i in range(4 + n)] for n in range(3)]
examples = [Example((TokenSequence((*r, 2), (Target(len(r) - 1, 2, 0),)),), None) for r in rows]
engine = TorchEngine(model, Tokenizer(), low_rank=(2, 50), train_batch_size=4)
engine.update([Record(0, 3, 0.0, 0.0, 0.5, 1e-1, 0, 3)])
probes, both = TwoPoint(0, 1e-1).probes(1), []
write_both, rest = LowRankSum._write_both, LowRankSum.rest
LowRankSum._write_both = lambda *a: both.append("low") or write_both(*a)
LowRankSum.rest = lambda s: both.append("rest") or rest(s)
on_gpu[0] = False
expected = engine.losses(examples, probes)
assert not both
engine._low_rank.readers.next.clear(), engine._low_rank.readers.read_whole.clear()
on_gpu[0], engine._graphs, engine._checked_reads = True, Graphs(torch.device("cpu")), False
padding = engine.work.padding
first = engine.losses(examples, probes)
# fc2 or down of two layers; k and v, on Llama also q, and the head.
assert (both.count("low"), both.count("rest")) == ((2, 5) if name == "OPT" else (2, 7)), both
assert engine.work.padding == 3 * padding  # rows of 5, 6 and 7 tokens, here as rows of 8
assert torch.equal(first, engine.losses(examples, probes))
assert (first - expected).abs().max() < 1e-5 and (expected[0] - expected[1]).abs().max() > 1e-2
"""
    )


def test_layer_norm():
    interpreted("""
from mezo.kernels import layers
generator = torch.Generator().manual_seed(0)
for probes, rows, size in ((2, 3, 64), (1, 5, 100), (3, 1, 7)):
    x = 3 + 2 * torch.randn(probes, rows, size, generator=generator)
    weight, bias = torch.randn(2, probes, size, generator=generator)
    for b in (None, bias, bias[:1].expand(probes, -1)):
        assert (layers._norm_on_gpu(x, weight, b, 1e-5) - layers.layer_norm(x, weight, b, 1e-5)).abs().max() < 1e-5
""")


@pytest.mark.parametrize(("dtype", "queries"), [("bfloat16", 2), ("float16", 1)])
def test_deferred_updates(dtype, queries):
    """Updates that wait for the next pass leave the bits of updates that don't: tied embeddings, several passes of a
    step, shared beginnings, evaluations and saves in between, and a pass that is interrupted."""
    interpreted(
        f"dtype, queries = torch.{dtype}, {queries}"
        + """
import copy
from transformers import OPTConfig, OPTForCausalLM
from mezo.engines.torch import dense
from mezo.engines.torch.dense import ProbeKeys
from mezo.engines.torch.engine import TorchEngine
from mezo.estimator import Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence, batch_loss
dense._LINEAR_BLOCK_GPU = (64 * 16, 64 * 16)  # a layer of two blocks
dense._MOST_FORMED = 0  # under two probes at once
torch.manual_seed(0)
config = OPTConfig(hidden_size=16, word_embed_proj_dim=16, ffn_dim=128, num_hidden_layers=1, num_attention_heads=2,
                   vocab_size=40, max_position_embeddings=20)
model = OPTForCausalLM(config).eval().requires_grad_(False).to(dtype)
layers, others = {"v_proj", "fc1", "fc2"}, {"final_layer_norm"} | ({"embed_tokens"} if queries == 1 else set())
for name, parameter in model.named_parameters():  # fewer take less time
    parameter.requires_grad_(bool({*name.split(".")} & (layers | others)))
def engine_with(deferring):
    class Tokenizer:
        pad_token_id = 1
    engine = TorchEngine(copy.deepcopy(model), Tokenizer(), weight_decay=0.1, train_batch_size=2)
    engine._keys = ProbeKeys(engine.space, torch.device("cpu"))
    engine._defers = deferring
    return engine
engines = [engine_with(True), engine_with(False)]
rows = [[5 + n + i for i in range(4 + n)] for n in range(3)]
examples = [Example((TokenSequence((*r, 2), (Target(len(r) - 1, 2, 0),)),), None) for r in rows]
estimator = TwoPoint(0, 1e-1, num_queries=queries)
def step(engine, number):
    probes = estimator.probes(number)
    losses = engine.losses(examples, probes)
    outcomes = estimator.outcomes(probes, [batch_loss(examples, losses_N) for losses_N in losses])
    engine.update([Record(number, *o, 1e-1, 0, 3, n, queries) for n, o in enumerate(outcomes)])
    return losses
start = engines[0].digest()
for number in range(2):
    assert torch.equal(*(step(engine, number) for engine in engines)), number
deferred = engines[0]._keys.deferred
assert {name.split(".")[-2] for name in deferred.names} == layers
waiting = [engine.space.parameters["model.decoder.layers.0.fc1.weight"].clone() for engine in engines]
assert not torch.equal(*waiting) and len(deferred._left) > len(layers)
assert torch.equal(*(engine.score(examples).logprobs_T for engine in engines)) and not deferred._left
assert engines[0].digest() == engines[1].digest() != start
step(engines[0], 2), step(engines[1], 2)
taken, count = deferred.taken, itertools.count()
def interrupted(block):
    taken(block)
    if next(count) == 3:
        raise torch.OutOfMemoryError("injected")
deferred.taken = interrupted
losses = [engine.losses(examples, estimator.probes(3)) for engine in engines]
assert next(count) == 4 and not deferred._left
assert (losses[0] - losses[1]).abs().max() < 0.1
for engine in engines:
    engine.update([Record(3, 5, 0.0, 0.0, 0.5, 1e-1, 0, 3, n, queries) for n in range(queries)])
assert deferred._left and engines[0].digest() == engines[1].digest()
engines[0].update([Record(4, 5, 0.0, 0.0, 0.5, 1e-1, 0, 3)] * 3)  # of another number: at once
assert not deferred._left
"""
    )


# Graphs emulated by running the captured pass again.
EMULATED = """
import copy
from mezo.engines.torch import deferred, dense, engine as engines, passes
from mezo.engines.torch.dense import ProbeKeys
from mezo.engines.torch.graphs import Graphs
from mezo.estimator import UNPERTURBED, OneSided, Record
from mezo.objective import Example, Target, TokenSequence
capturing = [False]
deferred.is_capturing = dense.is_capturing = engines.is_capturing = lambda tensor: capturing[0]
class Emulated(Graphs):
    def __init__(self, engine):
        super().__init__(torch.device("cpu"))
        self._captures, self.engine = True, engine
    def _run_in_pool(self, kept, forward):
        return forward(kept.static)
    def _capture(self, kept, forward):
        forward(kept.static)
        weights, made, real = [], [], self.engine._weights
        def as_captured():
            made.clear()
            def formed(probes):  # the first time kept, afterwards the same: a graph's kernels do not change
                if len(weights) == len(made):
                    weights.append(real(probes))
                made.append(weights[len(made)])
                if made[-1] is not None:
                    made[-1].captured.clear()
                    made[-1]._has_small = False
                return made[-1]
            self.engine._weights, capturing[0] = formed, True
            try:
                return forward(kept.static)
            finally:
                self.engine._weights, capturing[0] = real, False
        kept.output = as_captured()
        kept.graph = type("Graph", (), {"replay": lambda graph: kept.output.copy_(as_captured())})()
class Tokenizer:
    pad_token_id = 1
"""


def test_deferred_updates_in_captured_passes():
    """With a pass for each probe, one of them unperturbed, and with unperturbed passes alone: losses and bits are those
    of passes that are never captured."""
    interpreted(
        EMULATED
        + """
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
torch.manual_seed(0)
config = GPTNeoXConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=40,
                       max_position_embeddings=32, initializer_range=0.3)
model = GPTNeoXForCausalLM(config).eval().requires_grad_(True).bfloat16()
sequences = [TokenSequence((5 + n, 6, 7, 8, 2), (Target(3, 2, 0),)) for n in range(3)]
examples = [Example((sequence,), None) for sequence in sequences]
def engine_with(defers):
    engine = engines.TorchEngine(copy.deepcopy(model), Tokenizer())
    engine._keys, engine._defers = ProbeKeys(engine.space, torch.device("cpu")), defers
    if defers:
        engine._graphs = Emulated(engine)
    return engine
ours, plain = engine_with(True), engine_with(False)
def both(probes):
    found, expected = (engine.losses(examples, probes) for engine in (ours, plain))
    assert (found - expected).abs().max() < 0.02, (found, expected)
    return expected
def step(number):
    losses = both(OneSided(0, 1e-1, 2).probes(number))
    assert min((a - b).abs().max() for a, b in itertools.combinations(losses, 2)) > 0.05  # probes can be told apart
    for engine in (ours, plain):
        engine.update([Record(number, 100 + number, 0.0, 0.0, 0.5, 1e-1, 0, 3)])
for number in range(4):
    step(number)
assert ours._keys.deferred._left and {shape.moved for shape in ours._graphs._kept} == {True, False}
assert all(kept.graph is not None for kept in ours._graphs._kept.values())
assert ours.digest() == plain.digest()
step(4)
for _ in range(3):
    both([UNPERTURBED])
step(5)
assert ours.digest() == plain.digest() and ours._graphs._captures
"""
    )


def test_deferred_updates_of_a_large_model():
    """Probes by twos, the last of them unperturbed, layers formed in blocks, rows of several lengths, weight decay."""
    interpreted(
        EMULATED
        + """
from transformers import OPTConfig, OPTForCausalLM
passes.LARGE_FLOPS = 0.0
dense._LINEAR_BLOCK_GPU, dense._MOST_FORMED = (64 * 16, 64 * 16), 0
torch.manual_seed(0)
config = OPTConfig(hidden_size=16, word_embed_proj_dim=16, ffn_dim=96, num_hidden_layers=1, num_attention_heads=2,
                   vocab_size=40, max_position_embeddings=40, init_std=0.3)
model = OPTForCausalLM(config).eval().requires_grad_(False).bfloat16()
for name, parameter in model.named_parameters():
    parameter.requires_grad_(bool({*name.split(".")} & {"fc1", "final_layer_norm"}))
def engine_with(defers):
    engine = engines.TorchEngine(copy.deepcopy(model), Tokenizer(), weight_decay=0.1, train_batch_size=3)
    engine._keys, engine._defers = ProbeKeys(engine.space, torch.device("cpu")), defers
    if defers:
        engine._graphs = Emulated(engine)
    return engine
ours, plain = engine_with(True), engine_with(False)
rows = [[5 + n + i for i in range(4 + n % 3 * 4)] for n in range(4)]
examples = [Example((TokenSequence((*r, 2), (Target(len(r) - 1, 2, 0),)),), None) for r in rows]
estimator = OneSided(0, 1e-1, 3)
assert [len(some) for some in ours._together(estimator.probes(0))] == [2, 2]
assert [len(some) for some in plain._together(estimator.probes(0))] == [4]
for number in range(5):
    batch, probes = examples[: (3, 2)[number % 2]], estimator.probes(number)
    found, expected = (engine.losses(batch, probes) for engine in (ours, plain))
    assert (found - expected).abs().max() < 0.05, (found, expected)
    seeds = enumerate(probe.seed for probe in probes[:3])
    records = [Record(number, seed, 0.0, 0.0, 0.5 + n, 2e-2, 1, len(batch), n, 3) for n, seed in seeds]
    for engine in (ours, plain):
        engine.update(records)
    if number == 2:
        assert ours.digest() == plain.digest(), number
assert ours._keys.deferred._left and any(kept.graph is not None for kept in ours._graphs._kept.values())
assert ours.digest() == plain.digest()
"""
    )
