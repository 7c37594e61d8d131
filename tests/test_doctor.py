"""mezo doctor: each illness is found, with its numbers and a mend, and a healthy run has none of them."""

import itertools
import json
import logging
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerState

from mezo import build_trainer, callbacks, journal
from mezo.callbacks import DoctorCallback
from mezo.config import MeZOConfig
from mezo.doctor import diagnose, read_run, urgent, while_training
from mezo.doctor.losses import differences
from mezo.errors import NonFiniteLossError, UserError
from mezo.estimator import Record
from tests.conftest import SENTIMENT_ROWS
from tests.test_cli import error_line, mezo, run_cli

STEPS = 1000


@pytest.fixture(autouse=True)
def _to_caplog(monkeypatch):
    """The command line, which other tests call, keeps the package's log lines to itself."""
    monkeypatch.setattr(logging.getLogger("mezo"), "propagate", True)


@dataclass
class Numbers:
    """Losses of a healthy run; a test spoils some."""

    seed: int = 0
    steps: int = STEPS
    config: dict = field(default_factory=dict)
    kind: str = "masked_lm"
    queries: int = 1
    tokens: int = 1280
    logs: list = field(default_factory=list)

    def __post_init__(self):
        draw = np.random.default_rng(self.seed)
        t_S = np.arange(self.steps)
        self.loss_SQ = (0.4 + 0.3 * np.exp(-t_S / 300) + 0.04 * draw.normal(size=self.steps))[:, None]
        self.loss_SQ = np.repeat(self.loss_SQ, self.queries, axis=1)
        self.apart_SQ = 0.01 * draw.normal(size=(self.steps, self.queries))

    def flat(self, level=0.69):
        draw = np.random.default_rng(self.seed + 1)
        self.loss_SQ = np.repeat(level + 0.04 * draw.normal(size=(self.steps, 1)), self.queries, axis=1)
        return self

    def write(self, folder, **state):
        config = MeZOConfig(model_name_or_path="m", output_dir=str(folder), **{"max_steps": self.steps, **self.config})
        header = {"format": journal.FORMAT_VERSION, "config": config.to_dict(), "kind": self.kind}
        opened = journal.Journal.create(folder / "journal", header)
        width = 2 * config.epsilon * self.queries
        for step, (loss_Q, apart_Q) in enumerate(zip(self.loss_SQ, self.apart_SQ, strict=True)):
            opened.append([
                Record(step, 1, loss + apart / 2, loss - apart / 2, apart / width, config.learning_rate,
                       self.tokens, config.batch_size, query, self.queries, 2 * self.tokens)
                for query, (loss, apart) in enumerate(zip(loss_Q.tolist(), apart_Q.tolist(), strict=True))
            ])  # fmt: skip
        opened.close()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": self.logs, **state}))
        return diagnose(read_run(folder))


def only(findings, topic, severity):
    (found,) = [f for f in findings if (f.topic, f.severity) == (topic, severity)]
    assert found.advice or severity == "ok"
    return found


def ills(findings):
    return [f for f in findings if f.severity != "ok"]


# --- healthy runs -----------------------------------------------------------------------------------------------------

LOGS = [
    {"loss": 0.5, "tokens_per_second": 1000.0 + i, "padding_percent": 5.0, "forward_percent": 80.0,
     "update_percent": 12.0, "step": i}
    for i in range(10)
]  # fmt: skip


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    ("config", "kind", "queries"),
    [
        ({}, "masked_lm", 1),
        ({"estimator": "fzoo", "num_queries": 4}, "masked_lm", 4),
        ({"clip_quantile": 0.9}, "sequence_classification", 1),
        ({"use_peft": True, "learning_rate": 1e-4, "per_device_train_batch_size": 16}, "causal_lm", 1),
    ],
    ids=["full", "fzoo", "clipped", "lora"],
)
def test_a_healthy_run_has_nothing_but_good_findings(tmp_path, seed, config, kind, queries):
    findings = Numbers(seed, config=config, kind=kind, queries=queries, logs=LOGS).write(tmp_path)
    assert ills(findings) == []
    assert {f.topic for f in findings} >= {"numbers", "convergence", "stability", "speed"}
    line = only(findings, "convergence", "ok").evidence
    assert "from 0.6" in line
    assert "to 0.4" in line


