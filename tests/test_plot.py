"""`mezo plot`: the numbers that are drawn, the files, and runs that cannot be plotted."""

import base64
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from mezo import UserError, curves, journal, plot
from mezo.config import MeZOConfig
from mezo.estimator import Record
from tests.test_cli import error_line, mezo, run_cli

matplotlib = pytest.importorskip("matplotlib", reason="plots are the extra mezo[plot]")


def make_run(folder, losses, grads=None, *, num_queries=1, log=None, **config):
    """A run's folder; `grads` are the coefficients of all records, `losses` the step's means."""
    folder.mkdir(parents=True)
    settings = MeZOConfig(model_name_or_path="model", num_queries=num_queries, **config).to_dict()
    opened = journal.Journal.create(folder / "journal", {"format": journal.FORMAT_VERSION, "config": settings})
    values = iter([0.5] * (len(losses) * num_queries) if grads is None else grads)
    for step, loss in enumerate(losses):
        opened.append(
            [
                Record(step, 7, loss + 0.25, loss - 0.25, next(values), 1e-6, 10, 2, query, num_queries)
                for query in range(num_queries)
            ]
        )
    opened.close()
    if log is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


LOG = [
    {"eval_loss": 0.9, "eval_accuracy": 0.95, "step": 0},
    {"loss": 0.8, "tokens_per_second": 100.0, "step": 2},
    {"eval_loss": 0.7, "eval_accuracy": 0.5, "step": 2},
    {"loss": 0.6, "tokens_per_second": 300.0, "step": 4},
    {"eval_loss": 0.8, "eval_accuracy": 0.75, "step": 4},
]


def panel(figure, title):
    (axes,) = [axes for axes in figure.axes if axes.get_title("left") == title]
    return axes


def points(line):
    return [[float(v) for v in line.get_xdata()], [float(v) for v in line.get_ydata()]]


def names(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def failure(capsys, *arguments):
    """The one line of a command that must fail."""
    return error_line(run_cli(capsys, *arguments))


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "window"), [(1, 1), (39, 1), (40, 2), (20_000, 1000), (100_000, 2000)])
def test_window_is_a_twentieth_of_the_run(steps, window):
    assert curves.smoothing_window(steps) == window


def test_moving_mean_by_hand():
    steps, values = curves.moving_mean(np.array([1.0, 2.0, 6.0, 1e20, 4.0, 0.0, 2.0]), 3)
    assert steps.tolist() == [3, 4, 5, 6, 7]
    # A window behind a huge value is not disturbed by it, as differences of running sums would be.
    assert values.tolist() == pytest.approx([3, 1e20 / 3, 1e20 / 3, 1e20 / 3, 2])


def test_smoothed_loss_is_the_mean_of_both_losses_over_the_window(tmp_path):
    losses = [float(n % 7) for n in range(60)]
    (run,) = curves.load_runs([make_run(tmp_path / "a", losses)])
    steps, values = curves.smoothed_loss(run)
    assert steps.tolist() == list(range(3, 61))
    assert values.tolist() == pytest.approx([sum(losses[n - 3 : n]) / 3 for n in range(3, 61)])


def test_several_queries_are_one_step_and_several_directions(tmp_path):
    """The coefficient is projected_grad / n."""
    (run,) = curves.load_runs([make_run(tmp_path / "a", [1.0, 3.0], [1.0, -2.0, 3.0, 5.0], num_queries=2)])
    assert run.losses.tolist() == [1.0, 3.0]
    assert run.projected_grads.tolist() == [2.0, -4.0, 6.0, 10.0]
    steps, sizes = curves.median_size(run)
    assert (steps.tolist(), sizes.tolist()) == ([1, 2], [3.0, 8.0])


