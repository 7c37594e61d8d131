"""Every command and every program of the documentation runs, or says in its first line what it needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mezo.config import PRESETS
from tests.test_readme import FEWER_STEPS, fewer_steps, folder, run

__all__ = ["FEWER_STEPS", "folder"]  # a fixture

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")])
NEEDS = re.compile(r"# needs (the Hub|a GPU|a server|the Hub and a GPU)\b")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's blocks."""
    return re.findall(r"```(\w*)\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_what_a_page_shows_runs(page, folder, model_folder):
    """Blocks in their order, in one folder, with fewer steps."""
    (folder / "model").symlink_to(model_folder("llama"))
    for language, text in blocks(page):
        if language == "bash":
            run(["bash", "-euo", "pipefail", "-c", fewer_steps(text)], folder)
        elif language == "python" and "sglang" not in text and "__main__" not in text:
            run([sys.executable, "-W", "ignore", "-c", fewer_steps(text)], folder)
        elif language == "console":
            assert NEEDS.match(text), f"{page.name}: say what this needs, or make it a bash block:\n{text}"


def test_commands_stand_in_blocks_that_run_or_say_what_they_need():
    for page in PAGES:
        for language, text in blocks(page):
            if re.search(r"^mezo (train|eval|tune|replay|merge|bench|doctor|plot) ", text, re.MULTILINE):
                assert language in ("bash", "console") or "sglang" in page.name, (page, text)


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