@pytest.mark.parametrize(("rate", "share"), [(1e-4, (8, 12)), (2e-6, None)])
def test_what_is_gradient_and_what_is_noise(tmp_path, rate, share):
    """1e-4 · 1000 steps · E[projected_grad²] = 25 predict 2.5, 2 between the outer fifths, which are 0.21 apart."""
    line = only(Numbers(config={"learning_rate": rate}, logs=LOGS).write(tmp_path), "convergence", "ok").evidence
    if share is None:  # more than predicted: the steps' own decrease is not the whole of it
        assert "predict a decrease of 0.05" in line and "of which" not in line
    else:
        percent = float(line.split("of which ")[1].split(" %")[0])
        assert share[0] < percent < share[1]
        assert "the rest is noise of batches" in line


def test_a_loss_that_falls_early_and_then_stays_has_converged(tmp_path):
    run = Numbers(logs=LOGS).flat(0.3)
    run.loss_SQ[:60] += 0.4 * np.exp(-np.arange(60) / 20)[:, None]
    assert ills(run.write(tmp_path)) == []


def test_a_solved_task_is_no_illness(tmp_path):
    run = Numbers(logs=LOGS)
    scale_S = np.exp(-np.arange(STEPS) / 60)[:, None] + 1e-9
    run.loss_SQ, run.apart_SQ = 0.7 * scale_S, run.apart_SQ * scale_S
    findings = run.write(tmp_path)
    assert ills(findings) == []
    assert "little left" in only(findings, "convergence", "ok").evidence


def test_a_gradient_that_shrinks_has_no_outliers(tmp_path):
    run = Numbers(logs=LOGS)
    run.apart_SQ *= np.geomspace(1, 0.01, STEPS)[:, None]
    assert ills(run.write(tmp_path)) == []


# --- convergence ------------------------------------------------------------------------------------------------------


def test_too_low_a_rate(tmp_path):
    findings = Numbers(config={"learning_rate": 1e-9}).flat().write(tmp_path)
    flat, far = [f for f in findings if (f.topic, f.severity) == ("convergence", "warning")]
    assert "not to tell from zero" in flat.evidence
    # 1e-9 · 1000 steps · E[projected_grad²] = (0.01 / 2e-3)² = 25; the sample's own mean is within 15 % of it.
    predicted = float(flat.advice.split("decrease of ")[1].split(",")[0])
    assert predicted == pytest.approx(2.5e-5, rel=0.15)
    assert flat.advice.endswith(
        "--learning_rate 5e-06"
    )  # a fall of 0.012 could be seen, 470 times as much; ten times that
    assert "1e-09 is far from 1e-07 … 1e-05" in far.evidence
    assert far.advice == "--learning_rate 1e-06"
    assert "100,000" in only(findings, "convergence", "note").evidence


def test_too_few_steps_at_a_good_rate(tmp_path):
    run = Numbers(config={"learning_rate": 1e-5}).flat()
    run.apart_SQ /= 30
    advice = [f.advice for f in run.write(tmp_path) if f.severity == "warning"]
    assert len(advice) == 1
    assert "too short. --max_steps" in advice[0]
    assert STEPS < int(advice[0].split("--max_steps ")[1].split()[0]) <= 100_000


def test_noise_of_small_batches(tmp_path):
    config = {"learning_rate": 1e-5, "per_device_train_batch_size": 4}
    findings = Numbers(config=config).flat().write(tmp_path)
    flat = only(findings, "convergence", "warning")
    assert "noise of batches of 4" in flat.advice
    assert "--gradient_accumulation_steps 4" in flat.advice
    assert "--gradient_accumulation_steps 16" in only(findings, "convergence", "note").advice  # the paper's 64 rows