def test_median_size_by_hand(tmp_path):
    grads = [(-1) ** n * float(n * n % 31) for n in range(100)]
    (run,) = curves.load_runs([make_run(tmp_path / "a", [1.0] * 100, grads)])
    steps, sizes = curves.median_size(run)
    assert steps.tolist() == list(range(5, 101))
    assert sizes.tolist() == [sorted(map(abs, grads[n - 5 : n]))[2] for n in range(5, 101)]


def test_histogram_by_hand(tmp_path):
    """The 99.5 % quantile of 1,000 sizes is 10 here; four larger values go into the outermost bins."""
    grads = [10.0] * 200 + [-10.0] * 196 + [0.1] * 600 + [99.0] * 3 + [-99.0]
    (run,) = curves.load_runs([make_run(tmp_path / "a", [1.0] * 1000, grads)])
    edges, (shares,) = curves.histograms([run])
    assert (edges[0], edges[-1], len(edges)) == (-10, 10, 62)
    assert shares[0] == pytest.approx(19.7)
    assert shares[-1] == pytest.approx(20.3)
    assert shares[30] == pytest.approx(60.0)  # the middle bin holds 0
    assert shares.sum() == pytest.approx(100)


def test_histograms_of_unlike_sizes_are_in_units_of_their_medians(tmp_path):
    small, large = np.linspace(-1, 1, 101), 100 * np.linspace(-1, 1, 101)
    folders = [make_run(tmp_path / n, [1.0] * 101, g.tolist()) for n, g in [("a", small), ("b", large)]]
    runs = curves.load_runs(folders)
    edges, shares = curves.histograms(runs)
    assert edges[-1] == pytest.approx(2, rel=0.02)  # the largest value is twice the median size
    assert np.abs(shares[0] - shares[1]).max() <= 1.0  # one value of 101, for one that lies on an edge
    assert not curves.comparable(runs)
    assert curves.comparable(runs[:1])
    figure = plot.draw(runs)
    assert panel(figure, "projected_grad / its median size")
    assert panel(figure, "median |projected_grad|").get_yscale() == "log"
    assert panel(plot.draw(runs[:1]), "median |projected_grad|").get_yscale() == "linear"


@pytest.mark.parametrize(
    ("metric", "best"), [("accuracy", ("accuracy", 0.75, 4)), ("loss", ("loss", 0.7, 2)), ("f1", None)]
)
def test_best_metric_is_chosen_as_the_trainer_does(tmp_path, metric, best):
    """Among trained weights only: accuracy is higher at step 0."""
    run = make_run(tmp_path / "a", [1.0] * 4, log=LOG, metric_for_best_model=metric)
    assert curves.best_metric(*curves.load_runs([run])) == best


def test_names_are_unique(tmp_path):
    folders = [tmp_path / name for name in ("x/a", "y/a", "y/b")]
    assert curves.unique_names(folders) == ["x/a", "y/a", "y/b"]
    assert curves.unique_names(folders[1:]) == ["a", "b"]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_curves_of_two_runs_are_drawn_with_their_names(tmp_path):
    first = make_run(tmp_path / "x" / "run", [1.0, 3.0, 2.0, 4.0], log=LOG)
    second = make_run(tmp_path / "y" / "run", [5.0, 6.0, 8.0, 7.0], log=[{"eval_accuracy": 0.25, "step": 4}])
    figure = plot.draw(plot.load_runs([first, second]))
    assert names(figure) == ["x/run", "y/run"]
    titles = ["training loss", "eval_loss", "eval_accuracy", "projected_grad", "median |projected_grad|"]
    assert [axes.get_title("left") for axes in figure.axes] == [*titles, "tokens_per_second"]
    loss = panel(figure, "training loss")
    assert loss.get_ylabel() == "loss, mean over 1 step"
    assert [points(line) for line in loss.lines[-2:]] == [[[1, 2, 3, 4], [1, 3, 2, 4]], [[1, 2, 3, 4], [5, 6, 8, 7]]]
    accuracy = panel(figure, "eval_accuracy").lines
    assert [points(line) for line in accuracy] == [[[0, 2, 4], [0.95, 0.5, 0.75]], [[4], [0.25]]]
    assert [points(line) for line in panel(figure, "eval_loss").lines] == [[[0, 2, 4], [0.9, 0.7, 0.8]]]
    assert [points(line) for line in panel(figure, "tokens_per_second").lines] == [[[2, 4], [100, 300]]]
    assert accuracy[0].get_color() != accuracy[1].get_color()
    handles = figure.legends[0].legend_handles
    assert [h.get_color() for h in handles] == [line.get_color() for line in accuracy]


