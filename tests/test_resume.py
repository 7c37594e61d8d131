"""Straight run = replayed run = interrupted and resumed run, bit for bit."""

import dataclasses
import functools
import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mezo import checkpoint, journal
from mezo.api import build_trainer, replay
from mezo.config import MeZOConfig
from mezo.errors import JournalError, UserError
from mezo.header import check_header
from tests.conftest import SENTIMENT_ROWS

SPACES = {
    "full": {},
    "full-bfloat16": {"dtype": "bfloat16", "learning_rate": 1e-4},
    "full-normalised": {"normalize_perturbations": True, "learning_rate": 1e-1, "epsilon": 1e-1},
    "lora": {"use_peft": True, "learning_rate": 1e-2, "weight_decay": 0.1},
    "lora-adam": {
        "use_peft": True,
        "learning_rate": 1e-3,
        "optim": "adam",
        "num_queries": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
    },
    "lora-clipped": {
        "use_peft": True,
        "learning_rate": 1e-2,
        "optim": "momentum",
        "clip_quantile": 0.5,
        "clip_window": 10,
    },
    "low-rank": {
        "direction": "low_rank",
        "direction_refresh_steps": 5,
        "optim": "momentum",
        "estimator": "fzoo",
        "num_queries": 3,
        "learning_rate": 1e-3 - 1e-6,
    },
    "subspace-1.5-spsa": {
        "direction": "subspace",
        "direction_refresh_steps": 5,
        "optim": "adam",
        "estimator": "1.5-spsa",
        "num_queries": 2,
        "learning_rate": 1e-4,
    },
    "lora-es": {"use_peft": True, "estimator": "es", "num_queries": 3, "learning_rate": 1e-2},
    "prefix": {"use_peft": True, "peft_type": "prefix_tuning", "learning_rate": 1e-2, "epsilon": 1e-1},
}


def make_config(model, output_dir, space, **options):
    values = {
        "model_name_or_path": model,
        "template": "{text} it was [MASK] ." if "bert" in Path(model).name else "{text} it was",
        "label_words": {"0": "terrible", "1": "great"},
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "max_steps": 23,
        "save_steps": 5,
        "eval_steps": 7,
        "logging_steps": 3,
        "save_total_limit": None,
        "disable_tqdm": True,
    }
    return MeZOConfig.from_dict({**values, **SPACES[space], **options})


def weights(folder):
    (path,) = Path(folder).glob("*model.safetensors")
    return load_file(path)


def assert_same_weights(first, second):
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def train(config):
    return build_trainer(config, SENTIMENT_ROWS[:100], SENTIMENT_ROWS[100:]).train()


@pytest.fixture(scope="module")
def straight_run(model_folder, tmp_path_factory):
    """Folder and result of a BERT's uninterrupted run in a space, trained once."""

    @functools.cache
    def trained(space):
        folder = tmp_path_factory.mktemp("straight") / space
        return folder, train(make_config(model_folder("bert"), folder, space))

    return trained


class Killed(BaseException):
    """Stands for the end of the process at one instant."""


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_replay_equals_training(straight_run, model_folder, tmp_path, model, space):
    run = straight_run(space)[0] if model == "bert" else tmp_path / "run"
    if model != "bert":
        train(make_config(model_folder(model), run, space))
    replay(run / "journal", tmp_path / "replayed")
    assert_same_weights(run, tmp_path / "replayed")
    replay(run, tmp_path / "twenty", step=20)
    assert_same_weights(run / "checkpoint-20", tmp_path / "twenty")


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("instant", ["before record", "before update", "in checkpoint", "in evaluation"])
def test_interrupted_and_resumed_equals_straight(straight_run, model_folder, tmp_path, monkeypatch, space, instant):
    straight_folder, straight = straight_run(space)
    config = make_config(model_folder("bert"), tmp_path / "run", space)
    trainer = build_trainer(config, SENTIMENT_ROWS[:100], SENTIMENT_ROWS[100:])

    def die(*args):
        raise Killed

    def die_later(function, count):
        calls = []

        def wrapped(*args):
            calls.append(1)
            return die() if len(calls) > count else function(*args)

        return wrapped

    if instant == "before record":
        monkeypatch.setattr(journal.Journal, "append", die_later(journal.Journal.append, 12))
    elif instant == "before update":
        trainer.engine.update = die_later(trainer.engine.update, 12)
    elif instant == "in checkpoint":
        trainer.engine.save = die_later(trainer.engine.save, 2)
    else:
        trainer.engine.score = die_later(trainer.engine.score, 1)
    with pytest.raises(Killed):
        trainer.train()
    monkeypatch.undo()
    resumed = train(dataclasses.replace(config, resume_from_checkpoint=True))
    assert_same_weights(straight_folder, tmp_path / "run")
    assert journal.read(straight.journal_path).steps == journal.read(resumed.journal_path).steps
    assert resumed.metrics == straight.metrics
    assert resumed.train_loss == straight.train_loss
    histories = [
        json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for folder in (straight_folder, tmp_path / "run")
    ]
    for history in histories:
        for entry in history:
            for timed in ("tokens_per_second", "seconds_saved", "padding_percent", "forward_percent", "update_percent"):
                entry.pop(timed, None)
    assert histories[0] == histories[1]


