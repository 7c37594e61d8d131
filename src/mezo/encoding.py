"""From rows to examples: which objective the columns ask for, and its token sequences."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2 import TemplateError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mezo.config import GENERATING, MeZOConfig, label_key
from mezo.data import Row
from mezo.errors import UserError
from mezo.objective import Example, Question, Target, TokenSequence, common_prefix
from mezo.prompts import (
    Reading,
    default_text,
    demonstrated,
    fill,
    label_order,
    listed,
    option_of,
    reading,
    require_columns,
    required_template,
    text_of,
)
from mezo.tasks import template_columns

logger = logging.getLogger(__name__)

ModelKind = Literal["causal_lm", "masked_lm", "sequence_classification"]
_MASK = "[MASK]"
# Encoders whose position embeddings start behind the padding token's.
_POSITIONS_AFTER_PADDING = frozenset(
    "roberta xlm-roberta xlm-roberta-xl roberta-prelayernorm camembert mpnet data2vec-text xmod ibert luke longformer "
    "esm".split()
)


@dataclass(frozen=True)
class Encoder:
    """Turns rows into examples for one objective.

    Args:
        name: the objective, for messages and the model card.
        kind: the model head it needs.
        labels: names of the options, where all rows have the same.
        tokens: tokenizer and length limit.
        encode: one row to one example.
    """

    name: str
    kind: ModelKind
    labels: tuple[str, ...]
    tokens: _Tokens
    encode: Callable[[Row], Example]

    def __call__(self, rows: Sequence[Row]) -> list[Example]:
        """Encodes all rows; says once how many were longer than the model's context."""
        examples = []
        num_truncated = 0
        for number, row in enumerate(rows):
            before = self.tokens.num_truncated
            try:
                examples.append(self.encode(row))
            except UserError as error:
                raise UserError(f"row {number}: {error}") from None
            num_truncated += self.tokens.num_truncated > before
        if num_truncated:
            logger.warning("%d rows were longer than %d tokens and were cut", num_truncated, self.tokens.max_length)
        return examples


