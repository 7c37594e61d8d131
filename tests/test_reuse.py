"""What is computed once gives the losses of computing everything, for one pass and along whole trajectories."""

import json
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mezo import MeZOConfig, UserError, journal
from mezo.activation import activate, invocation_tokens
from mezo.adapter import add_adapter
from mezo.api import eval_model, make_engine, mezo_finetune, replay, summary
from mezo.encoding import make_encoder
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.graphs import Graphs
from mezo.engines.torch.layers import first_trainable, trainable_names
from mezo.engines.torch.loading import load_model, load_model_config, load_tokenizer
from mezo.engines.torch.reuse import TensorStore, prompt_length, shared_prefixes
from mezo.estimator import Probe, Record, TwoPoint
from mezo.objective import Example, Target, TokenSequence, batch_loss, common_prefix, example_losses
from tests.conftest import SENTIMENT_ROWS
from tests.speed_table import INVOCATION as TABLE_INVOCATION
from tests.speed_table import TABLE, examples_of

# Float32 on both sides; products over other shapes sum in other orders.
TOLERANCE = 1e-5
DECODERS = ["llama", "opt", "gpt2", "qwen2"]
INVOCATION = (7, 8)
COMMON = 500  # tokens


def engine_for(
    folder, *, share, peft=True, prefix=False, alora=False, layers=None, store_bytes=1_000_000_000, dense_cost=0
):
    config = MeZOConfig(
        model_name_or_path=folder, use_peft=peft, dtype="float32", use_cpu=True, seed=3, trainable_layers=layers,
        enable_kv_cache_optimization=share, kv_cache_gb=store_bytes / 1e9,
        **({"lora_variant": "alora", "alora_invocation_tokens": list(INVOCATION)} if alora else {}),
        **({"peft_type": "prefix_tuning", "num_virtual_tokens": 3} if prefix else {}),
    )  # fmt: skip
    model = load_model(config, "causal_lm").model
    if peft:
        model = add_adapter(model, config, "causal_lm")
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 0 at the start: the adapter would do nothing
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    else:
        names = set(trainable_names(model, layers)) if layers else None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(names is None or name in names)
    engine = make_engine(config, model, load_tokenizer(config))
    type(engine)._cost_of_pass = lambda self, num_probes: dense_cost  # every stage that saves anything
    return engine


@pytest.fixture(autouse=True)
def _cost_of_pass():
    real = TorchEngine._cost_of_pass
    yield
    TorchEngine._cost_of_pass = real


tokens = st.integers(10, 29)


@st.composite
def batches(draw, invocation=()):
    """Examples with a common instruction, prompts of their own, and one to four options."""
    instruction = draw(st.lists(tokens, max_size=12))
    examples = []
    for _ in range(draw(st.integers(1, 5))):
        prompt = [*instruction, *draw(st.lists(tokens, min_size=0 if instruction else 1, max_size=10)), *invocation]
        sequences = []
        for option in range(draw(st.integers(1, 4))):
            answer = draw(st.lists(tokens, min_size=1, max_size=4))
            targets = tuple(Target(len(prompt) - 1 + i, token, option) for i, token in enumerate(answer))
            sequences.append(TokenSequence((*prompt, *answer), targets))
        examples.append(Example(tuple(sequences), draw(st.integers(0, len(sequences) - 1))))
    return activate(examples, invocation) if invocation else examples


quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


TRAINED = {"lora": {}, "full": {"peft": False}, "prefix": {"prefix": True}}


def tokens_of_a_probe(engine, examples):
    """What `engine` computes where every stage that saves anything is formed."""
    total, beginning, groups = 0, (), engine._groups(examples, 64)
    common = engine._common_beginning(examples) if len(groups) > 1 else ()
    for group in groups:
        first, *others = shared_prefixes([examples[n] for n in group], 0, beginning, common)
        total += sum(stage.num_tokens for stage in (first, *others))
        if others and len(first.chunks) == 1:  # a beginning, as far as the pass before has not computed it
            total -= common_prefix([beginning, first.chunks[0]])
            beginning = first.chunks[0]
    return total


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", DECODERS)
def test_shared_prefixes(model_folder, name, trained):
    shared, whole = (engine_for(model_folder(name), share=share, **TRAINED[trained]) for share in (True, False))

    @quick
    @given(batches(), st.integers(0, 100))
    def check(examples, seed):
        probes = TwoPoint(seed, 1e-2).probes(0)
        before = (shared.work.asked, shared.work.computed)
        ours, expected = shared.losses(examples, probes), whole.losses(examples, probes)
        assert (ours - expected).abs().max() < TOLERANCE
        asked, computed = shared.work.asked - before[0], shared.work.computed - before[1]
        assert computed == 2 * tokens_of_a_probe(shared, examples)
        assert asked == 2 * sum(e.num_tokens for e in examples) >= computed

    check()
    assert shared.work.computed < shared.work.asked
    assert whole.work.computed == whole.work.asked