@pytest.mark.parametrize(
    ("config", "said", "advice"),
    [
        ({"learning_rate": 1e-6, "normalize_perturbations": True}, "unnormalised", "--learning_rate 0.001"),
        ({"learning_rate": 1e-2}, "far above", "--learning_rate 1e-06"),
    ],
)
def test_rate_and_normalisation_swapped(tmp_path, config, said, advice):
    run = Numbers(config=config).flat()
    run.apart_SQ *= 0.1 if "normalize_perturbations" in config else 1  # z is shorter
    findings = run.write(tmp_path)
    (found,) = [f for f in findings if said in f.evidence]
    assert (found.severity, found.topic, found.advice) == ("warning", "convergence", advice)


def test_a_prediction_beyond_the_loss_is_a_rate_beyond_stability(tmp_path):
    """Steps that promise to take away more than there is, and take nothing."""
    run = Numbers(config={"learning_rate": 1e-4}).flat()
    run.apart_SQ *= 3
    found = only(run.write(tmp_path), "stability", "problem")
    assert "more than the whole loss" in found.evidence and found.advice.startswith("--learning_rate ")


@pytest.mark.parametrize(
    "state",
    ['{"log_history": [{"step": "x", "eval_loss": 1}]}', '{"log_history": [3], "max_steps": "a"}', '{"max_steps": {}}'],
)
def test_damaged_states_are_one_line(tmp_path, state):
    Numbers().write(tmp_path)
    (tmp_path / "trainer_state.json").write_text(state)
    with pytest.raises(UserError, match=r"not a trainer_state\.json"):
        read_run(tmp_path)


@pytest.mark.parametrize("weights", [b"", b"garbage", b"\x02\0\0\0\0\0\0\0[]"])
def test_damaged_weights_do_not_stop_a_diagnosis(tmp_path, weights):
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    assert Numbers().write(tmp_path)


def test_a_loss_that_creeps(tmp_path):
    run = Numbers(config={"learning_rate": 1e-7}).flat()
    run.loss_SQ = 0.69 - np.linspace(0, 0.005, STEPS)[:, None] + (run.loss_SQ - 0.69) / 100
    found = only(run.write(tmp_path), "convergence", "warning")
    assert "less than a hundredth" in found.evidence
    assert "--learning_rate 1e-05" in found.advice


def test_an_epsilon_far_above_the_papers(tmp_path):
    run = Numbers(config={"epsilon": 1.0})
    assert only(run.flat().write(tmp_path), "epsilon", "warning").advice == "--epsilon 0.001"


def test_an_optimizer_with_memory_predicts_nothing(tmp_path):
    config = {"use_peft": True, "optim": "adam", "learning_rate": 1e-3}
    advice = only(Numbers(config=config).flat().write(tmp_path), "convergence", "warning").advice
    assert advice == "--max_steps 3000 --resume_from_checkpoint"


def test_a_slight_rise_is_told(tmp_path):
    run = Numbers().flat()
    run.loss_SQ += np.linspace(0, 0.05, STEPS)[:, None]
    found = only(run.write(tmp_path), "convergence", "warning")
    assert "it rises" in found.evidence
    assert found.advice == "--learning_rate 3e-07"


# --- stability --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "severity", "rate"), [(2.0, "problem", "1e-07"), (0.25, "warning", "3e-07")])
def test_divergence(tmp_path, height, severity, rate):
    run = Numbers()
    run.loss_SQ[600:] += np.linspace(0, height, 400)[:, None]
    found = only(run.write(tmp_path), "stability", severity)
    assert "lowest" in found.evidence
    assert found.advice.endswith(f"--learning_rate {rate}")


def test_explosion(tmp_path):
    run = Numbers(config={"learning_rate": 1e-2})
    run.loss_SQ[100:110], run.loss_SQ[110:], run.apart_SQ[110:] = 1e6, 4.159, 0
    findings = run.write(tmp_path)
    found = only(findings, "stability", "problem")
    for text in ("10 of 1,000", "1e+06", "number 100"):
        assert text in found.evidence
    assert found.advice == "A new run with --learning_rate 0.001"
    assert "far above the paper's" in only(findings, "convergence", "warning").evidence
    assert len(ills(findings)) == 2  # that nothing moves any more is its consequence