class _Tokens:
    """Tokenizer and length limit; counts what it had to cut."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.num_truncated = 0
        # What the tokenizer puts before and after any text: <s> … </s>, [CLS] … [SEP], or nothing.
        inner, outer = self.ids("a"), list(tokenizer("a")["input_ids"])
        before = next(i for i in range(len(outer)) if outer[i : i + len(inner)] == inner)
        self.prefix, self.suffix = outer[:before], outer[before + len(inner) :]

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens around it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def completion(self, prompt: str, answer: str, option: int, *, end: bool = False) -> TokenSequence:
        """Prompt and answer; the answer's tokens are the targets. Too long: the prompt loses its start."""
        ids = self.ids(prompt + answer)
        start = common_prefix([tuple(self.ids(prompt)), tuple(ids)])
        if end and self.tokenizer.eos_token_id not in (None, *ids[-1:]):
            ids.append(self.tokenizer.eos_token_id)
        if start == len(ids):
            raise UserError(f"the answer {answer!r} has no tokens")
        room = self.max_length - len(self.prefix)
        if len(ids) > room:
            if len(ids) - start >= room:
                raise UserError(
                    f"the answer alone has {len(ids) - start} tokens, more than max_length {self.max_length}"
                )
            self.num_truncated += 1
            start -= len(ids) - room
            ids = ids[-room:]
        offset = len(self.prefix)
        # The first token of a text without any start token has nothing to be predicted from.
        first = max(start + offset, 1)
        targets = tuple(Target(i - 1, ids[i - offset], option) for i in range(first, len(ids) + offset))
        if not targets:
            raise UserError(f"{prompt + answer!r} is a single token: there is nothing to predict")
        return TokenSequence((*self.prefix, *ids), targets)

    def prompt(self, text: str, num_new_tokens: int) -> tuple[int, ...]:
        """A prompt to continue, with room for new tokens behind it. Too long: it loses its start."""
        room = self.max_length - len(self.prefix) - num_new_tokens
        if room < 1:
            raise UserError(f"max_new_tokens {num_new_tokens} leaves no room for a prompt in {self.max_length} tokens")
        ids = self.ids(text)
        self.num_truncated += len(ids) > room
        return (*self.prefix, *ids[-room:])

    def encoder_text(self, text: str, keep: int | None = None) -> tuple[int, ...]:
        """Special tokens around a text. Too long: cut at the end, or at the start to save token `keep`."""
        ids = self.ids(text)
        room = self.max_length - len(self.prefix) - len(self.suffix)
        if len(ids) > room:
            self.num_truncated += 1
            start = 0
            if keep is not None and keep in ids[room:]:
                start = min(ids.index(keep) - room // 2, len(ids) - room)  # a window around it
            ids = ids[start : start + room]
        return (*self.prefix, *ids, *self.suffix)


def make_encoder(
    rows: Sequence[Row],
    config: MeZOConfig,
    model_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder_model: bool,
    labels: Sequence[str] | None = None,
    training: bool = False,
    demonstrations: Sequence[Row] = (),
) -> Encoder:
    """The encoder that the columns ask for.

    Args:
        rows: all rows to encode; their columns decide, and a classification head takes its labels from them.
        config: template, label words, lengths.
        model_config: for the context length.
        tokenizer: the model's.
        encoder_model: whether the model is an encoder (else a decoder).
        labels: the classes of a saved classification head, in its order.
        training: whether the rows are trained on, which `train_as_classification` is about.
        demonstrations: rows that stand, with their answers, before each prompt.
    """
    tokens = _Tokens(tokenizer, context_length(config, model_config, tokenizer))
    columns = set(rows[0])
    if encoder_model:
        if demonstrations:
            raise UserError("num_demonstrations needs a decoder; prompts of an encoder stand alone")
        return _for_encoder(columns, rows, config, tokens, labels)
    return _for_decoder(columns, rows, config, tokens, demonstrations, training)


def context_length(config: MeZOConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Longest input the model takes, or `max_length` if that is shorter."""
    positions = getattr(model_config, "max_position_embeddings", None) or getattr(model_config, "n_positions", None)
    limit = positions or 1 << 30
    if model_config.model_type in _POSITIONS_AFTER_PADDING:
        limit -= model_config.pad_token_id + 1
    limit = min(limit, tokenizer.model_max_length)
    if config.use_peft and config.peft_type == "prefix_tuning":
        limit -= config.num_virtual_tokens
    if config.max_length is not None and config.max_length > limit:
        raise UserError(f"max_length {config.max_length} is more than the model's context of {limit} tokens")
    return config.max_length or limit


# --- encoders -------------------------------------------------------------------------------------------------------


def _for_encoder(
    columns: set[str], rows: Sequence[Row], config: MeZOConfig, tokens: _Tokens, labels: Sequence[str] | None
) -> Encoder:
    if config.label_words is None:
        return _classification(columns, rows, config, tokens, labels)
    require_columns(columns, {config.label_column})
    template = required_template(config, columns)
    mask_id = tokens.tokenizer.mask_token_id
    if _MASK not in template:
        raise UserError(f"template {template!r} has no {_MASK}, where an encoder reads the label word")
    if mask_id is None:
        raise UserError("the model's tokenizer has no mask token")
    names, words = tuple(config.label_words), config.label_words.values()
    space = "" if template.lstrip().startswith(_MASK) else " "
    word_ids = [_single_token(tokens, word if word[:1] == " " else space + word.strip()) for word in words]

    def encode(row: Row) -> Example:
        text = fill(template, row).replace(_MASK, tokens.tokenizer.mask_token)
        ids = tokens.encoder_text(text, keep=mask_id)
        if ids.count(mask_id) != 1:
            raise UserError(f"the prompt has {ids.count(mask_id)} mask tokens, one is needed")
        position = ids.index(mask_id)
        targets = tuple(Target(position, word_id, option) for option, word_id in enumerate(word_ids))
        return Example((TokenSequence(ids, targets),), option_of(row, config.label_column, names))

    return Encoder("masked label word", "masked_lm", names, tokens, encode)


def _classification(
    columns: set[str], rows: Sequence[Row], config: MeZOConfig, tokens: _Tokens, labels: Sequence[str] | None
) -> Encoder:
    require_columns(columns, {config.label_column})
    template = config.template or default_text(columns)
    if _MASK in template:
        raise UserError(f"template has {_MASK}, but label_words are missing")
    require_columns(columns, set(template_columns(template)))
    found = {label_key(row[config.label_column]) for row in rows if row[config.label_column] is not None}
    names = tuple(labels) if labels is not None else tuple(sorted(found, key=label_order))
    if len(names) < 2:
        found_labels = f"a single label, {names[0]!r}" if names else "no label"
        raise UserError(f"column {config.label_column!r} holds {found_labels}: there is nothing to classify")

    def encode(row: Row) -> Example:
        ids = tokens.encoder_text(fill(template, row))
        targets = tuple(Target(0, option, option) for option in range(len(names)))
        return Example((TokenSequence(ids, targets),), option_of(row, config.label_column, names))

    return Encoder("classification head", "sequence_classification", names, tokens, encode)


# --- decoders -------------------------------------------------------------------------------------------------------


def _for_decoder(
    columns: set[str],
    rows: Sequence[Row],
    config: MeZOConfig,
    tokens: _Tokens,
    demonstrations: Sequence[Row],
    training: bool,
) -> Encoder:
    if config.objective == "reward":
        return _rewarded(columns, config, tokens, demonstrations)
    found = reading(columns, rows, config)
    if found is not None:
        return _prompted(found, config, tokens, demonstrations, training)
    if demonstrations:
        raise UserError("num_demonstrations needs rows with a prompt and an answer")
    if "messages" in columns:
        return _messages(tokens)
    if {"prompt", "completion"} <= columns:
        return _conversations(tokens)
    if "text" in columns and config.label_column not in columns:
        return Encoder("language modelling", "causal_lm", (), tokens, lambda row: _language_model(tokens, row))
    wanted = (
        "prompt and completion; messages; prompt, choices and label; prompt and answers; text; or text and label with "
        "label_words"
    )
    raise UserError(f"columns {listed(columns)} are none of these: {wanted}")


def _prompted(
    found: Reading, config: MeZOConfig, tokens: _Tokens, demonstrations: Sequence[Row], training: bool
) -> Encoder:
    """Prompts with answers: all options, or the right one's tokens alone."""
    before = demonstrated(found.read, demonstrations)
    options = found.objective in ("label words", "multiple choice")
    right_alone = options and training and config.train_as_classification is False

    def encode(row: Row) -> Example:
        asked = found.read(row)
        prompt = before + asked.prompt
        if options and not right_alone:
            sequences = tuple(tokens.completion(prompt, answer, i) for i, answer in enumerate(asked.answers))
            return Example(sequences, asked.right[0], asked.right[1:])
        generated = asked.texts and (not training or config.objective in GENERATING)
        question = Question(tokens.prompt(prompt, config.max_new_tokens), asked.texts) if generated else None
        if training and question is not None:
            return Example((), question=question)
        return Example((tokens.completion(prompt, asked.answers[asked.right[0]], 0, end=asked.end),), question=question)

    name = f"{found.objective}, the right one alone" if right_alone else found.objective
    return Encoder(name, "causal_lm", found.labels, tokens, encode)


def _rewarded(columns: set[str], config: MeZOConfig, tokens: _Tokens, demonstrations: Sequence[Row]) -> Encoder:
    """Prompts alone, with all columns for the reward."""
    if demonstrations:
        raise UserError("num_demonstrations needs rows with a prompt and an answer")
    require_columns(columns, {"prompt"} if config.template is None else set(template_columns(config.template)))

    def encode(row: Row) -> Example:
        prompt = fill(config.template, row) if config.template is not None else row["prompt"]
        text = _rendered(tokens, prompt, add_generation_prompt=True) if isinstance(prompt, list) else prompt
        if not isinstance(text, str) or not text:
            raise UserError(f"prompt must be a text or messages, got {prompt!r}")
        columns = {**row, "prompt": prompt}
        return Example((), question=Question(tokens.prompt(text, config.max_new_tokens), columns=columns))

    return Encoder("reward", "causal_lm", (), tokens, encode)


def _language_model(tokens: _Tokens, row: Row) -> Example:
    return Example((tokens.completion("", text_of(row, "text"), 0, end=True),))


def _messages(tokens: _Tokens) -> Encoder:
    def encode(row: Row) -> Example:
        messages = _turns(row, "messages")
        if messages[-1]["role"] != "assistant":
            raise UserError("messages must be a list that ends with an assistant's message")
        return _chat(tokens, messages[:-1], messages)

    return Encoder("completion of a conversation", "causal_lm", (), tokens, encode)


def _conversations(tokens: _Tokens) -> Encoder:
    def encode(row: Row) -> Example:
        prompt = _turns(row, "prompt")
        return _chat(tokens, prompt, prompt + _turns(row, "completion"))

    return Encoder("completion of a conversation", "causal_lm", (), tokens, encode)


def _turns(row: Row, column: str) -> list[Row]:
    turns = row[column]
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) and t.get("role") for t in turns):
        raise UserError(f"column {column!r} must hold a list of messages with role and content, got {turns!r}")
    return turns


