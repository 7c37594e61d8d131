"""Examples whose results are claims of the documentation."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_only_reuse_across_signs_is_biased(tmp_path):
    pytest.importorskip("matplotlib")
    script = ROOT / "examples" / "kv_reuse" / "experiment.py"
    command = [sys.executable, script, "--directions", "24", "--output_dir", tmp_path]
    subprocess.run(command, check=True, capture_output=True, text=True)
    with (tmp_path / "kv-reuse.csv").open() as file:
        rows = {row["reuse"][:3]: row for row in csv.DictReader(file)}
    bias = {name: float(row["bias_over_gradient"]) for name, row in rows.items()}
    assert max(bias["(a)"], bias["(b)"], bias["(d)"]) < 0.01
    assert bias["(c)"] > 0.3
    assert float(rows["(b)"]["tokens_reused"]) > 0.6
    assert float(rows["(d)"]["tokens_reused"]) > 0.8  # its first step computes the prompts
    assert (tmp_path / "kv-reuse.png").stat().st_size > 10_000
