"""From rows to log-probabilities by prefill-only requests, with nothing computed twice.

`Scorer` runs inside SGLang's workers on `versions.Prefill`, or in the client on POST /generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mezo.engines.sglang.plugin import BASE_PREFIX
from mezo.errors import EngineError
from mezo.objective import TokenSequence, common_prefix

Answers = Callable[[], list[dict[str, Any]]]
Submit = Callable[[Mapping[str, Any]], Answers]

_ATTEMPTS = 4  # to have all prompts of a batch in the cache at once
_PREFILL_ONLY = {"max_new_tokens": 0, "temperature": 0.0}


class Row(NamedTuple):
    """One sequence under one probe."""

    name: str  # of the adapter slot
    sequence: TokenSequence
    key: str  # keys and values are shared under the same one only

    @property
    def prompt(self) -> tuple[int, ...]:
        """What stands before an activated LoRA acts."""
        return self.sequence.input_ids[: self.sequence.adapter_start]


def make_rows(
    names: Sequence[str], sequences: Sequence[TokenSequence], key: str, row_numbers: Iterator[int] | None
) -> list[Row]:
    """All sequences under all probes; `row_numbers` makes each row's key its own, so that nothing is shared."""
    return [
        Row(name, s, key if row_numbers is None else f"{key}-row-{next(row_numbers)}")
        for name in names
        for s in sequences
    ]


def rows_body(rows: Sequence[Row], top: int, *, base: bool = False) -> dict[str, Any]:
    """A prefill-only request for the log-probabilities from each row's first target on, `top` best tokens beside each.

    With `base`, a row takes keys and values of its prompt from what the base model computed under its key, and leaves
    nothing behind.
    """
    sampling: list[dict[str, Any]] = [dict(_PREFILL_ONLY) for _ in rows]
    if base:
        for options, row in zip(sampling, rows, strict=True):
            options["custom_params"] = {BASE_PREFIX: [row.sequence.adapter_start, row.key]}
    return {
        "input_ids": [r.sequence.input_ids for r in rows],
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": [r.sequence.read_start for r in rows],
        "top_logprobs_num": top,
        "lora_path": [r.name for r in rows],
        "extra_key": [r.key for r in rows],
    }


def base_body(input_ids: Sequence[Sequence[int]], keys: Sequence[str]) -> dict[str, Any]:
    """A request that has the base model compute keys and values of these rows."""
    return {
        "input_ids": list(input_ids),
        "sampling_params": [dict(_PREFILL_ONLY) for _ in keys],
        "return_logprob": False,
        "lora_path": [None] * len(keys),
        "extra_key": list(keys),
    }


class Scores(NamedTuple):
    """Of all rows: log-probabilities of the targets, and whether each is the most probable token."""

    logprobs: list[float]
    best: list[bool]
    computed: int  # tokens that went through the model


