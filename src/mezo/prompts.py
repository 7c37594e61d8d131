"""From rows to prompts and answers as text: templates, and which columns hold what."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mezo.config import MeZOConfig, label_key
from mezo.data import Row
from mezo.errors import UserError
from mezo.tasks import template_columns


class Asked(NamedTuple):
    """A row as a prompt and its possible answers, white space before them included."""

    prompt: str
    answers: tuple[str, ...]
    right: tuple[int, ...] = (0,)  # indices of right answers; the first is trained
    end: bool = False  # the answer ends with the end-of-text token
    texts: tuple[str, ...] = ()  # what a generated answer is compared with


class Reading(NamedTuple):
    """How the rows of one objective become prompts and answers."""

    objective: str
    read: Callable[[Row], Asked]
    labels: tuple[str, ...] = ()


def reading(columns: set[str], rows: Sequence[Row], config: MeZOConfig) -> Reading | None:
    """The reading that a decoder's rows ask for; None for rows without a prompt as text."""
    if config.label_words is not None:
        require_columns(columns, {config.label_column})
        template = required_template(config, columns)
        names, words = tuple(config.label_words), tuple(config.label_words.values())
        return Reading("label words", lambda row: _label_words(template, row, words, config.label_column, names), names)
    if "messages" in columns:
        return None
    if {"choices", "answers"} & columns and (config.template is not None or "prompt" in columns):
        template = config.template or "{prompt}"
        require_columns(columns, set(template_columns(template)))
        if "answers" in columns and "choices" not in columns:
            return Reading("answer", lambda row: _answers(template, row))
        require_columns(columns, {config.label_column})
        return Reading("multiple choice", lambda row: _choices(template, row, config.label_column))
    if {"prompt", "completion"} <= columns and not (rows and isinstance(rows[0]["prompt"], list)):
        return Reading("completion", lambda row: Asked(text_of(row, "prompt"), (text_of(row, "completion"),), end=True))
    return None


def demonstrated(read: Callable[[Row], Asked], rows: Sequence[Row]) -> str:
    """Rows with their right answers, empty lines between them, as the paper puts them before a prompt."""
    asked = [read(row) for row in rows]
    return "".join((a.prompt + a.answers[a.right[0]]).strip() + "\n\n" for a in asked)


def _label_words(template: str, row: Row, words: tuple[str, ...], label_column: str, names: tuple[str, ...]) -> Asked:
    prompt = fill(template, row)
    return Asked(prompt, tuple(_spaced(prompt, word) for word in words), (option_of(row, label_column, names),))


def _choices(template: str, row: Row, label_column: str) -> Asked:
    prompt, choices, label = _prompt(template, row), row["choices"], row[label_column]
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"choices must be a list of at least two texts, got {choices!r}")
    labels = label if isinstance(label, list) else [label]
    right = [i for i in labels if isinstance(i, int) and 0 <= i < len(choices)]
    if not right or right != labels:
        raise UserError(f"label {label!r} is not an index into its {len(choices)} choices")
    return Asked(prompt, tuple(_spaced(prompt, str(c)) for c in choices), tuple(right))


def _answers(template: str, row: Row) -> Asked:
    """The first answer and the end of its line are trained; a generated one is compared with all."""
    prompt, answers = _prompt(template, row), row["answers"]
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
        raise UserError(f"answers must be a list of texts, got {answers!r}")
    return Asked(prompt, (_spaced(prompt, answers[0]) + "\n",), texts=tuple(answers))


def _prompt(template: str, row: Row) -> str:
    return text_of(row, "prompt") if template == "{prompt}" else fill(template, row)


# --- rows and templates ---------------------------------------------------------------------------------------------


def _value(row: Row, column: str) -> object:
    value = row.get(column)
    if value is None:
        raise UserError(f"column {column!r} has no value")
    return value


def text_of(row: Row, column: str) -> str:
    """The text in a column."""
    value = _value(row, column)
    if not isinstance(value, str):
        raise UserError(f"column {column!r} holds {value!r}, a text is needed")
    return value


def _spaced(prompt: str, answer: str) -> str:
    """The answer with a space before it, unless prompt or answer bring white space."""
    return answer if not prompt or prompt[-1].isspace() or answer[:1].isspace() else " " + answer


def fill(template: str, row: Row) -> str:
    """The template with the row's columns in it."""
    return re.sub(r"\{(\w+)\}", lambda m: str(_value(row, m.group(1))), template)


def required_template(config: MeZOConfig, columns: set[str]) -> str:
    """The config's template, which must name columns that there are."""
    if config.template is None:
        raise UserError(
            "label_words need a template, '{text} It was [MASK].' for an encoder or '{text}\\nSentiment:' for a decoder"
        )
    if not template_columns(config.template):
        raise UserError(f"template {config.template!r} names no column in braces; columns are {listed(columns)}")
    require_columns(columns, set(template_columns(config.template)))
    return config.template


def default_text(columns: set[str]) -> str:
    """The columns that hold the text where no template says so, as a template."""
    for names in (("text",), ("sentence",), ("premise", "hypothesis"), ("sentence1", "sentence2")):
        if columns.issuperset(names):
            return " ".join(f"{{{name}}}" for name in names)
    raise UserError(f"column 'text' is missing; found {listed(columns)}")


def require_columns(columns: set[str], needed: set[str]) -> None:
    """Fails if a column is missing."""
    missing = sorted(needed - columns)
    if missing:
        raise UserError(f"column {missing[0]!r} is missing; found {listed(columns)}")


def listed(columns: set[str]) -> str:
    """The columns, for messages."""
    return ", ".join(sorted(columns)) or "none"


def option_of(row: Row, column: str, names: tuple[str, ...]) -> int:
    """The index of the row's label among the labels."""
    key = label_key(_value(row, column))
    if key not in names:
        raise UserError(f"label {key!r} is not among the labels {', '.join(names)}")
    return names.index(key)


def label_order(name: str) -> tuple[bool, int, str]:
    """Numbers by value, before words by alphabet."""
    return (False, int(name), "") if name.lstrip("-").isdigit() else (True, 0, name)
