"""The wheel as users get it, and the Hub as far as it goes without one."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from requests import Response

import mezo
from mezo import UserError
from mezo.cli import main
from mezo.hub import push_run
from mezo.tasks import task_names
from tests.conftest import SENTIMENT_ROWS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "hatchling" in done.stderr and done.returncode:
        pytest.skip("building needs hatchling from a package index")
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("mezo-*.whl")
    return path


def test_what_a_wheel_holds(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"mezo-{mezo.__version__}-py3-none-any")
    assert {"mezo/py.typed", "mezo/auto.yaml", "mezo/kernels/_gpu_triton.py"} <= names
    assert {f"mezo/tasks/{n}.yaml" for n in task_names()} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"mezo", f"mezo-{mezo.__version__}.dist-info"}
    assert not any(name.endswith((".jsonl", ".csv", ".safetensors", ".png", ".nbc")) for name in names)
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 1_000_000


def test_an_installed_wheel_works(wheel, tmp_path):
    """Without the checkout: command line, tasks, SGLang's entry point, type information."""
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    program = (
        "import mezo, importlib.metadata as m; from pathlib import Path; from mezo.cli import main\n"
        f"assert Path(mezo.__file__).is_relative_to({str(site)!r}), mezo.__file__\n"
        "from mezo.tasks import load_task; print(load_task('copa').rows, m.version('mezo'))\n"
        "print([e.value for e in m.entry_points(group='sglang.srt.plugins') if e.name == 'mezo'][0])\n"
        "main(['presets'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": ""}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"copa {mezo.__version__}\nmezo.engines.sglang.plugin:register\nroberta-full")


def test_a_run_goes_to_the_hub(model_folder, jsonl, tmp_path, monkeypatch):
    """What would be uploaded, by huggingface_hub's own selection of files."""
    calls = {}

    def create_repo(self, repo_id, **options):
        calls["create"] = (repo_id, options)
        return type("RepoUrl", (str,), {"repo_id": f"me/{repo_id}"})(f"https://hub/me/{repo_id}")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: calls.update(upload=options))
    main(["train", "--model_name_or_path", model_folder("llama"), "--dataset_name", jsonl(SENTIMENT_ROWS[:8]),
          "--template", "{text} it was", "--label_words", "0", "bad", "1", "good", "--use_peft", "--max_steps", "4",
          "--save_steps", "2", "--output_dir", str(tmp_path / "my-run"), "--disable_tqdm", "--push_to_hub",
          "--hub_private_repo", "True"])  # fmt: skip
    assert calls["create"] == ("my-run", {"private": True, "exist_ok": True})
    upload = calls["upload"]
    assert upload["repo_id"] == "me/my-run"
    from huggingface_hub.utils import filter_repo_objects

    files = [str(p.relative_to(tmp_path / "my-run")) for p in (tmp_path / "my-run").rglob("*") if p.is_file()]
    kept = set(filter_repo_objects(files, ignore_patterns=upload["ignore_patterns"]))
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "journal", "trainer_state.json"} <= kept
    assert not any("checkpoint" in name and "/" in name for name in kept)
    assert any(name.startswith("checkpoint-4/") for name in files)
    front = yaml.safe_load((tmp_path / "my-run" / "README.md").read_text().split("---")[1])
    assert "base_model" not in front and "datasets" not in front  # paths, which the Hub refuses


def test_a_hub_that_refuses_leaves_the_run(tmp_path, monkeypatch):
    def refused(self, repo_id, **_):
        raise HfHubHTTPError("401 Client Error: not logged in\nmore", response=Response())

    monkeypatch.setattr(HfApi, "create_repo", refused)
    with pytest.raises(UserError, match=r"push_to_hub mine: 401 .*; the run is complete in"):
        push_run(tmp_path, "mine")
