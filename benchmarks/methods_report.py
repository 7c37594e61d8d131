"""Tables and plots of what benchmarks/methods.py has measured, from its CSV file alone.

    python benchmarks/methods_report.py FILE.csv [--output FOLDER] [--methods mezo "lozo, adam" …]
        [--page docs/methods.md]

Curves are those of each method at the learning rate that its held-out rows chose, median of the seeds, with the
smallest and the largest as a band. A curve reaches an accuracy where two evaluations in a row have it, since the best
of twenty noisy ones has it too early. Seconds are steps times what a step takes with nothing beside it, evaluations not
counted, on the device and at the commit that the file has the most methods of; those of a method that was timed beside
plain MeZO elsewhere are scaled by plain MeZO's. Another ε, clipping or another schedule leaves a step's work as it is:
where a method was not timed, one that differs by these alone stands for it, also for plain MeZO.
"""

import argparse
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from methods_schedule import read
from methods_settings import FIRST_ORDER, METHODS, TWINS, best_rate, key, options_of, rates, tried_rates

Row = dict[str, str]
# The models' README: accuracy by step, seed 0, an independent implementation.
INDEPENDENT = {
    ("minilm-mlm/sst2", 1e-5): {500: 81.2, 1000: 81.4, 2000: 81.5},
    ("minilm-mlm/sst2", 3e-5): {500: 81.1, 1000: 81.3, 2000: 81.5},
    ("reviews-llama/sst2", 3e-5): {500: 71.9, 1000: 76.6, 2000: 81.5},
}


def reached(curve: list[Row], accuracy: float) -> Row:
    """The first point of a curve with that accuracy which the next one has, too."""
    good = [float(row["accuracy"]) >= accuracy for row in curve]
    holds = (row for row, here, after in zip(curve, good, [*good[1:], True], strict=True) if here and after)
    return next(holds, {"step": "inf", "forwards": "inf"})


class Finals(NamedTuple):
    """The runs of a method on a task at its best rate."""

    curves: list[list[Row]]  # one a seed
    step_seconds: float  # with nothing beside it; nan where this was not measured beside plain MeZO

    @property
    def task(self) -> str:
        """Its name."""
        return self.curves[0][0]["task"]

    def ends(self) -> list[float]:
        """Last accuracies in percent, ascending."""
        return sorted(100 * float(curve[-1]["accuracy"]) for curve in self.curves)

    def until(self, accuracy: float) -> tuple[float, float]:
        """Forward passes and seconds until that accuracy, each in the median of the seeds."""
        points = [reached(curve, accuracy) for curve in self.curves]
        forwards, steps = (statistics.median(float(p[what]) for p in points) for what in ("forwards", "step"))
        return forwards, steps * self.step_seconds

    def bands(self) -> list[tuple[float, float, float, float, float]]:
        """Forward passes, seconds, then least, median and greatest accuracy in percent; points that all seeds have."""
        found = []
        for points in zip(*self.curves, strict=False):
            values = sorted(100 * float(p["accuracy"]) for p in points)
            seconds = float(points[0]["step"]) * self.step_seconds
            found.append((float(points[0]["forwards"]), seconds, values[0], statistics.median(values), values[-1]))
        return found


def tuned(found: list[Row]) -> list[Row]:
    """Without the runs of methods whose rates were not all tried on a task."""
    pairs = {(row["task"], row["method"]) for row in found if row["phase"] == "train" and row["method"] in METHODS}
    left = {pair for pair in pairs if not set(rates(pair[1])) <= tried_rates(found, *pair)}
    return [row for row in found if row["phase"] != "train" or (row["task"], row["method"]) not in left]


def finals(found: list[Row]) -> dict[str, dict[str, Finals]]:
    """By task and method."""
    curves: dict[Any, list[Row]] = defaultdict(list)
    for row in found:
        curves[key(row)].append(row)
    result: dict[str, dict[str, Finals]] = defaultdict(dict)
    for task, method in dict.fromkeys((job.task, job.method) for job in curves):
        rate = best_rate(found, task, method)
        same = [(job, c) for job, c in curves.items() if (job.task, job.method) == (task, method)]
        best = [c for job, c in same if job.phase == "train" and job.learning_rate == rate]
        if best:
            result[task][method] = Finals(best, _step_seconds(found, task, method))
    return result


