"""Successive halving against rounds counted by hand; the paper's configs."""

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path

import pytest

from mezo import MeZOConfig, UserError, journal
from mezo import trainer as trainer_module
from mezo import tune as tune_module
from mezo.api import build_trainer
from mezo.cli import commands, main, parse_train, parse_tune
from mezo.cli.options import TuneOptions
from mezo.config import PRESETS
from mezo.tune import Trial, tune
from tests.conftest import SENTIMENT_ROWS

PAPER = Path(__file__).parents[1] / "examples" / "paper"
CONFIGS = sorted(PAPER.glob("*.yaml"))


@pytest.fixture
def config(model_folder, jsonl, tmp_path):
    return MeZOConfig(
        model_name_or_path=model_folder("llama"), dataset_name=jsonl(SENTIMENT_ROWS[:24]), template="{text} it was",
        label_words={"0": "bad", "1": "good"}, validation_size=8, use_peft=True, per_device_train_batch_size=4,
        max_steps=9, output_dir=str(tmp_path / "tune"), disable_tqdm=True,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:learning_rate")
def test_losers_stop_early_and_winners_go_on(config, tmp_path):
    """4 candidates for 1 step of 9, 2 of them to 3, 1 to 9; the winner's journal is that of a straight run."""
    told = []
    options = TuneOptions(learning_rates=(1e-3, 1e-2, 1e-1), epsilons=(1e-2, 1e-3), rounds=3, reduction=3)
    trials = tune(config, options, told.append)
    assert [t.steps for t in told] == [1] * 6 + [3] * 2 + [9]
    assert sorted(t.steps for t in trials) == [1] * 4 + [3] + [9]
    assert trials[0].steps == 9
    first, second = sorted(told[:6], key=lambda t: t.metric)[:2]
    assert {(t.learning_rate, t.epsilon) for t in told[6:8]} == {(t.learning_rate, t.epsilon) for t in (first, second)}
    assert json.loads((tmp_path / "tune" / "tune.json").read_text())[0]["metric"] == trials[0].metric
    best = trials[0]
    straight = {"learning_rate": best.learning_rate, "epsilon": best.epsilon, "output_dir": str(tmp_path / "straight")}
    build_trainer(MeZOConfig.from_dict({**config.to_dict(), **straight})).train()
    ours, theirs = (journal.read(Path(f) / "journal").steps for f in (best.output_dir, tmp_path / "straight"))
    assert ours == theirs


def test_between_equals_the_loss_decides(config):
    """Accuracy of few rows takes few values."""
    config = dataclasses.replace(config, metric_for_best_model="accuracy")
    trials = [Trial(1e-3, 1e-3, "a", 9, 0.5, 0.7), Trial(1e-2, 1e-3, "b", 9, 0.5, 0.6), Trial(1.0, 1e-3, "c", 9, None)]
    trials.append(Trial(1e-1, 1e-3, "e", 9, 0.5, None))  # a loss that is not finite
    assert [t.output_dir for t in tune_module._ranked(config, trials)] == ["b", "a", "e", "c"]
    better = Trial(1e-4, 1e-3, "d", 9, 0.6, 0.9)
    assert tune_module._ranked(config, [*trials, better])[0] == better


@pytest.mark.filterwarnings("ignore:learning_rate")
def test_what_diverges_is_last(config):
    options = TuneOptions(learning_rates=(1e25, 1e-2), rounds=1)
    trials = tune(config, options)
    assert [t.learning_rate for t in trials] == [1e-2, 1e25]
    assert trials[1].metric is None or trials[1].metric > trials[0].metric


def test_a_search_goes_on_with_what_it_has_measured(config, monkeypatch):
    """With one candidate more, nothing is trained twice and all are compared after the same number of steps."""
    options = TuneOptions(learning_rates=(1e-3, 1.23456789e-2), rounds=2)
    first, told = [], []
    tune(config, options, first.append)
    trained = []
    build = tune_module.build_trainer
    monkeypatch.setattr(tune_module, "build_trainer", lambda run: (trained.append(run), build(run))[1])
    tune(config, TuneOptions(learning_rates=(1e-3, 1.23456789e-2, 1e-4), rounds=2), told.append)
    assert told[:2] == first[:2]
    assert [t.steps for t in told] == [3, 3, 3, 9]
    assert (trained[0].learning_rate, trained[0].max_steps) == (1e-4, 3)
    assert len(trained) == 1 + (told[3].learning_rate == 1e-4)
    with pytest.raises(UserError, match="has been trained beyond 1 steps"):
        tune(MeZOConfig.from_dict({**config.to_dict(), "max_steps": 1}), TuneOptions(learning_rates=(1e-3,), rounds=1))


def test_a_loss_that_is_no_number_loses(config, monkeypatch):
    """Finite in training, NaN in the evaluation."""
    found = iter([math.nan, 0.5, 0.4])
    monkeypatch.setattr(trainer_module, "evaluate", lambda *_: trainer_module.Metrics(0.5, next(found), 8))
    trials = tune(config, TuneOptions(learning_rates=(1e-4, 2e-4, 3e-4), rounds=1))
    assert [(t.learning_rate, t.metric) for t in trials] == [(3e-4, 0.4), (2e-4, 0.5), (1e-4, None)]


def test_candidates_around_the_learning_rate(config):
    told = []
    tune(
        MeZOConfig.from_dict({**config.to_dict(), "max_steps": 1, "learning_rate": 1e-4}),
        TuneOptions(rounds=1),
        told.append,
    )
    assert [t.learning_rate for t in told] == [1e-5, 3.2e-5, 1e-4, 3.2e-4]


def test_the_presets_grid(model_folder):
    config, options = parse_tune(["--preset", "opt-full", "--model_name_or_path", "x"])
    assert options.learning_rates == PRESETS["opt-full"].learning_rates and config.epsilon == 1e-3
    assert parse_tune(["--preset", "opt-full", "--model_name_or_path", "x", "--learning_rates", "1e-5", "1e-6"])[
        1
    ].learning_rates == (1e-5, 1e-6)


def test_what_tune_cannot_do(config):
    for values, options, message in (
        ({"validation_size": 0.0}, TuneOptions(), "tune chooses by evaluation"),
        (
            {"validation_size": 0.0, "task": "sst2", "dataset_name": None, "template": None, "label_words": None},
            TuneOptions(),
            "tune would choose by the rows that task sst2 reports on; give num_shots or validation_size",
        ),
        ({"lr_scheduler_type": "linear"}, TuneOptions(), "use rounds 1 or constant"),
        ({}, TuneOptions(rounds=0), "at least 1 round"),
    ):
        with pytest.raises(UserError, match=message):
            tune(MeZOConfig.from_dict({**config.to_dict(), **values}), options)


def test_the_command(config, tmp_path, capsys):
    main(["tune", "--model_name_or_path", config.model_name_or_path, "--dataset_name", config.dataset_name,
          "--template", "{text} it was", "--label_words", "0", "bad", "1", "good", "--validation_size", "8",
          "--use_peft", "--max_steps", "3", "--learning_rates", "1e-4", "1.23456789e-3", "--rounds", "2",
          "--output_dir", str(tmp_path / "grid")])  # fmt: skip
    output = capsys.readouterr().out
    (before, following) = output.split("twice as far with\n")
    assert "that was tried; " in before
    for folder in (tmp_path / "grid").glob("lr-*"):  # a narrow table folds names and cuts none
        assert folder.name in re.sub(r"[│\s]", "", before)
    assert "--learning_rates" not in following and "--rounds" not in following
    main(shlex.split(following.strip())[1:])
    best = json.loads((tmp_path / "grid" / "tune.json").read_text())[0]
    assert len(journal.read(Path(best["output_dir"]) / "journal").steps) == 6
    found = json.loads((tmp_path / "grid" / "tune.json").read_text())
    assert sorted(entry["steps"] for entry in found) == [1, 1, 3]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_papers_configs_run(path, model_folder, jsonl, tmp_path):
    """Each file as it is, with a small model and small data in place of those of the Hub."""
    family, how = path.stem.split("-")
    config = parse_train(["--config", str(path)])
    values = PRESETS[path.stem].values
    assert {name: getattr(config, name) for name in values} == dict(values)
    assert config.learning_rate in PRESETS[path.stem].learning_rates
    assert (config.use_peft, config.peft_type) == (how != "full", "prefix_tuning" if how == "prefix" else "lora")
    rows = [{"sentence": f"the film was {'good' if i % 2 else 'bad'} ", "label": i % 2} for i in range(80)]
    counts = ["--num_shots", "4"] if family == "roberta" else ["--validation_size", "20", "--max_train_samples", "50"]
    main(["train", "--config", str(path), "--dataset_name", jsonl(rows), "--max_steps", "2", *counts,
          "--model_name_or_path", model_folder({"opt": "opt", "roberta": "roberta"}[family]),
          "--output_dir", str(tmp_path / "run"), "--disable_tqdm"])  # fmt: skip
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize(
    ("best", "said"), [(1e-5, "is the lowest that was tried; lower"), (1e-3, "is the highest"), (1e-4, None)]
)
def test_a_best_rate_at_the_edge_of_the_grid_is_said(config, monkeypatch, capsys, best, said):
    rates = sorted((1e-5, 1e-4, 1e-3), key=lambda rate: rate != best)
    trials = [Trial(rate, 1e-3, f"runs/{rate}", 10, 0.6 if rate == best else 0.5) for rate in rates]
    monkeypatch.setattr(commands, "run_tune", lambda *_: trials)
    commands.tune(config, TuneOptions(), [])
    output = capsys.readouterr().out
    assert ("that was tried" in output) == (said is not None)
    assert said is None or said in output


def test_candidates_that_do_not_differ_are_not_ranked(config, monkeypatch, capsys):
    trials = [Trial(rate, 1e-3, f"runs/{rate}", 10, 0.5) for rate in (1e-5, 1e-4)]
    monkeypatch.setattr(commands, "run_tune", lambda *_: trials)
    commands.tune(config, TuneOptions(), [])
    output = capsys.readouterr().out
    assert "is the same for all; more steps" in output
    assert "that was tried" not in output


def test_there_is_a_config_for_each_preset():
    assert {path.stem for path in CONFIGS} == set(PRESETS)
