"""Rows of text from files, the Hub or memory, through the `datasets` library; splits and sampling by seed."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError

from mezo.config import MeZOConfig, label_key
from mezo.errors import UserError
from mezo.tasks import Task

logger = logging.getLogger(__name__)

Row = dict[str, object]
TrainData: TypeAlias = "str | Path | Sequence[Row] | Dataset | DatasetDict"

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


class Splits(NamedTuple):
    """Rows to train on and rows to evaluate on (possibly none)."""

    train: Dataset
    evaluation: Dataset | None


def load_splits(
    config: MeZOConfig,
    train: TrainData | None = None,
    evaluation: TrainData | None = None,
    task: Task | None = None,
) -> Splits:
    """The rows that a config names, prepared by its task; `train` and `evaluation` (paths or rows in memory) win."""
    train_source = train if train is not None else config.dataset_name
    if train_source is None:
        raise UserError("dataset_name is missing: a file, a folder or a Hub name")
    seed = data_seed(config)
    train_rows = prepared(load_rows(train_source, config.dataset_config, config.dataset_train_split), config, task)
    eval_rows = load_eval_rows(config, evaluation, train_source)
    if eval_rows is not None:
        eval_rows = prepared(eval_rows, config, task)
    if config.num_shots is not None:
        train_rows, other_rows = few_shot(train_rows, config.num_shots, config.label_column, seed)
        eval_rows = other_rows if eval_rows is None else eval_rows
    elif config.validation_size and eval_rows is None:
        train_rows, eval_rows = _hold_out(train_rows, config.validation_size, seed)
    if (config.max_train_samples or 0) > len(train_rows):
        logger.warning("max_train_samples is %d; there are %d rows", config.max_train_samples, len(train_rows))
    train_rows = _sample(train_rows, config.max_train_samples, seed)
    if eval_rows is not None:
        eval_rows = _sample(eval_rows, config.max_eval_samples, seed)
    return Splits(train_rows, eval_rows)


def data_seed(config: MeZOConfig) -> int:
    """The seed of data order, splits and samples."""
    return config.seed if config.data_seed is None else config.data_seed


def prepared(rows: Dataset, config: MeZOConfig, task: Task | None) -> Dataset:
    """The rows as the task's templates speak of them; without a task as they are."""
    return rows if task is None else task.prepare(rows, config)


def load_eval_rows(
    config: MeZOConfig, evaluation: TrainData | None = None, train_source: TrainData | None = None
) -> Dataset | None:
    """Rows to evaluate on, if the config names any: a source of their own, or a split of the training source."""
    source = evaluation if evaluation is not None else config.eval_dataset_name
    if source is not None:
        names = [config.dataset_test_split] if config.dataset_test_split else ["test", "validation", "train"]
        return load_rows(source, config.dataset_config, *names)
    if config.dataset_test_split is not None:
        whole = train_source if train_source is not None else config.dataset_name
        assert whole is not None
        return load_rows(whole, config.dataset_config, config.dataset_test_split)
    return None


def evaluates_held_out(config: MeZOConfig, dataset: TrainData | None) -> bool:
    """Whether `mezo eval` evaluates what a training with this `validation_size` holds out: no other rows are named."""
    named = dataset is not None or config.eval_dataset_name is not None or config.dataset_test_split is not None
    return config.validation_size > 0 and not named


def load_test_rows(config: MeZOConfig, dataset: TrainData | None, task: Task | None) -> Dataset:
    """The rows that `mezo eval` evaluates: those that the config names, at most `max_eval_samples` drawn by seed.

    With `validation_size` those that a training with the same seed holds out.
    """
    rows = load_eval_rows(config, dataset)
    if rows is None:
        if config.dataset_name is None:
            raise UserError("dataset_name is missing: a file, a folder or a Hub name; or a task")
        if evaluates_held_out(config, dataset):
            held_out = load_splits(config, task=task).evaluation
            assert held_out is not None
            return held_out
        rows = load_rows(config.dataset_name, config.dataset_config, "validation", "test", "train")
    return _sample(prepared(rows, config, task), config.max_eval_samples, data_seed(config))


