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
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mezo import philox
from mezo.engines.base import Loss, Work
from mezo.engines.sglang.client import Client, split, worker_state
from mezo.engines.sglang.plugin import ADAPTER_MARK
from mezo.engines.sglang.scoring import Answers, Scorer, Scores, Submit, make_rows
from mezo.engines.torch.engine import trained_parameters
from mezo.engines.torch.space import ParameterSpace, tensors_digest
from mezo.errors import EngineError, UserError
from mezo.estimator import UNPERTURBED, Probe, Record
from mezo.objective import Example, TargetScores, TokenSequence, example_losses

logger = logging.getLogger(__name__)

_RECORDS_PER_COMMAND = 256
_GIVEN_UP_AFTER = 600  # seconds


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
        self.resumes_every = 1
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
        self._held: dict[str, object] | None = None  # a step that goes with the next rows
        self._pool = ThreadPoolExecutor(max_workers=len(clients)) if len(clients) > 1 else None
        self._attached = False
        self.work = Work()
        self.wave_cost = 1024
        self._lock = threading.Lock()
        self._row_numbers = itertools.count()
        self._base_samples = base_samples
        self._heard = time.monotonic()  # when the workers last heard of us
        self._scorers = {client.name: Scorer(_submit_to(client), self.wave_cost) for client in clients}
        self._scores_in_workers = False  # known when attached
        self._rows_sent: dict[str, dict[TokenSequence, int]] = {}  # by client: numbers of the rows it has

    @property
    def model(self) -> None:
        """The model lives in SGLang."""
        return None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._tokenizer

    def losses(self, examples: Sequence[Example], probes: Sequence[Probe], loss: Loss = example_losses) -> Tensor:
        """See `Engine.losses`."""
        self.work.asked += len(probes) * sum(e.num_tokens for e in examples)
        scores = self._scores(examples, probes, greedy=False)
        return torch.stack([loss(examples, s.logprobs_T) for s in scores])

    def score(self, examples: Sequence[Example]) -> TargetScores:
        """See `Engine.score`."""
        computed = self.work.computed
        parts = [
            self._scores(examples[first : first + self.eval_batch_size], [UNPERTURBED], greedy=True)[0]
            for first in range(0, len(examples), self.eval_batch_size)
        ]
        self.work.computed = computed  # the work of training is counted
        return TargetScores(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def generate(
        self, prompts: Sequence[tuple[int, ...]], probes: Sequence[Probe], max_new_tokens: int, stop: str | None
    ) -> list[list[str]]:
        """See `Engine.generate`: all prompts under all probes in one request to each replica, by its scheduler."""
        self._write(probes, hold=False)
        sampling = {
            "max_new_tokens": max_new_tokens,
            "temperature": 0.0,
            **({"stop": stop} if stop is not None else {}),
        }

        def ask(client: Client, part: Sequence[tuple[int, ...]]) -> list[list[str]]:
            if not part:
                return [[] for _ in probes]
            rows = [(name, prompt) for name in self._names[: len(probes)] for prompt in part]
            answers = client.generate(
                {
                    "input_ids": [prompt for _, prompt in rows],
                    "sampling_params": [sampling] * len(rows),
                    "lora_path": [name for name, _ in rows],
                    "extra_key": [f"{self._session}-{self._version}"] * len(rows),
                }
            )
            texts = self.tokenizer.batch_decode([a["output_ids"] for a in answers], skip_special_tokens=True)
            texts = [text if stop is None else text.partition(stop)[0] for text in texts]
            return [texts[p * len(part) : (p + 1) * len(part)] for p in range(len(probes))]

        found = self._everywhere(ask, [prompts[s] for s in split(len(prompts), len(self._clients))])
        return [[text for texts in found for text in texts[p]] for p in range(len(probes))]

    def update(self, records: Sequence[Record]) -> None:
        """See `Engine.update`. The workers hear of it with the next probes."""
        self._unsent.append(records)
        self._unsaved.append(records)
        self._in_slots = ()
        if self._attached and len(self._unsent) >= _RECORDS_PER_COMMAND:
            self._send([])

    def deferring(self) -> AbstractContextManager[None]:
        """See `Engine.deferring`."""
        return nullcontext()

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
        set_peft_model_state_dict(self._adapter, load_file(folder / SAFETENSORS_WEIGHTS_NAME))
        self._unsent, self._unsaved = [], []
        self._detach()

    def save_optimizer(self, folder: Path) -> None:
        """See `Engine.save_optimizer`: plain SGD has no state."""

    def load_optimizer(self, folder: Path) -> None:
        """See `Engine.load_optimizer`."""

    def num_parameters(self) -> int:
        """See `Engine.num_parameters`."""
        return self.space.num_parameters()

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

    def _write(self, probes: Sequence[Probe], *, hold: bool = True) -> None:
        """Has the probes written into the slots, now or, with `hold` where workers score, with the next rows."""
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
            self._send(probes, hold=hold and self._scores_in_workers)
        self._in_slots = tuple(probes)

    def _send(self, probes: Sequence[Probe], *, hold: bool = False) -> None:
        """Updates that the workers lack, then the probes, in as few commands as can be; `hold` leaves the last one."""
        while True:
            part, self._unsent = self._unsent[:_RECORDS_PER_COMMAND], self._unsent[_RECORDS_PER_COMMAND:]
            last = not self._unsent
            if not part and not (last and probes):
                return
            self._version += 1
            step: dict[str, object] = {
                "applied": self._applied,
                "updates": [[[r.seed, r.coefficient, r.learning_rate] for r in records] for records in part],
                "probes": [list(p) for p in probes] if last else [],
            }
            self._applied += len(part)
            if last and hold:
                self._held = step
                return
            command = {"op": "step", "owner": self._owner, **step}
            self._everywhere(lambda client, c=command: client.command(c))
            self._heard = time.monotonic()
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
            self._rows_sent[client.name] = {}
            self._check_base(client)

        self._attached = True  # from here on there may be something to take away
        self._everywhere(attach)
        states = {client.name: worker_state(client) for client in self._clients}
        self._scores_in_workers = all(state["scores"] for state in states.values())
        for name, state in states.items():
            if self._share_prefixes and state["scores"] and not state.get("shares_within_batch", True):
                logger.warning(
                    "%s: rows of a batch share only what is cached before it; with --attention-backend triton, "
                    "--page-size 1 and a radix cache they share all that they have in common",
                    name,
                )
        if not self._scores_in_workers:
            self._refuse_chunks()

    def _refuse_chunks(self) -> None:
        """As requests, rows of an activated LoRA must stay whole: SGLang would look for a next piece's prefix anew."""
        if getattr(self._adapter.peft_config["default"], "alora_invocation_tokens", None):
            for client in self._clients:
                if (client.info().get("chunked_prefill_size") or -1) > 0:
                    raise EngineError(f"lora_variant alora: start {client.name} with --chunked-prefill-size -1")

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
        self._refuse_chunks()
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
        step, self._held = self._held, None
        parts = [examples[s] for s in split(len(examples), len(self._clients))]
        answers = self._everywhere(lambda client, part: self._ask(client, part, len(probes), greedy, step), parts)
        columns = [[a[p] for a in answers if a] for p in range(len(probes))]
        return [TargetScores(*(torch.cat(t) for t in zip(*scores, strict=True))) for scores in columns]

    def _ask(
        self, client: Client, examples: Sequence[Example], probes: int, greedy: bool, step: dict[str, object] | None
    ) -> list[TargetScores]:
        sequences = [s for e in examples for s in e.sequences]
        if self._scores_in_workers:
            scores = self._ask_worker(client, sequences, probes, greedy, step)
        elif not sequences:
            return []
        else:
            numbers = None if self._share_prefixes else self._row_numbers
            rows = make_rows(self._names[:probes], sequences, self._key(sequences), numbers)
            scores = self._scorers[client.name].scores(rows, share=self._share_prefixes, greedy=greedy)
        if not sequences:
            return []
        with self._lock:
            self.work.computed += scores.computed
        columns = zip(torch.tensor(scores.logprobs).chunk(probes), torch.tensor(scores.best).chunk(probes), strict=True)
        return [TargetScores(*column) for column in columns]

    def _ask_worker(
        self,
        client: Client,
        sequences: Sequence[TokenSequence],
        probes: int,
        greedy: bool,
        step: dict[str, object] | None,
    ) -> Scores:
        """By numbers of rows; the tokens of a row cross once. A replica without rows still takes the step."""
        known = self._rows_sent[client.name]
        new = [s for s in dict.fromkeys(sequences) if s not in known]
        known.update(dict(zip(new, itertools.count(len(known)), strict=False)))
        command: dict[str, object] = {
            "op": "score",
            "owner": self._owner,
            "step": step,
            "key": self._key(sequences),
            "new": [[s.input_ids, [t[:2] for t in s.targets], s.adapter_start] for s in new],
            "rows": [known[s] for s in sequences],
            "probes": probes,
            "share": self._share_prefixes,
            "greedy": greedy,
            "wave_cost": self.wave_cost,
        }
        try:
            return Scores(*client.command(command))
        finally:
            self._heard = time.monotonic()

    def _key(self, sequences: Sequence[TokenSequence]) -> str:
        """Under which keys and values are shared: an activated LoRA's prompts for good, others until slots change."""
        return f"{self._session}-{'base' if any(s.adapter_start for s in sequences) else self._version}"

    def _everywhere(self, function: Callable[..., Any], *columns: Sequence[Any]) -> list[Any]:
        """`function(client, …)` for each client, at the same time if there are several."""
        if self._pool is None:
            return [function(*arguments) for arguments in zip(self._clients, *columns, strict=True)]
        return list(self._pool.map(function, self._clients, *columns))


def _submit_to(client: Client) -> Submit:
    def submit(body: Mapping[str, Any]) -> Answers:
        answers = client.generate(body)
        return lambda: answers

    return submit
