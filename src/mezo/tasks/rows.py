"""What a template of words and columns cannot say: rows of a data set as the rows that a task's templates speak of.

Each function takes one row as the Hub or the data set's own files hold it and returns the rows it stands for, mostly
one. A task names its function in `rows`. Facts about the prompts are those of the paper's code (princeton-nlp/MeZO).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mezo.errors import UserError

Row = dict[str, object]


def column(row: Row, *names: str) -> Any:
    """The first of these columns that the row has.

    Raises:
        UserError: it has none, or nothing in it.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise UserError(f"column {names[0]!r} is missing; found {', '.join(sorted(row))}")


def sst2(row: Row) -> list[Row]:
    """GLUE's sentences end with a space."""
    return [{**row, "text": column(row, "text", "sentence").strip()}]


def entailment(row: Row) -> list[Row]:
    """Adds what LM-BFF puts around `? [MASK],`: a premise without its last character, a hypothesis in lower case."""
    premise, hypothesis = column(row, "premise", "sentence1"), column(row, "hypothesis", "sentence2")
    lower = hypothesis[:1].lower() + hypothesis[1:]
    return [{**row, "premise_stem": premise[:-1], "hypothesis_lower": lower}]


def boolq(row: Row) -> list[Row]:
    """The question as a sentence: a capital letter and a question mark."""
    question = column(row, "question")
    question = question[:1].upper() + question[1:]
    return [{**row, "question": question if question.endswith("?") else question + "?"}]


def wsc(row: Row) -> list[Row]:
    """Both spans as columns, the pronoun in lower case."""
    spans = row.get("target") or row
    assert isinstance(spans, dict)
    return [{**row, "span1_text": column(spans, "span1_text"), "pronoun": column(spans, "span2_text").lower()}]


def multirc(row: Row) -> list[Row]:
    """One row for each answer; SuperGLUE's own files nest questions in passages, and answers in questions."""
    passage = row.get("passage")
    if not isinstance(passage, dict):
        return [row]
    return [
        {"paragraph": passage["text"], "question": question["question"], "answer": answer["text"],
         "label": answer.get("label", -1)}
        for question in passage["questions"]
        for answer in question["answers"]
    ]  # fmt: skip


def copa(row: Row) -> list[Row]:
    """A sentence with two endings."""
    conjunctions = {"effect": "so", "cause": "because"}
    premise, question = column(row, "premise").rstrip(), column(row, "question")
    if question not in conjunctions:
        raise UserError(f"column 'question' holds {question!r}, cause or effect is needed")
    choices = [_continued(column(row, name)) for name in ("choice1", "choice2")]
    return [
        {
            "premise": premise.removesuffix("."),
            "conjunction": conjunctions[question],
            "choices": choices,
            "label": column(row, "label"),
        }
    ]


def _continued(sentence: str) -> str:
    """A sentence as it goes on behind a conjunction."""
    first, space, rest = sentence.partition(" ")
    return (first if first == "I" else first.lower()) + space + rest


def record(row: Row) -> list[Row]:
    """One row for each query, its choices the query with each entity in it; every entity that is an answer is right."""
    passage = column(row, "passage")
    if isinstance(passage, dict):  # SuperGLUE's own files
        text = passage["text"]
        entities = [text[e["start"] : e["end"] + 1] for e in passage["entities"]]
        queries = [(q["query"], [a["text"] for a in q.get("answers", [])]) for q in column(row, "qas")]
    else:
        text, entities = passage, column(row, "entities")
        queries = [(column(row, "query"), column(row, "answers"))]
    names = list(dict.fromkeys(entities))
    found = []
    for query, answers in queries:
        right = [names.index(answer) for answer in dict.fromkeys(answers) if answer in names]
        if right:
            choices = [query.replace("@placeholder", name) for name in names]
            found.append({"passage": text.replace("@highlight\n", "- "), "choices": choices, "label": right})
    return found


def squad(row: Row) -> list[Row]:
    """The answers as a list of texts, the question without white space around it."""
    answers = column(row, "answers", "answer")
    texts = answers["text"] if isinstance(answers, dict) else answers
    return _with_answers(row, texts)


def drop(row: Row) -> list[Row]:
    """The same for DROP, whose answers are spans."""
    answers = column(row, "answers", "answers_spans")
    texts = answers["spans"] if isinstance(answers, dict) else answers
    return _with_answers(row, texts)


def _with_answers(row: Row, texts: list[str] | str) -> list[Row]:
    answers = [texts] if isinstance(texts, str) else list(texts)
    return [{**row, "question": column(row, "question").strip(), "answers": answers}] if answers else []


FUNCTIONS: Mapping[str, Callable[[Row], list[Row]]] = {
    f.__name__: f for f in (sst2, entailment, boolq, wsc, multirc, copa, record, squad, drop)
}