def test_explosion_of_a_run_on_rounding(tmp_path):
    run = Numbers(config={"epsilon": 1e-9})
    run.loss_SQ[100:] = 1e6
    run.apart_SQ[:100] *= 1e-5
    first, second = [f for f in run.write(tmp_path) if f.severity == "problem"]
    assert first.advice == "--epsilon 0.001"
    assert second.topic == "stability"


def test_spikes(tmp_path):
    run = Numbers()
    run.loss_SQ[[400, 700]] = 9.0
    found = only(run.write(tmp_path), "stability", "warning")
    for text in ("2 of 1,000", "up to 9", "step 400"):
        assert text in found.evidence


@pytest.mark.parametrize(
    ("config", "queries", "advice"),
    [({}, 1, "--clip_quantile 0.9, or --learning_rate 3e-07"),
     ({"estimator": "fzoo", "num_queries": 2}, 2, "--learning_rate 3e-07")],
)  # fmt: skip
def test_outliers_of_projected_grad(tmp_path, config, queries, advice):
    run = Numbers(config=config, queries=queries)
    run.apart_SQ[50::100] = 0.25
    found = only(run.write(tmp_path), "stability", "warning")
    assert "the largest 1 % of directions make" in found.evidence
    assert found.advice == advice


def test_clipped_outliers_are_mended_already(tmp_path):
    run = Numbers(config={"clip_quantile": 0.9})
    run.apart_SQ[50::100] = 0.25
    only(run.write(tmp_path), "stability", "ok")


# --- numbers and epsilon ----------------------------------------------------------------------------------------------


def test_parameters_that_do_not_act(tmp_path):
    run = Numbers()
    run.loss_SQ[:], run.apart_SQ[:] = 0.6931, 0
    found = only(run.write(tmp_path), "numbers", "problem")
    assert "0 in 100 % of directions at a loss of 0.6931, and all losses are the same" in found.evidence
    assert "do not act" in found.evidence
    assert "lora_target_modules" in found.advice


def test_zeros_of_a_tiny_epsilon(tmp_path):
    run = Numbers(config={"epsilon": 1e-8})
    run.apart_SQ[::4] = 0
    found = only(run.write(tmp_path), "numbers", "warning")
    assert "25 %" in found.evidence
    assert "epsilon 1e-08 is below rounding" in found.evidence
    assert found.advice == "--epsilon 0.001"


@pytest.mark.parametrize("objective", ["accuracy", "f1"])
def test_zeros_of_an_objective_that_counts(tmp_path, objective):
    """Nothing is rounded and no factor is dead: as many answers are right on both sides."""
    run = Numbers(config={"objective": objective, "use_peft": True, "epsilon": 1e-2}, kind="causal_lm")
    run.apart_SQ[::4] = 0
    found = only(run.write(tmp_path), "numbers", "warning")
    assert "exactly 0 in 25 % of directions" in found.evidence
    assert found.evidence.endswith(f": both sides come to the same {objective}.")
    assert found.advice == "Larger batches: --gradient_accumulation_steps 4; or --epsilon 0.1"


@pytest.mark.parametrize(
    ("config", "scale", "severity", "advice"),
    [({}, 1e-5, "problem", "--epsilon 0.01"), ({"epsilon": 1e-7}, 1e-5, "problem", "--epsilon 0.001"),
     ({"dtype": "bfloat16"}, 0.03, "note", "--epsilon 0.01, or --dtype float32"),
     ({"dtype": "bfloat16"}, 1.0, "ok", "")],
)  # fmt: skip
def test_rounding_of_the_losses(tmp_path, config, scale, severity, advice):
    run = Numbers(config=config)
    run.apart_SQ *= scale
    assert only(run.write(tmp_path), "numbers", severity).advice == advice


def test_too_large_an_epsilon(tmp_path):
    run = Numbers(config={"epsilon": 0.5})
    run.apart_SQ *= 60
    found = only(run.write(tmp_path), "epsilon", "warning")
    assert "% of the loss" in found.evidence
    assert found.advice == "--epsilon 0.05"


