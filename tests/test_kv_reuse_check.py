"""benchmarks/gpu_kv_reuse_check.py on a CPU: trajectories with reuse pass, and what reuses too much does not."""

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu_kv_reuse_check as check


@pytest.fixture(autouse=True)
def _same_generator():
    """The benchmark seeds torch's own."""
    with torch.random.fork_rng():
        yield


def test_the_torch_engine_passes(tmp_path, capsys):
    out = tmp_path / "found.csv"
    assert check.main(["torch", "--shape", "tiny", "--steps", "5", "--output", str(out)]) == 0
    rows = {row["setting"]: row for row in csv.DictReader(out.read_text().splitlines())}
    assert list(rows) == list(check.TORCH)
    assert {row["result"] for row in rows.values()} == {"PASS"}
    assert capsys.readouterr().out.count("PASS") == len(rows)
    reused = {name: float(row["reused_percent"]) for name, row in rows.items()}
    assert 0 < reused["aLoRA, memory for half of the prompts"] < reused["aLoRA, prompts beside the model"]


@pytest.mark.parametrize("naive", [check.ReuseAcrossSigns, check.ReuseAcrossSteps])
def test_an_engine_that_reuses_too_much_fails(naive, monkeypatch, capsys):
    monkeypatch.setitem(check.TORCH, "naive", check.OnTorch(check.OPTIONS, naive))
    ((name, found),) = check.on_torch("tiny", ["naive"], 5)
    assert not check.passes(name, found)
    assert found.concordance < check.LEAST_CONCORDANCE and found.difference > 100 * check.TOLERANCE
    assert check.main(["torch", "--shape", "tiny", "--settings", "naive", "--steps", "5"]) == 1
    assert "FAIL  naive" in capsys.readouterr().out


def test_what_passes():
    good = check.Found(0.5 * check.TOLERANCE, 0.0, 0.999, 6 * check.TOLERANCE, 0.5, True)
    assert check.passes("LoRA", good)
    assert not check.passes("control", good)
    for bad in (good._replace(difference=2 * check.TOLERANCE), good._replace(concordance=0.98)):
        assert not check.passes("LoRA", bad)
        assert check.passes("control", bad)
    for bad in ({"moved": 4 * check.TOLERANCE}, {"reused": 0.0}, {"same_weights": False}):
        assert not check.passes("LoRA", good._replace(**bad))


def test_concordance_by_hand():
    assert check.concordance([(1.0, 1.0), (3.0, 3.0)]) == 1.0
    # Variances 1 and 1, covariance 1, means 1 apart: 2 / (1 + 1 + 1).
    assert check.concordance([(1.0, 2.0), (3.0, 4.0)]) == pytest.approx(2 / 3)
    # Variances 1 and 4, covariance 2: 4 / (1 + 4).
    assert check.concordance([(-1.0, -2.0), (1.0, 2.0)]) == pytest.approx(4 / 5)
    assert check.concordance([(1.0, -1.0), (-1.0, 1.0)]) == -1.0
