"""Low-rank directions against weights written out, and several probes in one traversal against one after the other."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.optim._muon import _zeropower_via_newtonschulz
from transformers import AutoConfig, AutoModelForCausalLM

from mezo import MeZOConfig, UserError, mezo_finetune, philox
from mezo.api import build_trainer, replay
from mezo.engines.torch import dense
from mezo.engines.torch import engine as engine_module
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.generation import generate
from mezo.engines.torch.graphs import Graphs
from mezo.engines.torch.low_rank import LowRank
from mezo.engines.torch.optimizer import Adam, Momentum, Muon
from mezo.engines.torch.perturbed import BATCHED_MODELS, PerturbedForward
from mezo.engines.torch.space import ParameterSpace
from mezo.estimator import Probe, Record, TwoPoint
from mezo.kernels.layers import LowRankSum
from tests.conftest import SENTIMENT_ROWS

MODELS = ["llama", "opt", "gpt2", "bert", "roberta"]
LOW_RANK = {"direction": "low_rank", "direction_rank": 2, "direction_refresh_steps": 4}
SUBSPACE = {**LOW_RANK, "direction": "subspace", "direction_rank": 3}
DIRECTIONS = {"dense": {}, "low_rank": LOW_RANK, "subspace": SUBSPACE}
# Float32 on both sides; products of other shapes sum in other orders.
TOLERANCE = 2e-5


def options_for(name, **more):
    mask = " [MASK] ." if name in ("bert", "roberta") else ""
    words = {"0": "bad", "1": "good"}
    return {"template": f"{{text}} it was{mask}", "label_words": words, "dtype": "float32", "use_cpu": True, **more}


def engine_for(path, name, **more):
    config = MeZOConfig(model_name_or_path=path, seed=3, **options_for(name, **more))
    trainer = build_trainer(config, SENTIMENT_ROWS[:6])
    return noisy(trainer.engine), trainer.train_examples


def noisy(engine):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in engine.space.parameters.values():  # biases are 0 and norms 1 in a fresh model
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if engine._low_rank is not None:
        engine._low_rank.reset()
    return engine


def numbers(probes, step=0):
    return [Record(step, p.seed, 0.0, 0.0, c, 0.05, 0, 0, q, 2) for q, (p, c) in enumerate(probes)]


PROBES = {
    "two-point": [Probe(7, 0.05), Probe(7, -0.05)],
    "two queries": [Probe(7, 0.05), Probe(7, -0.05), Probe(8, 0.05), Probe(8, -0.05)],
    "one-sided": [Probe(7, 0.0), Probe(7, 0.05), Probe(8, 0.05)],
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("probes", PROBES.values(), ids=PROBES)
@pytest.mark.parametrize("name", MODELS)
def test_probes_in_one_traversal(model_folder, name, probes, direction):
    engine, examples = engine_for(model_folder(name), name, **DIRECTIONS[direction])
    engine.update(numbers([(Probe(5, 0), 0.3), (Probe(6, 0), -0.2)]))
    assert engine._together(probes) == [probes]
    together = engine.losses(examples, probes)
    one_by_one = torch.cat([engine.losses(examples, [probe]) for probe in probes])
    assert (together - one_by_one).abs().max() < TOLERANCE
    assert (together[0] - together[1]).abs().min() > 10 * TOLERANCE  # probes that are mixed up show


def test_batched_models_are_known(model_folder):
    """Those without a folder of their own in the tests: models of random weights."""
    llama, examples = engine_for(model_folder("llama"), "llama")
    others = sorted(BATCHED_MODELS - set(MODELS))
    assert others == ["mistral", "qwen2", "qwen3"]
    for model_type, low_rank in itertools.product(others, (None, (2, 4))):
        config = AutoConfig.for_model(
            model_type, vocab_size=llama.model.config.vocab_size, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).eval()
        engine = noisy(TorchEngine(model, llama.tokenizer, low_rank=low_rank))
        engine.update(numbers([(Probe(5, 0), 0.3), (Probe(6, 0), -0.2)]))
        together = engine.losses(examples, PROBES["two queries"])
        one_by_one = torch.cat([engine.losses(examples, [probe]) for probe in PROBES["two queries"]])
        assert (together - one_by_one).abs().max() < TOLERANCE


def written_out(engine, probe, weights, window_seed, kind="low_rank"):
    """A copy of the model whose weights are `weights` + scale · U Vᵀ / √r, vectors + scale · z."""
    model = copy.deepcopy(engine.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(
                    weights[name] + probe.scale * direction(name, parameter.shape, probe.seed, window_seed, kind)
                )
    return model


def direction(name, shape, seed, window_seed, kind="low_rank"):
    """z as the module's text defines it, float64."""

    def normals(seed, purpose, count):
        starts = torch.tensor([0])
        return philox.reference_normals(seed, philox.stream_id(purpose, name), starts, count)[0].double()

    if len(shape) < 2:
        return normals(seed, "direction", math.prod(shape)).view(shape)
    rows, columns, rank = math.prod(shape[:-1]), shape[-1], DIRECTIONS[kind]["direction_rank"]
    if kind == "subspace":
        u, v = normals(window_seed, "left basis", rows * rank), normals(window_seed, "basis", columns * rank)
        core = normals(seed, "direction", rank * rank).view(rank, rank)
        return (u.view(rows, rank) @ core @ v.view(columns, rank).T / rank).view(shape)
    u, v = normals(seed, "direction", rows * rank), normals(window_seed, "basis", columns * rank)
    return (u.view(rows, rank) @ v.view(columns, rank).T / math.sqrt(rank)).view(shape)