def test_curvature_under_one_sided_probes(tmp_path):
    run = Numbers(config={"estimator": "fzoo", "num_queries": 2}, queries=2)
    run.apart_SQ = np.abs(run.apart_SQ)
    assert "100 % of directions" in only(run.write(tmp_path), "epsilon", "warning").evidence


def test_probes_far_above_evaluations(tmp_path):
    run = Numbers(logs=[{"eval_loss": 0.1, "step": 200}, {"eval_loss": 0.35, "step": 1000}])
    assert "Around step 200" in only(run.write(tmp_path), "epsilon", "warning").evidence
    assert only(diagnose(read_run(tmp_path)), "numbers", "ok")


def test_nan(tmp_path):
    run = Numbers(logs=[{"eval_loss": math.nan, "step": 500}])
    run.loss_SQ[997:] = math.nan
    findings = run.write(tmp_path)
    first, second = [f for f in findings if f.severity == "problem"]
    assert "3 of 1,000 steps" in first.evidence
    assert "step 997" in first.evidence
    assert "step 500" in second.evidence
    assert "1e-07" in first.advice
    assert only(findings, "convergence", "ok")  # the steps before are judged


# --- precision and speed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "severity", "said"),
    [
        ({"dtype": "bfloat16"}, "note", "stochastic"),  # 1e-6 · 3.4 against 1.2e-4
        ({"dtype": "bfloat16", "learning_rate": 1e-5}, "ok", "right on average"),
        ({"dtype": "float32"}, "ok", "1.9e-09"),
        ({"dtype": "float32", "learning_rate": 1e-10}, "warning", "round to nothing"),
        ({"use_peft": True, "dtype": "bfloat16", "learning_rate": 1e-8}, "ok", "float32"),
        ({"dtype": "bfloat16", "direction": "low_rank", "learning_rate": 2e-6}, "ok", "right on average"),
    ],
)
def test_updates_against_rounding(tmp_path, config, severity, said):
    assert said in only(Numbers(config=config).write(tmp_path), "precision", severity).evidence


