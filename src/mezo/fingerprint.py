"""Hash of a checkpoint's weights, the same for any sharding and any engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from mezo.engines.torch.space import TensorHasher
from mezo.errors import UserError

WEIGHT_NAMES = ("model.safetensors", "model.safetensors.index.json")


def checkpoint_digest(model_name_or_path: str, revision: str = "main") -> str:
    """xxh3-128 over names, types, shapes and bytes of all tensors of a checkpoint, in the order of their names.

    One tensor is in memory at a time, so a model larger than the memory can be hashed.
    """
    hasher = TensorHasher()
    try:
        for name, tensor in _tensors(weight_files(model_name_or_path, revision)):
            hasher.update(name, tensor)
    except SafetensorError as error:
        raise UserError(f"model_name_or_path {model_name_or_path!r}: {error}") from None
    return hasher.hexdigest()


def checkpoint_tensor(model_name_or_path: str, revision: str, name: str) -> Tensor | None:
    """One tensor of a checkpoint by name, or None."""
    for file in weight_files(model_name_or_path, revision):
        with safe_open(file, framework="pt") as handle:
            if name in handle.keys():  # noqa: SIM118
                tensor: Tensor = handle.get_tensor(name)
                return tensor
    return None


def weight_files(model_name_or_path: str, revision: str) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        UserError: there are none, or one is missing. Pickled weights can run code when they are loaded; they never are.
    """
    for name in WEIGHT_NAMES:
        found = hub_file(model_name_or_path, name, revision)
        if found is None:
            continue
        if found.suffix != ".json":
            return [found]
        shards = _shards(found)
        paths = [hub_file(model_name_or_path, shard, revision) for shard in shards]
        if None in paths:
            raise UserError(f"model_name_or_path {model_name_or_path!r}: {shards[paths.index(None)]} is missing")
        return [path for path in paths if path is not None]
    raise UserError(
        f"model_name_or_path {model_name_or_path!r}: no safetensors weights, neither of {', '.join(WEIGHT_NAMES)}. "
        "Pickled ones (pytorch_model.bin) can run code and are not loaded; give a model_revision with safetensors (the "
        "Hub's converted copies are refs/pr/N) or convert them"
    )


def _shards(index: Path) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        inside = all(not Path(shard).is_absolute() and ".." not in Path(shard).parts for shard in shards)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is damaged ({type(error).__name__})") from None
    if not inside:
        raise UserError(f"{index} names files outside its folder")
    return shards


def is_hub_name(name: str) -> bool:
    """Whether something on the Hub may be called so; what is not is a path."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None


def hub_file(model_name_or_path: str, name: str, revision: str = "main") -> Path | None:
    """A file of a folder or of a Hub repository, or None."""
    found = cached_file(
        model_name_or_path,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """All tensors in the order of their names."""
    handles = [safe_open(file, framework="pt") for file in files]
    where = sorted((name, i) for i, handle in enumerate(handles) for name in handle.keys())  # noqa: SIM118
    for name, i in where:
        yield name, handles[i].get_tensor(name)
