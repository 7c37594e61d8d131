"""Every command and every program of the documentation runs, or says in its first line what it needs."""

import dataclasses
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from mezo.bench import BenchOptions
from mezo.cli import COMMANDS, commands, main, options
from mezo.config import PRESETS, MeZOConfig
from mezo.tasks import load_task
from tests.test_cli import run_cli
from tests.test_readme import fewer_steps, folder, run

__all__ = ["folder"]  # a fixture

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")])
SHOWN = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
WHAT = r"(the Hub|PyPI|a clone|a GPU|SGLang|an SGLang server)"
NEEDS = re.compile(rf"# needs {WHAT}(( and|,) {WHAT})*\b")
PROGRAMS = "mezo|python3?|pip|uv|pytest|torchrun|sglang|hf|make|bash|sh|git|curl|docker|cmp|cd|export"
# At a line's beginning or behind another command; also by its path, or with variables set for it.
PROGRAM = rf"(?:[\w.~-]*/)*(?:{PROGRAMS})|\.\w*/[\w./-]+"
COMMAND = re.compile(rf"(?:^|&&|\|\||[;|]) *(?:[$%] )?(?:\w+=\S+ +)*(?:{PROGRAM})(?= |$)")
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks."""
    return BLOCK.findall(text)


def is_marked(language: str, block: str) -> bool:
    """Whether a block runs, says what it needs, or shows no command."""
    if language in ("bash", "python"):
        return True  # a program with a mark is compiled
    if language == "console":
        return NEEDS.match(block) is not None
    return language in ("yaml", "") and not any(COMMAND.search(line.strip()) for line in block.splitlines())


def unmarked(text: str) -> list[str]:
    """What of a page neither runs in a test nor says what it needs: blocks, indented lines, fences of other kinds."""
    lines = BLOCK.sub("", text).splitlines()
    indented = [line for line in lines if line.startswith(("    ", "\t", "$ ")) and COMMAND.search(line.strip())]
    fences = [line for line in lines if "```" in line or "~~~" in line or "<pre" in line]
    return [*indented, *fences, *(block for language, block in blocks(text) if not is_marked(language, block))]


@pytest.mark.parametrize(
    "text",
    [
        "```\nmezo inspect runs/first\n```",
        "```\npip install mezo\n```",
        "```\n$ mezo doctor runs/first\n```",
        "```yaml\npython train.py\n```",
        "```\n.venv/bin/python -m pytest\n```",
        "```\n./.ci/run\n```",
        "```\nHF_HUB_OFFLINE=1 mezo presets\n```",
        "```\ncd runs && mezo presets\n```",
        "```console\nmezo train --task sst2\n```",
        "```console\n# needs luck\nmezo train --task sst2\n```",
        "```console\nmezo train --task sst2\n# needs the Hub\n```",
        "```sh\nmezo presets\n```",
        "``` bash\nmezo presets\n```",
        "~~~\nmezo presets\n~~~",
        "- a list\n\n    mezo presets\n",
        "  ```bash\n  mezo presets\n  ```",
        "<pre>\nmezo presets\n</pre>",
    ],
)
def test_an_unmarked_command_is_noticed(text):
    assert unmarked(f"Before.\n\n{text}\n\nAfter.\n")


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nmezo presets\n```",
        "```console\n# needs the Hub and a GPU\nmezo train --task sst2\n```",
        "```python\n# needs SGLang and a GPU\nimport mezo\n```",
        "```\nheader   8 bytes\n```",
        "```\nengines/torch/engine.py   the torch engine\n```",
        "mezo trains\nmezo is started beside",
    ],
)
def test_what_runs_or_is_marked_passes(text):
    assert not unmarked(f"Before.\n\n{text}\n\nAfter.\n")


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_no_page_shows_an_unmarked_command(page):
    assert unmarked(page.read_text()) == []


def test_a_page_that_no_test_runs_has_no_block_that_would_run():
    """tests/test_readme.py runs README.md, the test below all PAGES."""
    for page in {*SHOWN} - {*PAGES, ROOT / "README.md"}:
        assert all(language == "console" for language, _ in blocks(page.read_text())), page


def command_lines(block: str) -> list[str]:
    """One command a line."""
    return [line for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


def run_shell(block: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain `mezo` commands and examples in this process, where they start faster; what a shell has to read in one."""
    for line in command_lines(fewer_steps(block)):
        if line.startswith("mezo ") and not re.search(r"[$|<>&;*`]", line):
            finished = run_cli(capsys, *shlex.split(line, comments=True)[1:])
            assert finished.status == 0, f"{line}\n{finished.out}\n{finished.err}"
        elif line.startswith("python examples/"):
            with monkeypatch.context() as here, torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
                here.setattr("sys.argv", shlex.split(line)[1:])
                runpy.run_path(shlex.split(line)[1], run_name="__main__")
        else:
            run(["bash", "-euo", "pipefail", "-c", line], folder)


