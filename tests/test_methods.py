"""benchmarks/methods.py: what it runs and what it leaves out, and what its report says of rows counted by hand."""

import functools
import gzip
import json
import logging
import math
import multiprocessing
import os
import statistics
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import pytest
import torch
from transformers.utils.logging import enable_progress_bar

from mezo import MeZOConfig
from mezo.api import build_trainer
from mezo.trainer import make_estimator
from tests.conftest import SENTIMENT_ROWS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gradient_signal
import methods
import methods_report
import methods_schedule
import methods_settings
import plain_rows
from methods_settings import METHODS, TWINS, Job, best_rate, forwards_per_step, options_of, rates

FIRST = ["--models", "models", "--data", "data", "--tasks", "minilm-mlm/sst2"]


@pytest.fixture(autouse=True)
def _as_it_was():
    """A run of the benchmark, usually a process of its own, quietens this one."""
    logger = logging.getLogger("mezo")
    level = logger.level
    yield
    logger.setLevel(level)
    enable_progress_bar()


def options_for(tmp_path, *more):
    return methods.parser().parse_args([*FIRST, "--output", str(tmp_path / "rows.csv"), *more])


def rows_for(job, points, end=""):
    """Rows of a run with these (forwards, accuracy, held-out loss)."""
    return [
        {**job._asdict(), "budget": 4000, "step": forwards // 2, "forwards": forwards, "seconds": 1.0,
         "milliseconds_per_step": 10.0, "held_out_accuracy": 0.5, "held_out_loss": loss, "accuracy": accuracy,
         "loss": loss, "end": end, "wall_seconds": 5.0, "device": "a GPU", "commit": "a commit"}
        for forwards, accuracy, loss in points
    ]  # fmt: skip


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measure(options) with runs that only give rows; returns what was run."""
    ran = []

    def run(job, options):
        ran.append(job)
        if job.seed == 1 and len(ran) == fails_at[0]:
            raise RuntimeError("out of memory")
        end = "diverged" if job.phase == "train" and job.learning_rate == rates(job.method)[0] else ""
        loss = {rates("mezo")[1]: 0.3, rates("mezo")[0]: 0.1}.get(job.learning_rate, 0.4)
        return rows_for(job, [(0, 0.5, 0.7), (4000, 0.8, loss)], end)

    def measure(options, fails=0):
        fails_at[0] = fails
        ran.clear()
        methods.measure(options)
        return list(ran)

    fails_at = [0]
    monkeypatch.setattr(methods, "run", run)
    monkeypatch.setattr(methods, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(1))
    return measure


def test_what_is_run_and_what_is_left_out(tmp_path, measured, capsys):
    """Time, four rates of the first seed, the best of those that held with the others; then nothing is left."""
    options = options_for(tmp_path, "--methods", "mezo")
    lines = methods.plan(options)
    assert [(phase, runs) for phase, _, _, runs, _ in lines] == [("time", 1), ("train", 6)]
    best = rates("mezo")[1]
    tried = [Job("minilm-mlm/sst2", "mezo", rate, 0, "train") for rate in rates("mezo")]
    others = [Job("minilm-mlm/sst2", "mezo", best, seed, "train") for seed in (1, 2)]
    ran = measured(options)
    assert [ran[0].phase, *ran[1:]] == ["time", *tried, *others]
    assert measured(options) == [] and methods.plan(options) == []
    assert len(methods_schedule.read(options.output)) == 2 * 7


@pytest.mark.parametrize(
    ("best", "places"),  # of the rates that are tried, in half decades below the largest of the four
    [(-1, [0, 1, 2, 3, -1, -2]), (-5, [0, 1, 2, 3, -1, -2]), (4, [0, 1, 2, 3, 4, 5]), (2, [0, 1, 2, 3])],
    ids=["bracketed", "beyond two more", "below", "among the four"],
)
def test_rates_go_on_until_the_best_is_between_others(tmp_path, measured, monkeypatch, best, places):
    rate = {n: float(f"{1e-4 * 10 ** (-n / 2):.1e}") for n in range(-6, 7)}
    place = {value: n for n, value in rate.items()}
    ran = []

    def run(job, options):
        ran.append(job)
        return rows_for(job, [(0, 0.5, 0.7), (4000, 0.8, 0.3 + 0.01 * abs(place[job.learning_rate] - best))])

    options = options_for(tmp_path, "--methods", "mezo", "--parts", "methods")
    monkeypatch.setattr(methods, "run", run)
    methods.measure(options)
    assert [place[job.learning_rate] for job in ran if job.seed == 0] == places
    chosen = max(min(best, max(places)), min(places))
    assert {place[job.learning_rate] for job in ran if job.seed} == {chosen}
    assert len(ran) == len(places) + 2
    found = methods_schedule.read(options.output)
    assert methods_report._at_edge(found, "minilm-mlm/sst2", "mezo") == (chosen != best)
    assert methods.plan(options) == []


def test_first_orders_rate_is_chosen_by_accuracy():
    """Of equal ones by loss; a forward method's by loss alone."""
    found = []
    for rate, accuracy, loss in ((1e-4, 0.8, 0.9), (3.2e-5, 0.8, 0.7), (1e-5, 0.7, 0.4)):
        for method in ("first order lora", "mezo"):
            job = Job("minilm-mlm/sst2", method, rate, 0, "train")
            (row,) = rows_for(job, [(4000, 0.5, loss)])
            found.append({name: str(value) for name, value in {**row, "held_out_accuracy": accuracy}.items()})
    assert best_rate(found, "minilm-mlm/sst2", "first order lora") == 3.2e-5
    assert best_rate(found, "minilm-mlm/sst2", "mezo") == 1e-5