def test_stages_of_options_under_a_common_instruction():
    """By hand: an instruction of 5, prompts of 3 and 4 more tokens, options of 2; the prompt's last token is read."""
    examples = []
    for own in ((1, 2, 3), (4, 5, 6, 7)):
        prompt = (9, 9, 9, 9, 9, *own)
        rows = tuple(
            TokenSequence((*prompt, 20 + o, 30 + o), tuple(Target(len(prompt) - 1 + i, 0, o) for i in range(2)))
            for o in range(3)
        )
        examples.append(Example(rows, 0))
    first, second, last = shared_prefixes(examples, 0)
    assert (first.chunks, first.parents, first.starts) == ([(9,) * 5], [0], [0])
    assert (second.chunks, second.parents, second.starts) == ([(1, 2), (4, 5, 6)], [0, 0], [5, 5])
    assert last.chunks == [(own, 20 + o, 30 + o) for own in (3, 7) for o in range(3)]
    assert (last.parents, last.starts) == ([0, 0, 0, 1, 1, 1], [7, 7, 7, 8, 8, 8])
    # 13 of 51 tokens more than needed are too few for a pass that costs 1,000.
    assert [stage.num_tokens for stage in shared_prefixes(examples, 1000)] == [sum(e.num_tokens for e in examples)]


@pytest.mark.parametrize("name", DECODERS)
def test_activated_lora_is_pefts(model_folder, name, tmp_path):
    """Losses of the saved adapter in PEFT, which masks the adapter in place of cutting the row."""
    engine = engine_for(model_folder(name), share=True, alora=True)
    engine.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alora_invocation_tokens"] == list(INVOCATION)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32), str(tmp_path)
    ).eval()
    plain = engine_for(model_folder(name), share=True)
    apart: list[float] = []

    @quick
    @given(batches(INVOCATION))
    def check(examples):
        expected = []
        for sequence in (s for e in examples for s in e.sequences):
            with torch.no_grad():
                logits = theirs(input_ids=torch.tensor([sequence.input_ids])).logits[0].log_softmax(dim=-1)
            expected += [logits[t.position, t.token] for t in sequence.targets]
        scores = engine.score(examples)
        assert (scores.logprobs_T - torch.stack(expected)).abs().max() < TOLERANCE
        bare = [Example(tuple(TokenSequence(s.input_ids, s.targets) for s in e.sequences), e.label) for e in examples]
        apart.append(float((plain.score(bare).logprobs_T - scores.logprobs_T).abs().max()))

    check()
    # The adapter acts, and not everywhere; on a single token it may differ by less.
    assert max(apart) > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_static_pass(model_folder, name):
    """What a CUDA graph replays, in buckets, against the plain pass; also with other shapes in between."""
    static, plain = (engine_for(model_folder(name), share=True, alora=True) for _ in range(2))
    static._graphs = Graphs(static.model.device)

    @quick
    @given(batches(INVOCATION), st.integers(0, 100))
    def check(examples, seed):
        probes = TwoPoint(seed, 1e-2).probes(0)
        ours, expected = (engine.losses(examples, probes) for engine in (static, plain))
        assert (ours - expected).abs().max() < TOLERANCE
        assert torch.equal(static.score(examples).greedy_T, plain.score(examples).greedy_T)

    check()
    assert (static.work.asked, static.work.computed) == (plain.work.asked, plain.work.computed)
    assert static.work.padding >= plain.work.padding  # buckets


