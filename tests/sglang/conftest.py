"""These tests need SGLang in the environment: `make test-sglang`."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Nothing to collect where SGLang is not installed."""
    return True if importlib.util.find_spec("sglang") is None and collection_path.name.startswith("test_") else None


def environment() -> dict[str, str]:
    """SGLang on a CPU: stand-ins for what it imports for accelerators, one thread."""
    paths = [str(ROOT), str(ROOT / "tests" / "sglang" / "shim")]
    settings = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(paths)}


def start_job(name: str, settings: dict[str, str] | None = None, **arguments: Any) -> "subprocess.Popen[str]":
    """Starts a job of jobs.py, with `settings` added to its environment."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.sglang.jobs", name, json.dumps(arguments)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment() | (settings or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> str:
    """Its output; fails if it failed."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.fixture(scope="session")
def reference(model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run folder of the torch engine on a tiny model, with the tests' setting."""
    made: dict[str, Path] = {}

    def folder(name: str, **options: Any) -> Path:
        key = f"{name} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("torch") / name
            finish(start_job("finetune", model=model_folder(name), out=str(made[key]), engine="torch", **options))
        return made[key]

    return folder