def test_a_run_that_failed_is_tried_again(tmp_path, measured, capsys):
    options = options_for(tmp_path, "--methods", "mezo")
    assert len(measured(options, fails=6)) == 7
    assert "out of memory" in capsys.readouterr().out
    (again,) = measured(options)
    assert again.seed == 1


def test_no_run_begins_that_would_not_end_in_time(tmp_path, measured):
    options = options_for(tmp_path, "--methods", "mezo")
    measured(options_for(tmp_path, "--methods", "mezo", "--minutes", "0.1"))  # room for what is timed: about 3 s
    assert [row["phase"] for row in methods_schedule.read(options.output)] == ["time", "time"]
    assert measured(options_for(tmp_path, "--methods", "mezo", "--minutes", "0")) == []


def test_parts(tmp_path, measured):
    """Segments of the long run one after the other; other types at the rate of the method they are twins of."""
    more = (
        "--long_steps",
        "3",
        "--segment_steps",
        "1",
        "--methods",
        "mezo lora",
        "--twins",
        "mezo lora, bf16",
        "--parts",
        "long",
        "published",
        "twins",
    )
    ran = [job for job in measured(options_for(tmp_path, *more, "methods")) if job.phase != "time"]
    assert [job.phase for job in ran if job.phase.startswith("long")] == ["long 1", "long 2", "long 3"]
    assert sorted({job.learning_rate for job in ran if job.phase == "published"}) == [1e-5, 3e-5]
    assert len([job for job in ran if job.phase == "published"]) == 6
    twins = [job for job in ran if job.method == "mezo lora, bf16" and job.phase == "train"]
    chosen = {job.learning_rate for job in ran if job.method == "mezo lora" and job.seed == 1}
    assert len(twins) == 3 and {job.learning_rate for job in twins} == chosen


def test_a_kill_in_the_middle_of_the_rows_is_not_possible(tmp_path):
    """One write a run; the header once."""
    path = tmp_path / "new" / "rows.csv"
    job = Job("t", "mezo", 1e-5, 0, "train")
    methods_schedule.append(path, rows_for(job, [(0, 0.5, 0.7)]))
    methods_schedule.append(path, rows_for(job, [(2, 0.5, 0.7)]))
    assert [row["forwards"] for row in methods_schedule.read(path)] == ["0", "2"]


def test_runs_are_spread_over_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    started = multiprocessing.get_context("spawn").Value("i", 0)
    found = []
    for _ in range(3):
        methods.begin(os.getppid(), 2, started)
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert found == ["0", "1", "0"]


