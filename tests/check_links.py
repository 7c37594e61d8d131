"""Relative links and anchors of all Markdown files lead somewhere. `make check` runs this."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def dead_links() -> list[str]:
    tracked = subprocess.run(["git", "-C", ROOT, "ls-files", "*.md"], capture_output=True, text=True, check=True)
    dead = []
    for name in tracked.stdout.split():
        path = ROOT / name
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:", link):
                continue
            file = (path.parent / target) if target else path
            if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
                dead.append(f"{name}: {link}")
    return dead


if __name__ == "__main__":
    found = dead_links()
    print("\n".join(found) or "all links lead somewhere")
    sys.exit(bool(found))
