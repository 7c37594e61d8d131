"""Activated LoRA (aLoRA, arXiv 2504.12397): the adapter acts from the invocation tokens on.

Keys and values of what stands before them are the base model's, whatever the adapter holds. The rule where an adapter
starts is PEFT's: at the last occurrence of `alora_invocation_tokens` in a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mezo.errors import UserError
from mezo.objective import Example, TokenSequence, common_prefix

_LONGEST = 16


def invocation_tokens(examples: Sequence[Example]) -> list[int]:
    """What all prompts end with, at most 16 tokens: of a template, the text behind its last column.

    Raises:
        UserError: prompts end differently.
    """
    prompts = [s.input_ids[: s.read_start + 1] for e in examples for s in e.sequences]
    # Token 0 is left out of it: an invocation that is the whole prompt would leave nothing to share.
    length = min(_LONGEST, common_prefix([prompt[:0:-1] for prompt in prompts]))
    if not length:
        raise UserError(
            "lora_variant alora: the training prompts have no common ending; let the template end with a fixed text, "
            "or give alora_invocation_tokens"
        )
    return list(prompts[0][-length:])


def activate(examples: Sequence[Example], tokens: Sequence[int]) -> list[Example]:
    """The examples with `adapter_start` set in each row.

    Raises:
        UserError: a row lacks the tokens, or they stand behind the first token of the answer.
    """
    activated = []
    for number, example in enumerate(examples):
        try:
            sequences = tuple(_activate(s, tuple(tokens)) for s in example.sequences)
        except UserError as error:
            raise UserError(f"row {number}: {error}") from None
        activated.append(dataclasses.replace(example, sequences=sequences))
    return activated


def _activate(sequence: TokenSequence, tokens: tuple[int, ...]) -> TokenSequence:
    ids, count = sequence.input_ids, len(tokens)
    for start in range(len(ids) - count, -1, -1):
        if ids[start] == tokens[0] and ids[start : start + count] == tokens:
            if start > sequence.read_start:
                raise UserError(
                    f"alora_invocation_tokens {list(tokens)} occur in the answer; the adapter would start there"
                )
            return dataclasses.replace(sequence, adapter_start=start)
    raise UserError(f"alora_invocation_tokens {list(tokens)} do not occur in the row")
