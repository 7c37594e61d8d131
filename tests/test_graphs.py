"""Static passes, as a CUDA graph replays them, against plain ones: whole trajectories, all kinds of directions."""

from contextlib import nullcontext

import pytest
import torch

from mezo import MeZOConfig
from mezo.api import build_trainer
from mezo.engines.torch.dense import Copies
from mezo.engines.torch.graphs import Graphs, Shape
from mezo.estimator import OneSided, TwoPoint
from mezo.objective import Example, TokenSequence
from tests.conftest import SENTIMENT_ROWS
from tests.test_low_rank import DIRECTIONS, TOLERANCE, noisy, numbers, options_for

KINDS = {**DIRECTIONS, "lora": {"use_peft": True, "lora_r": 2}}
LAST = {"trainable_layers": "last:1"}
KINDS |= {f"{name}, last layer": {**KINDS[name], **LAST} for name in ("dense", "low_rank", "lora")}
PREFIX = {"use_peft": True, "peft_type": "prefix_tuning", "num_virtual_tokens": 3}
PROMPT = {"llama": "text", "opt": "text", "gpt2": "text", "bert": "mask", "roberta": "mask"}


def engine_for(folder, name, values):
    config = MeZOConfig(model_name_or_path=folder, seed=3, **options_for(name, **values))
    trainer = build_trainer(config, SENTIMENT_ROWS)
    return noisy(trainer.engine), trainer.train_examples


def as_on_gpu(engine):
    """The same static pass, without a graph."""
    engine._graphs = Graphs(engine.model.device)
    engine._copies = engine._copies_within(1 << 30)
    return engine


def assert_same_trajectory(static, plain, examples, num_queries=1):
    """Batches of several sizes, so that buckets are met again with other rows in them."""
    estimator = TwoPoint(7, 0.05, num_queries)
    for step, count in enumerate((5, 2, 5, 3, 5, 2)):
        batch = [examples[(step + i) % len(examples)] for i in range(count)]
        probes = estimator.probes(step)
        ours, expected = (engine.losses(batch, probes) for engine in (static, plain))
        assert (ours - expected).abs().max() < TOLERANCE
        for engine in (static, plain):
            engine.update(numbers([(p, 0.3) for p in probes[::2]], step))
    assert max(kept.calls for kept in static._graphs._kept.values()) > 1
    assert static.digest() == plain.digest()
    assert (static.work.asked, static.work.computed) == (plain.work.asked, plain.work.computed)
    assert static.work.padding >= plain.work.padding  # buckets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROMPT)
def test_static_pass(model_folder, name, kind):
    static, examples = engine_for(model_folder(name), name, KINDS[kind])
    plain, _ = engine_for(model_folder(name), name, KINDS[kind])
    assert_same_trajectory(as_on_gpu(static), plain, examples)
    assert isinstance(static._weights(TwoPoint(0, 0.1).probes(0)), Copies) == ("dense" in kind)
    assert (static._frozen is not None) == ("last layer" in kind)


@pytest.mark.parametrize("kind", [*KINDS, "prefix"])
@pytest.mark.parametrize("name", ["opt", "bert"])
def test_the_first_pass_has_the_bits_of_later_ones(model_folder, name, kind):
    """A run that goes on from its journal takes the steps that it would have taken."""
    engine, examples = engine_for(model_folder(name), name, {**KINDS, "prefix": PREFIX}[kind])
    as_on_gpu(engine)
    probes = TwoPoint(7, 0.05).probes(0)
    first, second = (engine.losses(examples[:5], probes) for _ in range(2))
    assert torch.equal(first, second)
    assert all(kept.calls == 2 for kept in engine._graphs._kept.values()) and engine._graphs._kept
    assert engine.work.computed <= engine.work.asked


