"""Trackers through `report_to`, with the real libraries, offline; what they stored is read back."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In processes of their own: the libraries start threads and servers, and patch what they find.
RUN = """
import json, sys
from mezo import mezo_finetune
from tests.conftest import SENTIMENT_ROWS
model, out, tracker = sys.argv[1:]
mezo_finetune(model, SENTIMENT_ROWS[:24], eval_dataset=SENTIMENT_ROWS[24:32], num_steps=6, batch_size=4,
    learning_rate=1e-4, output_dir=out, report_to=tracker, run_name="named", logging_steps=2, eval_steps=3,
    disable_tqdm=True)
"""
STEPS = [1, 2, 4, 6]


def run(model: str, folder: Path, tracker: str, **settings: str) -> dict[int, float]:
    """Trains, and returns the logged losses by step as trainer_state.json has them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **settings}
    command = [sys.executable, "-W", "ignore", "-c", RUN, model, str(folder / "run"), tracker]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_tensorboard(model_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = run(model_folder("bert"), tmp_path, "tensorboard", TENSORBOARD_LOGGING_DIR=str(tmp_path / "events"))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "train/projected_grad", "eval/loss", "eval/accuracy"} <= set(tags)
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert list(found) == STEPS
    assert found == pytest.approx(expected, rel=1e-6)


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format, as W&B keeps one: blocks of 32 KiB, records in parts."""
    at, whole = 7, b""  # behind W&B's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def test_wandb_offline(model_folder, tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    expected = run(
        model_folder("bert"), tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true",
        WANDB_CACHE_DIR=str(tmp_path / "cache"), WANDB_CONFIG_DIR=str(tmp_path / "config"),
    )  # fmt: skip
    (stored,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    found = {}
    for data in log_records(stored.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            row = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            if "train/loss" in row:
                found[row["train/global_step"]] = row["train/loss"]
    assert list(found) == STEPS
    assert found == pytest.approx(expected)


def test_trackio(model_folder, tmp_path):
    expected = run(model_folder("bert"), tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "store"))
    (stored,) = (tmp_path / "store").glob("*.db")
    with sqlite3.connect(stored) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics").fetchall()
    database.close()
    found = {}
    for name, text in rows:
        metrics = json.loads(text)
        assert name == "named"
        if "train/loss" in metrics:
            found[metrics["train/global_step"]] = metrics["train/loss"]
    assert found == pytest.approx(expected)