@pytest.mark.parametrize("method", [*METHODS, *TWINS])
def test_forward_passes_of_a_step(method):
    config = MeZOConfig.from_dict({"model_name_or_path": "m", **options_of(method)})
    if not method.startswith(methods_settings.FIRST_ORDER):
        batches = config.gradient_accumulation_steps
        assert forwards_per_step(method) == batches * len(make_estimator(config).probes(0))


@pytest.fixture
def tiny(model_folder, tmp_path, monkeypatch):
    """A task of a tiny model."""
    for name, rows in (("train", SENTIMENT_ROWS), ("validation", SENTIMENT_ROWS[:20])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({**row, "label": str(row["label"])}) + "\n" for row in rows)
    task = {
        "model": Path(model_folder("bert")).name, "data": ("train.jsonl.gz", "validation.jsonl.gz"), "batch": 8,
        "template": "{text} it was [MASK] .", "label_words": {"0": "bad", "1": "good"}, "max_length": 32,
    }  # fmt: skip
    monkeypatch.setitem(methods_settings.TASKS, "tiny", task)
    options = options_for(
        tmp_path, "--rows", "100", "--forwards", "40", "--points", "2", "--long_steps", "4", "--segment_steps", "2",
        "--work", str(tmp_path / "long"),
    )  # fmt: skip
    options.models, options.data = Path(model_folder("bert")).parent, tmp_path
    return options


@pytest.mark.parametrize("method", ["mezo", "fzoo lora, 8 queries", "first order"])
def test_a_run(tiny, method):
    """Its points, with what they have cost; 100 rows are 80 to train on and 20 held out."""
    job = Job("tiny", method, 1e-2 if method == "first order" else 1e-4, 0, "train")
    rows = methods.run(job, tiny)
    steps = {"mezo": [0, 10, 20], "fzoo lora, 8 queries": [0, 2, 4], "first order": [0, 12, 24]}[method]
    assert [row["step"] for row in rows] == steps
    assert [row["forwards"] for row in rows] == [step * forwards_per_step(method) for step in steps]
    assert {row["end"] for row in rows} == {""} and methods_settings.key(rows[0]) == job
    train, held_out, reported = methods.split(job, tiny)
    assert (len(train), len(held_out), len(reported)) == (80, 20, 20)
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}
    assert method != "first order" or rows[-1]["held_out_loss"] < 0.9 * rows[0]["held_out_loss"]


def test_the_long_run_goes_on_from_its_journal(tiny):
    """In two segments as in one."""
    parts = [methods.run(Job("tiny", "mezo", 1e-4, 0, f"long {end}"), tiny) for end in (2, 4)]
    assert [row["step"] for part in parts for row in part] == [0, 2, 4]
    tiny.segment_steps, tiny.work = 4, tiny.work.parent / "at once"
    whole = methods.run(Job("tiny", "mezo", 1e-4, 0, "long 4"), tiny)
    assert whole[-1]["held_out_loss"] == parts[1][-1]["held_out_loss"]


def test_rows_without_the_datasets_package():
    """What mezo asks of a data set, beside the package's own answers."""
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": 1}]
    ours, theirs = plain_rows.Dataset.from_list(rows), datasets.Dataset.from_list(rows)
    assert ours.column_names == theirs.column_names and len(ours) == len(theirs)
    assert list(ours) == list(theirs) and ours[1] == theirs[1] and ours["label"] == list(theirs["label"])
    assert list(ours.select([2, 0])) == list(theirs.select([2, 0]))


def curve(method, seed, accuracies, rate=None, task="minilm-mlm/sst2"):
    job = Job(task, method, rate or rates(method)[1], seed, "train")
    points = [(1000 * i, accuracy, 0.7 - 0.1 * i) for i, accuracy in enumerate(accuracies)]
    return [{name: str(value) for name, value in row.items()} for row in rows_for(job, points)]