@pytest.mark.parametrize("kind", ["low_rank", "subspace"])
@pytest.mark.parametrize("name", MODELS)
def test_probes_updates_and_folds_are_those_of_weights_written_out(model_folder, name, kind):
    """Ten steps over windows of four, with two directions a step and weight decay, in float64 beside the engine."""
    engine, examples = engine_for(model_folder(name), name, weight_decay=0.5, **DIRECTIONS[kind])
    plain, _ = engine_for(model_folder(name), name)
    weights = {n: p.detach().double().clone() for n, p in engine.space.parameters.items()}
    for step in range(10):
        seeds = [100 + 2 * step, 101 + 2 * step]
        window_seed = 100 + 2 * (step // 4 * 4)
        for probe in (Probe(seeds[0], 0.05), Probe(seeds[0], -0.05)):
            plain.model.load_state_dict(written_out(engine, probe, weights, window_seed, kind).state_dict())
            expected = plain.losses(examples, [Probe(1, 0.0)])
            assert (engine.losses(examples, [probe]) - expected).abs().max() < 5 * TOLERANCE
        engine.update(numbers([(Probe(seed, 0), c) for seed, c in zip(seeds, (0.3, -0.2), strict=True)], step))
        for n, weight in weights.items():
            weight.mul_(1 - 0.05 * 0.5 if weight.ndim > 1 else 1.0)
            for seed, c in zip(seeds, (0.3, -0.2), strict=True):
                weight.sub_(0.05 * c * direction(n, weight.shape, seed, window_seed, kind))
            assert (engine._low_rank.folded(n).double() - weight).abs().max() < 1e-5
        assert engine._low_rank.is_folded == (step % 4 == 3)
    plain.model.load_state_dict(written_out(engine, Probe(0, 0.0), weights, 0, kind).state_dict())
    scores = [e.score(examples).logprobs_T for e in (engine, plain)]
    assert (scores[0] - scores[1]).abs().max() < 5 * TOLERANCE


@pytest.mark.parametrize("kind", ["low_rank", "subspace"])
def test_directions_have_unit_variance_and_estimate_the_gradient(kind):
    """E[z zᵀ] = 1: over many windows the mean of (g · z) z is g."""
    gradient = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    total, squares, count = torch.zeros(6, 5).double(), torch.zeros(6, 5).double(), 6000
    for seed in range(count):
        z = direction("w", (6, 5), seed, seed + 10**6, kind)
        total += (gradient * z).sum() * z
        squares += z.square()
    assert (squares / count - 1).abs().max() < 0.15
    assert torch.nn.functional.cosine_similarity((total / count).flatten(), gradient.flatten(), dim=0) > 0.98
    assert (total / count).norm() == pytest.approx(float(gradient.norm()), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folds_far_below_the_rounding_step_add_up(dtype):
    """300 windows whose changes are a tenth of the distance between neighbours of half precision: lost if rounded to
    the nearest, kept on average."""
    start = torch.full((64, 48), 1.0)
    finer, coarse = start.clone(), start.to(dtype)
    states = [LowRank(ParameterSpace({"w": w}), 2, 2) for w in (finer, coarse)]
    ulp = torch.finfo(dtype).eps
    for step in range(600):
        for state in states:
            state.update([Record(step, step, 0.0, 0.0, 1.0, ulp / 20, 0, 0)], 0.0)
    drift = (finer - start).flatten()
    assert drift.abs().mean() > 0.5 * ulp
    followed = (coarse.float() - start).flatten()
    assert float(followed @ drift / (drift @ drift)) == pytest.approx(1, abs=0.25)  # standard error 0.06


def test_a_probe_in_half_precision_is_not_lost(model_folder):
    """What a window has collected does not swallow ε: B + εU stays in float32."""
    config = {**options_for("llama", **LOW_RANK), "dtype": "bfloat16"}
    trainer = build_trainer(MeZOConfig(model_name_or_path=model_folder("llama"), seed=3, **config), SENTIMENT_ROWS[:6])
    engine = trainer.engine
    engine.update(numbers([(Probe(5, 0), 400.0)]))
    weights = engine._low_rank.probes([Probe(6, 1e-4), Probe(6, -1e-4)])
    left_PRr = weights._left(next(n for n, p in engine.space.parameters.items() if p.ndim > 1))
    assert left_PRr.dtype == torch.float32
    plus_Rr, minus_Rr = left_PRr
    assert plus_Rr.abs().mean() > 1e4 * (plus_Rr - minus_Rr).abs().mean() / 2
    assert ((plus_Rr - minus_Rr) / 2e-4).std() == pytest.approx(1, abs=0.2)


def test_other_reads_of_a_matrix(model_folder):
    """A function that the mode does not know gets the matrix itself, with one probe."""
    engine, _ = engine_for(model_folder("llama"), "llama", **LOW_RANK)
    engine.update(numbers([(Probe(5, 0), 0.3)]))
    name, parameter = next((n, p) for n, p in engine.space.parameters.items() if "q_proj" in n)
    probe = Probe(9, 0.05)
    expected = engine._low_rank.folded(name).double() + 0.05 * direction(name, parameter.shape, 9, 5)
    with torch.no_grad(), PerturbedForward(engine._low_rank.probes([probe])):
        seen = torch.einsum("oi->io", parameter)
    assert (seen.T.double() - expected).abs().max() < 1e-5
    with pytest.raises(AssertionError), PerturbedForward(engine._low_rank.probes([probe, probe])):
        torch.einsum("oi->io", parameter)


@pytest.mark.parametrize(
    ("name", "fused", "shared"),
    # Of a layer q (times its scale), fc1 (relu), out_proj and fc2 (residual); gate (silu), up (times that), o and down.
    [("opt", 4, ["q_proj", "k_proj", "v_proj"]), ("llama", 4, ["gate_proj", "up_proj"])],
)
def test_what_reads_a_layer_finishes_it(model_folder, monkeypatch, name, fused, shared):
    """One pass over memory where that function reads and writes every element anyway, and x V once for its readers."""
    engine, examples = engine_for(model_folder(name), name, **LOW_RANK)
    then, linear, products = LowRankSum.then, F.linear, []
    calls = []
    monkeypatch.setattr(LowRankSum, "then", lambda *a, **k: calls.append(k) or then(*a, **k))
    monkeypatch.setattr(F, "linear", lambda x, w, *b: products.append(w.shape) or linear(x, w, *b))
    engine.losses(examples[:2], PROBES["two-point"])
    layers = engine.model.config.num_hidden_layers
    assert len(calls) == fused * layers
    first = sum(shape[0] == 8 for shape in products)
    groups = {group for n in engine.space.parameters for group in [engine._low_rank.readers.of(n)] if len(group) > 1}
    assert sorted(shared) in [sorted(n.split(".")[-2] for n in group) for group in groups]
    products.clear()
    engine.losses(examples[:2], PROBES["two-point"])
    assert sum(shape[0] == 8 for shape in products) == first - sum(len(group) - 1 for group in groups)


class Reader(torch.nn.Module):
    """Reads a linear layer's output in a way of its own."""

    def __init__(self, read):
        super().__init__()
        self.layer = torch.nn.Linear(6, 4)
        self.read = read

    def forward(self, x):
        return self.read(self.layer(x))


READS = {
    "nothing": lambda y: y,
    "list": lambda y: torch.cat([y, y]),
    "keyword": lambda y: torch.add(input=y, other=1.0),
    "number": lambda y: y * 2,
    "times": lambda y: 0.3 * y,
    "relu twice": lambda y: F.relu(y) + y,
    "silu": lambda y: F.silu(y) * y,
    "product": lambda y: torch.full_like(y, 0.5) * y,
    "itself": lambda y: y + y,
    "two layers": lambda y: (y + torch.ones(())) + y,
    "dropout": lambda y: F.dropout(y, 0.5, training=False) + torch.ones_like(y),
    "in place": lambda y: y.add_(1.0),
    "slice": lambda y: y[..., :2].relu(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("read", READS)
def test_an_unfinished_layer_is_whole_for_every_reader(read, dtype):
    torch.manual_seed(0)
    model = Reader(READS[read]).requires_grad_(False).to(dtype)
    low_rank = LowRank(ParameterSpace(dict(model.named_parameters())), 2, 4)
    x = torch.randn(2, 5, 6).to(dtype)
    probes = [Probe(7, 0.3), Probe(7, -0.3)]
    with PerturbedForward(low_rank.probes(probes)):
        y = model(x)
    start = model.layer.weight.double(), model.layer.bias.double()
    expected = []
    for probe, x_N in zip(probes, x.double().split(1), strict=True):
        z = direction("layer.weight", start[0].shape, 7, 7)
        b = philox.reference_normals(7, philox.stream_id("direction", "layer.bias"), torch.tensor([0]), 4)[0].double()
        expected.append(model.read(F.linear(x_N, start[0] + probe.scale * z, start[1] + probe.scale * b)))
    halves = y.double().chunk(2) if read != "list" else (y[[0, 2]], y[[1, 3]])
    # bfloat16: V and every step of the way are rounded to 2⁻⁸ of numbers up to about 4.
    assert (torch.stack(expected) - torch.stack(list(halves))).abs().max() < (1e-5 if dtype == torch.float32 else 0.1)


def test_a_pass_that_fails_shows_nothing_of_its_readers(monkeypatch):
    """A relu that does not fit into memory is no whole read of its layer."""
    model = Reader(F.relu).requires_grad_(False)
    low_rank = LowRank(ParameterSpace(dict(model.named_parameters())), 2, 4)

    def fails(*_, **__):
        raise MemoryError

    monkeypatch.setattr(LowRankSum, "then", fails)
    with pytest.raises(MemoryError), PerturbedForward(low_rank.probes(PROBES["two-point"])):
        model(torch.randn(2, 5, 6))
    assert not low_rank.readers.read_whole


def test_what_several_matrices_read_comes_next_in_one_way():
    """What the first pass shows holds: the second and third compute x V by the same products."""
    matrices = {name: torch.randn(6, 6) for name in "aqkv"}
    low_rank = LowRank(ParameterSpace(matrices), 4, 50)  # of rank 4 only two share a product
    found = []
    for _ in range(3):
        probes = low_rank.probes(PROBES["two-point"])
        found.append(probes.right_after("a"))
        x = probes.linear(torch.randn(2, 5, 6), matrices["a"], None, False).then("relu")
        for name in "qkv":
            probes.linear(x, matrices[name], None, False)
    assert found == [None, None, None]


def test_generation_is_made_again_when_it_shows_something_new(model_folder, monkeypatch):
    engine, examples = engine_for(model_folder("opt"), "opt", **LOW_RANK)
    engine._graphs = Graphs(torch.device("cpu"))
    calls = []
    monkeypatch.setattr(engine_module, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    prompts = [e.sequences[0].input_ids for e in examples[:2]]
    first = engine.generate(prompts, PROBES["two-point"], 3, None)
    assert len(calls) == 2
    assert engine.generate(prompts, PROBES["two-point"], 3, None) == first and len(calls) == 3


def test_trained_lines_of_a_dense_direction_are_drawn_once_for_both_signs(model_folder, monkeypatch):
    engine, examples = engine_for(model_folder("llama"), "llama")
    drawn = []
    both = dense.philox.add_normals_both

    def counting(base_N, *arguments):
        drawn.append(len(base_N))
        return both(base_N, *arguments)

    monkeypatch.setattr(dense.philox, "add_normals_both", counting)
    monkeypatch.setattr(dense.philox, "add_normals", lambda *_: pytest.fail("z of one sign alone"))
    engine.losses(examples, PROBES["two-point"])
    embedding = engine.model.get_input_embeddings().weight
    assert sum(drawn) == engine.space.num_parameters() - embedding.numel()


@pytest.mark.parametrize("num_probes", [1, 2])
def test_an_activation_takes_no_memory_under_several_probes(model_folder, num_probes):
    engine, examples = engine_for(model_folder("opt"), "opt")
    layer, places = engine.model.model.decoder.layers[0], []
    for module in (layer.fc1, layer.activation_fn):
        module.register_forward_hook(lambda _, inputs, output: places.append(output.data_ptr()))
    engine.losses(examples[:1], [Probe(5, scale) for scale in (1e-3, -1e-3)[:num_probes]])
    assert (places[0] == places[1]) == (num_probes == 2)


@pytest.mark.parametrize("kind", ["low_rank", "subspace"])
@pytest.mark.parametrize("optim", ["momentum", "adam"])
def test_momentum_and_adam_are_pytorchs_on_what_is_drawn(kind, optim):
    """Two queries a step. The gradient is Σ coefficient · U (LOZO-M) or the core's r × r (SubZero), float64 beside it;
    W moves by lr · step · Vᵀ / √r or lr · U · step · Vᵀ / r, and the state starts anew with each window."""
    shape, rank, rate = (6, 5), DIRECTIONS[kind]["direction_rank"], 0.1
    weight, bias = torch.ones(shape), torch.ones(4)
    made = {"momentum": lambda: Momentum(0.8), "adam": lambda: Adam(0.8, 0.95, 1e-6)}[optim]()
    state = LowRank(ParameterSpace({"w": weight, "b": bias}), rank, 3, made, subspace=kind == "subspace")
    expected_W, expected_b = weight.double(), bias.double()

    def drawn(name, shape, seed, purpose="direction"):
        stream = philox.stream_id(purpose, name)
        return philox.reference_normals(seed, stream, torch.tensor([0]), math.prod(shape))[0].double().view(shape)

    for step in range(7):
        if step % 3 == 0:
            window_seed = 100 + 2 * step
            right = drawn("w", (shape[1], rank), window_seed, "basis").T / math.sqrt(rank)
            left = drawn("w", (shape[0], rank), window_seed, "left basis") / math.sqrt(rank)
            theirs = [torch.zeros((rank if kind == "subspace" else shape[0], rank)).double(), torch.zeros(4).double()]
            parameters = [torch.nn.Parameter(t) for t in theirs]
            reference = {
                "momentum": lambda p: torch.optim.SGD(p, lr=rate, momentum=0.8, dampening=0.8),
                "adam": lambda p: torch.optim.Adam(p, lr=rate, betas=(0.8, 0.95), eps=1e-6),
            }[optim](parameters)
            if optim == "momentum":  # PyTorch begins with the whole first gradient; ours with a share, as later steps
                for p in parameters:
                    p.grad = torch.zeros_like(p)
                reference.step()
            start_W, start_b = expected_W, expected_b
        records = numbers([(Probe(100 + 2 * step, 0), 0.3), (Probe(101 + 2 * step, 0), -0.7)], step)
        state.update([dataclasses.replace(r, learning_rate=rate) for r in records], 0.0)
        for p, name in zip(parameters, "wb", strict=True):
            p.grad = sum(r.coefficient * drawn(name, p.shape, r.seed) for r in records)
        reference.step()
        moved = (left @ parameters[0] if kind == "subspace" else parameters[0]) @ right
        expected_W, expected_b = start_W + moved.detach(), start_b + parameters[1].detach()
        assert torch.allclose(state.folded("w").double(), expected_W, atol=1e-5), step
        assert torch.allclose(state.folded("b").double(), expected_b, atol=1e-5), step


def test_muon_orthogonalises_cores():
    """Against the singular vectors of the momentum and, for vectors, Adam; one core is of rank 2, one is 0."""
    rank, optimizer = 4, Muon(0.9, 4, 0.8, 0.95, 1e-6)
    adam = Adam(0.8, 0.95, 1e-6)
    optimizer.num_matrix = 3 * rank * rank
    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(3, rank, rank, dtype=torch.float64)
    for _ in range(3):
        cores = torch.randn(3, rank, rank, generator=generator) * torch.tensor([1e-3, 1e3, 0.0])[:, None, None]
        cores[1, :, 2:] = 0.0
        vectors = torch.randn(5, generator=generator)
        step = optimizer.step(torch.cat((cores.flatten(), vectors)))
        mean = 0.9 * mean + 0.1 * cores.double()
        assert torch.equal(step[-5:], adam.step(vectors))
        found = step[:-5].view(3, rank, rank).double() / math.sqrt(rank)
        u, s, v = torch.linalg.svd(mean)
        inside = u.mT @ found @ v.mT  # what is left of the singular values
        diagonal = inside.diagonal(dim1=1, dim2=2)
        assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-4
        large = s > 0.1 * s[:, :1].clamp(min=1e-30)
        assert large.sum(dim=1).tolist()[1:] == [2, 0] and large[0].sum() > 1
        assert ((diagonal[large] > 0.6) & (diagonal[large] < 1.3)).all()
        assert (diagonal[s == 0.0].abs() < 1e-4).all() and (found[2] == 0.0).all()
        theirs = _zeropower_via_newtonschulz(mean[0].float(), Muon.coefficients, 5, 1e-7)  # in bfloat16
        assert (theirs - found[0]).abs().max() < 0.05


# --- runs -----------------------------------------------------------------------------------------------------------


def train(model_folder, out, **more):
    setting = {"learning_rate": 1e-4, "batch_size": 4, "seed": 5, "disable_tqdm": True, "logging_steps": 1}
    options = {**setting, **options_for("llama"), **LOW_RANK, **more}
    return mezo_finetune(model_folder("llama"), SENTIMENT_ROWS[:16], output_dir=out, **options)


def tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "kind",
    [LOW_RANK, *({**SUBSPACE, "num_queries": 2, "optim": optim} for optim in ("adam", "muon"))],
    ids=["low rank", "subspace", "subspace, muon"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("steps", [8, 10], ids=["folded", "within a window"])
def test_replay_and_resume_are_bit_identical(model_folder, tmp_path, dtype, steps, kind):
    whole = train(model_folder, tmp_path / "whole", num_steps=steps, dtype=dtype, **kind)
    expected = tensors(whole.model_path)
    assert all(map(torch.equal, tensors(replay(whole.output_dir, tmp_path / "replayed")).values(), expected.values()))
    for stop, save_steps in itertools.product((4, 5, 7), (2, 3)):
        out = tmp_path / f"{stop} {save_steps}"
        train(model_folder, out, num_steps=stop, dtype=dtype, save_steps=save_steps, **kind)
        more = train(
            model_folder, out, num_steps=steps, dtype=dtype, save_steps=save_steps, resume_from_checkpoint=True, **kind
        )
        found = tensors(more.model_path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), (stop, save_steps)


def test_it_learns(model_folder, tmp_path):
    result = train(
        model_folder, tmp_path / "run", num_steps=600, learning_rate=9e-4, direction_refresh_steps=20, logging_steps=50,
        eval_dataset=SENTIMENT_ROWS[:16], eval_on_start=True, eval_steps=600,
    )  # fmt: skip
    import json

    log = json.loads((result.output_dir / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_peft": True}, "an adapter is of low rank already"),
        ({"normalize_perturbations": True}, "needs direction dense"),
        ({"optim": "muon"}, "needs direction subspace"),
        ({"direction_rank": 0}, "direction_rank must be at least 1"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        MeZOConfig(model_name_or_path="m", direction="low_rank", **options)


def test_estimator_and_window_agree_on_the_seed():
    """V comes from a window's first record, which is the first probe's."""
    probes = TwoPoint(0, 1e-3).probes(0)
    state = LowRank(ParameterSpace({"w": torch.zeros(4, 3)}), 2, 5)
    state.probes(probes)
    before = state.right["w"].clone()
    state.update([Record(0, probes[0].seed, 0.0, 0.0, 1.0, 0.1, 0, 0)], 0.0)
    assert torch.equal(state.right["w"], before)
    state.probes(TwoPoint(0, 1e-3).probes(1))
    assert torch.equal(state.right["w"], before)


def test_vectors_begin_where_a_gpu_reads_them_fast(model_folder):
    """Whatever the matrices before them take: unaligned weights made layer norms twice as slow."""
    engine, _ = engine_for(model_folder("opt"), "opt", **LOW_RANK)
    probes = engine._low_rank.probes(PROBES["two-point"])
    norms = [p for name, p in engine.space.parameters.items() if "layer_norm" in name]
    assert norms and engine._low_rank.num_left % 8  # of 16 bits in 16 bytes
    assert all(probes.whole(p).storage_offset() % 8 == 0 for p in norms)
