"""transformers' callbacks see the events, state and logs that its own Trainer would give them."""

import dataclasses
import io
import logging
import math
import re

import pytest
import torch
from rich.console import Console
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from mezo.api import build_trainer
from mezo.callbacks import ProgressCallback
from mezo.cli import commands
from mezo.config import MeZOConfig
from mezo.evaluation import evaluate
from tests.conftest import SENTIMENT_ROWS


@pytest.fixture
def config(model_folder, tmp_path):
    return MeZOConfig(
        model_name_or_path=model_folder("bert"),
        output_dir=str(tmp_path / "run"),
        learning_rate=1e-4,
        per_device_train_batch_size=8,
        max_steps=10,
        logging_steps=4,
        eval_steps=5,
        save_steps=5,
        disable_tqdm=True,
        load_best_model_at_end=True,
    )


class Recorder(TrainerCallback):
    def __init__(self):
        self.events = []
        self.logs = []

    def on_train_begin(self, args, state, control, **kwargs):
        assert isinstance(kwargs["model"], torch.nn.Module)
        assert kwargs["processing_class"].mask_token == "[MASK]"
        self.events.append("begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(("evaluate", state.global_step, sorted(metrics)))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def test_events_arrive_in_order(config):
    recorder = Recorder()
    build_trainer(config, SENTIMENT_ROWS[:64], SENTIMENT_ROWS[64:], [recorder]).train()
    evaluation = ["eval_accuracy", "eval_loss"]
    steps = [event for event in recorder.events if isinstance(event, int)]
    assert steps == list(range(1, 11))
    assert recorder.events[0] == "begin"
    assert recorder.events[-1] == "end"
    assert ("evaluate", 5, evaluation) in recorder.events
    assert ("save", 10) in recorder.events
    assert recorder.events.index(("evaluate", 10, evaluation)) < recorder.events.index(("save", 10))
    train_logs = [(step, logs) for step, logs in recorder.logs if "loss" in logs]
    assert [step for step, _ in train_logs] == [1, 4, 8]
    wanted = {
        "loss", "projected_grad", "loss_plus", "loss_minus", "learning_rate", "tokens_per_second",
        "tokens_asked", "tokens_computed", "reuse_percent", "seconds_saved", "padding_percent", "forward_percent",
        "update_percent",
    }  # fmt: skip
    assert all(logs.keys() == wanted and all(map(math.isfinite, logs.values())) for _, logs in train_logs)


def test_a_callback_can_stop_the_run_and_it_can_go_on(config):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    assert build_trainer(config, SENTIMENT_ROWS[:64], SENTIMENT_ROWS[64:], [Stop()]).train().global_step == 3


@pytest.mark.parametrize(("steps", "expected"), [(4, 2), (5, 3)], ids=["at an evaluation", "after one"])
def test_the_last_weights_are_evaluated_once(config, monkeypatch, steps, expected):
    config = dataclasses.replace(config, max_steps=steps, eval_steps=2, load_best_model_at_end=False)
    trainer = build_trainer(config, SENTIMENT_ROWS, SENTIMENT_ROWS)
    counted, scored = [], trainer.engine.score
    monkeypatch.setattr(trainer.engine, "score", lambda examples: counted.append(1) or scored(examples))
    found = trainer.train().metrics
    assert len(counted) == expected
    assert found.loss == evaluate(trainer.engine, trainer.eval_examples).loss


def test_early_stopping_of_transformers_works(config):
    # Nothing can improve when the updates are this small, so the second evaluation ends the run.
    config = MeZOConfig.from_dict({**config.to_dict(), "max_steps": 100, "learning_rate": 1e-30, "eval_steps": 3})
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    result = build_trainer(config, SENTIMENT_ROWS[:64], SENTIMENT_ROWS[64:], [stopping]).train()
    assert result.global_step == 9


def test_the_progress_bar_fits_into_80_columns(config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    progress = ProgressCallback()
    text = io.StringIO()
    progress._progress.live.console = Console(file=text, force_terminal=True, width=80)
    progress._progress.disable = False
    build_trainer(config, SENTIMENT_ROWS[:64], SENTIMENT_ROWS[64:], [progress]).train()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).replace("\r", "\n").splitlines()
    last = [line.rstrip() for line in shown if line.strip()][-1]
    assert len(last) <= 80
    for part in ("training", "━", "10/10", "loss ", "reuse 0 %", "0:00:0"):
        assert part in last
    assert "…" not in last


def test_the_progress_bar_shows_figures_and_survives_without_a_terminal(config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    progress = ProgressCallback()
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=140)
    progress._progress.live.console = console
    progress._progress.disable = False
    build_trainer(config, SENTIMENT_ROWS[:64], SENTIMENT_ROWS[64:], [progress]).train()
    shown = text.getvalue()
    for part in ("10/10", "loss 0.", "projected_grad", "tokens/s", "step 5: eval_", "eval_loss"):
        assert part in shown


@pytest.mark.parametrize("width", [80, 130, 170, 180, 200])
def test_the_progress_bar_says_what_reuse_saved(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    progress, text = ProgressCallback(), io.StringIO()
    progress._progress.live.console = Console(file=text, force_terminal=True, width=width)
    progress._progress.disable = False
    progress.on_train_begin(None, TrainerState(max_steps=10), None)
    reuse = {"tokens_asked": 25_984, "tokens_computed": 6_880, "reuse_percent": 73.52, "seconds_saved": 12.4}
    progress.on_log(None, TrainerState(), None, {"loss": 0.5, "projected_grad": 1.0, "tokens_per_second": 9.0, **reuse})
    progress.stop()
    assert ("reuse 74 %: 6.88k of 26k tokens computed, 12 s saved" in text.getvalue()) == (width > 80)
    assert "reuse 74 %" in text.getvalue()
    assert "…" not in text.getvalue()  # steps and times have their room
    assert ("projected_grad" in text.getvalue()) == (width >= 170)


def test_a_log_line_stands_above_the_progress_bar(config, monkeypatch):
    """Not behind it on the same line: the handler writes to what standard error is then."""
    progress, handler, text = ProgressCallback(), commands._StandardError(), io.StringIO()
    progress._progress.live.console = Console(file=text, force_terminal=True, width=140)
    progress._progress.disable = False
    record = logging.LogRecord("mezo", logging.WARNING, __file__, 1, "what is %s", ("wrong",), None)
    progress.on_train_begin(None, TrainerState(max_steps=10), None)
    handler.emit(record)
    progress.stop()
    (before, _) = text.getvalue().split("what is wrong\n")
    assert before.endswith("\r\x1b[2K")  # the bar's line was emptied