class Scorer:
    """Asks for the log-probabilities of rows, in the order that computes least.

    Args:
        submit: starts a body of POST /generate that asks for prefill only; what it returns gives the answers.
        wave_cost: what one more request costs, in tokens.
        shares_within_batch: rows of one body share what is not cached yet; then one body is enough.
    """

    def __init__(self, submit: Submit, wave_cost: int, shares_within_batch: bool = False):
        self._submit = submit
        self._wave_cost = wave_cost
        self._in_waves = not shares_within_batch
        self._prompts: set[tuple[str, tuple[int, ...]]] = set()  # (key, tokens) that the base model has computed
        self._computed = 0

    def scores(self, rows: Sequence[Row], *, share: bool, greedy: bool) -> Scores:
        """Scores of all rows. With `share`, what rows have in common is computed once, else their keys differ."""
        self._computed = 0
        activated = any(r.sequence.adapter_start for r in rows)
        answers = (self._activated if activated else self._ordinary)(rows, share, greedy)
        pairs = [
            pair
            for row, answer in zip(rows, answers, strict=True)
            for pair in _targets(row.sequence, answer["meta_info"], greedy)
        ]
        return Scores([logprob for logprob, _ in pairs], [best for _, best in pairs], self._computed)

    def _ordinary(self, rows: Sequence[Row], share: bool, greedy: bool) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = [{}] * len(rows)
        parts = waves(rows, self._wave_cost) if share and self._in_waves else [list(range(len(rows)))]
        # All are started before the first is read, so that preparing one overlaps with computing the one before.
        started = [self._submit(rows_body([rows[i] for i in wave], int(greedy))) for wave in parts]
        for wave, found in zip(parts, started, strict=True):
            for i, answer in zip(wave, found(), strict=True):
                answers[i] = answer
                self._count(rows[i].sequence.input_ids, answer)
        return answers

    def _activated(self, rows: Sequence[Row], share: bool, greedy: bool) -> list[dict[str, Any]]:
        """An activated LoRA's prompts are the base model's: computed once for both signs and all steps.

        SGLang may evict a prompt, and would then compute it with the adapter. Such rows are known by their number of
        cached tokens; their answers are thrown away, the prompts computed again.
        """
        answers: list[dict[str, Any]] = [{}] * len(rows)
        left = list(range(len(rows)))
        for _ in range(_ATTEMPTS):
            self._compute_prompts([rows[i] for i in left], share)
            found = self._submit(rows_body([rows[i] for i in left], int(greedy), base=True))()
            missed = []
            for i, answer in zip(left, found, strict=True):
                answers[i] = answer
                self._count(rows[i].sequence.input_ids, answer)
                if answer["meta_info"]["cached_tokens"] != rows[i].sequence.adapter_start:
                    missed.append(i)
                    self._prompts.discard((rows[i].key, rows[i].prompt))
            if not missed:
                return answers
            left = missed
        raise EngineError(
            f"{len(left)} prompts were evicted before they could be used; the KV cache is too small for a batch: lower "
            "the batch size, or raise --mem-fraction-static"
        )

    def _compute_prompts(self, rows: Sequence[Row], share: bool) -> None:
        """Has the base model compute the prompts that it has not computed yet."""
        wanted = dict.fromkeys((r.key, r.prompt) for r in rows if r.prompt)
        missing = [prompt for prompt in wanted if prompt not in self._prompts]
        common = common_prefix([tokens for _, tokens in missing]) if missing and share and self._in_waves else 0
        parts = [missing]
        if common * (len(missing) - 1) > self._wave_cost:
            beginning = (missing[0][0], missing[0][1][:common])
            if beginning not in self._prompts:
                parts = [missing[:1], missing[1:]]
                self._prompts.add(beginning)
        for part in filter(None, parts):
            answers = self._submit(base_body([tokens for _, tokens in part], [key for key, _ in part]))()
            for (_, tokens), answer in zip(part, answers, strict=True):
                self._count(tokens, answer)
        if share:
            self._prompts.update(missing)

    def _count(self, tokens: Sequence[int], answer: Mapping[str, Any]) -> None:
        self._computed += len(tokens) - answer["meta_info"]["cached_tokens"]


def waves(rows: Sequence[Row], wave_cost: int) -> list[list[int]]:
    """Rows in up to three requests, because rows of one request do not share what is not cached yet.

    First a row of each probe, if all rows have a beginning in common; then one of each prompt; then the others.

    Args:
        rows: of all probes.
        wave_cost: what one more request costs, in tokens; a wave that saves less is left out.
    """
    prompts = [r.sequence.input_ids[: r.sequence.read_start] for r in rows]
    first_of_probe: dict[str, int] = {}
    first_of_prompt: dict[tuple[str, tuple[int, ...]], int] = {}
    saved = 0
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        first_of_probe.setdefault(row.name, i)
        if first_of_prompt.setdefault((row.name, prompt), i) != i:
            saved += len(prompt)
    found: list[list[int]] = []
    heads = list(first_of_prompt.values()) if saved > wave_cost else list(range(len(rows)))
    if common_prefix(prompts) * (len(heads) - len(first_of_probe)) > wave_cost:
        found.append(list(first_of_probe.values()))
    taken = set(found[0]) if found else set()
    found.append([i for i in heads if i not in taken])
    if len(heads) < len(rows):
        found.append([i for i in range(len(rows)) if i not in set(heads)])
    return [wave for wave in found if wave]


def _targets(sequence: TokenSequence, meta_info: dict[str, Any], greedy: bool) -> list[tuple[float, bool]]:
    """(log-probability, is the most probable token) of a row's targets.

    SGLang's list starts at token `logprob_start_len`, whose own log-probability is not given; the one of token p + 1
    is the model's output at position p.
    """
    start = sequence.read_start
    logprobs = meta_info["input_token_logprobs"]
    if len(logprobs) != len(sequence.input_ids) - start:
        raise EngineError(f"SGLang gave {len(logprobs)} log-probabilities for {len(sequence.input_ids) - start} tokens")
    read = []
    for target in sequence.targets:
        index = target.position + 1 - start
        logprob, token = logprobs[index][:2]
        assert token == target.token, "a target is not the row's next token"
        best = greedy and meta_info["input_top_logprobs"][index][0][1] == token
        read.append((float(logprob), bool(best)))
    return read
