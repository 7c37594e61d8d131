"""Which runs benchmarks/methods.py has still to make, from the rows of those that have ended."""

import argparse
import csv
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from methods_settings import (
    FIRST_ORDER,
    PUBLISHED,
    TWINS,
    Estimate,
    Job,
    best_rate,
    forwards_per_step,
    key,
    next_rate,
    rates,
    share_of,
)

Rows = list[dict[str, Any]]


def steps_of(job: Job, options: argparse.Namespace) -> int:
    """Steps that a run takes, a segment of the long one by itself."""
    if job.phase.startswith("long"):
        return options.segment_steps
    if job.phase == "time":  # fewer of the longest ones; all of them past the capture of graphs
        wanted = 10 * options.time_steps // forwards_per_step(job.method)
        return min(options.time_steps, max(10, wanted))
    if job.phase == "published":
        return options.published_steps
    if job.method.startswith(FIRST_ORDER):
        return max(1, 5 * (options.rows - options.rows // 5) // 16)
    return max(1, int(options.forwards * share_of(job.method)) // forwards_per_step(job.method))


def read(path: Path) -> list[dict[str, str]]:
    """The rows of finished runs."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, rows: Rows) -> None:
    """Adds a run's rows in one write, so that a kill leaves all of them or none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        file.write(text.getvalue())


class Schedule:
    """What is left to run, by parts and methods; other seeds begin when all rates of a method have ended."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        last = {key(row): row for row in read(options.output)}
        self.found, self.have = list(last.values()), set(last)  # the last row of each run says what is asked here
        self.under_way: set[Job] = set()

    def todo(self) -> Iterator[Job]:
        """What may start now, the most wanted first."""
        parts = {"long": self._long, "published": self._published, "methods": self._methods, "twins": self._twins}
        for part in self.options.parts:
            if part in parts:
                yield from (job for job in parts[part]() if job not in self.have and job not in self.under_way)

    def left(self) -> list[Job]:
        """All that is not measured yet; rates that are not chosen yet stand for themselves."""
        o, jobs = self.options, self.untimed() + list(self.todo())
        if "methods" in o.parts:
            for task, method in self._pairs():
                if not self._tuned(task, method):
                    jobs += [Job(task, method, 0.0, seed, "train") for seed in o.seeds[1:]]
        if "twins" in o.parts:
            untuned = [(task, twin) for task in o.tasks for twin in o.twins if not self._tuned(task, TWINS[twin][0])]
            jobs += [Job(*pair, 0.0, seed, "train") for pair in untuned for seed in o.seeds]
        if "long" in o.parts:
            ends = range(o.segment_steps, o.long_steps + 1, o.segment_steps)
            jobs += [job for job in map(self._segment, ends) if job not in self.have and job not in jobs]
        return jobs

    def untimed(self) -> list[Job]:
        """A few steps of every method on every task, and of every twin; the rate does not matter."""
        if "time" not in self.options.parts:
            return []
        timed = {(job.task, job.method) for job in self.have if job.phase == "time"}
        twins = [(task, twin) for task in self.options.tasks for twin in self.options.twins]
        wanted = dict.fromkeys(self._pairs() + twins)
        rate = {pair: (best_rate(self.found, *pair) or 1e-7) for pair in wanted if pair not in timed}
        return [Job(*pair, rate[pair], self.options.seeds[0], "time") for pair in rate]

    def ended(self, job: Job, rows: Rows) -> None:
        """Takes a run's rows; none if it failed, which another call tries again."""
        self.under_way.discard(job)
        self.have.add(job)
        if rows:
            append(self.options.output, rows)
            self.found.append({name: str(value) for name, value in rows[-1].items()})

    def _pairs(self) -> list[tuple[str, str]]:
        return [(task, method) for method in self.options.methods for task in self.options.tasks]

    def _tuned(self, task: str, method: str) -> bool:
        return self.have.issuperset(self._tuning(task, method))

    def _tuning(self, task: str, method: str) -> list[Job]:
        beyond = next_rate(self.found, task, method)
        wanted = rates(method) if beyond is None else [*rates(method), beyond]
        return [Job(task, method, rate, self.options.seeds[0], "train") for rate in wanted]

    def _methods(self) -> Iterator[Job]:
        for task, method in self._pairs():
            tuned = self._tuned(task, method)
            yield from self._at_best_rate(task, method) if tuned else self._tuning(task, method)

    def _twins(self) -> Iterator[Job]:
        for task in self.options.tasks:
            for twin in self.options.twins:
                if self._tuned(task, TWINS[twin][0]):
                    yield from self._at_best_rate(task, twin)

    def _at_best_rate(self, task: str, method: str) -> list[Job]:
        rate = best_rate(self.found, task, method)
        return [] if rate is None else [Job(task, method, rate, seed, "train") for seed in self.options.seeds]

    def _published(self) -> list[Job]:
        tasks = [(task, rate) for task, rate in PUBLISHED if task in self.options.tasks]
        return [Job(task, "mezo", rate, seed, "published") for task, rate in tasks for seed in self.options.seeds]

    def _long(self) -> list[Job]:
        """The next segment, unless one is under way."""
        ends = range(self.options.segment_steps, self.options.long_steps + 1, self.options.segment_steps)
        busy = any(job.phase.startswith("long") for job in self.under_way)
        return [] if busy else [job for job in map(self._segment, ends) if job not in self.have][:1]

    def _segment(self, end: int) -> Job:
        o = self.options
        return Job(o.tasks[0], o.long_method, o.long_rate, o.seeds[0], f"long {end}")


def estimate(schedule: Schedule) -> Estimate:
    o = schedule.options
    return Estimate(schedule.found, o.jobs / o.gpus, functools.partial(steps_of, options=o), o.points + 1)


def plan(options: argparse.Namespace) -> list[tuple[str, str, str, int, float]]:
    """Says what is left: phase, task, method, number of runs, seconds of them all."""
    schedule = Schedule(options)
    seconds, groups = estimate(schedule), dict[tuple[str, str, str], list[Job]]()
    for job in schedule.left():
        groups.setdefault((job.phase.split()[0], job.task, job.method), []).append(job)
    lines, end = [], 0.0
    for group, jobs in groups.items():
        one = seconds(jobs[0])
        end += one * len(jobs) / (1 if group[0] == "time" else options.jobs)
        lines.append((*group, len(jobs), one * len(jobs)))
        print(
            f"{group[0]:9} {group[1]:18} {group[2]:26} {len(jobs):3} runs of {one:6.1f} s; all up to here {end:7.0f} s"
        )
    return lines