def load_demonstrations(config: MeZOConfig, dataset: TrainData | None, task: Task | None) -> list[Row]:
    """In-context examples for `mezo eval`, from rows of which none are evaluated."""
    if config.num_demonstrations is None:
        return []
    source = config.dataset_name
    if source is None:
        raise UserError("num_demonstrations needs training rows: dataset_name is missing")
    evaluated_elsewhere = dataset is not None or config.eval_dataset_name not in (None, source)
    if evaluates_held_out(config, dataset):
        return draw_demonstrations(config, load_splits(config, task=task).train)
    if Path(source).is_file() and not evaluated_elsewhere:
        raise UserError(
            f"num_demonstrations: {source} is evaluated as well; name the rows to evaluate as eval_dataset_name"
        )
    rows = load_rows(source, config.dataset_config, config.dataset_train_split)
    return draw_demonstrations(config, prepared(rows, config, task))


def draw_demonstrations(config: MeZOConfig, train: Dataset) -> list[Row]:
    """In-context examples, drawn from the training rows by seed."""
    if config.num_demonstrations is None:
        return []
    if config.num_demonstrations > len(train):
        raise UserError(f"num_demonstrations is {config.num_demonstrations}, but there are {len(train)} training rows")
    order = permutation(len(train), data_seed(config))
    return list(train.select(order[: config.num_demonstrations]))


def load_rows(source: TrainData, dataset_config: str | None, *splits: str) -> Dataset:
    """All rows of the first of `splits` that the source has. A single file has one split, whatever it is called.

    Raises:
        UserError: missing or malformed file (with the line), unknown split, no rows.
    """
    if isinstance(source, IterableDataset):
        raise UserError("streaming data sets cannot be shuffled by seed; pass a datasets.Dataset")
    if isinstance(source, DatasetDict):
        rows = _split(source, splits, "the DatasetDict")
    elif isinstance(source, Dataset):
        rows = source
    elif isinstance(source, (str, Path)):
        rows = _load_named(str(source), dataset_config, splits)
    else:
        rows = _from_memory(source)
    name = source if isinstance(source, (str, Path)) else "the data set"
    if len(rows) == 0:
        raise UserError(f"{name} holds no rows")
    try:
        rows[0]
    except (KeyError, ValueError) as error:  # column names that Arrow cannot tell apart
        raise UserError(f"{name}: columns cannot be read ({_first_line(error)})") from None
    return rows


def _from_memory(source: Sequence[Row]) -> Dataset:
    if not all(isinstance(row, dict) for row in source):
        raise UserError("rows in memory must be dicts of column names and values")
    try:
        return Dataset.from_list(list(source))
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise UserError(f"rows in memory do not fit together: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _load_named(name: str, dataset_config: str | None, splits: Sequence[str]) -> Dataset:
    path = Path(name)
    if path.is_file():
        return _load_file(path)
    if not path.exists() and (path.suffix in _BUILDERS or path.is_absolute() or name.startswith((".", "~"))):
        raise UserError(f"dataset_name: there is no file {name!r}")
    if path.is_dir():
        path_files = {p.name.split(".")[0]: p for p in sorted(path.iterdir()) if _builder(p) is not None}
        for split in splits:
            if split in path_files:
                return _load_file(path_files[split])
    try:
        found = load_dataset(name, dataset_config)
    except (DatasetsError, OSError, ValueError, KeyError, RuntimeError) as error:
        if path.is_dir() and path_files:
            raise UserError(
                f"dataset_name {name!r} has no file {splits[0]}.jsonl or of another type that is known; it has "
                f"{', '.join(p.name for p in path_files.values())} ({_first_line(error.__cause__ or error)})"
            ) from None
        raise UserError(f"dataset_name {name!r}: {_first_line(error)}") from None
    return _split(found, splits, repr(name))


def _split(found: DatasetDict, splits: Sequence[str], name: str) -> Dataset:
    for split in splits:
        if split in found:
            return found[split]
    raise UserError(f"{name} has no split {splits[0]!r}; it has {', '.join(found)}")


def _builder(path: Path) -> str | None:
    return _BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix)