def parse_only(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options and config of the `mezo` commands of a block that needs what is not here; nothing is run."""
    parsed = []
    for name in ("train", "tune", "evaluate", "replay", "inspect", "doctor", "plot", "merge", "bench"):
        monkeypatch.setattr(commands, name, lambda *options: parsed.append(options))
    lines = [line for line in command_lines(block) if line.startswith("mezo ")]
    for line in lines:
        main(shlex.split(line, comments=True)[1:])
    assert len(parsed) == len(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_what_a_page_shows_runs(page, folder, model_folder, monkeypatch, capsys):
    """Blocks in their order, in one folder, with fewer steps. What is marked is parsed."""
    (folder / "model").symlink_to(model_folder("llama"))
    monkeypatch.chdir(folder)
    for language, text in blocks(page.read_text()):
        if language == "bash":
            run_shell(text, folder, capsys, monkeypatch)
        elif language == "console":
            with monkeypatch.context() as only_here:
                parse_only(text, only_here)
        elif language == "python":
            program = compile(fewer_steps(text), str(page), "exec")
            if not NEEDS.match(text):
                with warnings.catch_warnings(action="ignore"):
                    exec(program, {"__name__": "__main__"})
        elif language == "yaml":
            (folder / "shown.yaml").write_text(text)
            assert load_task("shown.yaml").template


@pytest.mark.parametrize("config", sorted((ROOT / "examples").glob("*/*.yaml")), ids=lambda config: config.name)
def test_a_config_says_how_it_is_run(config, folder, monkeypatch):
    """In its second line; the command is parsed with the config under it."""
    monkeypatch.chdir(folder)
    command = config.read_text().splitlines()[1].removeprefix("#   ").partition(" (")[0]
    assert f"--config {config.relative_to(ROOT)} " in command
    parse_only(command, monkeypatch)


OPTIONS = {
    "help", "version", "config", "preset",
    *(f.name for f in dataclasses.fields(MeZOConfig)),
    *(f.name for f in dataclasses.fields(BenchOptions)),
    *(f.name for kind in vars(options).values() if dataclasses.is_dataclass(kind) for f in dataclasses.fields(kind)),
}  # fmt: skip


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_option_and_command_that_a_page_names_exists(page):
    """SGLang's options have hyphens; those of example scripts are theirs."""
    text = page.read_text()
    named = {name for name in re.findall(r"(?<![\w-])--([a-z]\w*)(?![\w-])", text) if name not in OPTIONS}
    scripts = "".join(path.read_text() for path in (ROOT / "examples").glob("*/*.py"))
    assert {name for name in named if f'"--{name}"' not in scripts} == set()
    assert set(re.findall(r"`mezo ([a-z]+)\b", text)) <= COMMANDS.keys()
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE))


def test_the_hyperparameter_table_is_the_presets():
    text = (ROOT / "docs" / "methods.md").read_text()
    for name, preset in PRESETS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert [float(rate) for rate in cells[1].split(",")] == list(preset.learning_rates)
        assert float(cells[2]) == preset.values["epsilon"]
        assert int(cells[3]) == preset.values["per_device_train_batch_size"]
        assert int(cells[4].replace(",", "")) == preset.values["max_steps"]


def test_the_site_builds_and_knows_every_page(tmp_path):
    """Strictly: a broken link or an unknown name in the API page is an error."""
    pytest.importorskip("mkdocs", reason="the site needs mezo[docs]")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MeZOConfig" in (tmp_path / "site" / "api.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "site" / f"{page.stem}.html").exists()
        assert page.name in (ROOT / "mkdocs.yml").read_text(), f"{page.name} is not in the site's navigation"
    pages = [path.read_text() for path in (tmp_path / "site").glob("*.html")]
    assert not any(re.search(r'(src|href)="https?://[^"]*\.(js|css|woff2?)"', page) for page in pages)
