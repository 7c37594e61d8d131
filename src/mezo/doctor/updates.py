"""Whether updates survive rounding, and what makes steps slow."""

from __future__ import annotations

import math

import numpy as np

from mezo.doctor.finding import Finding, short
from mezo.doctor.losses import SPACING
from mezo.doctor.run import Run

_WEIGHT = 0.02  # size of a typical weight of a language model


def precision(run: Run) -> list[Finding]:
    """Whether updates of weights survive the rounding of their type."""
    config, dtype = run.config, run.dtype
    if config.use_peft:
        return [Finding("ok", "precision", "The adapter is kept in float32; small updates add up.")]
    step_S = run.rate_S * np.sqrt((run.coefficient_SQ**2).sum(axis=1))
    update = float(np.median(step_S)) * math.sqrt(config.direction_refresh_steps if config.direction != "dense" else 1)
    if dtype is None or config.normalize_perturbations or config.optim != "sgd" or update == 0:
        return []
    unit = SPACING[dtype] * 2.0 ** math.floor(math.log2(_WEIGHT))
    figures = f"A write moves an element by {update:.2g}; {dtype} spaces weights of {_WEIGHT} by {unit:.2g}"
    if dtype == "float32" and update < unit / 2:
        advice = f"--learning_rate {short(config.learning_rate * unit / update)}"
        return [Finding("warning", "precision", f"{figures}: most updates round to nothing.", advice)]
    if dtype == "float32" or update > unit / 10:
        mean = "" if dtype == "float32" else "; stochastic rounding is right on average"
        return [Finding("ok", "precision", f"{figures}{mean}.")]
    # An update u that is stochastically rounded to multiples of s has variance u · s.
    evidence = (
        f"{figures}: stochastic rounding is right on average, its noise has {math.sqrt(unit / update):.0f} times the "
        "spread of the updates."
    )
    advice = "--dtype float32, --use_peft, or --direction low_rank, which writes weights once a window"
    return [Finding("note", "precision", evidence, advice)]


def speed(run: Run) -> list[Finding]:
    """Padding, reuse, the size of a pass and its pace, as far as journal and log tell."""
    config, found = run.config, []
    padding = [entry["padding_percent"] for entry in run.logs if "padding_percent" in entry]
    rates = [entry["tokens_per_second"] for entry in run.logs if "tokens_per_second" in entry]
    tokens, rows = float(run.tokens_S.mean()), config.batch_size
    found += _parts(run)
    if padding and padding[-1] > 30:
        evidence = (
            f"{padding[-1]:.0f} % of computed positions were padding; a row has {tokens / rows:.0f} tokens on average."
        )
        found.append(
            Finding("note", "speed", evidence, f"--max_length {short(2 * tokens / rows)} cuts the longest rows")
        )
    if not config.enable_kv_cache_optimization:
        evidence = (
            f"Reuse is off: all {tokens:.0f} tokens of a step are computed under every probe, shared prefixes too."
        )
        found.append(Finding("note", "speed", evidence, "--enable_kv_cache_optimization"))
    if tokens < 256:
        evidence = (
            f"A pass has {tokens:.0f} tokens; on a GPU reading the weights takes longer than computing with so few."
        )
        advice = (
            f"--per_device_train_batch_size {4 * config.per_device_train_batch_size}; mezo bench says what it costs"
        )
        found.append(Finding("note", "speed", evidence, advice))
    latest = rates[-max(1, len(rates) // 5) :]
    if len(rates) >= 5 and np.median(latest) < 0.5 * np.median(rates):
        evidence = f"{np.median(latest):,.0f} tokens per second of late, {np.median(rates):,.0f} in the median."
        found.append(Finding("note", "speed", evidence, "See what else runs on the machine"))
    if rates and not found:
        return [Finding("ok", "speed", f"{np.median(rates):,.0f} tokens per second.")]
    return found


def _parts(run: Run) -> list[Finding]:
    """Which part of a step takes the time, where it is not the forward passes."""
    shares = [(e["forward_percent"], e["update_percent"]) for e in run.logs if "forward_percent" in e]
    if not shares:
        return []
    forward, update = (float(np.median(column)) for column in zip(*shares, strict=True))
    rest = 100 - forward - update
    evidence = f"Of a step's time {forward:.0f} % is forward passes, {update:.0f} % the update, {rest:.0f} % the rest."
    if update > 30:
        if run.config.use_peft or run.config.direction != "dense":
            return [Finding("note", "speed", evidence, "A larger batch, or --num_queries, for each update")]
        return [Finding("note", "speed", evidence, "--direction low_rank writes the weights once in 50 steps")]
    if rest > 30:
        return [Finding("note", "speed", evidence, "Slower callbacks, trackers or disks: fewer --logging_steps")]
    return []