@pytest.mark.parametrize("name", PROMPT)
def test_static_pass_behind_a_trained_prefix(model_folder, name):
    static, examples = engine_for(model_folder(name), name, PREFIX)
    plain, _ = engine_for(model_folder(name), name, PREFIX)
    assert_same_trajectory(as_on_gpu(static), plain, examples)


@pytest.mark.parametrize("name", PROMPT)
def test_rows_as_long_as_the_model_takes(model_folder, name):
    """No bucket is longer, behind a trained prefix of three places either."""
    static, examples = engine_for(model_folder(name), name, PREFIX)
    plain, _ = engine_for(model_folder(name), name, PREFIX)
    config, sequence = static.model.config, examples[0].sequences[0]
    most = config.max_position_embeddings - 3
    if name == "roberta":  # whose positions begin behind that of padding
        most -= config.pad_token_id + 1
    ids = (sequence.input_ids + sequence.input_ids[1:-1] * most)[:most]
    rows = [Example((TokenSequence(ids, sequence.targets[:1]),))]
    as_on_gpu(static)
    probes = TwoPoint(7, 0.05).probes(0)
    for _ in range(2):
        ours, expected = (engine.losses(rows, probes) for engine in (static, plain))
        assert (ours - expected).abs().max() < TOLERANCE
    assert static._graphs._kept


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_attention_that_takes_no_mask_of_four_dimensions(model_folder, name):
    for values, is_static in ((PREFIX, False), (KINDS["lora"], name == "opt")):
        static, examples = engine_for(model_folder(name), name, values)
        as_on_gpu(static)._takes_masks = False
        for _ in range(2):
            static.losses(examples[:3], TwoPoint(7, 0.05).probes(0))
        assert bool(static._graphs._kept) == is_static


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_trained_prefix_before_an_encoder(model_folder, name):
    """All probes in one traversal, against one after the other."""
    engine, examples = engine_for(model_folder(name), name, PREFIX)
    apart, _ = engine_for(model_folder(name), name, {**PREFIX, "enable_kv_cache_optimization": False})
    probes = TwoPoint(7, 0.5, 2).probes(0)
    assert list(map(len, engine._together(probes))) == [4] and len(apart._together(probes)) == 4
    found, expected = (e.losses(examples, probes) for e in (engine, apart))
    assert (found - expected).abs().max() < TOLERANCE < (found[0] - found[1]).abs().max()


def test_more_probes_than_copies(model_folder, monkeypatch):
    """Copies of as many probes as the memory holds, one group after the other."""
    static, examples = engine_for(model_folder("bert"), "bert", {})
    plain, _ = engine_for(model_folder("bert"), "bert", {})
    as_on_gpu(static)
    monkeypatch.setattr("mezo.engines.torch.engine._COPY_BYTES", 4 * 4 * static.space.num_parameters())
    assert list(map(len, static._together(TwoPoint(7, 0.05, 3).probes(0)))) == [4, 2]
    assert_same_trajectory(static, plain, examples, num_queries=3)


def test_copies_within_memory(model_folder):
    engine, _ = engine_for(model_folder("opt"), "opt", {})
    two = 8 * engine.space.num_parameters()
    assert engine._copies_within(two - 1) is None
    assert engine._copies_within(two) is not None
    assert engine._copies is None  # on a CPU memory is read as fast as z is drawn


def test_a_larger_pass_takes_the_memory_of_captured_ones():
    """Smaller ones run beside them."""

    class Captured(Graphs):
        def __init__(self):
            super().__init__(torch.device("cpu"))
            self._captures = True

        def _run_in_pool(self, kept, forward):
            return forward(kept.static)

        def _capture(self, kept, forward):
            kept.output = forward(kept.static)
            kept.graph = type("Graph", (), {"replay": lambda graph: None})()

    graphs = Captured()
    sizes = {rows: Shape.of(2, True, True, rows, 8, 0, rows, rows, False) for rows in (2, 4, 8)}
    for rows, captured in ((4, []), (4, [4]), (2, [4]), (2, [2, 4]), (8, []), (8, [8]), (4, [4, 8]), (2, [2, 4, 8])):
        graphs.inputs(sizes[rows])
        graphs.run(sizes[rows], lambda static: torch.ones(1))
        assert [n for n, shape in sizes.items() if shape in graphs._kept and graphs.is_captured(shape)] == captured