def test_panels_over_steps_share_their_axis_and_hide_nothing(tmp_path):
    runs = plot.load_runs([make_run(tmp_path / "a", [1.0] * 4, log=[*LOG, {"eval_loss": 1.0, "step": 30}])])
    figure = plot.draw(runs)
    plot.to_png(figure)
    limits = {axes.get_xlim() for axes in figure.axes if axes.get_xlabel() == "step"}
    ((low, high),) = limits
    assert low < 0
    assert high > 30


def test_the_label_names_the_windows(tmp_path):
    runs = plot.load_runs([make_run(tmp_path / "a", [1.0] * 400), make_run(tmp_path / "b", [1.0] * 100)])
    assert panel(plot.draw(runs), "training loss").get_ylabel() == "loss, mean over 5 to 20 steps"
    assert panel(plot.draw(runs[:1]), "median |projected_grad|").get_ylabel() == "median over 20 steps"


def test_speed_is_averaged_over_log_entries(tmp_path):
    log = [{"tokens_per_second": float(n), "step": 10 * n} for n in range(1, 61)]
    figure = plot.draw(plot.load_runs([make_run(tmp_path / "a", [1.0], log=log)]))
    steps, values = points(panel(figure, "tokens_per_second").lines[0])
    assert (steps[0], values[0], steps[-1], values[-1]) == (30, 2, 600, 59)
    assert panel(figure, "tokens_per_second").get_ylabel() == "mean over 3 log entries"


def test_single_steps_lie_behind_the_means_of_few_runs_only(tmp_path):
    folders = [make_run(tmp_path / str(n), [1.0, 2.0]) for n in range(9)]
    runs = plot.load_runs(folders)
    assert len(panel(plot.draw(runs[:3]), "training loss").lines) == 6
    many = panel(plot.draw(runs), "training loss").lines
    assert len(many) == 9
    assert len({(line.get_color(), line.get_linestyle()) for line in many}) == 9


def test_a_run_that_goes_on_is_plotted_from_its_journal(tmp_path):
    run = make_run(tmp_path / "a", [1.0, 2.0, 3.0])
    with (run / "journal").open("ab") as file:
        file.write(b"torn")
    figure = plot.draw(plot.load_runs([run]))
    titles = ["training loss", "projected_grad", "median |projected_grad|"]
    assert [axes.get_title("left") for axes in figure.axes] == titles
    assert points(figure.axes[0].lines[-1]) == [[1, 2, 3], [1, 2, 3]]


def test_the_newest_checkpoint_stands_in_for_a_missing_state(tmp_path):
    run = make_run(tmp_path / "a", [1.0] * 20)
    for step in (2, 10):
        (run / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"eval_loss": float(step), "step": step}]}
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (loaded,) = plot.load_runs([run / "journal"])
    assert (loaded.name, loaded.logged["eval_loss"].values.tolist()) == ("a", [10.0])


def test_evaluations_that_are_not_finite_leave_a_gap(tmp_path):
    log = [{"eval_loss": value, "step": n} for n, value in enumerate([1.0, float("nan"), float("inf"), 2.0], start=1)]
    run = make_run(tmp_path / "a", [1.0] * 4, log=log, metric_for_best_model="loss")
    runs = plot.load_runs([run])
    assert curves.best_metric(*runs) == ("loss", 1.0, 1)
    assert plot.to_png(plot.draw(runs))


