"""What runs in SGLang's processes: float32 masters of the adapter, and slots written as master + scale · z.

Every tensor-parallel rank holds the whole masters (an adapter is small), draws z by the global index of each element,
and hands its slice to its slots. So ranks agree on z without talking to each other.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mezo import philox
from mezo.engines.sglang import versions
from mezo.engines.sglang.scoring import Scorer, Scores, make_rows
from mezo.engines.torch.space import ParameterSpace, tensors_digest
from mezo.estimator import Record
from mezo.objective import Target, TokenSequence

logger = logging.getLogger(__name__)


class Slots:
    """An adapter under training in one process of SGLang.

    Args:
        manager: SGLang's LoRA manager.
        names: adapters loaded from the same float32 tensors, one slot for each probe of a step.
        normalize_perturbations: see `ParameterSpace`.
        weight_decay: see `ParameterSpace.update`.
    """

    def __init__(self, manager: Any, names: Sequence[str], normalize_perturbations: bool, weight_decay: float):
        self.manager = manager
        self.names = list(names)
        self.weight_decay = weight_decay
        kept = [manager.mezo_tensors.pop(name) for name in names]  # all the same
        masters: dict[str, Tensor] = {n: t.to(manager.device) for n, t in kept[0].items()}
        self.space = ParameterSpace(masters, normalize_perturbations)
        self.rank = next(t.shape[0] for name, t in masters.items() if ".lora_A." in name)
        self.applied = 0  # updates so far
        marks = {name: torch.full_like(t, i + 1, device="cpu") for i, (name, t) in enumerate(masters.items())}
        layout = versions.stacked_weights(manager, names[0], marks)
        # As SGLang stacks the adapter: one buffer per stacked weight, and which rows of it each parameter fills.
        stacked: list[dict[str, Tensor]] = [
            {name: torch.zeros_like(mark, device=manager.device) for name, mark in layer.items()} for layer in layout
        ]
        filled = [
            (parameter, stacked[layer][name][rows])
            for layer, marked in enumerate(layout)
            for name, mark in marked.items()
            for parameter, rows in _runs(mark, list(masters))
        ]
        self._filled = [parameter for parameter, _ in filled]
        self._bases = [masters[parameter] for parameter, _ in filled]
        self._rows = [rows for _, rows in filled]
        streams = [philox.stream_id("direction", parameter) for parameter, _ in filled]
        self._segments = philox.Segments(self._bases, self._rows, streams)
        self._targets = [
            {(versions.target_of(manager, n), ".lora_A." in n): t for n, t in layer.items()} for layer in stacked
        ]
        self._views: dict[int, list[tuple[int, str, Any, Tensor, Tensor]]] = {}
        self._check_layout()

    @torch.no_grad()
    def update(self, records: Sequence[Record]) -> None:
        """One step's update of the masters."""
        self.space.update(records, self.weight_decay)
        self.applied += 1

    @torch.no_grad()
    def write(self, probes: Sequence[tuple[int, float]]) -> None:
        """Writes (seed, scale) into the slots; scale 0 is the adapter itself."""
        numbers = versions.make_resident(self.manager, self.names)
        for slot, (seed, scale) in zip(numbers, probes, strict=False):
            self._fill(seed, scale)
            self._copy_into(slot)
        versions.slots_changed(self.manager, numbers[: len(probes)])

    def _fill(self, seed: int, scale: float) -> None:
        if scale == 0.0:
            torch._foreach_copy_(self._rows, self._bases)
        else:
            self._segments.add_normals([scale * s for s in self.space.scales(seed, self._filled)], seed)

    def _copy_into(self, slot: int) -> None:
        sources: list[Tensor] = []
        views: list[Tensor] = []
        if slot not in self._views:
            self._views[slot] = list(versions.slot_views(self.manager, slot, self.rank))
        for layer, target, module, a_view, b_view in self._views[slot]:
            if (target, True) in self._targets[layer]:
                views += (a_view, b_view)
                sources.append(module.slice_lora_a_weights(self._targets[layer][target, True]))
                sources.append(module.slice_lora_b_weights(self._targets[layer][target, False]))
        torch._foreach_copy_(views, sources)

    def _check_layout(self) -> None:
        """What we write equals what SGLang itself loaded into the slots."""
        slots = versions.make_resident(self.manager, self.names)
        views = list(versions.slot_views(self.manager, slots[0], self.rank))
        loaded = [(a.clone(), b.clone()) for *_, a, b in views]
        self._fill(0, 0.0)
        self._copy_into(slots[0])
        for (layer, target, _, a, b), (a_loaded, b_loaded) in zip(views, loaded, strict=True):
            if not (torch.equal(a, a_loaded) and torch.equal(b, b_loaded)):
                raise RuntimeError(f"this SGLang lays out LoRA slots in another way (layer {layer}, {target})")