@pytest.mark.parametrize("leaves", [False, True])
def test_what_a_pass_leaves_in_the_memory_of_captured_ones(monkeypatch, leaves):
    """The allocator's list of blocks decides; what is not of the shared memory does not count."""
    graphs, alive = Graphs(torch.device("cpu")), {(0, 7): [100], (0, 0): [900]}
    graphs._captures, graphs._pool = True, type("Pool", (), {"id": (0, 7)})()
    graphs._largest = 1 << 20

    def snapshot():
        return [
            {"segment_pool_id": pool, "total_size": 64,
             "blocks": [{"address": a, "state": "active_allocated"} for a in addresses]
             + [{"address": 5, "state": "inactive"}]}
            for pool, addresses in alive.items()
        ]  # fmt: skip

    monkeypatch.setattr(graphs, "_in_pool", nullcontext)
    for name in ("empty_cache", "current_blas_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", snapshot)
    large, small = (Shape.of(2, True, True, rows, 8, 0, 1, 1, False) for rows in (8, 4))

    def forward(_):
        scores = torch.ones(1)
        alive[0, 7].append(scores.data_ptr())
        alive[0, 0].append(901)
        if leaves:
            alive[0, 7].append(200)
        return scores

    for shape in (large, small):
        graphs.inputs(shape)
    graphs._kept[large].graph = object()
    graphs.run(small, forward)
    assert graphs.is_captured(large) != leaves
    assert graphs.num_bytes == 64


