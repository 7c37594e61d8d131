"""Passes that do not fit into memory are cut, and nothing else changes."""

import dataclasses
import json
import math

import pytest
import torch

from mezo import MeZOConfig, UserError, mezo_finetune
from mezo.api import build_trainer
from mezo.cli import main
from mezo.engines.torch import passes
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.graphs import Graphs, Shape
from mezo.engines.torch.low_rank import LowRank
from mezo.engines.torch.passes import length_groups
from mezo.errors import EngineError
from mezo.estimator import Probe, Record, TwoPoint
from tests.conftest import SENTIMENT_ROWS
from tests.test_graphs import as_on_gpu

PROBES = [Probe(7, 0.05), Probe(7, -0.05)]
PROMPT = {"template": "{text} it was", "label_words": {"0": "bad", "1": "great , good"}}


def on_gpu():
    raise torch.OutOfMemoryError("injected")


def on_cpu():
    torch.empty(1 << 60)  # what PyTorch's own allocator raises


def small_memory(model, tokens, run_out=on_gpu):
    """Passes of more tokens raise what a GPU or a CPU raises."""
    seen = []

    def check(_, args, kwargs):
        size = (*args, kwargs.get("input_ids"))[0].numel()
        seen.append(size)
        if size > tokens:
            run_out()

    model.get_decoder().register_forward_pre_hook(check, with_kwargs=True)
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"use_peft": True}, {"direction": "low_rank"}], ids=["full", "lora", "low rank"]
)
@pytest.mark.parametrize("run_out", [on_gpu, on_cpu])
def test_losses_do_not_depend_on_memory(model_folder, options, run_out):
    config = MeZOConfig(model_name_or_path=model_folder("llama"), seed=3, **PROMPT, **options)
    roomy, tight = (build_trainer(config, SENTIMENT_ROWS[:20]) for _ in range(2))
    seen = small_memory(tight.engine.model, 200, run_out)
    expected = roomy.engine.losses(roomy.train_examples, PROBES)
    assert (tight.engine.losses(tight.train_examples, PROBES) - expected).abs().max() < 1e-5
    assert max(seen) > 200
    assert tight.engine.work.asked == roomy.engine.work.asked >= tight.engine.work.computed
    seen.clear()  # what did not fit is not tried again
    assert (tight.engine.losses(tight.train_examples, PROBES) - expected).abs().max() < 1e-5
    assert max(seen) <= 200
    scores = [t.engine.score(t.train_examples) for t in (roomy, tight)]
    assert (scores[0].logprobs_T - scores[1].logprobs_T).abs().max() < 1e-5
    assert torch.equal(scores[0].greedy_T, scores[1].greedy_T)


def test_what_did_not_fit_counts_all_probes(model_folder):
    """Four probes that found no memory leave one probe four times as many rows as each of them."""
    trainer = build_trainer(MeZOConfig(model_name_or_path=model_folder("llama"), **PROMPT), SENTIMENT_ROWS[:20])
    engine, examples = trainer.engine, trainer.train_examples
    seen = small_memory(engine.model, 300)
    engine.losses(examples, TwoPoint(7, 0.05, 2).probes(0))
    assert max(seen) > 300 and engine._most_tokens <= max(seen) / 2
    most = [
        max(sum(len(examples[n].sequences) for n in group) for group in engine._groups(examples, 64, probes))
        for probes in (4, 1)
    ]
    assert 2 * most[0] < most[1]


def test_memory_runs_out_once_for_all_probes_of_a_step(model_folder):
    """Where probes go one by one: what the first could not hold the others do not try."""
    config = MeZOConfig(model_name_or_path=model_folder("llama"), enable_kv_cache_optimization=False, **PROMPT)
    trainer = build_trainer(config, SENTIMENT_ROWS[:20])
    expected = trainer.engine.losses(trainer.train_examples, PROBES)
    ran_out = []
    small_memory(trainer.engine.model, 200, lambda: ran_out.append(1) or on_gpu())
    assert (trainer.engine.losses(trainer.train_examples, PROBES) - expected).abs().max() < 1e-5
    seen = len(ran_out)
    trainer.engine._most_tokens = math.inf
    trainer.engine.losses(trainer.train_examples, PROBES[:1])
    assert seen == len(ran_out) - seen > 0


def test_probes_one_by_one_and_then_an_error(model_folder):
    trainer = build_trainer(MeZOConfig(model_name_or_path=model_folder("llama"), **PROMPT), SENTIMENT_ROWS[:1])
    (example,) = trainer.train_examples
    expected = trainer.engine.losses([example], PROBES)
    rows, longest = len(example.sequences), max(len(s.input_ids) for s in example.sequences)
    small_memory(trainer.engine.model, rows * longest)
    assert (trainer.engine.losses([example], PROBES) - expected).abs().max() < 1e-5
    small_memory(trainer.engine.model, longest - 1)
    with pytest.raises(EngineError, match="does not fit into memory"):
        trainer.engine.losses([example], PROBES)


