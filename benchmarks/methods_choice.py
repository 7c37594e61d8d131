"""What `method: auto` sets, by a rule, from the rows of benchmarks/methods.py.

    python benchmarks/methods_choice.py benchmarks/results/methods.csv [--write]

Of all parameters, of all by low-rank directions alone, of upper layers, of LoRA, and of LoRA as far as
SGLang's engine has it: among the methods whose last accuracy, the median of the seeds and the mean of the tasks, is
within one point of the best one's, the one that comes soonest to the accuracy of plain MeZO at 2,000 steps of SST-2, in
seconds as a ratio to plain MeZO's own, combined over the models by the geometric mean; if none gets there on both, the
most accurate. Plain MeZO is that of the same kind, itself a candidate, and of low rank and upper layers that of all
parameters, which is none, as first-order methods are none. The learning rate is the median of the tuned ones, the lower
of two. Where a task was not measured, the others decide. RTE is left out, where no forward method leaves chance. (Until
2026-11-28 the rule looked at SST-2 alone, which had been measured by then, and took the smaller rate. Seconds of the
other tasks are in the table since 2026-11-29 and decide nothing: with a miss on one of them as one everywhere, plain
MeZO, which cannot miss its own accuracy, would be chosen over a method that is more accurate in the mean and quicker
wherever it gets there.)

`--write` puts the choices into src/mezo/auto.yaml and the table of docs/methods.md; what was not measured stays there.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from methods_report import Finals, Row, finals, tuned, with_table
from methods_schedule import read
from methods_settings import FIRST_ORDER, LORA, METHODS, TRAINED

from mezo import auto
from mezo.config import MeZOConfig
from mezo.errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "methods.md"
# And their plain MeZO.
KINDS = {"full": "mezo", "low rank": "mezo", "upper layers": "mezo", "lora": "mezo lora", "sglang lora": "mezo lora"}
TASKS = ("minilm-mlm/sst2", "reviews-llama/sst2", "minilm-mlm/snli", "minilm-mlm/trec")
TIMED = TASKS[:2]  # whose seconds decide
PLAIN_STEPS = 2000
NEAR = 1.0  # points of accuracy


class Judged(NamedTuple):
    """A candidate. Lists are by task."""

    method: str
    finals: list[Finals]
    gaps: list[float]  # points of accuracy to the best one
    ratios: list[float]  # seconds to plain MeZO's accuracy, over plain MeZO's; inf where it does not get there, or nan

    @property
    def accuracy(self) -> float:
        """Mean of the tasks, in percent."""
        return round(statistics.mean(map(ending, self.finals)), 6)

    @property
    def slowness(self) -> float:
        pairs = zip(self.finals, self.ratios, strict=True)
        timed = [seconds for of, seconds in pairs if of.task in TIMED and not math.isnan(seconds)]
        return math.prod(timed) ** (1 / len(timed)) if timed else math.inf


def candidates(kind: str) -> list[str]:
    """The methods of a kind."""
    return [m for m, (options, _) in METHODS.items() if not m.startswith(FIRST_ORDER) and _is_of(kind, options)]


def _is_of(kind: str, options: dict[str, Any]) -> bool:
    if options.get("peft_type") == "prefix_tuning" or options.get("use_peft", False) != ("lora" in kind):
        return False
    if ("trainable_layers" in options) != (kind == "upper layers"):
        return False
    if kind == "low rank" and options.get("direction") != "low_rank":
        return False
    try:
        MeZOConfig.from_dict(
            {"model_name_or_path": "", **options, **({"engine": "sglang"} if "sglang" in kind else {})}
        )
    except UserError:
        return False
    return True


def judged(found: list[Row], kind: str) -> list[Judged]:
    """The candidates that were measured where plain MeZO was, with as many seeds; none if that was nowhere."""
    plain, of_task = KINDS[kind], finals(found)
    tasks = [of_task[task] for task in TASKS if plain in of_task.get(task, {})]
    seeds = [len(methods[plain].curves) for methods in tasks]
    whole = [[m for m in methods if len(methods[m].curves) == n] for methods, n in zip(tasks, seeds, strict=True)]
    best = [
        max((ending(methods[m]) for m in candidates(kind) if m in of), default=math.nan)
        for methods, of in zip(tasks, whole, strict=True)
    ]
    result = []
    for method in candidates(kind):
        if tasks and all(method in of for of in whole):
            own = [methods[method] for methods in tasks]
            gaps = [top - ending(of) for top, of in zip(best, own, strict=True)]
            ratios = [ratio(of, methods[plain]) for of, methods in zip(own, tasks, strict=True)]
            result.append(Judged(method, own, gaps, ratios))
    return result


def ending(of: Finals) -> float:
    """Last accuracy in percent, median of the seeds."""
    return statistics.median(of.ends())


def ratio(of: Finals, plain: Finals) -> float:
    """Seconds to plain MeZO's accuracy at 2,000 steps, over its own; nan where that was not timed."""
    if math.isnan(plain.step_seconds):
        return math.nan
    at = [[float(row["accuracy"]) for row in curve if int(row["step"]) <= PLAIN_STEPS][-1] for curve in plain.curves]
    goal = statistics.median_low(at)  # of an even number of seeds one that was reached
    seconds = of.until(goal)[1] / plain.until(goal)[1]
    return math.inf if math.isinf(of.until(goal)[0]) else seconds


