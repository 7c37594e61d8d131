"""A run's numbers as arrays, from its journal and log. Names: S steps, Q directions of a step."""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mezo import checkpoint, journal
from mezo.config import PRESETS, MeZOConfig, Preset
from mezo.errors import UserError
from mezo.estimator import Record

Floats = NDArray[np.float64]
Logs = Collection[Mapping[str, float]]
_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Run:
    """The numbers of a run.

    Args:
        config: the run's.
        kind: its model's head, see `mezo.encoding.ModelKind`.
        plus_SQ: loss_plus.
        minus_SQ: loss_minus.
        coefficient_SQ: what multiplied z.
        rate_S: learning rate.
        tokens_S: tokens of the batch, once.
        logs: log_history of trainer_state.json.
        max_steps: steps that the run is to have.
        weights_dtype: type of the saved weights; None if there are none.
        aborted: whether it ended in the way that a loss that is not finite ends it.
    """

    config: MeZOConfig
    kind: str
    plus_SQ: Floats
    minus_SQ: Floats
    coefficient_SQ: Floats
    rate_S: Floats
    tokens_S: Floats
    logs: Logs
    max_steps: int
    weights_dtype: str | None = None
    aborted: bool = False

    @property
    def num_steps(self) -> int:
        """Steps in the journal."""
        return len(self.rate_S)

    @property
    def loss_S(self) -> Floats:
        """Mean loss under a step's probes."""
        loss_S: Floats = ((self.plus_SQ + self.minus_SQ) / 2).mean(axis=1)
        return loss_S

    @property
    def slope_SQ(self) -> Floats:
        """Measured derivative of the loss along z: projected_grad, not clipped nor scaled."""
        width = self.config.epsilon * (1 if self.config.estimator == "fzoo" else 2)
        return (self.plus_SQ - self.minus_SQ) / width

    @property
    def opening(self) -> tuple[Floats, Floats]:
        """Both losses [R] of the first fifth of the run, at least 20 steps."""
        begin = max(20, self.num_steps // 5)
        return self.plus_SQ[:begin].ravel(), self.minus_SQ[:begin].ravel()

    @property
    def dtype(self) -> str | None:
        """Type of the weights; an adapter's file does not tell its base model's."""
        if self.config.dtype != "auto":
            return self.config.dtype
        return None if self.config.use_peft else self.weights_dtype

    @property
    def preset(self) -> Preset:
        """The paper's setting for this kind of model and parameters."""
        return paper_setting(self.config, self.kind)

    @property
    def usual_epsilon(self) -> float:
        """What such runs have."""
        return usual_epsilon(self.config, self.kind)


def paper_setting(config: MeZOConfig, kind: str) -> Preset:
    """The paper's setting for a kind of model and the parameters that a run trains."""
    family = "opt" if kind == "causal_lm" else "roberta"
    method = ("lora" if config.peft_type == "lora" else "prefix") if config.use_peft else "full"
    return PRESETS[f"{family}-{method}"]


def usual_epsilon(config: MeZOConfig, kind: str) -> float:
    """What runs of this kind have; with normalisation their own.

    It is larger by the root of each tensor's size then, which the journal does not hold.
    """
    if config.normalize_perturbations:
        return config.epsilon
    return float(str(paper_setting(config, kind).values["epsilon"]))


def read_run(run: str | Path) -> Run:
    """The numbers of a run's folder, or of its journal.

    Raises:
        UserError: there is no run, or its files cannot be read.
    """
    path = Path(run) / checkpoint.JOURNAL_NAME if Path(run).is_dir() else Path(run)
    header, steps = journal.stream(path)
    try:
        config = MeZOConfig.from_dict(header["config"])  # type: ignore[arg-type]  # JSON
        kind = str(header["kind"])
    except KeyError as error:
        raise UserError(f"{path}: the journal's header has no {error.args[0]!r}") from None
    state_path = path.parent / checkpoint.STATE_NAME
    try:
        state = json.loads(state_path.read_text()) if state_path.exists() else {}
        logs, max_steps = state.get("log_history", []), int(state.get("max_steps", config.max_steps))
        if not all(_is_entry(entry) for entry in logs):
            raise ValueError
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{state_path}: not a trainer_state.json") from None
    numbers = _numbers(steps, path)
    num_steps = len(numbers.rate_S)
    due = [config.save_steps] + ([config.eval_steps] if config.eval_steps else [])
    last = checkpoint.checkpoint_path(path.parent, num_steps)
    return Run(
        config=config,
        kind=kind,
        plus_SQ=numbers.plus_SQ,
        minus_SQ=numbers.minus_SQ,
        coefficient_SQ=numbers.coefficient_SQ,
        rate_S=numbers.rate_S,
        tokens_S=numbers.tokens_S,
        logs=logs,
        max_steps=max_steps,
        weights_dtype=_saved_dtype(path.parent),
        aborted=last.exists() and num_steps < max_steps and all(num_steps % n for n in due),
    )


def _is_entry(entry: object) -> bool:
    """Whether this is a log entry: numbers by name."""
    return isinstance(entry, dict) and all(isinstance(value, (int, float)) for value in entry.values())


class _Numbers(NamedTuple):
    """What `Run` has of a journal."""

    plus_SQ: Floats
    minus_SQ: Floats
    coefficient_SQ: Floats
    rate_S: Floats
    tokens_S: Floats


def _numbers(steps: Iterator[list[Record]], path: Path) -> _Numbers:
    """Eight bytes a number: a run that is training reads its own journal again and again."""
    plus, minus, coefficient, rate, tokens = (array("d") for _ in range(5))
    widths = set()
    for records in steps:
        widths.add(len(records))
        plus.extend(r.loss_plus for r in records)
        minus.extend(r.loss_minus for r in records)
        coefficient.extend(r.coefficient for r in records)
        rate.append(records[0].learning_rate)
        tokens.append(records[0].num_tokens)
    if len(widths) > 1:
        raise UserError(f"{path}: its steps have different numbers of directions")
    shape = (len(rate), *(widths or {1}))
    plus_SQ, minus_SQ, coefficient_SQ = (np.asarray(a).reshape(shape) for a in (plus, minus, coefficient))
    return _Numbers(plus_SQ, minus_SQ, coefficient_SQ, np.asarray(rate), np.asarray(tokens))


def _saved_dtype(folder: Path) -> str | None:
    """Type of the first tensor in the folder's weights, from the head of the file."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                head = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 1 << 26)))
            types = [entry["dtype"] for name, entry in head.items() if name != "__metadata__"]
        except (ValueError, TypeError, AttributeError, KeyError):
            return None  # damaged
        return _SAFETENSORS.get(types[0]) if types else None
    return None
