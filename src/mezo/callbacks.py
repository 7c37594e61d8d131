"""The bridge to transformers' callbacks: arguments, state and events as TensorBoard, W&B and trackio expect them."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from mezo.config import MeZOConfig
from mezo.doctor import Finding, diagnose, read_run, urgent, while_training

logger = logging.getLogger(__name__)


def training_arguments(config: MeZOConfig) -> TrainingArguments:
    """The part of a config that transformers has fields for."""
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=config.weight_decay,
        logging_steps=config.logging_steps,
        logging_first_step=config.logging_first_step,
        eval_strategy="steps" if config.eval_steps is not None else "no",
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        metric_for_best_model=config.metric_for_best_model,
        greater_is_better=config.metric_for_best_model != "loss",
        seed=config.seed,
        data_seed=config.data_seed,
        report_to=config.report_to,
        run_name=config.run_name,
        disable_tqdm=config.disable_tqdm,
        use_cpu=config.use_cpu,
    )


def callback_handler(
    config: MeZOConfig,
    kind: str,
    args: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
    model: object,
    tokenizer: object,
) -> CallbackHandler:
    """transformers' handler: its flow of logging, evaluation and saving, trackers, the progress bar, the user's own."""
    trackers = [tracker() for tracker in get_reporting_integration_callbacks(args.report_to)]
    progress = [] if config.disable_tqdm else [ProgressCallback()]
    ours = [DoctorCallback(config, kind), *progress]
    return CallbackHandler([DefaultFlowCallback(), *trackers, *ours, *callbacks], model, tokenizer, None, None)


class DoctorCallback(TrainerCallback):
    """Warns, once each, of what is wrong: at log entries of what they show, at checkpoints as `mezo doctor` does.

    Args:
        config: the run's.
        kind: its model's head.
    """

    def __init__(self, config: MeZOConfig, kind: str) -> None:
        self._config = config
        self._kind = kind
        self._entries: deque[dict[str, float]] = deque(maxlen=100)
        self._said: set[tuple[str, str]] = set()
        self._due = 0.0  # when a journal is read again

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Looks at the latest entries."""
        if logs is not None and "loss" in logs:
            self._entries.append(logs)
            self._say(state.global_step, while_training(self._config, self._kind, self._entries))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Reads journal and log, in at most a hundredth of the run's time."""
        started = time.monotonic()
        if started >= self._due:
            run = read_run(self._config.output_dir)
            self._say(state.global_step, urgent(run, diagnose(run)))
            self._due = time.monotonic() + 100 * (time.monotonic() - started)

    def _say(self, step: int, findings: Sequence[Finding]) -> None:
        for finding in findings:
            said = finding.topic, finding.severity
            if said in self._said or _DIVERGED in self._said:
                continue  # what follows a divergence is its consequence
            self._said.add(said)
            logger.warning("step %d: %s %s.", step, finding.evidence, finding.advice)


_DIVERGED = ("stability", "problem")
_BARS = "▁▂▃▄▅▆▇█"
_SPARKS = 16  # characters
_WIDE = 180  # columns that all figures need beside a long bar
_REST = 52  # columns of a short bar, its name, steps and times


def _short(count: float) -> str:
    """Three digits, as 25.9k."""
    size, unit = next(((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= s), (1, ""))
    return f"{count / size:.3g}{unit}"


def sparkline(values: Sequence[float], width: int = _SPARKS) -> str:
    """The last `width` values as bars between their lowest and highest."""
    shown = [v for v in values[-width:] if math.isfinite(v)]
    if not shown:
        return ""
    low, span = min(shown), (max(shown) - min(shown)) or 1.0
    return "".join(_BARS[int((v - low) / span * (len(_BARS) - 1) + 0.5)] for v in shown)


class ProgressCallback(TrainerCallback):
    """A bar with step, loss and its history, projected_grad, tokens per second; one line per evaluation above it."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._wide = console.width >= _WIDE
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24 if self._wide else 8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._shown = 0.0
        self._losses: list[float] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Shows the bar, at the step where a resumed run goes on."""
        self._progress.start()
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Moves the bar, at most ten times a second."""
        if self._task is not None and (time.monotonic() - self._shown > 0.1 or state.global_step == state.max_steps):
            self._shown = time.monotonic()
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Shows the latest figures; prints evaluations."""
        if logs is None or self._task is None:
            return
        if "loss" in logs:
            rate = logs.get("tokens_per_second", 0.0)
            self._losses.append(logs["loss"])
            figures = f"loss {sparkline(self._losses, _SPARKS if self._wide else 4)} {logs['loss']:.4f}"
            choices = [[f"projected_grad {logs['projected_grad']:+.3g}  {rate:,.0f} tokens/s"]]
            if "reuse_percent" in logs:
                reuse = f"reuse {logs['reuse_percent']:.0f} %"
                computed, asked = _short(logs["tokens_computed"]), _short(logs["tokens_asked"])
                saved = f"{computed} of {asked} tokens computed, {logs['seconds_saved']:,.0f} s saved"
                choices.insert(0, [f"{reuse}: {saved}", reuse] if logs["reuse_percent"] else [reuse])
            for choice in choices:
                room = self._progress.console.width - _REST - len(figures) - 2
                figures += next((f"  {part}" for part in choice if len(part) <= room), "")
            self._progress.update(self._task, figures=figures)
        if "eval_loss" in logs:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in logs.items() if name.startswith("eval_"))
            self._progress.console.print(f"step {state.global_step}: {figures}", highlight=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Leaves the bar as it stands."""
        self.stop()

    def stop(self) -> None:
        """Gives the terminal back, also after an error."""
        self._progress.stop()