def test_after_a_pass_that_did_not_fit_no_probe_goes_on_from_anothers(model_folder):
    """Probes of an example go one by one, those of the next together; both have a beginning to go on from."""
    rows = [{"prompt": f"good bad good bad {text} it was", "choices": ["bad", "great , good"], "label": 0}
            for text in ("film " * 9, "book")]  # fmt: skip
    config = MeZOConfig(model_name_or_path=model_folder("llama"), use_peft=True, dtype="float32", use_cpu=True)
    shared, whole = (
        build_trainer(dataclasses.replace(config, enable_kv_cache_optimization=share), rows) for share in (True, False)
    )
    for trainer in (shared, whole):
        trainer.engine.train_batch_size = 1
        trainer.engine.update([Record(0, 1, 0.0, 0.0, 1.0, 0.3, 0, 2)])
    type(shared.engine)._cost_of_pass, real = (lambda self, num_probes: 0), TorchEngine._cost_of_pass
    try:
        longest = max(s.read_start for s in shared.train_examples[0].sequences)
        seen = small_memory(shared.engine.model, 2 * longest - 1)
        found = shared.engine.losses(shared.train_examples, PROBES)
    finally:
        TorchEngine._cost_of_pass = real
    assert max(seen) >= 2 * longest - 1 and shared.engine.work.computed < shared.engine.work.asked
    expected = whole.engine.losses(whole.train_examples, PROBES)
    assert (found - expected).abs().max() < 1e-5 < (expected[0] - expected[1]).abs().min()


def with_graphs(engine, monkeypatch):
    """Static passes that hold memory, as captured ones do."""
    monkeypatch.setattr(Graphs, "num_bytes", property(lambda graphs: len(graphs._kept)))
    return as_on_gpu(engine)


def test_what_finds_no_memory_runs_again_without_captured_passes(model_folder, monkeypatch, tmp_path):
    config = MeZOConfig(model_name_or_path=model_folder("opt"), direction="low_rank", **PROMPT)
    trainer = build_trainer(config, SENTIMENT_ROWS[:4])
    engine, folded, prompts = with_graphs(trainer.engine, monkeypatch), LowRank.folded, [(5, 6), (7,)]
    expected = {}

    def crowded(self, name):
        if engine._graphs._kept:
            on_gpu()
        return folded(self, name)

    for _ in range(2):
        engine.losses(trainer.train_examples, PROBES)
        engine.update([Record(0, 7, 0.0, 0.0, 1.0, 1e-2, 0, 4)])
        expected[engine.digest()] = engine.generate(prompts, PROBES, 3, None)
        monkeypatch.setattr(LowRank, "folded", crowded)
        engine.losses(trainer.train_examples, PROBES)
        assert engine._graphs._kept
        assert engine.digest() == list(expected)[-1] and not engine._graphs._kept
        engine.losses(trainer.train_examples, PROBES)
        engine.save(tmp_path)
        assert not engine._graphs._kept
        monkeypatch.setattr(LowRank, "folded", folded)
    assert len(expected) == 2
    monkeypatch.setattr(LowRank, "folded", lambda self, name: on_gpu())
    with pytest.raises(torch.OutOfMemoryError):
        engine.digest()


@pytest.mark.parametrize("is_large", [False, True])
def test_an_evaluation_takes_the_memory_of_captured_passes(model_folder, monkeypatch, is_large):
    """A large model's gives it back first, another's where memory runs out."""
    trainer = build_trainer(MeZOConfig(model_name_or_path=model_folder("opt"), **PROMPT), SENTIMENT_ROWS[:8])
    engine, examples = with_graphs(trainer.engine, monkeypatch), trainer.train_examples
    expected = engine.score(examples)
    monkeypatch.setattr(passes, "LARGE_FLOPS", 0.0 if is_large else math.inf)
    engine._graphs.inputs(Shape.of(2, True, True, 4, 8, 0, 4, 4, False))
    ran_out = []

    def crowded(*_):
        if engine._graphs._kept:
            ran_out.append(1)
            on_gpu()

    engine.model.get_decoder().register_forward_pre_hook(crowded)
    assert torch.equal(engine.score(examples).logprobs_T, expected.logprobs_T)
    assert not engine._graphs._kept and engine._most_tokens == math.inf
    assert bool(ran_out) != is_large


def test_what_is_read_is_learned_from_one_example(model_folder, monkeypatch):
    """And memory that runs out on the way leaves everything as it was."""
    rows = SENTIMENT_ROWS[:8]
    trainer = build_trainer(MeZOConfig(model_name_or_path=model_folder("opt"), direction="low_rank", **PROMPT), rows)
    engine, examples = with_graphs(trainer.engine, monkeypatch), trainer.train_examples
    seen = small_memory(engine.model, 1 << 30)
    engine._common = (5, 6)
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "_launched", lambda *_, **__: on_gpu())
        with pytest.raises(torch.OutOfMemoryError):
            engine._learn(examples, PROBES)
    assert engine._common == (5, 6) and not engine._checked_reads and engine.work.computed == 0
    engine._common = ()
    engine.losses(examples, PROBES)
    assert engine._checked_reads and seen[0] <= 2 * examples[0].num_tokens < min(seen[1:])
    assert engine.work.computed <= engine.work.asked
    seen.clear()
    engine.losses(examples, PROBES)
    assert min(seen) > 2 * examples[0].num_tokens


