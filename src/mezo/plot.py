"""`mezo plot`: what one or several runs did, as a PNG and as one HTML file."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from mezo.config import MeZOConfig
from mezo.curves import (
    Curve,
    Run,
    best_metric,
    comparable,
    exploded,
    histograms,
    load_runs,
    median_size,
    moving_mean,
    single_losses,
    smoothed_loss,
    smoothing_window,
)
from mezo.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; further runs get another dash.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_Dash = Literal["-", "--", ":", "-."]
_DASHES: tuple[_Dash, ...] = ("-", "--", ":", "-.")
_SPEED = "tokens_per_second"
_MAX_MARKERS = 30


# --- drawing ----------------------------------------------------------------------------------------------------------

Panel = Callable[["Axes", Sequence[Run]], None]


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's are, with less ink."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("mezo plot needs matplotlib: pip install 'mezo[plot]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", size=10)
        matplotlib.rc("figure", dpi=150)
        matplotlib.rc("lines", linewidth=1.8)
        matplotlib.rc("grid", color="#e6e6e6")
        matplotlib.rc("axes", titlesize=11, titleweight="bold", titlelocation="left", edgecolor="#888888")
        matplotlib.rc("axes", grid=True, axisbelow=True)
        matplotlib.rc("axes.spines", top=False, right=False)
        yield


@_style()
def draw(runs: Sequence[Run]) -> Figure:
    """One figure of all runs: losses, evaluations, projected_grad and speed, three panels wide.

    Raises:
        UserError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels = _panels(runs)
    columns = 2 if len(panels) == 4 else 3
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        panel(figure.add_subplot(rows, columns, place), runs)
    first, *others = [axes for axes in figure.axes if axes.get_xlabel() == "step"]
    for axes in others:
        axes.sharex(first)
    _add_legend(figure, runs)
    return figure


def _add_legend(figure: Figure, runs: Sequence[Run]) -> None:
    """Names of the runs above all panels, as many in a line as there is room for."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour(i), linestyle=_dash(i), linewidth=3) for i in range(len(runs))]
    columns = max(1, 180 // (10 + max(len(run.name) for run in runs)))
    legend = figure.legend(handles, ["run"] * len(runs), loc="outside upper left", ncols=columns, frameon=False)
    for text, run in zip(legend.get_texts(), runs, strict=True):
        text.set_parse_math(False)  # a folder's name may hold a dollar sign
        text.set_text(run.name)


def colour(index: int) -> str:
    """Colour of the `index`-th run."""
    return COLOURS[index % len(COLOURS)]


def _dash(index: int) -> _Dash:
    return _DASHES[index // len(COLOURS) % len(_DASHES)]


def _panels(runs: Sequence[Run]) -> list[Panel]:
    """What there is to show: an evaluation or the speed only if some run has logged it."""
    logged = {key for run in runs for key in run.logged}
    metrics = sorted((key for key in logged if key.startswith("eval_")), key=lambda key: (key != "eval_loss", key))
    panels = [_draw_loss, *(_logged_panel(key) for key in metrics), _draw_histogram, _draw_median]
    return [*panels, _draw_speed] if _SPEED in logged else panels


def _draw_loss(axes: Axes, runs: Sequence[Run]) -> None:
    if _few(runs):
        for i, run in enumerate(runs):
            axes.plot(*single_losses(run), color=colour(i), alpha=0.18, linewidth=0.7)
        low, high = np.quantile(np.concatenate([run.losses for run in runs]), (0.005, 0.995))
        margin = 0.05 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)
    curves = [smoothed_loss(run) for run in runs]
    for i, curve in enumerate(curves):
        _line(axes, i, curve)
    _scale(axes, curves)
    _dress(axes, "training loss", f"loss, mean over {_windows([run.window for run in runs], 'step', 'steps')}")


def _logged_panel(key: str) -> Panel:
    def panel(axes: Axes, runs: Sequence[Run]) -> None:
        for i, run in enumerate(runs):
            if key in run.logged:
                _line(axes, i, run.logged[key], _MAX_MARKERS)
        if key == "eval_loss":
            _scale(axes, [run.logged[key] for run in runs if key in run.logged])
        _dress(axes, key)

    return panel


def _draw_speed(axes: Axes, runs: Sequence[Run]) -> None:
    windows = []
    for i, run in enumerate(runs):
        if _SPEED in run.logged:
            steps, values = run.logged[_SPEED]
            windows.append(smoothing_window(len(steps)))
            ends, means = moving_mean(values, windows[-1])
            _line(axes, i, Curve(steps[ends - 1], means))
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _dress(axes, _SPEED, f"mean over {_windows(windows, 'log entry', 'log entries')}")


def _draw_histogram(axes: Axes, runs: Sequence[Run]) -> None:
    edges, shares = histograms(runs)
    for i, share in enumerate(shares):
        if _few(runs):
            axes.stairs(share, edges, color=colour(i), alpha=0.15, fill=True)
        axes.stairs(share, edges, color=colour(i), linestyle=_dash(i), linewidth=1.5)
    unit = "" if comparable(runs) else " / its median size"
    _dress(axes, f"projected_grad{unit}", "% of directions", "value; the outermost bins hold all beyond them")


def _draw_median(axes: Axes, runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        _line(axes, i, median_size(run))
    if comparable(runs):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    _dress(axes, "median |projected_grad|", f"median over {_windows([run.window for run in runs], 'step', 'steps')}")


def _line(axes: Axes, index: int, curve: Curve, most_markers: int = 1) -> None:
    """A run's curve; a single point, which makes no line, is marked."""
    marker = "o" if len(curve.steps) <= most_markers else ""
    axes.plot(*curve, color=colour(index), linestyle=_dash(index), marker=marker, markersize=4)


