"""Where a row of benchmark results comes from."""

import csv
import datetime
import functools
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers


@functools.cache
def provenance() -> dict[str, str]:
    """Machine, versions, commit and date of a measurement; the commit is $COMMIT where there is no .git."""
    root = Path(__file__).parent
    commit = subprocess.run(
        ["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu()}, {torch.get_num_threads()} threads"
    )
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": os.environ.get("COMMIT") or commit.stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a CSV file of rows that bear where they come from."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
