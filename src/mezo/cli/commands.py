"""What the commands do; imported only when one runs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Column, Table
from transformers.utils import logging as transformers_logging

from mezo import api, auto
from mezo import plot as plots
from mezo.bench import BenchOptions
from mezo.bench import run as run_bench
from mezo.cli.options import (
    DoctorOptions,
    EvalOptions,
    InspectOptions,
    MergeOptions,
    PlotOptions,
    ReplayOptions,
    TuneOptions,
)
from mezo.config import MeZOConfig
from mezo.doctor import diagnose, read_run
from mezo.errors import UserError
from mezo.evaluation import Metrics
from mezo.kernels import cpu as cpu_kernels
from mezo.tune import Trial
from mezo.tune import tune as run_tune


def _quiet() -> None:
    """Our own lines only: no bars of transformers and datasets, warnings as single lines."""
    import datasets
    import huggingface_hub

    logger = logging.getLogger("mezo")
    logger.setLevel(logging.WARNING)  # SGLang, started here, sets the root logger to ERROR
    if not logger.handlers:
        logger.addHandler(_StandardError())
        logger.handlers[0].setFormatter(logging.Formatter("mezo: %(message)s"))
        logger.propagate = False
    huggingface_hub.logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors come back as exceptions
    # PEFT calls this deprecated alias of transformers.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    warnings.showwarning = lambda message, *rest: logger.warning("%s", message)


class _StandardError(logging.Handler):
    """Whatever standard error is at the time: while a progress bar stands there, rich prints lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def train(config: MeZOConfig) -> None:
    """`mezo train`."""
    _quiet()
    if config.method == "auto":
        print(f"method auto: {auto.said(config.to_dict())}")
    trainer = api.build_trainer(config)
    try:
        result = trainer.train()
    finally:
        trainer.engine.close()
    print(f"trained {result.global_step} steps, loss {result.train_loss:.4f}: {result.model_path}")
    if result.best_checkpoint is not None:
        print(f"best checkpoint: {result.best_checkpoint}")
    if result.metrics is not None:
        _print_metrics(result.metrics)


def tune(config: MeZOConfig, options: TuneOptions, arguments: Sequence[str]) -> None:
    """`mezo tune`; `arguments` are those of the command line that a run of the best candidate keeps."""
    _quiet()
    name = config.metric_for_best_model
    trials = run_tune(dataclasses.replace(config, disable_tqdm=True), options, lambda t: print(_line(t, name)))
    table = Table("learning_rate", "epsilon", "steps", name, Column("folder", overflow="fold"))
    for trial in trials:
        value = "diverged" if trial.metric is None else f"{trial.metric:.4f}"
        table.add_row(f"{trial.learning_rate:g}", f"{trial.epsilon:g}", str(trial.steps), value, trial.output_dir)
    Console().print(table)
    best = trials[0]
    if best.metric is None:
        raise UserError("every candidate diverged; try smaller learning rates")
    rates = sorted({trial.learning_rate for trial in trials})
    as_far = [trial.metric for trial in trials if trial.steps == best.steps]
    if len(as_far) > 1 and set(as_far) == {best.metric}:
        print(f"{name} is the same for all; more steps, or more rows to evaluate on, may tell them apart")
    elif best.learning_rate in (rates[0], rates[-1]):
        which, further = ("highest", "higher") if best.learning_rate == rates[-1] else ("lowest", "lower")
        print(f"the best learning_rate is the {which} that was tried; {further} ones may be better")
    if config.lr_scheduler_type != "constant":  # its rate has come down
        print(f"best: {best.output_dir}")
        return
    found = ["--learning_rate", repr(best.learning_rate), "--epsilon", repr(best.epsilon)]
    more = ["--max_steps", str(2 * best.steps), "--output_dir", best.output_dir, "--resume_from_checkpoint"]
    print(f"best: {best.output_dir}; twice as far with\n{shlex.join(['mezo', 'train', *arguments, *found, *more])}")


def _line(trial: Trial, name: str) -> str:
    value = "diverged" if trial.metric is None else f"{name} {trial.metric:.4f}"
    return f"learning_rate {trial.learning_rate:g}, epsilon {trial.epsilon:g}, {trial.steps} steps: {value}"