@pytest.mark.parametrize(("peak", "scale"), [(900.0, "log"), (2.0, "linear")])
def test_losses_that_explode_leave_the_others_readable(tmp_path, peak, scale):
    log = [{"eval_loss": 0.7, "step": 100}, {"eval_loss": peak, "step": 200}]
    exploding = make_run(tmp_path / "a", [0.7] * 150 + [peak] * 50, log=log)
    figure = plot.draw(plot.load_runs([exploding, make_run(tmp_path / "b", [0.7] * 200)]))
    shown = {axes.get_title(loc="left"): axes for axes in figure.axes}
    for title in ("training loss", "eval_loss"):
        assert shown[title].get_yscale() == scale
        low, high = shown[title].get_ylim()
        assert low < 0.7 and high > peak
    assert plot.to_png(figure)


def test_a_single_point_is_seen(tmp_path):
    runs = plot.load_runs([make_run(tmp_path / "a", [0.7], log=[{"tokens_per_second": 9.0, "step": 1}])])
    for axes in plot.draw(runs).axes:
        for line in axes.lines:
            if len(line.get_xdata()) == 1 and line.get_alpha() is None:
                assert line.get_marker() == "o", axes.get_title(loc="left")


def test_100_000_steps_take_seconds(tmp_path):
    runs = [curves.Run("long", MeZOConfig(model_name_or_path="m"), np.ones(100_000), np.ones(100_000),
                       np.arange(100_001), {})]  # fmt: skip
    started = time.process_time()
    figure = plot.draw(runs)
    plot.to_png(figure)
    # About 1 s; the limit is for machines that are busy.
    assert time.process_time() - started < 10
    assert all(len(line.get_xdata()) <= 1000 for axes in figure.axes for line in axes.lines)


def test_matplotlibs_settings_of_the_user_are_neither_used_nor_changed(tmp_path):
    runs = plot.load_runs([make_run(tmp_path / "a", [1.0, 2.0])])
    plain = plot.to_png(plot.draw(runs))
    with matplotlib.rc_context({"font.size": 40, "savefig.dpi": 20}):
        assert plot.to_png(plot.draw(runs)) == plain
        assert matplotlib.rcParams["font.size"] == 40


# --- files ------------------------------------------------------------------------------------------------------------


def test_command_writes_both_files_into_the_first_run(tmp_path, capsys):
    first = make_run(tmp_path / "a", [1.0, 2.0], log=LOG)
    second = make_run(tmp_path / "b", [1.0, 2.0])
    assert mezo(capsys, "plot", first, second) == f"plotted: {first}/plot.png\nplotted: {first}/plot.html\n"
    png = (first / "plot.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n")
    assert [int.from_bytes(png[i : i + 4], "big") for i in (16, 20)] == [1800, 1200]
    assert not list(second.glob("plot.*"))


@pytest.mark.parametrize("form", ["png", "html", "both"])
@pytest.mark.parametrize("name", ["out.png", "new/out.html"])
def test_output_and_format(tmp_path, capsys, form, name):
    run = make_run(tmp_path / "a", [1.0, 2.0])
    output = tmp_path / name
    mezo(capsys, "plot", "--format", form, run, "--output", output)
    endings = [".png", ".html"] if form == "both" else [f".{form}"]
    assert sorted(output.parent.glob("out.*")) == sorted(output.with_suffix(e) for e in endings)
    assert not list(run.glob("plot.*"))


