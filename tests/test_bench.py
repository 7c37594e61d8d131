"""`mezo bench`: what it times is what it says."""

import csv
import json
from pathlib import Path

import pytest
import torch

from mezo import UserError, bench
from mezo.bench import BenchOptions, make_bench_engine, make_examples, mezo_step, original_step, run
from mezo.cli import main
from mezo.engines.torch.engine import TorchEngine
from mezo.engines.torch.passes import Costs


def options(folder, **more):
    return BenchOptions(model_name_or_path=folder, rows=3, tokens=9, repeats=2, use_cpu=True, **more)


@pytest.mark.parametrize("more", [{}, {"use_peft": True}, {"direction": "low_rank"}], ids=["full", "lora", "low rank"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_three_rows_with_every_column(model_folder, name, more):
    rows = run(options(model_folder(name), **more))
    window = ["end of a window"] * ("direction" in more)
    assert [r.what for r in rows] == ["two plain forwards", "a step of mezo", "original algorithm", *window]
    assert rows[0].ratio == 1.0
    for row in rows:
        assert 0 < row.low <= row.milliseconds <= row.high
        tokens = 0 if row.what in window else 2 * 3 * 9
        assert row.tokens_per_second == pytest.approx(tokens / row.milliseconds * 1e3)
        assert row.ratio == pytest.approx(row.milliseconds / rows[0].milliseconds)
        assert row.peak_memory > 10
        assert row.bandwidth > 0


def test_a_step_bears_its_share_of_a_windows_end(model_folder, monkeypatch):
    """Of 50 steps: an end takes a hundred times a step, so a step of mezo three times."""
    engine = make_bench_engine(options(model_folder("llama"), direction="low_rank"))
    ends, timed = [], bench.timed

    def counted(function, device):
        before = engine._low_rank.steps
        seconds = timed(function, device)
        ends.append((before, engine._low_rank.steps))
        return seconds

    monkeypatch.setattr(bench, "timed", counted)
    assert len(bench.window_ends(engine)) == 3
    assert ends == [(49, 0)] * 4 and engine._low_rank.is_folded
    monkeypatch.setattr(bench, "timed", lambda function, device: 1.0 if function() is None else 2.0)
    monkeypatch.setattr(bench, "window_ends", lambda engine: [200.0, 100.0, 50.0])
    rows = {row.what: row for row in run(options(model_folder("llama"), direction="low_rank"))}
    assert rows["a step of mezo"].milliseconds == pytest.approx(1e3 * (1 + 100 / 50))
    assert rows["end of a window"].milliseconds == pytest.approx(100e3)


@pytest.mark.parametrize("use_peft", [False, True])
def test_the_original_algorithm_by_hand(model_folder, monkeypatch, use_peft):
    """θ − lr · (L(θ + εz) − L(θ − εz)) / 2ε · z with z of the global generator."""
    monkeypatch.setattr(bench, "_LEARNING_RATE", rate := 1e-2)
    monkeypatch.setattr(bench, "_EPSILON", epsilon := 1e-2)
    opts = options(model_folder("llama"), use_peft=use_peft)
    engine = make_bench_engine(opts)
    examples = make_examples(opts, engine)
    noisy = torch.Generator().manual_seed(0)
    before = {name: 0.3 * torch.randn(p.shape, generator=noisy) for name, p in engine.space.parameters.items()}
    torch.manual_seed(5)
    z = {name: torch.normal(0.0, 1.0, p.shape) for name, p in before.items()}

    @torch.no_grad()
    def move(scale):
        for name, p in engine.space.parameters.items():
            p.copy_(before[name] + scale * z[name])

    @torch.no_grad()
    def loss(scale):
        move(scale)
        ids = torch.tensor([e.sequences[0].input_ids for e in examples])
        logprobs = engine.model(input_ids=ids).logits[:, -2].log_softmax(dim=-1)
        return -float(logprobs.gather(1, ids[:, -1:]).mean())

    slope = (loss(epsilon) - loss(-epsilon)) / (2 * epsilon)
    assert abs(slope) > 0.1
    move(0.0)
    engine._changed()
    original_step(engine, examples, 5, engine if use_peft else TorchEngine(engine.model, engine.tokenizer))
    for name, p in engine.space.parameters.items():
        # Float32 losses around 5 leave some 1e-6 / 2ε of the slope; +ε, −2ε, +ε is the identity but for rounding.
        assert (p - (before[name] - rate * slope * z[name])).abs().max() < 1e-5 < rate * abs(slope) / 10
    mezo_step(engine, examples, 0)


def test_bytes_of_a_cut_pass(model_folder, monkeypatch):
    """Weights are read once for each traversal of the model."""
    opts = options(model_folder("llama"), use_peft=True, num_queries=2)
    engine = make_bench_engine(opts)
    examples = make_examples(opts, engine)
    assert bench._passes(opts, engine, examples) == 1
    monkeypatch.setattr(Costs, "most_tokens", lambda *_: examples[0].num_tokens)
    assert bench._passes(opts, engine, examples) == len(examples)


def test_random_weights_need_no_checkpoint(model_folder, tmp_path, capsys):
    import shutil

    shutil.copytree(model_folder("llama"), tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    command = ["bench", "--model_name_or_path", str(tmp_path / "bare"), "--random_weights", "--rows", "2"]
    main([*command, "--tokens", "6", "--repeats", "2", "--use_cpu", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["what"] for row in rows][1] == "a step of mezo"


def test_too_small_a_bench(model_folder):
    with pytest.raises(UserError, match="2 repeats"):
        run(BenchOptions(model_name_or_path=model_folder("llama"), repeats=1))


def test_profile_by_kind(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import gpu_profile

    names = {"nvjet_sm90_tst_192x192_64x4": "products", "nvjet_sm90_tst_8x256_64x6_splitK_TNN": "x V",
             "low_rank_sum_and_product": "low-rank sums", "update_and_perturb": "probes and updates",
             "vectorized_layer_norm_kernel": "norms", "Memcpy HtoD": "copies", "sigmoid": "other"}  # fmt: skip
    assert {name: gpu_profile.kind_of(name) for name in names} == names
    command = ["gpu_profile.py", "--shape", "tiny", "--sizes", "2x16", "--output", str(tmp_path / "rows.csv")]
    monkeypatch.setattr("sys.argv", command)
    gpu_profile.main()
    with (tmp_path / "rows.csv").open(newline="") as file:
        launches = {(row["what"], row["kind"]): int(row["launches"]) for row in csv.DictReader(file)}
    assert launches["two plain forwards", "attention"] == 2 * launches["a step of mezo", "attention"] > 0
    assert "aten::mm" in capsys.readouterr().out