def _step_seconds(found: list[Row], task: str, method: str) -> float:
    timed = [row for row in found if (row["phase"], row["task"]) == ("time", task) and row["step"] != "0"]
    runs = Counter(run for run, _ in {((r["device"], r["commit"]), r["method"]) for r in timed})
    plain, ours = _times(timed, "mezo"), _times(timed, method)
    beside = [run for run in plain or ours if run in ours]
    own = {(row["device"], row["commit"]) for row in timed if row["method"] == method}
    measured = [run for run in beside if run in own] or beside
    if not measured:
        return math.nan
    reference = max(plain or ours, key=runs.__getitem__)
    run = reference if reference in measured else measured[-1]
    return ours[run] * (plain[reference] / plain[run] if plain else 1.0)


def _times(timed: list[Row], method: str) -> dict[tuple[str, str], float]:
    """Seconds of a step by run: the method's own, or else the median of those that do the same."""
    own: dict[tuple[str, str], float] = {}
    same: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in timed:
        run, seconds = (row["device"], row["commit"]), float(row["milliseconds_per_step"]) / 1e3
        if _work(row["method"]) == _work(method):
            same[run].append(seconds)
        if row["method"] == method:
            own[run] = seconds
    return {run: own.get(run, statistics.median(of)) for run, of in same.items()}


def _work(method: str) -> dict[str, Any]:
    """What decides how long a step takes: all options but those that only decide how far it goes."""
    first = {"method": FIRST_ORDER} if method.startswith(FIRST_ORDER) else {}
    kept = {k: v for k, v in options_of(method).items() if k not in ("epsilon", "clip_quantile", "lr_scheduler_type")}
    return first | kept


def goal_of(methods: dict[str, Finals]) -> float:
    """The last accuracy of plain MeZO, in the median of its seeds; inf where it was not measured."""
    return statistics.median(methods["mezo"].ends()) / 100 if "mezo" in methods else math.inf


def table(found: list[Row], show: Callable[[str], None] = print) -> None:
    """The last accuracy of every method, and what it takes to plain MeZO's, in the median of the seeds."""
    for task, methods in finals(found).items():
        goal = goal_of(methods)
        show(f"\n{task}: plain MeZO ends at {100 * goal:.1f}; forward passes and seconds until there")
        names = f"{'seeds':>5} {'rate':>8} {'accuracy':>8} {'spread':>13} {'forwards':>9} {'seconds':>8}  edge"
        show(f"{'method':26} {names}")
        for method, of in methods.items():
            forwards, seconds = of.until(goal)
            rate, ends = float(of.curves[0][0]["learning_rate"]), of.ends()
            edge = "yes" if _at_edge(found, task, method) else ""
            spread = f"{ends[0]:6.1f}-{ends[-1]:<6.1f}"
            show(f"{method:26} {len(ends):5} {rate:8.1e} {statistics.median(ends):8.1f} {spread} "
                 f"{forwards:9.0f} {seconds:8.1f}  {edge}")  # fmt: skip


def page_table(found: list[Row]) -> str:
    """The same of the tasks that plain MeZO was measured on, for a page; SST-2 in a table, the others in another."""
    measured = {task: methods for task, methods in finals(found).items() if "mezo" in methods}
    tables = []
    for sentiment in (True, False):
        tasks = {t: of for t, of in measured.items() if t.endswith("/sst2") == sentiment}
        timed = any(not math.isnan(of["mezo"].step_seconds) for of in tasks.values())
        names = [f"{task}, % | passes" + " | s" * timed for task in tasks]
        lines = [f"| method | {' | '.join(names)} |", "|---|" + "---|" * (2 + timed) * len(tasks)]
        for method in (*METHODS, *TWINS):
            if any(method in methods for methods in tasks.values()):
                edges = [_at_edge(found, task, method) for task in tasks]
                of = [_cells(m, method, edge) for m, edge in zip(tasks.values(), edges, strict=True)]
                cells = [cell for some in of for cell in some[: 2 + timed]]
                lines.append(f"| {method} | {' | '.join(cells)} |")
        tables += ["\n".join(lines)] if tasks else []
    return "\n\n".join(tables)


def _at_edge(found: list[Row], task: str, method: str) -> bool:
    """Whether the best rate is the smallest or the largest that was tried."""
    tried = tried_rates(found, task, method) if method in METHODS else set()
    return len(tried) > 1 and best_rate(found, task, method) in (min(tried), max(tried))