def test_going_on_with_more_steps_equals_one_long_run(model_folder, tmp_path):
    model = model_folder("llama")
    train(make_config(model, tmp_path / "long", "lora", max_steps=30))
    train(make_config(model, tmp_path / "run", "lora", max_steps=13))
    train(make_config(model, tmp_path / "run", "lora", max_steps=30, resume_from_checkpoint=True))
    assert_same_weights(tmp_path / "long", tmp_path / "run")


def test_a_torn_record_is_dropped_and_said_so(model_folder, tmp_path, caplog):
    model = model_folder("bert")
    train(make_config(model, tmp_path / "straight", "full"))
    train(make_config(model, tmp_path / "run", "full", max_steps=12))
    path = tmp_path / "run" / "journal"
    path.write_bytes(path.read_bytes()[:-10])
    train(make_config(model, tmp_path / "run", "full", resume_from_checkpoint=True))
    assert "dropped a torn record of 54 bytes" in caplog.text
    assert_same_weights(tmp_path / "straight", tmp_path / "run")


def test_resume_without_any_checkpoint_replays_from_the_base(model_folder, tmp_path):
    model = model_folder("bert")
    train(make_config(model, tmp_path / "straight", "full", save_steps=100, eval_steps=None))
    config = make_config(model, tmp_path / "run", "full", save_steps=100, eval_steps=None)
    trainer = build_trainer(config, SENTIMENT_ROWS[:100])
    trainer.engine.save = lambda folder: (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        trainer.train()
    train(dataclasses.replace(config, resume_from_checkpoint=True))
    assert_same_weights(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"learning_rate": 2e-4}, "learning_rate"), ({"epsilon": 1e-2}, "epsilon"), ({"seed": 1}, "seed|digest"),
     ({"per_device_train_batch_size": 4}, "batch_size")],
)  # fmt: skip
def test_resume_refuses_other_settings(model_folder, tmp_path, change, message):
    model = model_folder("bert")
    train(make_config(model, tmp_path / "run", "full", max_steps=3))
    with pytest.raises(JournalError, match=message):
        train(make_config(model, tmp_path / "run", "full", resume_from_checkpoint=True, **change))


def test_more_steps_move_the_rates_of_a_schedule(model_folder, tmp_path, caplog):
    options = {"max_steps": 2, "lr_scheduler_type": "linear"}
    model = model_folder("bert")
    train(make_config(model, tmp_path / "run", "full", **options))
    train(make_config(model, tmp_path / "run", "full", **{**options, "max_steps": 3}, resume_from_checkpoint=True))
    assert "learning rates are those of a run of 3 steps; it began as another" in caplog.text


@pytest.mark.parametrize("objective", ["loss", "accuracy", "f1", "reward"])
def test_max_new_tokens_decides_losses_where_texts_are_generated(objective):
    header = dict.fromkeys(("rng", "model_digest", "initial_digest", "data_digest"), "")
    config = {**MeZOConfig(model_name_or_path="x").to_dict(), "objective": objective}
    before, now = ({**header, "config": {**config, "max_new_tokens": n}} for n in (4, 8))
    refused = pytest.raises(JournalError, match="started with max_new_tokens 4, now it is 8")
    with refused if objective in ("f1", "reward") else nullcontext():
        check_header(before, now, Path("journal"))


