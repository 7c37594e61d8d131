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
# In a process of its own: the libraries start threads and servers, and patch what they find.
RUN = """
import sys
from mezo import mezo_finetune
from tests.conftest import SENTIMENT_ROWS
for tracker in ("tensorboard", "wandb", "trackio"):
    mezo_finetune(sys.argv[1], SENTIMENT_ROWS[:24], eval_dataset=SENTIMENT_ROWS[24:32], num_steps=6, batch_size=4,
        learning_rate=1e-4, output_dir=f"run-{tracker}", report_to=tracker, run_name="named", logging_steps=2,
        eval_steps=3, disable_tqdm=True)
"""
STEPS = [1, 2, 4, 6]


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """Holds a run for each tracker, and what it stored."""
    folder = tmp_path_factory.mktemp("tracked")
    settings = {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
        "TENSORBOARD_LOGGING_DIR": str(folder / "events"), "TRACKIO_DIR": str(folder / "store"),
        "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true",
        "WANDB_CACHE_DIR": str(folder / "cache"), "WANDB_CONFIG_DIR": str(folder / "config"),
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-c", RUN, model_folder("bert")]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """The logged losses by step as trainer_state.json has them; the three runs are the same."""
    history = json.loads((folder / "run-wandb" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_tensorboard(folder, expected):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events")).Reload()
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


def test_wandb_offline(folder, expected):
    from wandb.proto.wandb_internal_pb2 import Record

    (stored,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
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


def test_trackio(folder, expected):
    (stored,) = (folder / "store").glob("*.db")
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