def _load_file(path: Path) -> Dataset:
    builder = _builder(path)
    if builder is None:
        raise UserError(f"{path}: unknown file type; known are {', '.join(_BUILDERS)}, also with .gz")
    if path.stat().st_size == 0:
        raise UserError(f"{path} holds no rows")
    if builder == "json" and not _check_json_lines(path):
        raise UserError(f"{path} holds no rows")
    options = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    try:
        return load_dataset(builder, data_files=str(path), split="train", **options)
    except (DatasetsError, OSError, ValueError, TypeError, KeyError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise UserError(f"{path} holds no rows") from None
        raise UserError(f"{path}: {_first_line(cause)}") from None


def _check_json_lines(path: Path) -> bool:
    """Names the first malformed line of a jsonl file; `datasets` does not."""
    if not path.name.removesuffix(".gz").endswith(".jsonl"):
        return True
    opener = gzip.open if path.suffix == ".gz" else open
    number, found = 0, False
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                found = found or bool(line.strip())
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise UserError(f"{path}, line {number}: not a JSON object")
        return found
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, line {number or 1}: malformed JSON ({error})") from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file ({error})") from None


def _hold_out(rows: Dataset, size: float, seed: int) -> Splits:
    count = round(size * len(rows)) if size < 1 else int(size)
    if not 0 < count < len(rows):
        raise UserError(
            f"validation_size {size:g} of {len(rows)} rows leaves {max(0, len(rows) - count)} to train on and "
            f"{min(count, len(rows))} to evaluate on"
        )
    order = permutation(len(rows), seed)
    return Splits(rows.select(order[count:]), rows.select(order[:count]))


def _sample(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """At most `count` rows, drawn by seed."""
    if count is None:
        return rows
    return rows.select(permutation(len(rows), seed)[:count])


def few_shot(rows: Dataset, num_shots: int, label_column: str, seed: int) -> Splits:
    """`num_shots` rows of each label to train on, and as many others to evaluate on, as far as there are so many.

    The draw is LM-BFF's (arXiv 2012.15723): on the same rows in the same order, its seeds give its sets.
    """
    if label_column not in rows.column_names or "choices" in rows.column_names:
        raise UserError(f"num_shots {num_shots} needs rows with classes in column {label_column!r}")
    labels = [label_key(label) for label in rows[label_column]]
    by_label: dict[str, list[int]] = {}
    for i in np.random.RandomState(seed % 2**32).permutation(len(rows)).tolist():
        by_label.setdefault(labels[i], []).append(i)
    train = [i for indices in by_label.values() for i in indices[:num_shots]]
    other = [i for indices in by_label.values() for i in indices[num_shots : 2 * num_shots]]
    short = {label: len(indices) for label, indices in by_label.items() if len(indices) < 2 * num_shots}
    if not other:
        raise UserError(f"num_shots {num_shots}: no label has more rows, none are left to evaluate on")
    if short:
        logger.warning("num_shots %d: fewer than twice as many rows of these labels: %s", num_shots, short)
    return Splits(rows.select(train), rows.select(other))


def permutation(count: int, seed: int) -> list[int]:
    """A random order of `count` things, a function of the seed alone."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


class BatchSampler:
    """Which examples step `step` sees, as a function of the seed: epochs of random order, batches across their ends."""

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        self.num_examples = num_examples
        self.batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __call__(self, step: int) -> list[int]:
        """Indices of the examples of one step, counted from 0."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._at(p // self.num_examples, p % self.num_examples) for p in positions]

    def epoch(self, step: int) -> float:
        """Passes over the data made before step `step`."""
        return step * self.batch_size / self.num_examples

    def _at(self, epoch: int, position: int) -> int:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.num_examples, self._seed + epoch)
        return self._order[position]