def _chat(tokens: _Tokens, prompt: list[Row], whole: list[Row]) -> Example:
    before = _rendered(tokens, prompt, add_generation_prompt=True)
    text = _rendered(tokens, whole)
    if not text.startswith(before):
        raise UserError("the chat template does not continue its own generation prompt")
    return Example((tokens.completion(before, text[len(before) :], 0),))


def _rendered(tokens: _Tokens, messages: list[Row], *, add_generation_prompt: bool = False) -> str:
    """A conversation as text. The template writes its own start token; the tokenizer must not add a second one."""
    if tokens.tokenizer.chat_template is None:
        raise UserError("the model's tokenizer has no chat template; use columns of text")
    try:
        text = tokens.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template does not take these messages: {error}") from None
    assert isinstance(text, str)
    bos = tokens.tokenizer.bos_token
    return text.removeprefix(bos) if tokens.prefix and bos is not None else text


def _single_token(tokens: _Tokens, word: str) -> int:
    ids = tokens.ids(word)
    if ids == [tokens.tokenizer.unk_token_id]:
        raise UserError(f"label word {word.strip()!r} is unknown to this model's tokenizer")
    if len(ids) != 1:
        raise UserError(f"label word {word.strip()!r} is {len(ids)} tokens for this model, one is needed")
    return ids[0]