def _scale(axes: Axes, curves: Sequence[Curve]) -> None:
    """A logarithmic axis for losses that exploded, beside which all others would be a flat line."""
    if any(exploded(curve) for curve in curves):
        axes.set_yscale("log")
        axes.autoscale(axis="y")
        axes.yaxis.set_major_formatter("{x:,g}")


def _dress(axes: Axes, title: str, ylabel: str = "", xlabel: str = "step") -> None:
    axes.set_title(title)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if xlabel == "step":
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5, integer=True)


def _windows(windows: Sequence[int], one: str, many: str) -> str:
    shortest, longest = min(windows), max(windows)
    span = f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    return f"{span} {one if longest == 1 else many}"


def _few(runs: Sequence[Run]) -> bool:
    """Whether single steps and filled areas can be shown; those of more runs hide each other."""
    return len(runs) <= 3


# --- files ------------------------------------------------------------------------------------------------------------


def write(paths: Sequence[str], output: str | None, form: Literal["png", "html", "both"]) -> list[Path]:
    """Plots runs into files, which it returns: `output` with the endings .png and .html, as `form` says.

    Raises:
        UserError: see `load_runs` and `draw`; `output` with another ending.
    """
    runs = load_runs(paths)
    folder = Path(paths[0]) if Path(paths[0]).is_dir() else Path(paths[0]).parent
    target = Path(output) if output is not None else folder / "plot.png"
    if target.suffix not in (".png", ".html"):
        raise UserError(f"output {str(target)!r} must end in .png or .html")
    png = to_png(draw(runs))
    files = {".png": png, ".html": to_html(runs, png).encode()}
    target.parent.mkdir(parents=True, exist_ok=True)
    written = [target.with_suffix(ending) for ending in files if form in ("both", ending.removeprefix("."))]
    for path in written:
        path.write_bytes(files[path.suffix])
    return written


@_style()
def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def to_html(runs: Sequence[Run], png: bytes) -> str:
    """One HTML file that needs no other: the figure, and a table of what each run is."""
    facts = [_facts(run) for run in runs]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in facts[0])
    rows = "".join(_html_row(i, list(row.values())) for i, row in enumerate(facts))
    return _PAGE.format(
        title=html.escape(", ".join(run.name for run in runs)),
        image=base64.b64encode(png).decode(),
        table=f"<tr>{head}</tr>{rows}",
    )


def _html_row(index: int, cells: Sequence[str]) -> str:
    first, *others = map(html.escape, cells)
    mark = f'<span style="color:{colour(index)}">&#9632;</span>'
    return f"\n<tr><td>{mark} {first}</td>" + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"


def _facts(run: Run) -> dict[str, str]:
    """The row of a run in the table."""
    config, best = run.config, best_metric(run)
    return {
        "run": run.name,
        "model": config.model_name_or_path,
        "method": _method(config),
        "learning rate": f"{config.learning_rate:g}",
        "epsilon": f"{config.epsilon:g}",
        "steps": f"{run.num_steps:,} of {config.max_steps:,}",
        "last loss": f"{smoothed_loss(run).values[-1]:.4f} (mean of {run.window:,})",
        "best metric": f"eval_{best[0]} {best[1]:.4f} at step {best[2]:,}" if best else "none",
    }


def _method(config: MeZOConfig) -> str:
    """What is trained and how, as far as it is not the default."""
    if config.use_peft:
        rank = f" r={config.lora_r}" if config.peft_type == "lora" else f", {config.num_virtual_tokens} tokens"
        trained = (config.lora_variant if config.peft_type == "lora" else config.peft_type) + rank
    else:
        trained = config.trainable_layers or "all parameters"
    direction = f"{config.direction.replace('_', ' ')} {config.direction_rank}" if config.direction != "dense" else ""
    queries = f"{config.num_queries} queries" if config.num_queries > 1 else ""
    optim = config.optim if config.optim != "sgd" else ""
    return ", ".join(part for part in (trained, config.estimator, queries, direction, optim) if part)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title} – mezo</title>
<style>
body {{ font: 15px/1.4 sans-serif; color: #222; margin: 1.5em auto; max-width: 1200px; padding: 0 1em; }}
img {{ width: 100%; }}
table {{ border-collapse: collapse; font-size: 14px; }}
th, td {{ text-align: left; padding: 0.3em 1em 0.3em 0; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<img alt="training loss, evaluations, projected_grad and speed of each run" src="data:image/png;base64,{image}">
<table>
{table}
</table>
</body>
</html>
"""
