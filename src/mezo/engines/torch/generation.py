"""Greedy generation by transformers. Shapes: R rows, S positions of the longest prompt, with padding on the left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mezo.errors import UserError


@torch.no_grad()
def generate(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: str | None,
    num_probes: int = 1,
) -> list[list[str]]:
    """The most probable continuation of each prompt, token by token, without `stop` and what follows.

    Returns one list for each probe; a batch's rows come probe by probe, for a model that tells them apart.

    Args:
        model: a decoder, in eval mode.
        tokenizer: the model's.
        prompts: token ids, special tokens included.
        batch_size: prompts in one batch, of similar length.
        max_new_tokens: length at which a continuation ends.
        stop: text at which it ends before, if any.
        num_probes: how often each prompt is continued.
    """
    if isinstance(model, PeftModel) and getattr(model.peft_config["default"], "alora_invocation_tokens", None):
        raise UserError("lora_variant alora: answers cannot be generated; evaluate this task with another adapter")
    texts = [[""] * len(prompts) for _ in range(num_probes)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        found = _continuations(model, tokenizer, [prompts[i] for i in part] * num_probes, max_new_tokens, stop)
        for number, text in enumerate(found):
            texts[number // len(part)][part[number % len(part)]] = text
    return texts


def _continuations(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[int, ...]],
    max_new_tokens: int,
    stop: str | None,
) -> list[str]:
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids_RS = torch.full((len(prompts), longest), pad)
    mask_RS = torch.zeros_like(input_ids_RS)
    for row, prompt in enumerate(prompts):
        input_ids_RS[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_RS[row, longest - len(prompt) :] = 1
    found = model.generate(
        input_ids=input_ids_RS.to(model.device),
        attention_mask=mask_RS.to(model.device),
        generation_config=_greedy(model, tokenizer, pad, max_new_tokens),
        stopping_criteria=StoppingCriteriaList([_Said(tokenizer, longest, stop)] if stop is not None else []),
    )
    texts = tokenizer.batch_decode(found[:, longest:], skip_special_tokens=True)
    return [text.partition(stop)[0] if stop is not None else text for text in texts]


class _Said(StoppingCriteria):
    """Ends a row when its new text holds a string; transformers' own `stop_strings` knows some tokenizers only."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, stop: str):
        self._tokenizer, self._start, self._stop = tokenizer, start, stop
        self._said: list[bool] = []

    def __call__(self, input_ids_RS: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self._said = self._said or [False] * len(input_ids_RS)
        going_on = [row for row, said in enumerate(self._said) if not said]
        tokens = input_ids_RS[going_on, self._start :]
        for row, text in zip(going_on, self._tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            self._said[row] = self._stop in text
        return torch.tensor(self._said, device=input_ids_RS.device)


def _greedy(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, pad: int, max_new_tokens: int
) -> GenerationConfig:
    """Plain greedy search; a model's own generation config may sample or penalise."""
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=ends, pad_token_id=pad
    )