def test_the_type_of_saved_weights_is_used(tmp_path):
    save_file({"w": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    assert "bfloat16" in only(Numbers().write(tmp_path), "precision", "note").evidence


@pytest.mark.parametrize(
    ("config", "changed", "tokens", "advice"),
    [
        ({}, {"padding_percent": 62.0}, 1280, "--max_length 40"),
        ({"enable_kv_cache_optimization": False}, {}, 1280, "--enable_kv_cache_optimization"),
        ({"per_device_train_batch_size": 8}, {}, 100, "--per_device_train_batch_size 32"),
        ({}, {"tokens_per_second": 300.0}, 1280, "what else runs"),
    ],
)
def test_what_makes_steps_slow(tmp_path, config, changed, tokens, advice):
    logs = [*LOGS[:-2], LOGS[-2] | changed, LOGS[-1] | changed]
    assert advice in only(Numbers(config=config, tokens=tokens, logs=logs).write(tmp_path), "speed", "note").advice


@pytest.mark.parametrize(
    ("config", "parts", "advice"),
    [
        ({}, (50.0, 45.0), "--direction low_rank"),
        ({"use_peft": True}, (50.0, 45.0), "--num_queries"),
        ({}, (40.0, 10.0), "--logging_steps"),
    ],
)
def test_which_part_of_a_step_takes_the_time(tmp_path, config, parts, advice):
    logs = [entry | dict(zip(("forward_percent", "update_percent"), parts, strict=True)) for entry in LOGS]
    finding = only(Numbers(config=config, tokens=1280, logs=logs).write(tmp_path), "speed", "note")
    assert advice in finding.advice
    assert f"{parts[0]:.0f} % is forward passes, {parts[1]:.0f} % the update" in finding.evidence


# --- how far ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 1, 5, 19])
def test_a_few_steps_say_nothing(tmp_path, done):
    (finding,) = Numbers(steps=done, config={"max_steps": 100}).write(tmp_path)
    assert finding.evidence.startswith(f"{done} of 100 steps")


@pytest.mark.parametrize("done", range(20, 60, 3))
def test_every_length_can_be_read(tmp_path, done):
    findings = Numbers(steps=done, config={"max_steps": 100}).write(tmp_path)
    assert f"{done} of 100 steps so far" in only(findings, "steps", "note").evidence
    assert not [f for f in findings if f.topic == "stability" and f.severity != "ok"]


def test_the_state_knows_the_last_goal(tmp_path):
    findings = Numbers(config={"max_steps": 500}).write(tmp_path, max_steps=2000)
    assert "1,000 of 2,000" in only(findings, "steps", "note").evidence


# --- the command ------------------------------------------------------------------------------------------------------


def test_command(capsys, tmp_path):
    run = Numbers(config={"learning_rate": 1e-9}).flat()
    findings = run.write(tmp_path)
    lines = mezo(capsys, "doctor", tmp_path).splitlines()
    assert lines[0].startswith("warning  convergence ")
    assert lines[1].strip().startswith("→ ")
    assert lines[1].endswith("--learning_rate 5e-06")  # commands are not wrapped
    parsed = [json.loads(line) for line in mezo(capsys, "doctor", tmp_path / "journal", "--json").splitlines()]
    assert [p["evidence"] for p in parsed] == [f.evidence for f in findings]
    assert parsed[0].keys() == {"severity", "topic", "evidence", "advice"}


def test_unreadable_runs_give_one_line(capsys, tmp_path):
    assert "no journal" in error_line(run_cli(capsys, "doctor", tmp_path))
    Numbers(steps=30).write(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{")
    assert "not a trainer_state.json" in error_line(run_cli(capsys, "doctor", tmp_path))
    (tmp_path / "journal").write_bytes(b"something else")
    assert "not a mezo journal" in error_line(run_cli(capsys, "doctor", tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    journal.Journal.create(other / "journal", {"format": journal.FORMAT_VERSION}).close()
    with pytest.raises(UserError, match="no JSON object with a config"):
        read_run(other)


@pytest.mark.parametrize("queries", [(1, 2, 1), (1, 2, 3)])
def test_steps_of_different_numbers_of_directions(tmp_path, queries):
    config = MeZOConfig(model_name_or_path="m").to_dict()
    header = {"format": journal.FORMAT_VERSION, "config": config, "kind": "masked_lm"}
    opened = journal.Journal.create(tmp_path / "journal", header)
    for step, count in enumerate(queries):
        opened.append([Record(step, 1, 0.5, 0.5, 0.0, 1e-6, 9, 4, query, count) for query in range(count)])
    opened.close()
    with pytest.raises(UserError, match="different numbers of directions"):
        read_run(tmp_path)


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(model_folder, tmp_path, caplog):
    """Trains a tiny decoder on the words of short texts, full parameters: findings, and what the run warned of."""

    def run(**values):
        config = MeZOConfig.from_dict({
            "model_name_or_path": model_folder("llama"), "output_dir": str(tmp_path / "run"), "disable_tqdm": True,
            "use_cpu": True, "learning_rate": 9e-4, "per_device_train_batch_size": 64, "max_steps": 200,
            "logging_steps": 5, **values,
        })  # fmt: skip
        with caplog.at_level(logging.WARNING, "mezo"):
            rows = SENTIMENT_ROWS if config.template else [{"text": row["text"]} for row in SENTIMENT_ROWS]
            build_trainer(config, rows).train()
        return diagnose(read_run(tmp_path / "run")), [r.getMessage() for r in caplog.records if "callbacks" in r.name]

    return run


def test_real_healthy_run(train):
    findings, warned = train()
    assert [f for f in ills(findings) if f.topic != "speed"] == []  # the machine may be busy
    assert "from 4." in only(findings, "convergence", "ok").evidence  # ln 64 = 4.16
    assert warned == []


@pytest.mark.parametrize("rate", [0.009, 0.09, 0.9])
@pytest.mark.filterwarnings("ignore:learning_rate .* is far above")
def test_real_run_with_far_too_high_a_rate(train, rate):
    findings, warned = train(learning_rate=rate)
    found = only(findings, "stability", "problem")
    assert found.advice == f"A new run with --learning_rate {rate / 10:g}"
    assert "numbers" not in {f.topic for f in ills(findings)}
    assert len(warned) == 1
    assert "--learning_rate" in warned[0]


@pytest.mark.filterwarnings("ignore:learning_rate .* is far above")
def test_real_run_that_ends_in_nan(train, tmp_path, model_folder):
    words = {"template": "{text} it was [MASK] .", "label_words": {"0": "terrible", "1": "great"}}
    with pytest.raises(NonFiniteLossError):
        train(model_name_or_path=model_folder("bert"), learning_rate=1e3, **words)
    found = only(diagnose(read_run(tmp_path / "run")), "steps", "problem")
    assert "broke off" in found.evidence
    assert found.advice == "A new run with --learning_rate 100"


def test_real_run_with_epsilon_below_rounding(train):
    findings, warned = train(epsilon=1e-9, learning_rate=1e-5)
    assert only(findings, "numbers", "problem").advice == "--epsilon 0.001"
    assert "First what is said of projected_grad" in only(findings, "convergence", "warning").advice
    assert len(warned) == 1  # though forty entries show it
    assert "--epsilon 0.001" in warned[0]


def test_some_losses_alike_among_rounded_ones():
    """How many are exactly alike depends on a CPU's order of summing; what is left of the others tells."""
    config, plus_R = MeZOConfig(model_name_or_path="m", epsilon=1e-9), np.full(40, 4.0)
    for apart, severity in ((1e-7, "problem"), (1e-2, "warning")):
        minus_R = plus_R - apart * (np.arange(40) % 10 > 0)
        (found,) = differences(config, 1e-3, "float32", plus_R, minus_R)
        assert (found.severity, found.advice) == (severity, "--epsilon 0.001")
        assert "exactly 0 in 10 %" in found.evidence


def test_real_run_with_too_low_a_rate(train):
    findings, warned = train(learning_rate=1e-9)
    assert "the rate is too low" in findings[0].advice
    assert findings[1].advice == "--learning_rate 1e-06"
    assert warned == []


# --- while training ---------------------------------------------------------------------------------------------------


def test_live_checks_see_divergence():
    config = MeZOConfig(model_name_or_path="m")
    noise = np.random.default_rng(0).normal(size=(40, 2))
    losses = [0.5 + 0.02 * a + (0.05 * (i - 20) if i > 20 else 0.0) for i, (a, _) in enumerate(noise)]
    logs = [{"loss": loss, "loss_plus": loss + 0.01 * b, "loss_minus": loss - 0.01 * b}
            for loss, (_, b) in zip(losses, noise, strict=True)]  # fmt: skip
    assert [f.topic for f in while_training(config, "causal_lm", logs)] == ["stability"]
    assert while_training(config, "causal_lm", logs[:20]) == while_training(config, "causal_lm", logs[:3]) == []
    assert [f.topic for f in while_training(config, "causal_lm", [*logs[:3], {**logs[3], "loss": 50.0}])] == [
        "stability"
    ]


def test_live_checks_leave_a_solved_task_alone():
    logs = [{"loss": 1e-5, "loss_plus": 1e-5, "loss_minus": 1e-5}] * 30
    assert while_training(MeZOConfig(model_name_or_path="m"), "causal_lm", logs) == []


@pytest.mark.parametrize(
    ("options", "kind", "advice"),
    [
        ({"epsilon": 1e-6}, "causal_lm", "--epsilon 0.001"),
        ({"epsilon": 1e-6, "use_peft": True}, "causal_lm", "--epsilon 0.01"),
        ({"epsilon": 1e-6, "use_peft": True}, "masked_lm", "--epsilon 0.001"),
        ({"epsilon": 1e-3, "use_peft": True, "peft_type": "prefix_tuning"}, "causal_lm", "--epsilon 0.1"),
        ({"epsilon": 1e-1, "use_peft": True, "peft_type": "prefix_tuning"}, "causal_lm", "--epsilon 1"),
        ({"epsilon": 0.5, "normalize_perturbations": True}, "causal_lm", "--epsilon 5"),
    ],
)
def test_live_checks_know_what_epsilon_such_a_run_has(options, kind, advice):
    logs = [{"loss": 0.7, "loss_plus": 0.7, "loss_minus": 0.7}] * 5
    (found,) = while_training(MeZOConfig(model_name_or_path="m", **options), kind, logs)
    assert (found.topic, found.severity) == ("numbers", "problem")
    assert found.advice.endswith(advice)


def told(folder, caplog):
    """What the live doctor says when a checkpoint of the run in `folder` is saved."""
    run = read_run(folder)
    callback, state = DoctorCallback(run.config, run.kind), TrainerState(global_step=run.num_steps)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mezo"):
        callback.on_save(None, state, None)
        callback.on_save(None, state, None)  # says nothing twice
    return [record.getMessage() for record in caplog.records]


@pytest.fixture
def spoiled(tmp_path, caplog):
    """Writes a run; what is said of it at a checkpoint."""
    folders = (tmp_path / str(number) for number in itertools.count())

    def check(run):
        folder = next(folders)
        folder.mkdir()
        run.write(folder)
        return told(folder, caplog)

    return check


def test_a_checkpoint_tells_of_outliers_spikes_epsilon_and_precision(spoiled):
    assert spoiled(Numbers(logs=LOGS)) == []
    run = Numbers()
    run.apart_SQ[50::100] = 0.25
    (line,) = spoiled(run)
    assert line.startswith("step 1000: |projected_grad| reaches")
    assert line.endswith("--clip_quantile 0.9, or --learning_rate 3e-07.")
    run = Numbers(config={"epsilon": 0.5})
    run.apart_SQ *= 60
    (line,) = spoiled(run)
    assert line.endswith("--epsilon 0.05.")
    (line,) = spoiled(Numbers(config={"dtype": "float32", "learning_rate": 1e-10}))
    assert "most updates round to nothing" in line


def test_a_loss_that_does_not_fall_is_told_in_the_second_half(spoiled):
    def flat(steps, goal):
        return Numbers(steps=steps, config={"learning_rate": 1e-9, "max_steps": goal, "use_peft": True}).flat()

    assert spoiled(flat(500, 900)) == []
    assert spoiled(flat(1500, 9000)) == []
    (line,) = spoiled(flat(1500, 3000))
    assert "not to tell from zero" in line


def test_a_divergence_is_told_after_a_spike_and_nothing_after_it(tmp_path, caplog):
    run = Numbers()
    run.loss_SQ[400] = 5.0
    run.write(tmp_path)
    callback, state = DoctorCallback(read_run(tmp_path).config, "masked_lm"), TrainerState(global_step=1000)
    with caplog.at_level(logging.WARNING, "mezo"):
        callback.on_save(None, state, None)
        for loss in (0.5, 900.0, 900.0):
            callback.on_log(None, state, None, {"loss": loss, "loss_plus": loss, "loss_minus": loss})
        for _ in range(20):
            callback.on_log(None, state, None, {"loss": 4.0, "loss_plus": 4.0, "loss_minus": 4.0})
    assert ["robust standard" in caplog.messages[0], "ten times the first" in caplog.messages[1]] == [True, True]
    assert len(caplog.messages) == 2


def test_reading_the_journal_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    Numbers().write(tmp_path)
    reads, now = [], iter([0.0, 2.0, 2.0, 100.0, 201.9, 203.0, 204.0, 204.0])
    monkeypatch.setattr(callbacks, "read_run", lambda run: (reads.append(run), read_run(run))[1])
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(now))
    callback, state = DoctorCallback(read_run(tmp_path).config, "masked_lm"), TrainerState(global_step=1000)
    for expected in (1, 1, 1, 2):  # at 0, 100, 201.9 and 203 s; the first took two seconds
        callback.on_save(None, state, None)
        assert len(reads) == expected


def test_early_on_neither_speed_nor_a_flat_loss_is_urgent(tmp_path):
    findings = Numbers(steps=30, config={"max_steps": 100, "per_device_train_batch_size": 8}, tokens=100).write(
        tmp_path
    )
    assert {f.topic for f in ills(findings)} == {"steps", "convergence", "speed"}
    assert urgent(read_run(tmp_path), findings) == []
