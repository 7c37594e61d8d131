"""`mezo.engines.base.Engine` on SGLang: LoRA on decoder language models.

Per step, scalars go to SGLang's workers (the last update's records, the next probes' seeds and scales), then all rows
under all probes in one prefill-only request. Every write of the slots changes the cache key, so KV of other weights is
never met. The adapter itself is kept here too, in float32: weights are a function of the journal, so nothing has to
come back from the workers to be saved; the hash of theirs is compared at each save.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mezo import philox
from mezo.engines.base import Work
from mezo.engines.sglang.client import Client, Row, base_body, rows_body, split, worker_state
from mezo.engines.sglang.plugin import ADAPTER_MARK
from mezo.engines.torch.engine import trained_parameters
from mezo.engines.torch.space import ParameterSpace, tensors_digest
from mezo.errors import EngineError, UserError
from mezo.estimator import Probe, Record
from mezo.objective import Example, TargetScores, TokenSequence, common_prefix, example_losses

logger = logging.getLogger(__name__)

_RECORDS_PER_COMMAND = 256
_GIVEN_UP_AFTER = 600  # seconds
_ATTEMPTS = 4  # to have all prompts of a batch in the cache at once
_ADAPTER_ITSELF = Probe(0, 0.0)


class SGLangEngine:
    """Trains one LoRA adapter in one or several SGLangs.

    Args:
        clients: engines or servers with the same base model; rows are split over them.
        adapter: the adapter at its initial values, float32 on the CPU; its base model may lie on the meta device.
        tokenizer: saved beside the adapter.
        num_probes: adapter slots to use, at least as many as probes in a step.
        normalize_perturbations: see `ParameterSpace`.
        weight_decay: decoupled weight decay of `update`.
        updates: "workers": slots are written in place inside SGLang's workers, mezo's plugin must be installed there.
            "public": the perturbed adapters are unloaded and loaded again at each step; slow, needs nothing.
        eval_batch_size: examples in one request of `score`.
        share_prefixes: compute once what rows have in common: beginnings within one probe, and all of an activated
            LoRA's prompts.
        owner: name of the run in SGLang; a run that is resumed under the same name takes over what it left there.
        base_samples: (parameter, type, shape) → `worker.sample_hash` of that weight of the base model, None if it has
            no such; the servers' weights are compared with it.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        adapter: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_probes: int = 2,
        normalize_perturbations: bool = False,
        weight_decay: float = 0.0,
        updates: str = "workers",
        eval_batch_size: int = 64,
        share_prefixes: bool = True,
        owner: str | None = None,
        base_samples: Callable[[str, str, list[int]], str | None] | None = None,
    ):
        self._clients = list(clients)
        self._adapter = adapter
        self._tokenizer = tokenizer
        self.space = ParameterSpace(trained_parameters(adapter), normalize_perturbations)
        self.weight_decay = weight_decay
        self.eval_batch_size = eval_batch_size
        self._updates = updates
        self._share_prefixes = share_prefixes
        self._session = uuid.uuid4().hex[:12]  # part of every cache key
        self._owner = owner or self._session
        self._names = [f"mezo-{self._owner}-{i}" for i in range(num_probes)]
        self._version = 0
        self._applied = 0  # updates that the workers have
        self._unsent: list[Sequence[Record]] = []  # updates that the workers lack
        self._unsaved: list[Sequence[Record]] = []  # updates that `space` lacks
        self._in_slots: tuple[Probe, ...] = ()
        self._pool = ThreadPoolExecutor(max_workers=len(clients)) if len(clients) > 1 else None
        self._attached = False
        self.work = Work()
        self.wave_cost = 1024
        self._lock = threading.Lock()
        self._row_numbers = itertools.count()
        self._base_samples = base_samples
        self._heard = time.monotonic()  # when the workers last heard of us
        self._computed_prompts: set[tuple[str, str, tuple[int, ...]]] = set()  # (client, key, tokens)

    @property
    def model(self) -> None:
        """The model lives in SGLang."""
        return None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._tokenizer

    def losses(self, examples: Sequence[Example], probes: Sequence[Probe]) -> Tensor:
        """See `Engine.losses`."""
        self.work.asked += len(probes) * sum(e.num_tokens for e in examples)
        scores = self._scores(examples, probes, greedy=False)
        return torch.stack([example_losses(examples, s.logprobs_T) for s in scores])

    def score(self, examples: Sequence[Example]) -> TargetScores:
        """See `Engine.score`."""
        computed = self.work.computed
        parts = [
            self._scores(examples[first : first + self.eval_batch_size], [_ADAPTER_ITSELF], greedy=True)[0]
            for first in range(0, len(examples), self.eval_batch_size)
        ]
        self.work.computed = computed  # the work of training is counted
        return TargetScores(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def update(self, records: Sequence[Record]) -> None:
        """See `Engine.update`. The workers hear of it with the next probes."""
        self._unsent.append(records)
        self._unsaved.append(records)
        self._in_slots = ()
        if self._attached and len(self._unsent) >= _RECORDS_PER_COMMAND:
            self._send([])

    def save(self, folder: Path) -> None:
        """See `Engine.save`; the workers' masters must be the same bits."""
        self._catch_up()
        if self._attached and self._updates == "workers":
            self._send([])
            expected = self.space.digest()
            for client in self._clients:
                client.command({"op": "digest", "owner": self._owner})
                if worker_state(client)["digest"] != expected:
                    raise EngineError(f"{client.name}: the adapter there is not the one that the journal describes")
        self._adapter.save_pretrained(str(folder), save_embedding_layers=False)
        self._tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """See `Engine.load`."""
        set_peft_model_state_dict(self._adapter, load_peft_weights(str(folder), device="cpu"))
        self._unsent, self._unsaved = [], []
        self._detach()

    def digest(self) -> str:
        """See `Engine.digest`."""
        self._catch_up()
        return tensors_digest(get_peft_model_state_dict(self._adapter, save_embedding_layers=False))

    def close(self) -> None:
        """See `Engine.close`."""
        try:
            self._detach()
        except EngineError as error:  # it may be gone already
            logger.warning("%s", error)
        for client in self._clients:
            client.close()
        if self._pool is not None:
            self._pool.shutdown()

    # --- probes into slots ------------------------------------------------------------------------------------------

    def _write(self, probes: Sequence[Probe]) -> None:
        if len(probes) > len(self._names):
            raise UserError(f"{len(probes)} probes in a step, but {len(self._names)} adapter slots")
        if tuple(probes) == self._in_slots:
            self._show_life()
            return
        if self._updates == "public":
            self._load_again(probes)
        else:
            if not self._attached:
                self._attach()
            self._send(probes)
        self._in_slots = tuple(probes)

    def _send(self, probes: Sequence[Probe]) -> None:
        """Updates that the workers lack, then the probes, in as few commands as can be."""
        while True:
            part, self._unsent = self._unsent[:_RECORDS_PER_COMMAND], self._unsent[_RECORDS_PER_COMMAND:]
            last = not self._unsent
            if not part and not (last and probes):
                return
            self._version += 1
            command: dict[str, object] = {
                "op": "step",
                "owner": self._owner,
                "applied": self._applied,
                "updates": [[[r.seed, r.coefficient, r.learning_rate] for r in records] for records in part],
                "probes": [list(p) for p in probes] if last else [],
            }
            self._everywhere(lambda client, c=command: client.command(c))
            self._heard = time.monotonic()
            self._applied += len(part)
            if last:
                return

    def _attach(self) -> None:
        self._catch_up()
        self._unsent, self._applied = [], 0
        config = {**self._peft_config(), ADAPTER_MARK: self._owner}
        command: dict[str, object] = {
            "op": "attach",
            "owner": self._owner,
            "names": self._names,
            "normalize_perturbations": self.space.normalize_perturbations,
            "weight_decay": self.weight_decay,
        }

        def attach(client: Client) -> None:
            self._take_over(client)
            for name in self._names:
                client.unload_adapter(name)  # left by a run of this name that was killed
                client.load_adapter(name, self.space.parameters, config)
            client.command(command)
            self._check_base(client)

        self._attached = True  # from here on there may be something to take away
        self._everywhere(attach)

    def _check_base(self, client: Client) -> None:
        """The server's base model is the one that the journal names, by samples of the weights that both have."""
        if self._base_samples is None:
            return
        compared = 0
        for name, (dtype, shape, found) in worker_state(client)["base_samples"].items():
            wanted = self._base_samples(name, dtype, shape)
            compared += wanted is not None
            if wanted not in (None, found):
                raise EngineError(f"{client.name} serves another base model than the journal's: {name} differs")
        if not compared:
            logger.warning("%s: its base model could not be compared with the journal's", client.name)

    def _show_life(self) -> None:
        """A command now and then, also where nothing has to be written for long."""
        if self._attached and self._updates == "workers" and time.monotonic() - self._heard > _GIVEN_UP_AFTER / 10:
            self._everywhere(lambda client: client.command({"op": "heartbeat"}))
            self._heard = time.monotonic()

    def _take_over(self, client: Client) -> None:
        """Removes what a run that ended without a word left in SGLang; one run at a time can train there."""
        state = worker_state(client)
        owner = state.get("owner")
        if not owner:
            return
        if owner != self._owner and state["idle_seconds"] < _GIVEN_UP_AFTER:
            raise EngineError(
                f"{client.name}: run {owner} trains there, last heard of {state['idle_seconds']:.0f} s ago; "
                f"after {_GIVEN_UP_AFTER} s without a word another may take its place"
            )
        client.command({"op": "detach", "owner": owner})
        for name in state["names"]:
            client.unload_adapter(name)

    def _detach(self) -> None:
        if not self._attached:
            return

        def detach(client: Client) -> None:
            try:
                if self._updates == "workers":
                    client.command({"op": "detach", "owner": self._owner})
            finally:
                for name in self._names:
                    client.unload_adapter(name)

        self._attached, self._in_slots = False, ()
        self._everywhere(detach)

    def _load_again(self, probes: Sequence[Probe]) -> None:
        """The plain path: each probe's adapter as tensors, by SGLang's public calls."""
        self._catch_up()
        self._unsent = []
        self._version += 1
        config = self._peft_config()
        perturbed = [{n: self._perturbed(n, p) for n in self.space.parameters} for p in probes]

        def load(client: Client) -> None:
            for name, tensors in zip(self._names, perturbed, strict=False):
                client.unload_adapter(name)
                client.load_adapter(name, tensors, config)

        self._attached = True
        self._everywhere(load)

    def _perturbed(self, name: str, probe: Probe) -> Tensor:
        master = self.space.parameters[name].detach()
        if probe.scale == 0.0:
            return master
        factor = probe.scale * self.space.scale(name, probe.seed)
        stream = philox.stream_id("direction", name)
        return philox.add_normals(master.view(-1), factor, probe.seed, stream, 0).view_as(master)

    def _peft_config(self) -> dict[str, object]:
        config = self._adapter.peft_config["default"]
        return {
            "peft_type": "LORA",
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "target_modules": sorted(config.target_modules),
        }

    def _catch_up(self) -> None:
        for records in self._unsaved:
            self.space.update(records, self.weight_decay)
        self._unsaved = []

    # --- rows to log-probabilities ----------------------------------------------------------------------------------

    def _scores(self, examples: Sequence[Example], probes: Sequence[Probe], *, greedy: bool) -> list[TargetScores]:
        """Scores under each probe, every row under every probe in one request to each replica."""
        self._write(probes)
        parts = [examples[s] for s in split(len(examples), len(self._clients))]
        answers = self._everywhere(
            lambda client, part: self._ask(client, part, len(probes), greedy) if part else [], parts
        )
        columns = [[a[p] for a in answers if a] for p in range(len(probes))]
        return [TargetScores(*(torch.cat(t) for t in zip(*scores, strict=True))) for scores in columns]

    def _ask(self, client: Client, examples: Sequence[Example], probes: int, greedy: bool) -> list[TargetScores]:
        sequences = [s for e in examples for s in e.sequences]
        activated = any(s.adapter_start for s in sequences)
        key = f"{self._session}-{'base' if activated else self._version}"
        # Without reuse each row has a key of its own.
        rows = [
            Row(name, s, key if self._share_prefixes else f"{self._session}-row-{next(self._row_numbers)}")
            for name in self._names[:probes]
            for s in sequences
        ]
        answers = (self._generate_activated if activated else self._generate)(client, rows, greedy)
        found = []
        for first in range(0, len(answers), len(sequences)):
            pairs = zip(sequences, answers[first : first + len(sequences)], strict=True)
            read = [pair for sequence, answer in pairs for pair in _targets(sequence, answer["meta_info"], greedy)]
            logprobs, best = zip(*read, strict=True)
            found.append(TargetScores(torch.tensor(logprobs), torch.tensor(best)))
        return found

    def _generate(self, client: Client, rows: Sequence[Row], greedy: bool) -> list[dict[str, Any]]:
        """Answers of all rows; what rows have in common is computed once per probe."""
        answers: list[dict[str, Any]] = [{}] * len(rows)
        for wave in waves(rows, self.wave_cost) if self._share_prefixes else [range(len(rows))]:
            body = rows_body([rows[i] for i in wave], int(greedy))
            for i, answer in zip(wave, client.generate(body), strict=True):
                answers[i] = answer
                self._count(rows[i].sequence.input_ids, answer)
        return answers

    def _generate_activated(self, client: Client, rows: Sequence[Row], greedy: bool) -> list[dict[str, Any]]:
        """The same for an activated LoRA. Its prompts are the base model's: computed once for both signs and all steps.

        SGLang may evict a prompt, and would then compute it with the adapter. Such rows are known by their number of
        cached tokens; their answers are thrown away, the prompts computed again.
        """
        answers: list[dict[str, Any]] = [{}] * len(rows)
        left = list(range(len(rows)))
        for _ in range(_ATTEMPTS):
            self._compute_prompts(client, [rows[i] for i in left])
            body = rows_body([rows[i] for i in left], int(greedy), base=True)
            missed = []
            for i, answer in zip(left, client.generate(body), strict=True):
                answers[i] = answer
                self._count(rows[i].sequence.input_ids, answer)
                if answer["meta_info"]["cached_tokens"] != rows[i].sequence.adapter_start:
                    missed.append(i)
                    self._computed_prompts.discard((client.name, rows[i].key, rows[i].prompt))
            if not missed:
                return answers
            left = missed
        raise EngineError(
            f"{client.name}: {len(left)} prompts were evicted before they could be used; its KV cache is too small for "
            "a batch: lower the batch size, or raise --mem-fraction-static"
        )

    def _compute_prompts(self, client: Client, rows: Sequence[Row]) -> None:
        """Has the base model compute the prompts that it has not computed yet."""
        known = self._computed_prompts
        wanted = dict.fromkeys((client.name, r.key, r.prompt) for r in rows if r.prompt)
        missing = [prompt for prompt in wanted if prompt not in known]
        common = common_prefix([tokens for *_, tokens in missing]) if missing and self._share_prefixes else 0
        parts = [missing]
        if common * (len(missing) - 1) > self.wave_cost:
            first = missing[0]
            beginning = (*first[:2], first[2][:common])
            if beginning not in known:
                parts = [missing[:1], missing[1:]]
                known.add(beginning)
        for part in filter(None, parts):
            answers = client.generate(base_body([tokens for *_, tokens in part], [key for _, key, _ in part]))
            for (*_, tokens), answer in zip(part, answers, strict=True):
                self._count(tokens, answer)
        if self._share_prefixes:
            known.update(missing)

    def _count(self, input_ids: Sequence[int], answer: Mapping[str, Any]) -> None:
        with self._lock:
            self.work.computed += len(input_ids) - answer["meta_info"]["cached_tokens"]

    def _everywhere(self, function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
        """`function(client, …)` for each client, at the same time if there are several."""
        if self._pool is None:
            return [function(*arguments) for arguments in zip(self._clients, *columns, strict=True)]
        return list(self._pool.map(function, self._clients, *columns))


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
