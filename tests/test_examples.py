"""Examples whose results are claims of the documentation."""

import csv
import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_only_reuse_across_signs_is_biased(tmp_path, monkeypatch):
    """12 directions: a root mean square of 0.62 is 0.13 uncertain, one of 0.0002 far from its bound."""
    pytest.importorskip("matplotlib")
    script = ROOT / "examples" / "kv_reuse" / "experiment.py"
    spec = importlib.util.spec_from_file_location("experiment", script)
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    monkeypatch.setattr("sys.argv", [str(script), "--directions", "12", "--output_dir", str(tmp_path)])
    with torch.random.fork_rng():
        experiment.main()
    with (tmp_path / "kv-reuse.csv").open() as file:
        rows = {row["reuse"][:3]: row for row in csv.DictReader(file)}
    bias = {name: float(row["bias_over_gradient"]) for name, row in rows.items()}
    assert max(bias["(a)"], bias["(b)"], bias["(d)"]) < 0.01
    assert bias["(c)"] > 0.3
    assert float(rows["(b)"]["tokens_reused"]) > 0.6
    assert float(rows["(d)"]["tokens_reused"]) > 0.8  # its first step computes the prompts
    assert (tmp_path / "kv-reuse.png").stat().st_size > 10_000