def _cells(methods: dict[str, Finals], method: str, at_edge: bool) -> tuple[str, str, str]:
    if method not in methods:
        return "", "", ""
    of = methods[method]
    ends, (forwards, seconds) = of.ends(), of.until(goal_of(methods))
    spread = {1: "one seed", 2: "two seeds: "}.get(len(ends), "") + f"{ends[0]:.1f}–{ends[-1]:.1f}" * (len(ends) > 1)
    reach = "–" if math.isinf(forwards) else f"{forwards:,.0f}"
    time = reach if math.isinf(forwards) else "" if math.isnan(seconds) else f"{seconds:.1f}"
    return f"{statistics.median(ends):.1f} ({spread})" + " †" * at_edge, reach, time


def with_table(page: str, name: str, table: str) -> str:
    """The page with the table between the two comments that name it."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, after = page.partition(begin)[0], page.partition(end)[2]
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def published(found: list[Row], show: Callable[[str], None] = print) -> None:
    """Plain MeZO beside the independent figures, at the same steps."""
    points: dict[tuple[str, float, int], list[float]] = defaultdict(list)
    for row in found:
        if row["phase"] == "published":
            points[row["task"], float(row["learning_rate"]), int(row["step"])].append(100 * float(row["accuracy"]))
    for (task, rate, step), values in sorted(points.items()):
        theirs = INDEPENDENT.get((task, rate), {}).get(step)
        beside = "" if theirs is None else f"  independent {theirs:.1f}, ours {statistics.median(values) - theirs:+.1f}"
        show(f"{task:18} {rate:8.1e} step {step:5}: {statistics.median(values):.1f} "
             f"({min(values):.1f}-{max(values):.1f}, {len(values)} seeds){beside}")  # fmt: skip


def twins(found: list[Row], show: Callable[[str], None] = print) -> None:
    """How far other types and engines are from the method that they are twins of, seed by seed, in percent.

    Beside it, how far that method's seeds are from one another: curves are the same if the first is no more than the
    second, which holds other rows and other directions, too.
    """
    for task, methods in finals(found).items():
        for twin in filter(TWINS.__contains__, methods):
            curves = {name: {c[0]["seed"]: c for c in methods[name].curves} for name in (twin, TWINS[twin][0])}
            ours, theirs = curves.values()
            pairs = [(ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys()]
            seeds = [(a, b) for a in theirs.values() for b in theirs.values() if a is not b]
            show(f"{task:18} {twin}: accuracies {_distance(pairs):.2f} apart on average; seeds {_distance(seeds):.2f}")


def _distance(pairs: Sequence[tuple[list[Row], list[Row]]]) -> float:
    apart = [abs(float(a["accuracy"]) - float(b["accuracy"])) for c, d in pairs for a, b in zip(c, d, strict=False)]
    return 100 * statistics.mean(apart) if apart else math.nan


def long_runs(found: list[Row]) -> dict[str, list[Row]]:
    """The points of the long runs by task, method and rate, as far as they came."""
    points: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in found:
        if row["phase"].startswith("long"):
            points[f"{row['task']}, {row['method']}, {row['learning_rate']}"][int(row["step"])] = row
    return {name: [of[step] for step in sorted(of)] for name, of in points.items()}


def shown_methods(methods: dict[str, Finals], wanted: Sequence[str]) -> list[str]:
    """What a plot shows: plain MeZO in its three forms, and the five that come soonest to its last accuracy."""
    if wanted:
        return [name for name in wanted if name in methods]
    plain = [name for name in ("mezo", "mezo lora", "mezo prefix") if name in methods]
    goal = goal_of(methods)

    def order(name: str) -> tuple[float, float]:
        return methods[name].until(goal)[0], -statistics.median(methods[name].ends())

    others = [n for n in methods if n not in (*plain, *TWINS) and not n.startswith(FIRST_ORDER)]
    return [*plain, *sorted(others, key=order)[:5]]


def plot_task(task: str, methods: dict[str, Finals], wanted: Sequence[str], path: Path) -> None:
    """Accuracy against forward passes and, where they were measured, seconds; first-order fine-tuning as a line."""
    from matplotlib.figure import Figure

    plain, best = methods["mezo"], max(max(of.ends()) for of in methods.values())
    panels = 1 if math.isnan(plain.step_seconds) else 2
    figure = Figure(figsize=(5.5 * panels, 4.5), layout="constrained")
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for number, name in enumerate(shown_methods(methods, wanted)):
        color = "black" if name == "mezo" else f"C{number}"
        forwards, seconds, low, middle, high = zip(*methods[name].bands(), strict=True)
        for axis, values in zip(axes, (forwards, seconds), strict=False):
            if not any(map(math.isnan, values)):
                axis.plot(values, middle, color=color, label=name)
                axis.fill_between(values, low, high, color=color, alpha=0.12, linewidth=0)
    for name, style in ((FIRST_ORDER, "--"), (f"{FIRST_ORDER} lora", ":")):
        if name in methods:
            for axis in axes:
                axis.axhline(statistics.median(methods[name].ends()), color="gray", linestyle=style, label=name)
    figure.suptitle(task)
    axes[0].set(xlabel="forward passes", ylabel="accuracy, %", ylim=(100 * goal_of(methods) - 14, best + 1))
    if panels == 2:  # what takes longer than plain MeZO is cut off
        axes[1].set(xlabel="seconds, nothing beside it", xlim=(0, 1.1 * plain.bands()[-1][1]))
    axes[0].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_every(task: str, methods: dict[str, Finals], path: Path) -> None:
    """Accuracy of every method against forward passes, a panel each, with plain MeZO's in gray."""
    from matplotlib.figure import Figure

    plain = methods["mezo"].bands()
    names = [name for name in (*METHODS, *TWINS) if name in methods]
    columns = 5
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 1.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for number, name in enumerate(names):
        panel = panels[number]
        forwards, _, low, middle, high = zip(*methods[name].bands(), strict=True)
        panel.plot([band[0] for band in plain], [band[3] for band in plain], color="gray", linewidth=1)
        panel.plot(forwards, middle, color="C0")
        panel.fill_between(forwards, low, high, color="C0", alpha=0.15, linewidth=0)
        panel.set_title(name, fontsize=7)
        panel.tick_params(labelsize=7, labelbottom=number >= len(names) - columns)
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    panels[0].set_xlim(0, 1.02 * plain[-1][0])
    figure.supxlabel("forward passes", fontsize=8)
    figure.supylabel("accuracy, %", fontsize=8)
    figure.suptitle(f"{task}, plain MeZO in gray", fontsize=9)
    figure.savefig(path, dpi=90)


