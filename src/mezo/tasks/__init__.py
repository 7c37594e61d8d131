"""Tasks of the paper by name: data set, template, label words. One YAML file each; see docs/tasks.md."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_type_hints

import yaml
from datasets import Dataset

from mezo.config import MeZOConfig, coerced, label_key
from mezo.errors import UserError
from mezo.names import unknown_key_message
from mezo.tasks.rows import FUNCTIONS, Row, column

_FOLDER = Path(__file__).parent
_UNLABELLED = ("-1", "-")  # of test rows on the Hub, and of rows that SNLI's annotators did not agree on


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set and how its rows are asked; the fields are the keys of the file.

    Args:
        name: name of the file.
        source: where template and label words come from.
        dataset_name: data set on the Hub.
        dataset_config: its configuration.
        encoder_dataset_name: data set for encoders, if it is another.
        dataset_train_split: split to train on.
        dataset_test_split: split to report on.
        rows: function of `mezo.tasks.rows` that rows go through first.
        columns: for a column, the names under which data sets hold it; the first that is there is taken.
        label_names: names of the labels 0, 1, …, where a data set holds names.
        template: prompt for decoders.
        label_words: word for each label.
        encoder_template: prompt for encoders.
        encoder_label_words: word for each label at [MASK]; label_words if not given.
        train_as_classification: as in `MeZOConfig`.
    """

    name: str
    source: str = ""
    dataset_name: str | None = None
    dataset_config: str | None = None
    encoder_dataset_name: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "validation"
    rows: str | None = None
    columns: dict[str, list[str]] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)
    template: str | None = None
    label_words: dict[str, str] | None = None
    encoder_template: str | None = None
    encoder_label_words: dict[str, str] | None = None
    train_as_classification: bool = True

    def fill_in(self, config: MeZOConfig, *, encoder_model: bool, test_split: bool) -> MeZOConfig:
        """The config with this task in whatever it leaves open.

        Args:
            config: the run; what it names wins.
            encoder_model: whether the model is an encoder (else a decoder).
            test_split: name the split to report on, if the config names none.
        """
        template = self.encoder_template if encoder_model else self.template
        words = self.encoder_label_words or self.label_words if encoder_model else self.label_words
        values: dict[str, object] = {}
        if config.template is None:
            if template is None:
                kind = "encoders" if encoder_model else "decoders"
                raise UserError(f"task {self.name!r} has no template for {kind}; give template and label_words")
            values |= {"template": template}
        if config.label_words is None:
            values |= {"label_words": words}
        else:  # by name or by number, as the data
            values |= {"label_words": {self._label(label): word for label, word in config.label_words.items()}}
        if config.dataset_name is None:
            own = self.encoder_dataset_name if encoder_model else None
            values |= {
                "dataset_name": own or self.dataset_name,
                "dataset_config": config.dataset_config or (self.dataset_config if own is None else None),
            }
        if config.dataset_train_split == MeZOConfig.dataset_train_split:
            values |= {"dataset_train_split": self.dataset_train_split}
        if test_split and config.dataset_test_split is None:
            values |= {"dataset_test_split": self.dataset_test_split}
        if config.train_as_classification is None:
            values |= {"train_as_classification": self.train_as_classification or config.objective == "accuracy"}
        return dataclasses.replace(config, **values)  # type: ignore[arg-type]

    def prepare(self, rows: Dataset, config: MeZOConfig) -> Dataset:
        """The rows with the columns of the filled-in config's template, numbered labels, choices or answers.

        Raises:
            UserError: a column is missing, a label has no number, or no row has a label.
        """
        kept = {*self.columns, *template_columns(config.template or ""), "choices", "answers"} - {"label"}
        prepared: list[Row] = []
        for number, row in enumerate(rows):
            try:
                for part in FUNCTIONS[self.rows](row) if self.rows is not None else [row]:
                    found = self._prepared(part, kept, config.label_column)
                    prepared += [found] if found is not None else []
            except UserError as error:
                raise UserError(f"task {self.name!r}, row {number}: {error}") from None
        if len(rows) and not prepared:
            raise UserError(f"task {self.name!r}: none of {len(rows)} rows has a label")
        return Dataset.from_list(prepared)

    def _prepared(self, row: Row, kept: set[str], label_column: str) -> Row | None:
        """One row; None if it has no label."""
        found: Row = {}
        for name in kept:
            for source in (*self.columns.get(name, ()), name):
                if row.get(source) is not None:
                    found[name] = row[source]
                    break
        if "answers" in found:
            return found
        sources = self.columns.get("label", ["label"]) if label_column == MeZOConfig.label_column else [label_column]
        label = column(row, *sources)
        if label_key(label) in _UNLABELLED:
            return None
        found[label_column] = self._label(label) if self.label_names else label
        return found

    def _label(self, label: object) -> str:
        """A label's number as text, from its name or number."""
        key = label_key(label)
        names = self.label_names
        if names and key not in names and key not in map(str, range(len(names))):
            numbered = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            raise UserError(f"label {key!r} is none of {numbered}")
        return str(names.index(key)) if key in names else key


def task_names() -> list[str]:
    """The tasks that come with mezo."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_task(name: str) -> Task:
    """A task by its name, or from a YAML file of one's own.

    Raises:
        UserError: no such task or file, or a file that is no task.
    """
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name))
    if name not in task_names():
        nearest = difflib.get_close_matches(name.lower(), task_names(), n=1, cutoff=0.0)[0]
        raise UserError(f"unknown task {name!r}, the nearest is {nearest!r}; there are {', '.join(task_names())}")
    return _read(_FOLDER / f"{name}.yaml")


def template_columns(template: str) -> list[str]:
    """The columns that a template names in braces."""
    return re.findall(r"\{(\w+)\}", template)


def _read(path: Path) -> Task:
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"task: there is no file {str(path)!r}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"task {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"task {path}: a mapping is needed, of names such as template and label_words to values")
    try:
        return _task(path.stem, values)
    except UserError as error:
        raise UserError(f"task {path}: {error}") from None


def _task(name: str, values: Mapping[object, object]) -> Task:
    hints = get_type_hints(Task)
    names = [f.name for f in dataclasses.fields(Task) if f.name != "name"]
    found: dict[str, object] = {}
    for key, value in values.items():
        if key not in names:
            raise UserError(unknown_key_message(str(key), names))
        for text in _texts(value) if str(key).endswith(("label_words", "label_names")) else ():
            if not isinstance(text, str):
                raise UserError(
                    f"{key}: put {text!r} in quotes; YAML reads Yes and No as true and false, digits as numbers"
                )
        found[str(key)] = _columns(value) if key == "columns" else coerced(str(key), value, hints[str(key)])
    if found.get("rows") not in (None, *FUNCTIONS):
        raise UserError(f"rows must be one of {', '.join(FUNCTIONS)}, got {found['rows']!r}")
    if found.get("template") is None and found.get("encoder_template") is None:
        raise UserError("template is missing, the prompt with the rows' columns in braces")
    return Task(name=name, **found)  # type: ignore[arg-type]


def _texts(value: object) -> Sequence[object]:
    return list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else ()


def _columns(value: object) -> dict[str, list[str]]:
    if not isinstance(value, Mapping):
        raise UserError(f"columns must map a column to its names in the data, got {value!r}")
    return {str(key): coerced("columns", names, list[str]) for key, names in value.items()}