def test_a_variant_stands_for_a_step_of_the_same_work():
    """Clipping and schedules leave a step as it is: 30 ms beside 20 of clipped MeZO are 15 beside 10 of plain MeZO."""
    methods = ("mezo", "mezo, clipped", "mezo, linear", "lozo, momentum", "lozo, adam")
    found = [row for method in methods for row in curve(method, 0, [0.5, 0.8])]
    for method, commit, milliseconds in (
        ("mezo", "most", 10.0), ("lozo", "most", 9.0), ("es, 8 queries", "most", 9.0),
        ("mezo, clipped", "another", 20.0), ("lozo, momentum", "another", 30.0), ("first order", "third", 1.0),
    ):  # fmt: skip
        (row,) = rows_for(Job("minilm-mlm/sst2", method, 1e-5, 0, "time"), [(80, 0.5, 0.7)])
        row |= {"commit": commit, "milliseconds_per_step": milliseconds}
        found.append({name: str(value) for name, value in row.items()})
    seconds = {name: of.step_seconds for name, of in methods_report.finals(found)["minilm-mlm/sst2"].items()}
    assert seconds["mezo, linear"] == seconds["mezo, clipped"] == seconds["mezo"] == 0.01
    assert seconds["lozo, momentum"] == pytest.approx(0.015)
    assert math.isnan(seconds["lozo, adam"])


def test_report_by_hand(tmp_path):
    """Plain MeZO ends at 0.80, 0.82 and 0.81: the goal is 0.81. A single 0.9 among worse ones does not reach it."""
    found = [
        row for seed, end in enumerate((0.80, 0.82, 0.81)) for row in curve("mezo", seed, [0.5, 0.6, 0.7, 0.7, end])
    ]
    quick = [[0.5, 0.81, 0.81, 0.83, 0.84], [0.5, 0.9, 0.6, 0.82, 0.82], [0.5, 0.7, 0.81, 0.82, 0.83]]
    found += [row for seed, values in enumerate(quick) for row in curve("lozo, adam", seed, values)]
    time_job = Job("minilm-mlm/sst2", "lozo, adam", 1e-5, 0, "time")
    found += [{name: str(value) for name, value in row.items()} for row in rows_for(time_job, [(80, 0.5, 0.7)])]
    assert methods_report.finals(found)["minilm-mlm/sst2"]["lozo, adam"].step_seconds == 0.01
    # Plain MeZO was timed beside it, 20 ms a step, and where most methods were, which was twice as fast.
    timed = (("mezo", "another", "10.0"), ("lozo", "another", "9.0"), ("es, 8 queries", "another", "9.0"))
    for method, commit, milliseconds in (*timed, ("mezo", "a commit", "20.0")):
        found.append({**found[-1], "method": method, "commit": commit, "milliseconds_per_step": milliseconds})
    methods_of_task = methods_report.finals(found)["minilm-mlm/sst2"]
    assert methods_of_task["mezo"].ends() == pytest.approx([80, 81, 82])
    # The three seeds get there at 1,000, 3,000 and 2,000 passes, which are half as many steps of 5 ms.
    assert methods_of_task["lozo, adam"].until(0.81) == (2000.0, 5.0)
    assert methods_of_task["lozo, adam"].bands()[2] == pytest.approx((2000.0, 5.0, 60.0, 81.0, 81.0))
    shown = []
    methods_report.table(found, shown.append)
    (line,) = [text for text in shown if text.startswith("lozo, adam")]
    assert line.split()[2:] == ["3", "3.2e-04", "83.0", "82.0-84.0", "2000", "5.0"]
    assert methods_report.page_table(found).splitlines()[2:] == [
        "| mezo | 81.0 (80.0–82.0) | 4,000 | 20.0 |",
        "| lozo, adam | 83.0 (82.0–84.0) | 2,000 | 5.0 |",
    ]
    # Other tasks get a table of their own; where they have no seconds, without them.
    elsewhere = [{**row, "task": "minilm-mlm/rte"} for row in found if row["phase"] == "train" and row["seed"] < "2"]
    assert methods_report.page_table(found + elsewhere).splitlines()[4:] == [
        "",
        "| method | minilm-mlm/rte, % | passes |",
        "|---|---|---|",
        "| mezo | 81.0 (two seeds: 80.0–82.0) | – |",
        "| lozo, adam | 83.0 (two seeds: 82.0–84.0) | 2,000 |",
    ]
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    for plot in (functools.partial(methods_report.plot_task, wanted=[]), methods_report.plot_every):
        path.unlink(missing_ok=True)
        plot("minilm-mlm/sst2", methods_of_task, path=path)
        assert path.stat().st_size > 10_000


