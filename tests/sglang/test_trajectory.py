"""SGLang takes the trajectory of the torch engine: the same z, the same updates, losses equal to rounding."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mezo import journal
from mezo.api import replay
from mezo.engines.sglang.build import RUN_NAME_FILE
from tests.sglang.conftest import finish, start_job

# Float32 on both sides; attention and matrix products sum in other orders. Seen: 2e-6 and 1.2e-5 after 50 steps.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-5, 2e-4


def assert_same_run(run: Path, expected: Path, steps: int) -> None:
    ours, theirs = (journal.read(folder / "journal").steps[:steps] for folder in (run, expected))
    assert len(ours) == steps
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert a.seed == b.seed
        assert a.loss_plus == pytest.approx(b.loss_plus, abs=LOSS_TOLERANCE)
        assert a.loss_minus == pytest.approx(b.loss_minus, abs=LOSS_TOLERANCE)
    assert any(abs(a.coefficient) > 1e-2 for (a,) in ours)


def assert_same_adapter(run: Path, expected: Path, *, moved: bool = True) -> None:
    ours, theirs = (load_file(str(folder / "adapter_model.safetensors")) for folder in (run, expected))
    assert sorted(ours) == sorted(theirs)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in theirs.items() if "lora_B" in name) is moved
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert (ours[name] - tensor).abs().max() < WEIGHT_TOLERANCE, name


@pytest.mark.parametrize("updates", ["workers", "public"])
def test_colocated_engine(updates, reference, model_folder, tmp_path):
    run = tmp_path / "run"
    options = {"engine": "sglang", "sglang_updates": updates}
    finish(start_job("finetune", model=model_folder("llama"), out=str(run), **options))
    assert_same_run(run, reference("llama"), 50)
    assert_same_adapter(run, reference("llama"))
    ours = {p.name for p in run.iterdir()} - {RUN_NAME_FILE}
    assert ours == {p.name for p in reference("llama").iterdir()}
    states = [json.loads((r / "trainer_state.json").read_text()) for r in (run, reference("llama"))]
    metrics = [[e for e in state["log_history"] if "eval_loss" in e] for state in states]
    assert metrics[0] == [{**entry, "eval_loss": pytest.approx(entry["eval_loss"], abs=1e-4)} for entry in metrics[1]]


@pytest.fixture
def expected_run(reference, model_folder, tmp_path):
    """Trains on SGLang, in `tmp_path / "run"`, as the torch engine does; returns the torch engine's folder."""

    def train(name, **options):
        run = tmp_path / "run"
        finish(start_job("finetune", model=model_folder(name), out=str(run), engine="sglang", **options))
        expected = reference(name, **options)
        assert_same_run(run, expected, options["num_steps"])
        assert_same_adapter(run, expected)
        return expected

    return train


def test_opt_with_an_adapter_on_every_module(expected_run):
    """In SGLang's own processes, where the plugin has to complete OPT."""
    modules = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    expected_run("opt", lora_target_modules=modules, num_steps=10)


GENERATING = {"epsilon": 0.3, "learning_rate": 9e-2}  # the signs say different things


def test_a_reward_of_what_both_adapters_say(expected_run):
    """No gradient anywhere: SGLang generates under both signs in one batch, and says what the torch engine says."""
    reward = {"objective": "reward", "reward_funcs": ["tests.sglang.jobs.says_much"], "max_new_tokens": 6}
    expected_run("llama", num_steps=8, **reward, **GENERATING)


def test_f1_of_generated_answers(expected_run, tmp_path):
    """The objective and the evaluation are F1 of what is said up to a stop text; both engines say the same."""
    run = tmp_path / "run"
    expected = expected_run("llama", objective="f1", num_steps=6, max_new_tokens=8, eval_steps=3, **GENERATING)
    assert any(r.loss_plus != r.loss_minus for (r,) in journal.read(run / "journal").steps)
    states = [json.loads((r / "trainer_state.json").read_text()) for r in (run, expected)]
    scores = [[e["eval_f1"] for e in state["log_history"] if "eval_f1" in e] for state in states]
    assert scores[0] == scores[1] and 0 < max(scores[0]) < 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_tensor_parallel(reference, model_folder, tmp_path):
    """Two ranks, each with its slice of the same z."""
    run = tmp_path / "run"
    cores = sorted(os.sched_getaffinity(0))[:2]
    settings = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))}
    options = {"engine": "sglang", "sglang_tp_size": 2, "num_steps": 20}
    finish(start_job("finetune", settings, model=model_folder("llama"), out=str(run), **options))
    assert_same_run(run, reference("llama"), 20)
    assert_same_adapter(run, replay(reference("llama"), tmp_path / "twenty", step=20))


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_in_process_trainer(name, reference, model_folder, tmp_path):
    """SGLang's own objects, from an adapter that is loaded there; with and without shared prefixes."""
    start = replay(reference(name), tmp_path / "start", step=0)
    finish(start_job("in_process", model=model_folder(name), out=str(tmp_path), start=str(start)))
    twenty = replay(reference(name), tmp_path / "twenty", step=20)
    for case in ("shared", "apart"):
        assert_same_run(tmp_path / case, reference(name), 20)
        assert_same_adapter(tmp_path / case, twenty)
        assert_same_adapter(tmp_path / case / "checkpoint-0", start, moved=False)


def test_in_process_with_several_directions(reference, model_folder, tmp_path):
    """Three probes a step, one of them unperturbed."""
    options = {"estimator": "fzoo", "num_queries": 2}
    expected = reference("llama", num_steps=20, **options)
    start = replay(expected, tmp_path / "start", step=0)
    finish(start_job("in_process", model=model_folder("llama"), out=str(tmp_path), start=str(start), **options))
    ours, theirs = (journal.read(folder / "journal").steps[0] for folder in (tmp_path / "shared", expected))
    assert [r.seed for r in ours] == [r.seed for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.loss_plus, a.loss_minus) == pytest.approx((b.loss_plus, b.loss_minus), abs=LOSS_TOLERANCE)


def test_no_stale_kv(reference, model_folder, tmp_path):
    """The cached losses are those computed anew, and freezing the cache's key would be seen."""
    out = tmp_path / "losses.json"
    finish(start_job("stale", model=model_folder("llama"), out=str(out), start=str(reference("llama"))))
    found = json.loads(out.read_text())

    def largest_difference(case: str) -> float:
        pairs = zip(found[case], found["computed"], strict=True)
        return max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))

    assert largest_difference("cached") < 1e-5
    assert largest_difference("frozen") > 1e-3