def plot_long(runs: dict[str, list[Row]], path: Path) -> None:
    """Accuracy and held-out loss against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in runs.items():
        steps = [int(p["step"]) for p in points]
        left.plot(steps, [100 * float(p["accuracy"]) for p in points], label=name)
        right.plot(steps, [float(p["held_out_loss"]) for p in points])
    later = [point for points in runs.values() for point in points[1:] or points]
    left.set(xlabel="step", ylabel="accuracy, %", ylim=(100 * min(float(p["accuracy"]) for p in later) - 1, None))
    right.set(xlabel="step", ylabel="held-out loss", ylim=(None, max(float(p["held_out_loss"]) for p in later)))
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, help="folder for the plots; none are made without it")
    parser.add_argument("--methods", nargs="+", default=[], choices=[*METHODS, *TWINS])
    parser.add_argument("--page", type=Path, help="page to put the table on, between <!-- methods.csv --> and its end")
    options = parser.parse_args()
    found = tuned(read(options.file))
    table(found)
    if options.page:
        options.page.write_text(with_table(options.page.read_text(), "methods.csv", page_table(found)))
    published(found)
    twins(found)
    runs = long_runs(found)
    for name, points in runs.items():
        for row in points:
            accuracy = f"accuracy {100 * float(row['accuracy']):.1f}, held-out loss {row['held_out_loss']}"
            print(f"{name}, step {row['step']:>6}: {accuracy}")
    if options.output is None:
        return
    options.output.mkdir(parents=True, exist_ok=True)
    for task, methods in finals(found).items():
        if "mezo" not in methods:
            continue
        name = f"methods-{task.replace('/', '-')}"
        plot_task(task, methods, options.methods, options.output / f"{name}.png")
        plot_every(task, methods, options.output / f"{name}-every.png")
    if runs:
        plot_long(runs, options.output / "methods-long.png")


if __name__ == "__main__":
    main()