def test_what_a_pass_costs():
    """Of OPT-13B on a GPU about what the rows of gpu_step.csv say: 105 tokens by low rank or LoRA, more by dense z."""
    large = {"token_flops": 2.6e10, "is_float32": False, "vocab_size": 50272}
    assert passes.Costs(on_gpu=True, forms_weights=False, **large).of_pass(2) == 100
    assert passes.Costs(on_gpu=True, forms_weights=True, **large).of_pass(2) == 500
    assert passes.Costs(on_gpu=False, forms_weights=True, **large).of_pass(2) == 100
    small = {**large, "token_flops": 2.5e8}
    assert passes.Costs(on_gpu=True, forms_weights=False, **small).of_pass(2) == 1000


def test_length_groups_keep_to_the_limit():
    shapes = [(2, 10), (2, 30), (1, 25), (3, 10), (9, 100)]
    assert length_groups(shapes, 10_000) == [[0, 3, 2, 1, 4]]
    groups = length_groups(shapes, 10_000, 100)
    for group in groups:
        assert len(group) == 1 or sum(shapes[n][0] for n in group) * max(shapes[n][1] for n in group) <= 100
    assert sorted(n for group in groups for n in group) == [0, 1, 2, 3, 4]
    assert len(groups) == 3


def test_losses_of_every_token_go_in_passes_of_so_many_logits(model_folder, monkeypatch):
    """8 rows of 6 to 13 positions that are read, under both signs; 20 positions of a probe are the most."""
    rows = [{"text": " ".join(["good"] * n)} for n in range(6, 14)]
    config = MeZOConfig(model_name_or_path=model_folder("llama"), use_peft=True, dtype="float32", use_cpu=True)
    trainer = build_trainer(config, rows)
    expected = trainer.engine.losses(trainer.train_examples, PROBES)
    head, seen = trainer.engine.model.get_output_embeddings(), []
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    assert (trainer.engine.losses(trainer.train_examples, PROBES) - expected).abs().max() == 0
    whole, most = sum(seen), 20
    assert (
        whole == 2 * sum(len(s.targets) for e in trainer.train_examples for s in e.sequences) and max(seen) > 2 * most
    )
    monkeypatch.setattr(passes, "MOST_LOGITS", most * 2 * head.out_features)
    seen.clear()
    assert (trainer.engine.losses(trainer.train_examples, PROBES) - expected).abs().max() < 1e-5
    assert sum(seen) == whole and max(seen) <= 2 * most


def test_the_limit_is_a_gpus(model_folder):
    config = MeZOConfig(model_name_or_path=model_folder("llama"), use_cpu=True, max_memory_gb=1.0, **PROMPT)
    with pytest.raises(UserError, match="the memory of a GPU"):
        build_trainer(config, SENTIMENT_ROWS)
    with pytest.raises(UserError, match="max_memory_gb must be a positive number"):
        MeZOConfig(model_name_or_path="m", max_memory_gb=-1)


def test_padding_is_logged(model_folder, tmp_path):
    rows = [{"prompt": "good", "completion": "x"}, {"prompt": "good " * 5, "completion": "x"}]
    result = mezo_finetune(
        model_folder("llama"), rows, num_steps=2, batch_size=2, output_dir=tmp_path, disable_tqdm=True, logging_steps=1
    )
    entry = json.loads((result.output_dir / "trainer_state.json").read_text())["log_history"][-1]
    trainer = build_trainer(MeZOConfig(model_name_or_path=model_folder("llama")), rows)
    short, long = sorted(e.num_tokens for e in trainer.train_examples)
    assert entry["padding_percent"] == pytest.approx(100 * (long - short) / (2 * long), abs=0.01)


def test_no_memory_at_all_is_one_line_and_keeps_what_was_saved(model_folder, jsonl, tmp_path, capsys, monkeypatch):
    """A run that has lost its memory at step 3 ends with 1; it goes on where memory is."""
    command = ["train", "--model_name_or_path", model_folder("llama"), "--dataset_name", jsonl(SENTIMENT_ROWS[:8]),
               "--template", "{text} it was", "--label_words", "0", "bad", "1", "good", "--use_peft",
               "--max_steps", "5", "--output_dir", str(tmp_path / "run"), "--disable_tqdm"]  # fmt: skip
    update, steps = TorchEngine.update, []

    def failing(self, records):
        steps.append(1)
        if len(steps) == 3:
            on_cpu()
        update(self, records)

    monkeypatch.setattr(TorchEngine, "update", failing)
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("mezo: error: out of memory; what was saved is intact")
    main([*command, "--resume_from_checkpoint"])
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 5