def test_options_younger_than_a_journal_were_at_their_defaults():
    header = dict.fromkeys(("rng", "model_digest", "initial_digest", "data_digest"), "")
    now = MeZOConfig(model_name_or_path="x", use_peft=True, load_in_4bit=True).to_dict()
    old = {name: value for name, value in now.items() if name != "load_in_4bit"}
    with pytest.raises(JournalError, match="started with load_in_4bit False, now it is True"):
        check_header({**header, "config": old}, {**header, "config": now}, Path("journal"))
    check_header({**header, "config": old}, {**header, "config": {**now, "load_in_4bit": False}}, Path("journal"))


def test_resume_refuses_other_data_and_other_models(model_folder, tmp_path):
    model = model_folder("bert")
    train(make_config(model, tmp_path / "run", "full", max_steps=3))
    config = make_config(model, tmp_path / "run", "full", resume_from_checkpoint=True)
    with pytest.raises(JournalError, match="data_digest"):
        build_trainer(config, SENTIMENT_ROWS[:99], SENTIMENT_ROWS[:9]).train()
    with pytest.raises(
        JournalError, match=r"model_digest is .* \(model_name_or_path '.*bert.*' then, '.*roberta.*' now"
    ):
        train(dataclasses.replace(config, model_name_or_path=model_folder("roberta")))
    with pytest.raises(JournalError, match="model_digest"):
        replay(tmp_path / "run", tmp_path / "w", model_name_or_path=str(tmp_path / "run"))
    with pytest.raises(UserError, match="holds a run already"):
        train(dataclasses.replace(config, resume_from_checkpoint=False))


def test_the_best_checkpoint_is_kept_and_can_be_the_result(model_folder, tmp_path):
    config = make_config(
        model_folder("bert"), tmp_path / "run", "lora", max_steps=40, save_total_limit=1, eval_steps=5, save_steps=5,
        load_best_model_at_end=True, learning_rate=3e-2,
    )  # fmt: skip
    result = train(config)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    losses = {e["step"]: e["eval_loss"] for e in state["log_history"] if "eval_loss" in e}
    best = min(losses, key=losses.get)
    assert result.best_checkpoint == tmp_path / "run" / f"checkpoint-{best}"
    assert state["best_global_step"] == best
    assert result.metrics.loss == losses[best]
    assert_same_weights(result.best_checkpoint, tmp_path / "run")
    replay(tmp_path / "run", tmp_path / "replayed")
    assert_same_weights(tmp_path / "run", tmp_path / "replayed")
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) <= 2


KILLS = {"full": (12, 900), "low-rank": (3, 150), "lora-adam": (3, 150), "prefix": (3, 150)}  # kills and steps


@pytest.fixture(scope="module")
def killed_runs(model_folder, tmp_path_factory):
    """Runs that were ended as often as `KILLS` says and resumed, by one process that imports once: their configs."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SENTIMENT_ROWS))
    configs = {
        space: make_config(
            model_folder("bert"), folder / space, space, dataset_name=str(folder / "data.jsonl"), validation_size=0.2,
            max_steps=steps, save_steps=40, eval_steps=60, resume_from_checkpoint=True,
        )
        for space, (_, steps) in KILLS.items()
    }  # fmt: skip
    jobs = [[config.to_dict(), KILLS[space][0]] for space, config in configs.items()]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("kill_loop.py")), str(folder / "jobs.json"), "7"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert process.returncode == 0, process.stderr
    return configs


@pytest.mark.parametrize("space", KILLS)
def test_kills_at_random_instants_change_nothing(killed_runs, tmp_path, space):
    """All three signals in each space; `benchmarks/kill_rounds.py` has many more."""
    config = killed_runs[space]
    straight = dataclasses.replace(config, output_dir=str(tmp_path / "straight"), resume_from_checkpoint=False)
    build_trainer(straight).train()
    run = Path(config.output_dir)
    assert_same_weights(tmp_path / "straight", run)
    assert journal.read(tmp_path / "straight" / "journal").steps == journal.read(run / "journal").steps


@pytest.mark.parametrize(("limit", "kept"), [(None, [0, 2, 4, 6]), (1, [0, 6]), (2, [0, 4, 6]), (5, [0, 2, 4, 6])])
def test_rotation_keeps_the_newest_and_the_start(limit, kept, tmp_path):
    for step in (0, 2, 4, 6):
        checkpoint.checkpoint_path(tmp_path, step).mkdir()
    checkpoint.rotate(tmp_path, limit, None)
    assert sorted(checkpoint.checkpoints(tmp_path)) == kept
