"""`method: auto`: options and learning rates chosen from measurements, see docs/methods.md.

The choices lie in auto.yaml, which benchmarks/methods_choice.py makes of benchmarks/results/methods.csv.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mezo.errors import UserError

TABLE = Path(__file__).with_name("auto.yaml")
# All that an entry may set.
OPTIONS = (
    "learning_rate", "epsilon", "estimator", "num_queries", "gradient_accumulation_steps", "clip_quantile", "optim",
    "lr_scheduler_type", "direction", "direction_rank", "direction_refresh_steps",
)  # fmt: skip
# What a learning rate belongs to: at another value another one is the right one. No entry normalises.
FITTED = ("estimator", "optim", "direction", "epsilon", "normalize_perturbations")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What method auto sets for one kind of trained parameters.

    Args:
        method: its name in benchmarks/methods_settings.py.
        options: what it sets, as fields of `MeZOConfig`; estimator, optim, direction and epsilon are always there.
        learning_rate: the median of those that were the best on the tasks measured, the lower of two.
        trained_parameters: numbers of trained scalars, by model measured.
        rows: the runs that it was chosen from: file, commit, task, method, learning_rate, and what they came to. Empty
            where it was chosen by hand.
    """

    method: str
    options: Mapping[str, object]
    learning_rate: float
    trained_parameters: Mapping[str, int]
    rows: Sequence[Mapping[str, object]]


def entries() -> dict[str, Entry]:
    """The table: full (all parameters), low rank (the same by directions U Vᵀ), upper layers (`trainable_layers`),
    lora, and sglang lora, where no Adam is."""
    import yaml  # here, so that `mezo --help` answers at once

    return {name: Entry(**values) for name, values in yaml.safe_load(TABLE.read_text()).items()}


def entry_of(values: Mapping[str, object]) -> Entry:
    """The entry for a config's values: what is trained, on which engine.

    Raises:
        UserError: nothing was measured for it.
    """
    lora, sglang = values.get("use_peft", False), values.get("engine") == "sglang"
    if lora and values.get("peft_type") == "prefix_tuning":
        raise UserError("method auto has no measurements of prefix tuning; use method mezo, or peft_type lora")
    objective = values.get("objective", "loss")
    if objective != "loss":
        raise UserError(f"method auto was measured on objective loss; with objective {objective} use method mezo")
    if sglang and not lora:
        raise UserError("engine sglang trains LoRA adapters: set use_peft, or use engine torch")
    if lora:
        return entries()["sglang lora" if sglang else "lora"]
    if values.get("trainable_layers") is not None:
        return entries()["upper layers"]
    table = entries()
    other = values.get("direction") == "low_rank" != table["full"].options["direction"]
    return table["low rank" if other else "full"]


def resolved(named: Mapping[str, object]) -> dict[str, object]:
    """What is named, and what method auto sets beside it.

    Args:
        named: values by name of option; what is not there is not named.

    Raises:
        UserError: nothing was measured for this kind of run, or the learning rate measured does not fit what is named.
    """
    entry = entry_of(named)
    measured = {"normalize_perturbations": False, **entry.options}
    for name in FITTED:
        if "learning_rate" not in named and named.get(name, measured[name]) != measured[name]:
            raise UserError(
                f"method auto: its learning_rate was measured with {name} {measured[name]}, not {named[name]}; leave "
                f"out {name}, or give a learning_rate too (mezo tune --learning_rates … finds one)"
            )
    return {**entry.options, "learning_rate": entry.learning_rate, **named}


def said(values: Mapping[str, object]) -> str:
    """The learning rate, and what a config has of that which its entry sets, in one line."""
    return ", ".join(f"{name} {values[name]}" for name in ("learning_rate", *entry_of(values).options))


def size_warning(values: Mapping[str, object], num_parameters: int) -> str | None:
    """A warning where method auto's learning rate is used far from the sizes it was measured at, else None.

    Args:
        values: all of a config's.
        num_parameters: scalars that the run trains.
    """
    entry = entry_of(values)
    sizes = sorted(entry.trained_parameters.values())
    if values["learning_rate"] != entry.learning_rate or sizes[0] / 10 <= num_parameters <= 10 * sizes[-1]:
        return None
    return (
        f"method auto: learning_rate {entry.learning_rate:g} was measured with {' and '.join(f'{n:,}' for n in sizes)} "
        f"trained parameters, this run has {num_parameters:,}; mezo tune finds a rate"
    )