class Worker:
    """Commands of the client, in one process of SGLang."""

    def __init__(self, scheduler: Any):
        self._scheduler = scheduler
        self._slots: Slots | None = None
        self._owner = ""
        self._error = ""
        self._digest_value = ""
        self._base_samples: dict[str, list[Any]] = {}
        self._prefill: versions.Prefill | None = None
        self._scorer: Scorer | None = None
        self._sequences: list[TokenSequence] = []  # rows by number, as the client has sent them
        self._row_numbers = itertools.count()
        self._heard = time.monotonic()

    def run(self, text: str) -> Any:
        """Runs a command, a JSON object: its answer or True; False if it failed on some rank, see `state`."""
        self._heard = time.monotonic()
        commands: dict[str, Callable[..., Any]] = {
            "attach": self._attach, "detach": self._detach, "digest": self._digest, "step": self._step,
            "score": self._score, "heartbeat": lambda **_: None,
        }  # fmt: skip
        answer = None
        try:
            command = json.loads(text)
            answer = commands[command.pop("op")](**command)
            error = ""
        except Exception as failure:  # whatever it is must not end the server
            logger.exception("mezo: %s failed", text[:200])
            error = f"{type(failure).__name__}: {failure}"
        self._error = next(filter(None, versions.all_ranks(self._scheduler, error)), "")
        return not self._error and (answer or True)

    def state(self) -> dict[str, object]:
        """What the client may want to know."""
        if self._slots is None:
            return {"error": self._error}
        return {
            "error": self._error,
            "scores": self._prefill is not None,
            "shares_within_batch": self._prefill is not None and self._prefill.shares_within_batch,
            "owner": self._owner,
            "names": self._slots.names,
            "idle_seconds": time.monotonic() - self._heard,
            "digest": self._digest_value,
            "base_samples": self._base_samples,
        }

    def _attach(self, owner: str, names: list[str], normalize_perturbations: bool, weight_decay: float) -> None:
        manager = versions.lora_manager(self._scheduler)
        if manager is None:
            raise RuntimeError("SGLang runs without LoRA; start it with --enable-lora")
        self._slots = Slots(manager, names, normalize_perturbations, weight_decay)
        self._owner = owner
        self._sequences = []
        self._prefill = versions.scheduler_prefill(self._scheduler)
        self._scorer = None
        self._base_samples = {
            name: [str(p.dtype).removeprefix("torch."), list(p.shape), sample_hash(p)]
            for name, p in versions.base_parameters(self._scheduler).items()
            if p.is_floating_point() and p.ndim <= 2
        }

    def _detach(self, owner: str) -> None:
        if owner == self._owner:
            self._slots, self._owner, self._scorer, self._sequences = None, "", None, []

    def _digest(self, owner: str) -> None:
        digests = versions.all_ranks(self._scheduler, self._of(owner).space.digest())
        self._digest_value = digests[0] if len(set(digests)) == 1 else "ranks differ"

    def _score(
        self,
        owner: str,
        step: dict[str, Any] | None,
        key: str,
        new: list[Any],
        rows: list[int],
        probes: int,
        share: bool,
        greedy: bool,
        wave_cost: int,
    ) -> Scores:
        """Log-probabilities of the targets of rows under the probes that `step` puts into the slots, or left there."""
        if step is not None:
            self._step(owner, **step)
        slots = self._of(owner)
        if self._prefill is None:
            raise RuntimeError("this SGLang takes rows as requests only")
        self._sequences += [
            TokenSequence(tuple(ids), tuple(Target(position, token, 0) for position, token in targets), start)
            for ids, targets, start in new
        ]
        self._scorer = self._scorer or Scorer(self._prefill, wave_cost, self._prefill.shares_within_batch)
        if not rows:
            return Scores([], [], 0)
        sequences = [self._sequences[number] for number in rows]
        table = make_rows(slots.names[:probes], sequences, key, None if share else self._row_numbers)
        return self._scorer.scores(table, share=share, greedy=greedy)

    def _of(self, owner: str) -> Slots:
        if self._slots is None or owner != self._owner:
            raise RuntimeError("no such run is attached here; was SGLang started anew?")
        return self._slots

    def _step(self, owner: str, applied: int, updates: list[list[list[Any]]], probes: list[tuple[int, float]]) -> None:
        """Updates since the last command, then the slots. `applied`: updates that the client believes to be in."""
        slots = self._of(owner)
        if applied != slots.applied:
            raise RuntimeError(f"{slots.applied} updates are in, the client believes {applied}")
        for step in updates:
            slots.update([Record(0, seed, 0.0, 0.0, coefficient, rate, 0, 0) for seed, coefficient, rate in step])
        if probes:
            slots.write(probes)


def sample_hash(parameter: Tensor) -> str:
    """Hash of a corner of a base parameter."""
    corner = parameter.detach()[tuple(slice(0, size) for size in (8, 64)[: parameter.ndim])]
    return tensors_digest({"": corner.cpu().contiguous()})


def _runs(mark: Tensor, names: Sequence[str]) -> list[tuple[str, slice]]:
    """Which rows of a stacked weight hold which parameter, from one filled with their numbers (0: none)."""
    numbers = mark[:, 0].int().tolist()
    runs: list[tuple[str, slice]] = []
    start = 0
    for row in range(1, len(numbers) + 1):
        if row == len(numbers) or numbers[row] != numbers[start]:
            if numbers[start]:
                runs.append((names[numbers[start] - 1], slice(start, row)))
            start = row
    return runs