@pytest.mark.parametrize("store_bytes", [1_000_000_000, 30_000, 1], ids=["kept", "evicted", "none kept"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_activated_lora_trajectory(model_folder, name, store_bytes):
    """20 steps over 12 prompts: the same losses and adapters as without any reuse, whatever was evicted."""
    engines = [
        engine_for(model_folder(name), share=share, alora=True, store_bytes=store_bytes) for share in (True, False)
    ]
    generator = torch.Generator().manual_seed(0)
    examples = []
    for n in range(12):
        prompt = [*torch.randint(10, 30, (6 + n,), generator=generator).tolist(), *INVOCATION]
        targets = tuple(Target(len(prompt) - 1 + i, 11 + i, 0) for i in range(2))
        examples.append(Example((TokenSequence((*prompt, 11, 12), targets),)))
    examples = activate(examples, INVOCATION)
    estimator, first = TwoPoint(5, 1e-2), 0.0
    for step in range(20):
        batch = [examples[(5 * step + i) % 12] for i in range(5)]
        probes = estimator.probes(step)
        ours, expected = (engine.losses(batch, probes) for engine in engines)
        assert (ours - expected).abs().max() < TOLERANCE
        losses = [batch_loss(batch, losses_N) for losses_N in expected]
        (outcome,) = estimator.outcomes(probes, losses)
        first = first or losses[0]
        for engine in engines:
            engine.update([Record(step, *outcome, 1e-2, 0, 5)])
    assert engines[0].digest() == engines[1].digest()
    work = engines[0].work
    assert work.asked == engines[1].work.asked == engines[1].work.computed
    prompts = [e.sequences[0].adapter_start for e in examples]
    once = sum(prompts) + 2 * sum(examples[(5 * s + i) % 12].num_tokens - prompts[(5 * s + i) % 12]
                                  for s in range(20) for i in range(5))  # fmt: skip
    if store_bytes > 30_000:
        assert work.computed == once  # each prompt once in all, everything else at both signs
        assert len(engines[0]._store) == 12
    else:
        assert once < work.computed < work.asked
    assert engines[0]._store.num_bytes <= store_bytes
    assert abs(losses[0] - first) > 1e-2  # it moved


def test_tensor_store_forgets_what_was_not_used_for_longest():
    store = TensorStore(12, torch.device("cpu"))
    for key in "abc":
        store.put(key, torch.zeros(1))
    assert store.get("a") is not None
    store.put("d", torch.zeros(1))
    assert [store.get(key) is not None for key in "abcd"] == [True, False, True, True]
    store.put("large", torch.zeros(4))
    assert store.get("large") is None
    assert store.num_bytes == 12
    elsewhere = TensorStore(12, torch.device("meta"))  # as the CPU's memory is to a model on a GPU
    elsewhere.put("a", torch.zeros(1))
    assert elsewhere.get("a").device.type == "meta"


def test_invocation_is_the_common_ending():
    def example(*prompt):
        return Example((TokenSequence((*prompt, 50), (Target(len(prompt) - 1, 50, 0),)),))

    assert invocation_tokens([example(1, 2, 3, 4), example(1, 9, 3, 4), example(5, 3, 4)]) == [3, 4]
    assert invocation_tokens([example(3, 4)] * 2) == [4]  # something is left to share
    assert len(invocation_tokens([example(*range(40))] * 2)) == 16
    with pytest.raises(UserError, match="no common ending"):
        invocation_tokens([example(1, 2), example(1, 3)])
    # PEFT's rule: the last occurrence, wherever it is.
    (found,) = activate([example(3, 4, 9, 3, 4, 5)], [3, 4])
    assert found.sequences[0].adapter_start == 3
    with pytest.raises(UserError, match=r"row 1: .* do not occur"):
        activate([example(3, 4), example(5, 4)], [3, 4])
    with pytest.raises(UserError, match="occur in the answer"):
        activate([example(1, 50)], [50])


@pytest.mark.parametrize("store_bytes", [1_000_000_000, 6_000], ids=["kept", "evicted"])
@pytest.mark.parametrize(("name", "peft"), [("llama", False), ("llama", True), ("opt", False), ("gpt2", True)])
def test_frozen_lower_layers(model_folder, name, peft, store_bytes):
    engines = [
        engine_for(model_folder(name), share=share, peft=peft, layers="last:1", store_bytes=store_bytes)
        for share in (True, False)
    ]
    trained = list(engines[0].space.parameters)
    assert trained and not any("embed" in n or ".0." in n or "wte" in n or "lm_head" in n for n in trained)
    seen = set()

    def frozen_tokens(examples):
        """Those of examples that were not seen before; what their rows begin with counts once."""
        total = 0
        for group in engines[0]._groups(examples, 64):
            rows = {}
            for n in group:
                own = examples[n].sequences
                rows[prompt_length(own) if len(own) > 1 else 0, *(s.input_ids for s in own)] = examples[n]
            new = [e for key, e in rows.items() if key not in seen]
            total += sum(stage.num_tokens for stage in shared_prefixes(new, 0)) if new else 0
            seen.update(rows)
        return total

    @quick
    @given(batches(), st.integers(0, 5))
    def check(examples, seed):
        probes = TwoPoint(seed, 1e-2).probes(0)
        before = engines[0].work.computed
        ours, expected = (engine.losses(examples, probes) for engine in engines)
        assert (ours - expected).abs().max() < TOLERANCE
        frozen, above = frozen_tokens(examples), 2 * tokens_of_a_probe(engines[0], examples)
        computed = engines[0].work.computed - before  # a token that passes through one of two layers counts half
        assert computed == (frozen + above) / 2 if store_bytes > 6_000 else computed >= above / 2
        scores = [engine.score(examples) for engine in engines]
        assert (scores[0].logprobs_T - scores[1].logprobs_T).abs().max() < TOLERANCE
        assert torch.equal(scores[0].greedy_T, scores[1].greedy_T)

    check()
    assert engines[0].work.computed < engines[1].work.computed == engines[1].work.asked
    assert 0 < engines[0]._store.num_bytes <= store_bytes


def test_the_same_rows_with_another_border_of_prompt_and_answer(model_folder):
    on, off = (engine_for(model_folder("llama"), share=share, peft=False, layers="last:1") for share in (True, False))
    ids = ((10, 11, 12, 13, 14), (10, 11, 12, 15, 16))
    late, early = (
        Example(tuple(TokenSequence(row, (Target(at, row[at + 1], n),)) for n, row in enumerate(ids)), 0)
        for at in (2, 1)
    )
    probes = TwoPoint(0, 1e-2).probes(0)
    for batch in ([late], [early], [late, early], [early, late]):
        assert (on.losses(batch, probes) - off.losses(batch, probes)).abs().max() < TOLERANCE


def test_one_row_a_pass_goes_on_from_what_all_begin_with(model_folder):
    """Four rows of 30 + 4 tokens, one in a pass: 30 once for each probe, then 4 tokens of each."""
    config = MeZOConfig(
        model_name_or_path=model_folder("llama"), use_peft=True, dtype="float32", use_cpu=True, seed=3,
        per_device_train_batch_size=1,
    )  # fmt: skip
    engine = make_engine(config, add_adapter(load_model(config, "causal_lm").model, config, "causal_lm"),
                         load_tokenizer(config))  # fmt: skip
    type(engine)._cost_of_pass = lambda self, num_probes: 20
    begin = tuple(range(10, 25)) * 2
    examples = [Example((TokenSequence((*begin, 5 + n, 6, 7, 8), (Target(32, 8, 0),)),)) for n in range(4)]
    engine.losses(examples, TwoPoint(0, 1e-2).probes(0))
    assert engine.work.computed == 2 * (30 + 4 * 4)


def test_work_that_went_into_the_store_counts_after_memory_ran_out(model_folder, monkeypatch):
    engine = engine_for(model_folder("llama"), share=True, peft=False, layers="last:1", dense_cost=10_000)
    examples = [Example((TokenSequence((5 + n, 6, 7, 8), (Target(2, 8, 0),)),)) for n in range(4)]
    read, failed = engine._read, []

    def too_large(*args):
        if not failed:
            failed.append(None)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(*args)

    monkeypatch.setattr(engine, "_read", too_large)
    engine.losses(examples, [Probe(0, 1e-2)])
    assert failed and engine.work.computed == 0.5 * 16 + 0.5 * 16  # the lower layer once, the upper one once


def test_options_of_a_prompt_lie_in_the_store_once(model_folder):
    engine = engine_for(model_folder("llama"), share=True, peft=False, layers="last:1")
    prompt = tuple(range(10, 20))
    rows = tuple(TokenSequence((*prompt, 20 + o, 21 + o), (Target(10, 21 + o, o),)) for o in range(4))
    losses = engine.losses([Example(rows, 1)], [Probe(1, 1e-2)])
    hidden_size = engine.model.config.hidden_size
    assert engine._store.num_bytes == 4 * hidden_size * (10 + 4 * 2)
    assert engine.work.computed == 0.5 * 18 + 0.5 * 18  # the lower layer's, and the upper one's
    again = engine.losses([Example(rows, 1)], [Probe(1, 1e-2)])
    assert engine.work.computed == 0.5 * 18 + 2 * 0.5 * 18
    assert torch.equal(losses, again)


def test_activated_lora_in_the_last_layers(model_folder):
    """Prompts are reused, with keys and values of all layers; the tokens behind them pass through all layers, too."""
    shared, whole = (
        engine_for(model_folder("llama"), share=share, alora=True, layers="last:1") for share in (True, False)
    )

    @quick
    @given(batches(INVOCATION), st.integers(0, 100))
    def check(examples, seed):
        probes = TwoPoint(seed, 1e-2).probes(0)
        assert (shared.losses(examples, probes) - whole.losses(examples, probes)).abs().max() < TOLERANCE

    check()
    assert all("layers.1." in name for name in shared.space.parameters)
    assert shared.work.computed < whole.work.computed


def test_frozen_lower_layers_of_an_encoder(model_folder):
    losses = []
    for share in (True, False):
        config = MeZOConfig(
            model_name_or_path=model_folder("bert"), template="{text} it was [MASK] .", trainable_layers="last:1",
            label_words={"0": "terrible", "1": "great"}, use_cpu=True, enable_kv_cache_optimization=share,
        )  # fmt: skip
        tokenizer = load_tokenizer(config)
        encoder = make_encoder(SENTIMENT_ROWS, config, load_model_config(config), tokenizer, encoder_model=True)
        model = load_model(config, "masked_lm").model
        for parameter_name in trainable_names(model, "last:1"):
            model.get_parameter(parameter_name).requires_grad_(True)
        engine = make_engine(config, model, tokenizer)
        examples = encoder(SENTIMENT_ROWS[:8])
        losses.append(torch.cat([engine.losses(examples, TwoPoint(1, 1e-2).probes(step)) for step in range(3)]))
        if share:
            tokens = sum(e.num_tokens for e in examples)
            assert engine.work.computed == pytest.approx(0.5 * tokens + 3 * 2 * 0.5 * tokens)
    assert (losses[0] - losses[1]).abs().max() < TOLERANCE


def test_trainable_layers_by_pattern(model_folder):
    engine = engine_for(model_folder("llama"), share=True, peft=False, layers=r"layers\.1\.mlp")
    assert set(engine.space.parameters) == {f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    assert engine._frozen is not None and engine._frozen.count == 1
    assert engine_for(model_folder("llama"), share=True, peft=False, layers="embed")._frozen is None
    for spec, message in (
        ("nothing", "matches no parameter"), ("last:9", "has 2 layers"), ("last:0", "has 2 layers"),
        ("last:1/0", "has 2 layers"), ("last:4/3", "has 2 layers"), ("(", "regular expression"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            engine_for(model_folder("llama"), share=True, peft=False, layers=spec)


@pytest.mark.parametrize(
    ("part", "counts"),
    [("1/3", [1, 1, 1, 2, 3, 4, 13]), ("1/2", [1, 1, 2, 3, 4, 6, 20]), ("3/3", [1, 2, 3, 6, 8, 12, 40])],
)
def test_a_part_of_the_layers(model_folder, part, counts):
    """Rounded to the nearest number of layers, and at least one."""
    for num_layers, count in zip([1, 2, 3, 6, 8, 12, 40], counts, strict=True):
        assert first_trainable(f"last:{part}", num_layers) == num_layers - count
    half, last = (engine_for(model_folder("llama"), share=True, peft=peft, layers="last:1/2") for peft in (False, True))
    assert set(half.space.parameters) == set(trainable_names(half.model, "last:1"))
    assert last.space.parameters and all(".layers.1." in name for name in last.space.parameters)


@pytest.mark.parametrize("row", TABLE)
def test_the_tables_rows_reuse_what_can_be(row):
    """With the costs of a forward pass that the engine counts with by itself."""
    (count, _, _, own, activated), percent = TABLE[row]
    examples = examples_of(row, 60)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=2048,
    )  # fmt: skip
    with torch.random.fork_rng():
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    variant = {"lora_variant": "alora", "alora_invocation_tokens": TABLE_INVOCATION} if activated else {}
    mezo_config = MeZOConfig(model_name_or_path="none", use_peft=True, use_cpu=True, **variant)
    tokenizer = type("Tokenizer", (), {"pad_token_id": 1})
    engine = TorchEngine(add_adapter(model, mezo_config, "causal_lm"), tokenizer)
    engine.losses(examples, TwoPoint(0, 1e-3).probes(0))
    first = engine.work.computed
    engine.losses(examples, TwoPoint(0, 1e-3).probes(1))
    second = engine.work.computed - first
    assert 100 * (1 - second / (engine.work.asked / 2)) == pytest.approx(percent, abs=1e-9)
    assert first == (second + count * (own - 1) if activated else second)


def test_a_common_beginning_is_computed_once_under_rows_of_any_length(model_folder):
    """16 rows of 500 common tokens and 12 to 102 of their own: one pass after the beginning's, not one a length."""
    engine = engine_for(model_folder("llama"), share=True, dense_cost=100)
    whole = engine_for(model_folder("llama"), share=False, dense_cost=100)
    generator = random.Random(0)
    beginning, examples = generator.choices(range(10, 30), k=COMMON), []
    for n in range(16):
        ids = (*beginning, 10 + n, *generator.choices(range(10, 30), k=10 + 6 * n), 20)
        examples.append(Example((TokenSequence(ids, (Target(len(ids) - 2, 20, 0),)),), None))
    for step, batch_size in enumerate((64, 4)):  # in one pass, and in four
        engine.train_batch_size = engine.eval_batch_size = batch_size
        before = engine.work.computed
        probes = TwoPoint(0, 1e-2).probes(step)
        found, expected = engine.losses(examples, probes), whole.losses(examples, probes)
        assert (found - expected).abs().max() < TOLERANCE
        assert engine.work.computed - before == 2 * (COMMON + sum(e.num_tokens - COMMON for e in examples))
        scores = [e.score(examples).logprobs_T for e in (engine, whole)]
        assert (scores[0] - scores[1]).abs().max() < TOLERANCE
        for e in (engine, whole):  # what was kept is of other weights now
            e.update([Record(step, 5, 0.0, 0.0, 0.5, 1e-1, 0, 16)])
        moved = [e.score(examples).logprobs_T for e in (engine, whole)]
        assert (moved[0] - moved[1]).abs().max() < TOLERANCE < (moved[0] - scores[0]).abs().max()
    assert whole.work.computed == whole.work.asked == engine.work.asked


RUN = {
    "template": "{text} it was", "label_words": {"0": "terrible", "1": "great"}, "learning_rate": 1e-2,
    "batch_size": 8, "num_steps": 12, "seed": 3, "use_cpu": True, "disable_tqdm": True, "logging_steps": 4,
}  # fmt: skip


@pytest.mark.parametrize("variant", ["alora", "lora", "prefix", "layers", "layers, evicted", "full"])
def test_a_run_with_reuse_is_a_run_without(model_folder, tmp_path, variant):
    """Journals, weights and evaluation of whole runs; what was reused is reported."""
    options = {
        "alora": {"lora_rank": 4, "lora_variant": "alora"},
        "lora": {"lora_rank": 4, "template": "it was good . " * 10 + "{text} it was"},
        "prefix": {"use_peft": True, "peft_type": "prefix_tuning", "template": "it was good . " * 10 + "{text} it was"},
        "layers": {"trainable_layers": "last:1", "learning_rate": 1e-4},
        "layers, evicted": {"trainable_layers": "last:1", "learning_rate": 1e-4, "kv_cache_gb": 3e-5},
        "full": {"template": "it was good . " * 10 + "{text} it was", "learning_rate": 1e-4},
    }[variant]  # fmt: skip
    runs = {}
    for reuse in (True, False):
        folder = tmp_path / str(reuse)
        mezo_finetune(
            model_folder("llama"), SENTIMENT_ROWS, output_dir=folder, eval_dataset=SENTIMENT_ROWS[:16],
            enable_kv_cache_optimization=reuse, **{**RUN, **options},
        )  # fmt: skip
        runs[reuse] = folder
    steps = [journal.read(runs[reuse] / "journal").steps for reuse in (True, False)]
    for (a,), (b,) in zip(*steps, strict=True):
        assert (a.seed, a.num_tokens) == (b.seed, b.num_tokens)
        assert (a.loss_plus, a.loss_minus) == pytest.approx((b.loss_plus, b.loss_minus), abs=TOLERANCE)
        assert b.computed_tokens == 2 * b.num_tokens
    last = json.loads((runs[True] / "trainer_state.json").read_text())["log_history"][-1]
    assert last["tokens_asked"] == sum(2 * r.num_tokens for (r,) in steps[0])
    assert last["tokens_computed"] == sum(r.computed_tokens for (r,) in steps[0])
    assert last["reuse_percent"] == pytest.approx(100 * (1 - last["tokens_computed"] / last["tokens_asked"]), abs=0.01)
    assert last["reuse_percent"] > 20 and last["seconds_saved"] > 0
    facts = summary(runs[True])
    assert {facts[key] == last[key] for key in ("tokens_computed", "reuse_percent", "seconds_saved")} == {True}
    assert facts["steps"] == "12 of 12"
    name = "adapter_model.safetensors" if variant in ("alora", "lora", "prefix") else "model.safetensors"
    ours, theirs = (load_file(str(runs[reuse] / name)) for reuse in (True, False))
    assert all((ours[n] - t).abs().max() < 2e-4 for n, t in theirs.items())
    again = load_file(str(replay(runs[True], tmp_path / "again") / name))
    assert all(torch.equal(again[n], t) for n, t in ours.items())


def test_an_activated_adapter_is_evaluated_as_such(model_folder, tmp_path):
    result = mezo_finetune(
        model_folder("llama"), SENTIMENT_ROWS, output_dir=tmp_path / "run", eval_dataset=SENTIMENT_ROWS[:16],
        lora_rank=4, lora_variant="alora", **RUN,
    )  # fmt: skip
    config = MeZOConfig(model_name_or_path=model_folder("llama"), use_cpu=True)
    metrics = eval_model(config, result.model_path, SENTIMENT_ROWS[:16])
    assert metrics.loss == pytest.approx(result.metrics.loss, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_a_trained_run_gives_its_losses_in_peft(model_folder, name, tmp_path):
    """A run's folder in PEFT's own forward pass: the loss that the run's evaluation reported."""
    rows = SENTIMENT_ROWS[:16]
    result = mezo_finetune(
        model_folder(name), SENTIMENT_ROWS, output_dir=tmp_path, eval_dataset=rows, lora_rank=4, lora_alpha=64,
        lora_variant="alora", **{**RUN, "num_steps": 40},
    )  # fmt: skip
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32), str(result.model_path)
    ).eval()
    assert theirs.peft_config["default"].alora_invocation_tokens
    config = MeZOConfig(
        model_name_or_path=model_folder(name), template=RUN["template"], label_words=RUN["label_words"], use_cpu=True
    )
    encoder = make_encoder(rows, config, load_model_config(config), load_tokenizer(config), encoder_model=False)
    examples = encoder(rows)

    def loss(model):
        logprobs = []
        with torch.no_grad():
            for sequence in (s for e in examples for s in e.sequences):
                logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].log_softmax(dim=-1)
                logprobs += [logits[t.position, t.token] for t in sequence.targets]
        return example_losses(examples, torch.stack(logprobs)).mean().item()

    assert loss(theirs) == pytest.approx(result.metrics.loss, abs=TOLERANCE)
    # Training moved it, and the same adapter on whole rows gives something else.
    with theirs.disable_adapter():
        assert abs(loss(theirs) - result.metrics.loss) > 10 * TOLERANCE
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alora_invocation_tokens": None}))
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_folder(name), dtype=torch.float32), str(tmp_path)
    ).eval()
    assert abs(loss(plain) - result.metrics.loss) > 10 * TOLERANCE


def test_alora_needs_lora():
    with pytest.raises(UserError, match="alora needs use_peft"):
        MeZOConfig(model_name_or_path="m", lora_variant="alora")


def test_patched_layers_come_back(model_folder):
    """The model that callbacks see is whole between two calls, also after an error."""
    engine = engine_for(model_folder("llama"), share=True, alora=True)
    bad = Example((TokenSequence((10, 7, 8, 999_999), (Target(2, 5, 0),), 1),), None)
    with pytest.raises(IndexError):
        engine.losses([bad], [Probe(1, 1e-2), Probe(1, -1e-2)])
    assert not any("forward" in vars(module) for module in engine.model.modules())