def choice(methods: list[Judged]) -> Judged:
    """The rule."""
    best = max(m.accuracy for m in methods)
    near = [m for m in methods if m.accuracy >= best - NEAR]
    return min(near, key=lambda m: (m.slowness, -m.accuracy))


def entries(found: list[Row]) -> dict[str, dict[str, Any]]:
    """What auto.yaml says of each kind that was measured."""
    return {kind: entry(kind, choice(methods)) for kind in KINDS if (methods := judged(found, kind))}


def entry(kind: str, chosen: Judged) -> dict[str, Any]:
    """An entry of auto.yaml."""
    usual = {name: getattr(MeZOConfig, name) for name in ("estimator", "optim", "direction", "epsilon")}
    options = METHODS[chosen.method][0]
    trained = options.get("trainable_layers", "lora" if "lora" in kind else "all")
    own = {name: value for name, value in options.items() if name not in (*LORA, "trainable_layers")}
    rows = [
        {
            "file": "benchmarks/results/methods.csv",
            "commit": ", ".join(sorted({row["commit"] for curve in of.curves for row in curve})),
            "task": of.task,
            "method": chosen.method,
            "learning_rate": float(of.curves[0][0]["learning_rate"]),
            "seeds": len(of.curves),
            "accuracy": round(ending(of), 2),
            "behind_the_best": round(gap, 2),
            **({} if math.isnan(seconds) else {"seconds_over_plain": round(seconds, 3)}),
        }
        for of, gap, seconds in zip(chosen.finals, chosen.gaps, chosen.ratios, strict=True)
    ]
    models = [row["task"].partition("/")[0] for row in rows]
    return {
        "method": chosen.method,
        "options": {**usual, **own},
        "learning_rate": statistics.median_low(row["learning_rate"] for row in rows),
        "trained_parameters": {model: TRAINED[model][trained] for model in models},
        "rows": rows,
    }


HEAD = """\
# What method auto sets, see docs/methods.md. Made by
#     python benchmarks/methods_choice.py benchmarks/results/methods.csv --write
# An entry without rows is PROVISIONAL: chosen by hand, not measured.
"""


def to_yaml(chosen: dict[str, dict[str, Any]]) -> str:
    return HEAD + yaml.safe_dump(chosen, sort_keys=False, width=110)


def docs_table(chosen: dict[str, auto.Entry]) -> str:
    """The table of docs/methods.md."""
    lines = ["| trained | method | options | learning rate | measured |", "|---|---|---|---|---|"]
    for kind, of in chosen.items():
        options = ", ".join(f"`{name} {value}`" for name, value in of.options.items())
        measured = "; ".join(
            f"{row['task']}{_at(row, of)}: {row['accuracy']:.1f} %, {row['behind_the_best']:.1f} behind the best"
            f"{_soon(row, KINDS[kind])}"
            for row in of.rows
        )
        lines.append(f"| {kind} | {of.method} | {options} | {of.learning_rate:g} | {measured or 'not yet'} |")
    return "\n".join(lines)


def _at(row: dict[str, Any], of: auto.Entry) -> str:
    return "" if row["learning_rate"] == of.learning_rate else f" at {row['learning_rate']:g}"


def _soon(row: dict[str, Any], plain: str) -> str:
    if "seconds_over_plain" not in row:
        return ""
    share = row["seconds_over_plain"]
    return f", accuracy of *{plain}* " + ("not reached" if math.isinf(share) else f"in {share:.2f} of its time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--write", action="store_true", help="put the choices into src/mezo/auto.yaml and docs/methods.md"
    )
    options = parser.parse_args()
    found = tuned(read(options.file))
    for kind in KINDS:
        for m in sorted(judged(found, kind), key=lambda m: -m.accuracy):
            by_task = "  ".join(
                f"{-gap:+5.1f} points {seconds:6.2f}x" for gap, seconds in zip(m.gaps, m.ratios, strict=True)
            )
            print(f"{kind:12} {m.method:32} {m.accuracy:5.1f} % {m.slowness:6.2f}x  {by_task}")
    chosen = entries(found)
    print(to_yaml(chosen))
    if options.write:
        table = {**yaml.safe_load(auto.TABLE.read_text()), **chosen}
        auto.TABLE.write_text(to_yaml({kind: table[kind] for kind in KINDS if kind in table}))
        DOCS.write_text(with_table(DOCS.read_text(), "auto.yaml", docs_table(auto.entries())))


if __name__ == "__main__":
    main()