@pytest.mark.parametrize(("rows", "bucket"), [(1, 1), (7, 7), (9, 10), (17, 20), (33, 40), (64, 64), (65, 80)])
def test_buckets(rows, bucket):
    reads = -(-rows // 32) * 32
    found = Shape.of(2, True, True, rows, 17, 0, rows, rows, False)
    assert found == (2, True, True, bucket, 24, 0, reads, reads, False)


def test_large_passes_are_not_captured(model_folder, monkeypatch):
    static, examples = engine_for(model_folder("opt"), "opt", {})
    monkeypatch.setattr("mezo.engines.torch.passes.STATIC_FLOPS", 1.0)
    as_on_gpu(static)
    for step in range(2):
        static.losses(examples[:2], TwoPoint(7, 0.05).probes(step))
    assert not static._graphs._kept
    assert torch.isfinite(static.losses(examples[:2], TwoPoint(7, 0.05).probes(2))).all()


def test_groups_of_few_shapes(model_folder, monkeypatch):
    """Small passes hold multiples of a quarter of the batch; passes that are not captured any number."""
    static, examples = engine_for(model_folder("opt"), "opt", {"per_device_train_batch_size": 16})
    batch = [examples[0]] * 3 + [examples[1]] * 6 + [examples[2]] * 5 + [examples[3]] * 2
    monkeypatch.setattr(type(static), "_cost_of_pass", lambda *_: 0)
    as_on_gpu(static)
    assert {len(group) % 4 for group in static._groups(batch, 16)} == {0}
    monkeypatch.setattr("mezo.engines.torch.passes.STATIC_FLOPS", 1.0)
    assert {len(group) % 4 for group in static._groups(batch, 16)} != {0}


@pytest.mark.parametrize("kind", ["lora", "low_rank"])
def test_probes_share_the_memory_of_one(model_folder, monkeypatch, kind):
    """Many probes on a filled GPU: each pass holds as many tokens as plain inference on the same rows."""
    static, examples = engine_for(model_folder("opt"), "opt", KINDS[kind])
    plain, _ = engine_for(model_folder("opt"), "opt", KINDS[kind])
    as_on_gpu(static)
    monkeypatch.setattr("mezo.engines.torch.passes.STATIC_FLOPS", 1.0)
    probes, batch, sizes = TwoPoint(7, 0.05, 2).probes(0), examples[:6], []
    inference = sum(len(e.sequences) for e in batch) * max(len(s.input_ids) for e in batch for s in e.sequences)
    static._transformer.get_input_embeddings().register_forward_hook(lambda _, x, __: sizes.append(x[0].numel()))
    losses = {}
    for filling in (0, 1 << 20):
        monkeypatch.setattr("mezo.engines.torch.passes.FILLING_TOKENS", filling)
        monkeypatch.setattr("mezo.engines.torch.passes.FILLING_FLOPS", 0)
        sizes.clear()
        losses[filling] = static.losses(batch, probes)
        assert (max(sizes) <= inference) == (filling == 0)
    for found in losses.values():
        assert (found - plain.losses(batch, probes)).abs().max() < TOLERANCE


@pytest.mark.parametrize("values", [{}, LAST])
def test_dense_probes_of_a_large_model_go_by_twos(model_folder, monkeypatch, values):
    """Where each pass forms the weights; rows are grouped once for all of them, frozen layers computed once."""
    engine, examples = engine_for(model_folder("opt"), "opt", values)
    plain, _ = engine_for(model_folder("opt"), "opt", values)
    engine._graphs, batch, probes = Graphs(engine.model.device), examples[:4], OneSided(7, 0.05, 6).probes(0)
    engine._store._budget = 0
    expected, seen, weights = plain.losses(batch, probes), [], engine._weights
    monkeypatch.setattr(engine, "_weights", lambda some: seen.append(len(some)) or weights(some))
    computed = set()
    for flops, groups in ((0.0, {2, 1}), (1e30, {7})):
        monkeypatch.setattr("mezo.engines.torch.passes.LARGE_FLOPS", flops)
        seen.clear()
        engine.work.computed = 0
        for _ in range(2):
            assert (engine.losses(batch, probes) - expected).abs().max() < TOLERANCE
        assert set(seen) == groups
        computed.add(engine.work.computed)
    assert len(computed) == 1


def test_copies_begin_where_products_read_them_fast(model_folder):
    """Whatever the sizes of those before: every probe's own, too."""
    engine, _ = engine_for(model_folder("bert"), "bert", {})
    copies = as_on_gpu(engine)._copies
    flat_PN = copies.write(TwoPoint(0, 1e-3).probes(0))
    parts = {name: copies.part(flat_PN, name) for name in engine.space.parameters}
    assert any(part[0].numel() % 64 for part in parts.values())
    assert all(row.storage_offset() % 64 == 0 for part in parts.values() for row in part)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_decoders_get_no_mask_where_it_says_nothing(model_folder, monkeypatch, name, window):
    """As during a capture, when transformers cannot look at values; rows beyond a sliding window need their mask."""
    engine, examples = engine_for(model_folder(name), name, {})
    probes, plain = TwoPoint(7, 0.05).probes(0), engine_for(model_folder(name), name, {})[0]
    expected = plain.losses(examples[:5], probes)
    if window is not None:
        engine._reach = window
    attention, masks = torch.nn.functional.scaled_dot_product_attention, []

    def recorded(*args, **kwargs):
        masks.append(kwargs.get("attn_mask"))
        return attention(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", recorded)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: True)
    as_on_gpu(engine)._checked_reads = True
    losses = engine.losses(examples[:5], probes)
    assert (losses - expected).abs().max() < TOLERANCE
    assert len(masks) > 1 and (window is not None or all(mask is None for mask in masks))
    assert engine.model.config._attn_implementation == "sdpa"
    if name == "llama":  # what it is for: without it the mask is made
        assert all((mask is None) == (window is None) for mask in masks)
