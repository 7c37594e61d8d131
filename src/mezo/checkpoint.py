"""Folders that appear whole or not at all, checkpoints with checksums, their rotation."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mezo.errors import UserError

JOURNAL_NAME = "journal"
STATE_NAME = "trainer_state.json"
CHECKSUMS_NAME = "checksums.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoints(run: Path) -> dict[int, Path]:
    """Complete checkpoints of a run by step, in order."""
    found = ((_CHECKPOINT.fullmatch(p.name), p) for p in run.iterdir() if p.is_dir())
    return dict(sorted((int(match.group(1)), path) for match, path in found if match))


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fills a new folder by `write` and lets it appear under its name only when everything is on the disk."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _naming(folder):
            write(partial)
            for path in partial.rglob("*"):
                _sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _sync(folder.parent)


def write_checkpoint(folder: Path, write: Callable[[Path], None]) -> None:
    """As `write_folder`, with the hashes of all files beside them."""

    def write_sealed(partial: Path) -> None:
        write(partial)
        text = json.dumps(_checksums(partial), indent=2, sort_keys=True)
        (partial / CHECKSUMS_NAME).write_text(text + "\n")

    write_folder(folder, write_sealed)


def is_whole(folder: Path) -> bool:
    """Whether all files of a checkpoint are there and are what was written."""
    try:
        recorded = json.loads((folder / CHECKSUMS_NAME).read_bytes())
        present = _checksums(folder)
        return isinstance(recorded, dict) and bool(recorded) and recorded.items() <= present.items()
    except (OSError, ValueError, RecursionError):
        return False


def read_state(path: Path, last_step: int) -> TrainerState:
    """What a trainer_state.json says of the steps up to `last_step`. It names no paths that anyone follows.

    Raises:
        UserError: the file is damaged.
    """
    try:
        state = TrainerState.load_from_json(str(path))
        state.log_history = [entry for entry in state.log_history if int(entry["step"]) <= last_step]
        best = state.best_global_step
        if best is not None and int(best) > last_step:
            best = state.best_metric = None
        state.best_global_step = None if best is None else int(best)
        state.global_step = min(int(state.global_step), last_step)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__})") from None
    state.best_model_checkpoint = None
    return state


def write_files(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes files into an existing folder; each one replaces its predecessor whole."""
    partial = folder / ".partial"
    write_folder(partial, write)
    for path in sorted(partial.iterdir()):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    partial.rmdir()
    _sync(folder)


def write_text(path: Path, text: str) -> None:
    """Replaces a text file whole."""
    partial = path.with_name(f".{path.name}.partial")
    with _naming(path):
        partial.write_text(text)
        _sync(partial)
        partial.replace(path)


def rotate(run: Path, limit: int | None, keep: Path | None) -> None:
    """Removes the oldest checkpoints above `limit`, but never `keep` and never that of step 0."""
    existing = [path for step, path in checkpoints(run).items() if step]
    for path in existing[: max(0, len(existing) - limit)] if limit is not None else []:
        if path != keep:
            shutil.rmtree(path)


def remove_partial(run: Path) -> None:
    """Removes what a killed process left half written."""
    for path in run.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(run / ".partial", ignore_errors=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Gives every failed write one form, an OSError with a path; those of Rust libraries are no OSErrors."""
    try:
        yield
    except Exception as error:
        rust = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(rust.group(1)) if rust else None
        if number is None:
            raise
        raise OSError(number, f"{os.strerror(number)} while writing", str(path)) from error


def _checksums(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != CHECKSUMS_NAME:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return found


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