def evaluate(options: EvalOptions) -> None:
    """`mezo eval`."""
    _quiet()
    names = {f.name for f in dataclasses.fields(MeZOConfig)}
    values = {key: value for key, value in dataclasses.asdict(options).items() if key in names}
    if options.reward_funcs:
        values["objective"] = "reward"
    if options.lm_eval:
        return _harness(MeZOConfig.from_dict(values), options)
    metrics = api.eval_model(MeZOConfig.from_dict(values), options.adapter_name_or_path)
    if options.json:
        print(json.dumps(metrics.measured))
    else:
        _print_metrics(metrics)


def _harness(config: MeZOConfig, options: EvalOptions) -> None:
    from mezo.harness import evaluate_with_harness

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    figures = evaluate_with_harness(
        config,
        options.lm_eval or [],
        adapter=options.adapter_name_or_path,
        include_path=options.lm_eval_include_path,
        num_fewshot=options.num_demonstrations,
    )
    if options.json:
        for figure in figures:
            print(json.dumps(dataclasses.asdict(figure)))
        return
    table = Table("task", "metric", "base", "trained")
    for f in figures:
        table.add_row(f.task, f.metric, _with_error(f.base, f.base_stderr), _with_error(f.trained, f.trained_stderr))
    Console().print(table)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def replay(options: ReplayOptions) -> None:
    """`mezo replay`."""
    _quiet()
    path = api.replay(**dataclasses.asdict(options))
    print(f"rebuilt: {path}")


def inspect(options: InspectOptions) -> None:
    """`mezo inspect`."""
    facts = api.summary(options.run)
    if options.json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:22} {f'{value:,.6g}' if isinstance(value, float) else value}")


def doctor(options: DoctorOptions) -> None:
    """`mezo doctor`."""
    findings = diagnose(read_run(options.run))
    if options.json:
        for finding in findings:
            print(json.dumps(dataclasses.asdict(finding)))
        return
    console = Console()
    for finding in findings:
        line = f"{finding.severity:8} {finding.topic:12} {finding.evidence}"
        console.print(line, style=_STYLES[finding.severity], markup=False, highlight=False, soft_wrap=True)
        if finding.advice:
            console.print(f"{'':21} → {finding.advice}", markup=False, highlight=False, soft_wrap=True)


_STYLES = {"problem": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


def plot(options: PlotOptions) -> None:
    """`mezo plot`."""
    _quiet()
    for path in plots.write(options.runs, options.output, options.format):
        print(f"plotted: {path}")


def merge(options: MergeOptions) -> None:
    """`mezo merge`."""
    _quiet()
    path = api.merge(options.adapter_name_or_path, options.output_dir, model_name_or_path=options.model_name_or_path)
    print(f"merged: {path}")


def bench(options: BenchOptions) -> None:
    """`mezo bench`."""
    _quiet()
    rows = run_bench(options)
    if options.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row)))
        return
    table = Table(Column("", no_wrap=True), "ms", "ratio", "tokens/s", "weights GB/s", "of copy", "peak MiB")
    for row in rows:
        table.add_row(
            row.what, f"{row.milliseconds:.1f}", f"{row.ratio:.2f}", f"{row.tokens_per_second:,.0f}",
            f"{row.traffic:.1f}", f"{100 * row.bandwidth:.0f} %", f"{row.peak_memory:,.0f}",
        )  # fmt: skip
    Console().print(table)


def env() -> None:
    """`mezo env`."""
    packages = ["mezo", "torch", "transformers", "peft", "datasets", "safetensors", "numba", "numpy", "bitsandbytes"]
    facts = {name: _version(name) for name in packages}
    facts["python"] = platform.python_version()
    facts["platform"] = platform.platform()
    facts["cpu threads"] = f"{torch.get_num_threads()} of {os.cpu_count()}"
    facts["compiled CPU kernels"] = "yes" if cpu_kernels.enabled() else "no (pip install 'mezo[cpu]')"
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for name, value in facts.items():
        print(f"{name:22} {value}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_metrics(metrics: Metrics) -> None:
    table = Table(*("examples" if name == "num_examples" else name for name in metrics.measured))
    table.add_row(*(str(v) if isinstance(v, int) else f"{v:.4f}" for v in metrics.measured.values()))
    Console().print(table)