def test_html_needs_no_other_file_and_escapes_names(tmp_path, capsys):
    settings = {"learning_rate": 3e-4, "max_steps": 5000, "metric_for_best_model": "accuracy"}
    run = make_run(tmp_path / "<b>&$x_{y$", [1.0, 2.0, 1.5, 0.5], log=LOG, use_peft=True, **settings)
    other = make_run(tmp_path / "_other", [1.0], num_queries=4, epsilon=0.02, learning_rate=1e-6, max_steps=9)
    mezo(capsys, "plot", run, other, "--output", tmp_path / "p.png")
    page = (tmp_path / "p.html").read_text()
    (image,) = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert base64.b64decode(image) == (tmp_path / "p.png").read_bytes()
    text = page.replace(image, "")
    assert not re.search(r"https?:|//|<script|<link|@import|url\(", text)
    assert len(re.findall(r"\ssrc=|\shref=", text)) == 1
    assert "<b>" not in text
    assert text.count("&lt;b&gt;&amp;$x_{y$") == 2
    rows = [re.findall(r"<td>(?:<span.*?</span> )?(.*?)</td>", line) for line in text.splitlines() if "<td>" in line]
    assert rows == [
        ["&lt;b&gt;&amp;$x_{y$", "model", "lora r=8, spsa", "0.0003", "0.001", "4 of 5,000", "0.5000 (mean of 1)",
         "eval_accuracy 0.7500 at step 4"],
        ["_other", "model", "all parameters, spsa, 4 queries", "1e-06", "0.02", "1 of 9", "1.0000 (mean of 1)",
         "none"],
    ]  # fmt: skip
    assert names(plot.draw(plot.load_runs([run, other]))) == ["<b>&$x_{y$", "_other"]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_no_run(capsys):
    assert "mezo plot RUN" in failure(capsys, "plot")


def test_folder_without_a_journal(tmp_path, capsys):
    assert failure(capsys, "plot", tmp_path) == f"{tmp_path}/journal: no journal here"
    assert failure(capsys, "plot", tmp_path / "nowhere") == f"{tmp_path}/nowhere: no journal here"


def test_journal_without_steps(tmp_path, capsys):
    run = make_run(tmp_path / "a", [])
    assert failure(capsys, "plot", run) == f"{run}/journal: the journal holds no step yet"


def test_run_given_twice(tmp_path, capsys):
    run = make_run(tmp_path / "a", [1.0])
    assert failure(capsys, "plot", run, run / "journal") == f"{run}/journal: this run is given twice"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"log_history": 5}', '{"log_history": [5]}', '{"log_history": [{"eval_loss": 1}]}',
     '{"log_history": [{"eval_loss": "x", "step": 1}]}', '{"log_history": [{"eval_loss": 1, "step": Infinity}]}',
     '{"log_history": [{"eval_loss": null, "step": 1}]}', "\udcff"],
)  # fmt: skip
def test_unreadable_state(tmp_path, capsys, text):
    run = make_run(tmp_path / "a", [1.0])
    (run / "trainer_state.json").write_text(text, errors="surrogateescape")
    line = failure(capsys, "plot", run)
    assert line.startswith(f"{run}/trainer_state.json: not the state of a run (")
    assert not list(run.glob("plot.*"))


@pytest.mark.parametrize("name", ["plots", "plot.pdf", "v1.5"])
def test_output_of_another_kind(tmp_path, capsys, name):
    run = make_run(tmp_path / "a", [1.0])
    line = failure(capsys, "plot", run, "--output", tmp_path / name)
    assert line == f"output '{tmp_path / name}' must end in .png or .html"


def test_output_that_cannot_be_written(tmp_path, capsys):
    run = make_run(tmp_path / "a", [1.0])
    (tmp_path / "p.png").mkdir()
    assert failure(capsys, "plot", run, "--output", tmp_path / "p.png") == f"Is a directory: {tmp_path}/p.png"


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "a", [1.0])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert failure(capsys, "plot", run) == "mezo plot needs matplotlib: pip install 'mezo[plot]'"
    with pytest.raises(UserError):
        plot.draw(plot.load_runs([run]))


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never(tmp_path):
    run = make_run(tmp_path / "a", [1.0, 2.0])
    script = f"""
import sys
from mezo import plot
runs = plot.load_runs([{str(run)!r}])
assert "matplotlib" not in sys.modules
plot.to_png(plot.draw(runs))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