def test_what_is_not_tuned_is_not_reported():
    task, of = "minilm-mlm/sst2", {}
    for method, count in (("mezo", 4), ("lozo", 3)):
        jobs = [Job(task, method, rate, 0, "train") for rate in rates(method)[:count]]
        of[method] = [
            {name: str(v) for name, v in row.items()} for j in jobs for row in rows_for(j, [(4000, 0.8, 0.4)])
        ]
    found = of["mezo"] + of["lozo"]
    assert methods_report.tuned(found) == of["mezo"]
    timed = [{**of["lozo"][0], "phase": "time"}, {**of["lozo"][0], "method": "mezo lora, bf16"}]
    assert methods_report.tuned(found + timed) == of["mezo"] + timed


def test_twins_by_hand():
    """Two seeds: 0, 1 and 3 points apart, then 2, 0 and 0: 1 on average. The seeds themselves: 0, 4 and 8, so 4."""
    rate = rates("mezo lora")[2]
    found = curve("mezo lora", 0, [0.5, 0.6, 0.7], rate) + curve("mezo lora", 1, [0.5, 0.64, 0.78], rate)
    found += curve("mezo lora, bf16", 0, [0.5, 0.61, 0.73], rate) + curve(
        "mezo lora, bf16", 1, [0.52, 0.64, 0.78], rate
    )
    shown = []
    methods_report.twins(found, shown.append)
    assert shown == ["minilm-mlm/sst2    mezo lora, bf16: accuracies 1.00 apart on average; seeds 4.00"]


def test_published_figures_by_hand():
    job = Job("minilm-mlm/sst2", "mezo", 1e-5, 0, "published")
    rows = [row for seed, end in enumerate((0.80, 0.82, 0.83))
            for row in rows_for(job._replace(seed=seed), [(4000, end, 0.4)])]  # fmt: skip
    shown = []
    methods_report.published([{name: str(value) for name, value in row.items()} for row in rows], shown.append)
    assert shown == ["minilm-mlm/sst2     1.0e-05 step  2000: 82.0 (80.0-83.0, 3 seeds)  independent 81.5, ours +0.5"]


def test_signal_and_scatter(model_folder):
    """The signal is the squared gradient of the mean loss; a batch of two rows scatters half as far as a row."""
    folder = model_folder("bert")
    config = MeZOConfig(
        model_name_or_path=folder, template="{text} it was [MASK] .", label_words={"0": "bad", "1": "good"},
        dtype="float32", use_cpu=True,
    )  # fmt: skip
    trainer = build_trainer(config, SENTIMENT_ROWS[:4])
    engine, examples = trainer.engine, trainer.train_examples
    found = gradient_signal.signal_and_scatter(engine, examples)

    def gradient(batch):
        engine.model.zero_grad()
        methods.differentiable_loss(engine, batch).backward()
        return torch.cat([p.grad.flatten() for p in engine.model.parameters() if p.grad is not None])

    mean = gradient(examples)
    assert found["all"][0] == pytest.approx(mean.square().sum().item(), rel=1e-4)
    pairs = [gradient([a, b]) for a in examples for b in examples]  # drawn with replacement
    scatter = statistics.mean((pair - mean).square().sum().item() for pair in pairs)
    assert found["all"][1] / 2 == pytest.approx(scatter, rel=1e-4)
    for part in (0, 1):
        assert sum(of[part] for kind, of in found.items() if kind != "all") == pytest.approx(found["all"][part])
    before = statistics.mean(methods.differentiable_loss(engine, [e]).item() for e in examples)
    gradient_signal.train(engine, examples * 200)
    assert statistics.mean(methods.differentiable_loss(engine, [e]).item() for e in examples) < before


def test_a_step_bears_its_share_of_a_windows_end(monkeypatch):
    curve = methods.Curve(6, 2, window=3)
    monkeypatch.setattr(methods, "evaluate", lambda engine, rows: types.SimpleNamespace(accuracy=0.5, loss=0.7))
    curve.begin(None, [], [], measure=False)
    curve.times = [0.0, 9.0, 9.0, 9.0, 1.0, 1.0, 4.0]  # steps 3 and 6 end windows
    curve.measure(6)
    assert curve.points[-1]["milliseconds_per_step"] == 1e3 * (2.5 + (4.0 - 2.5) / 3)
