"""The training loop: probes, losses, coefficients, journal, update."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState

from mezo import checkpoint, journal
from mezo.blackbox import Rewards, loss_function
from mezo.callbacks import ProgressCallback, callback_handler, training_arguments
from mezo.config import MeZOConfig
from mezo.data import BatchSampler
from mezo.engines.base import Engine
from mezo.errors import NonFiniteLossError, UserError
from mezo.estimator import ESTIMATORS, Estimator, Outcome, QuantileClip, Record, is_finite, scheduled_rate
from mezo.evaluation import Metrics, evaluate
from mezo.header import check_header
from mezo.hub import push_run
from mezo.model_card import model_card
from mezo.objective import Example, batch_loss

logger = logging.getLogger(__name__)

FLAT_STEPS = 100


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Args:
        output_dir: the run's folder; the final weights or adapter lie in it.
        model_path: folder to load from: with `PeftModel.from_pretrained` after LoRA or prefix tuning, else with
            transformers' `from_pretrained`.
        journal_path: the journal.
        best_checkpoint: the checkpoint with the best evaluation, if there was one.
        metrics: evaluation of the final weights, if there are evaluation rows.
        global_step: steps trained in all.
        train_loss: mean of (loss_plus + loss_minus) / 2 over the last `logging_steps` steps.
    """

    output_dir: Path
    model_path: Path
    journal_path: Path
    best_checkpoint: Path | None
    metrics: Metrics | None
    global_step: int
    train_loss: float


class MeZOTrainer:
    """Trains an engine's parameters with forward passes.

    Args:
        config: the run.
        engine: evaluates and updates the model, see `mezo.engines.base`.
        train_examples: encoded training rows.
        eval_examples: encoded evaluation rows, or None.
        header: facts about model and versions that the journal's header keeps, see `mezo.api.journal_header`.
        callbacks: `transformers.TrainerCallback`s.
        estimator: probes and coefficients; what the config says if not given.
        rewards: judges what is generated, for objective reward.
    """

    def __init__(
        self,
        config: MeZOConfig,
        engine: Engine,
        train_examples: Sequence[Example],
        eval_examples: Sequence[Example] | None,
        header: journal.JsonObject,
        callbacks: Sequence[TrainerCallback] = (),
        estimator: Estimator | None = None,
        rewards: Rewards | None = None,
    ):
        self.config = config
        self.engine = engine
        self.train_examples = train_examples
        self.eval_examples = eval_examples
        self.estimator = estimator or make_estimator(config)
        self._rewards = rewards
        self._losses = loss_function(config, rewards)
        self._num_probes = len(self.estimator.probes(0))
        self._clip = QuantileClip(config.clip_quantile, config.clip_window) if config.clip_quantile else None
        self.run = Path(config.output_dir)
        self.header = header
        self.args = training_arguments(config)
        self.state = TrainerState(
            max_steps=config.max_steps,
            logging_steps=config.logging_steps,
            eval_steps=config.eval_steps or 0,
            save_steps=config.save_steps,
            train_batch_size=config.per_device_train_batch_size,
        )
        self.control = TrainerControl()
        self._is_watched = bool(callbacks)  # by somebody who may look at the model's weights
        self.callbacks = callback_handler(
            config, str(header["kind"]), self.args, callbacks, engine.model, engine.tokenizer
        )
        self.sampler = BatchSampler(
            len(train_examples), config.batch_size, config.seed if config.data_seed is None else config.data_seed
        )
        self._journal: journal.Journal | None = None
        self._recent: list[Record] = []  # since the last log entry
        self._last_metrics: Metrics | None = None  # of the present weights, if they were evaluated
        self._log_time = time.perf_counter()
        # Since the last log entry. A GPU's update may still run when it returns; it counts with the next losses then.
        self._seconds = {"forward": 0.0, "update": 0.0}
        self._asked, self._computed = 0, 0  # tokens of all steps
        self._token_seconds = math.inf  # of the step that computed its tokens fastest
        self._flat_steps = 0  # in a row that taught nothing; stays where the warning was given
        self._unfinished_step = False  # resumed behind a step whose log, evaluation or checkpoint may be missing

    # --- the step ---------------------------------------------------------------------------------------------------

    def step(self) -> list[Record]:
        """One training step: forward passes under all probes, a record for each direction, one update."""
        step = self.state.global_step
        examples = [self.train_examples[i] for i in self.sampler(step)]
        probes = self.estimator.probes(step)
        computed, started = self.engine.work.computed, time.perf_counter()
        losses_PN = self._losses(self.engine, examples, probes)
        computed = round(self.engine.work.computed - computed)
        seconds = time.perf_counter() - started
        self._seconds["forward"] += seconds
        self._token_seconds = min(self._token_seconds, seconds / max(computed, 1))
        outcomes = self.estimator.outcomes(probes, [batch_loss(examples, losses_N) for losses_N in losses_PN])
        records = self._records(examples, outcomes if self._clip is None else self._clip(outcomes), computed)
        if not all(map(is_finite, records)):
            raise NonFiniteLossError(self._non_finite_message(step, losses_PN.isfinite().all(dim=0).tolist()))
        self._watch_for_flat_losses(records)
        assert self._journal is not None
        self._journal.append(records)
        started = time.perf_counter()
        self.engine.update(records)
        self._seconds["update"] += time.perf_counter() - started
        return records

    def _records(self, examples: Sequence[Example], outcomes: Sequence[Outcome], computed: int) -> list[Record]:
        counts = {
            "num_tokens": sum(e.num_tokens for e in examples),
            "num_examples": len(examples),
            "num_queries": len(outcomes),
            "computed_tokens": computed,
        }
        return [
            Record(self.state.global_step, *outcome, self._learning_rate(), query=query, **counts)
            for query, outcome in enumerate(outcomes)
        ]

    def _learning_rate(self, step: int | None = None) -> float:
        """Of the present step, or of another."""
        c, step = self.config, self.state.global_step if step is None else step
        return scheduled_rate(c.learning_rate, step, c.max_steps, c.lr_scheduler_type, c.warmup_steps)

    # --- the run ----------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Trains from the start, or from where the journal ends with `resume_from_checkpoint`.

        Raises:
            UserError: `output_dir` holds a run already.
            JournalError: its journal does not belong to this run, or is damaged.
            NonFiniteLossError: the loss became NaN or infinite; the last good weights are in a checkpoint.
        """
        self._journal = self._open_journal()
        try:
            if self._unfinished_step or self.state.global_step < self.config.max_steps:
                self._event("on_train_begin")
                with nullcontext() if self._is_watched else self.engine.deferring():
                    self._loop()
                self._event("on_train_end")
            result = self._finish()
        except BaseException:
            for callback in self.callbacks.callbacks:
                if isinstance(callback, ProgressCallback):
                    callback.stop()
            raise
        finally:
            self._journal.close()
        if self.config.push_to_hub:
            repo_id = self.config.hub_model_id or self.run.resolve().name
            address = push_run(self.run, repo_id, private=self.config.hub_private_repo)
            logger.warning("uploaded to %s", address)
        return result

    def _loop(self) -> None:
        if self._unfinished_step:
            self._event("on_step_end")
            self._act()
        if self.config.eval_on_start and self.state.global_step == 0:
            self._evaluate()
        self._log_time = time.perf_counter()
        while self.state.global_step < self.config.max_steps and not self.control.should_training_stop:
            self._event("on_step_begin")
            try:
                self._last_metrics = None
                records = self.step()
            except NonFiniteLossError:
                self._save_checkpoint()
                raise
            self.state.global_step += 1
            self.state.epoch = self.sampler.epoch(self.state.global_step)
            self.state.num_input_tokens_seen += records[0].num_tokens
            self._asked += self._num_probes * records[0].num_tokens
            self._computed += records[0].computed_tokens
            self._recent += records
            self._event("on_step_end")
            self._act()
        if self._recent or not any("tokens_asked" in entry for entry in self.state.log_history):
            self.state.log_history.append(self._dated(self._reuse(), self.state.global_step))

    def _act(self) -> None:
        """What the callbacks asked for after a step."""
        if self.control.should_log:
            self._log(self._train_logs())
        if self.control.should_evaluate and self.eval_examples is not None:
            self._evaluate()
        if self.control.should_save:
            self._save_checkpoint()

    def _finish(self) -> TrainResult:
        """Final evaluation, and the final weights at the root of the run's folder."""
        best = self._best_checkpoint()
        if self.config.load_best_model_at_end and best is not None:
            self._last_metrics = None
            if not checkpoint.is_whole(best):
                raise UserError(
                    f"{best}, the best checkpoint, is damaged or missing. All steps are in the journal: mezo replay "
                    f"with --step {self.state.best_global_step} makes these weights anew"
                )
            self.engine.load(best)
        metrics = self._last_metrics
        if metrics is None and self.eval_examples is not None:
            metrics = self._metrics(self.eval_examples)
        checkpoint.write_files(self.run, lambda folder: self._write(folder, metrics))
        last = journal.read(self._journal_path).steps[-self.config.logging_steps :]
        return TrainResult(
            output_dir=self.run,
            model_path=self.run,
            journal_path=self._journal_path,
            best_checkpoint=best,
            metrics=metrics,
            global_step=self.state.global_step,
            train_loss=mean_loss([r for records in last for r in records]),
        )

    # --- logs, evaluation, checkpoints ------------------------------------------------------------------------------

    def _train_logs(self) -> dict[str, float]:
        now = time.perf_counter()
        tokens = self._num_probes * sum(r.num_tokens for r in self._recent if r.query == 0)
        wall = now - self._log_time
        parts = {f"{part}_percent": round(100 * seconds / wall, 1) for part, seconds in self._seconds.items()}
        logs = {**log_entry(self._recent), "tokens_per_second": tokens / wall, **parts, **self._reuse()}
        self._recent, self._log_time, self._seconds = [], now, dict.fromkeys(self._seconds, 0.0)
        return logs

    def _reuse(self) -> dict[str, float]:
        """What was not computed anew since the first step, and a low estimate of the time that it would have taken."""
        saved = (self._asked - self._computed) * self._token_seconds if math.isfinite(self._token_seconds) else 0.0
        work = self.engine.work
        padding = round(100 * work.padding / max(work.padding + work.computed, 1), 2)
        return {
            **reuse_entry(self._asked, self._computed),
            "seconds_saved": round(saved, 3),
            "padding_percent": padding,
        }

    def _log(self, logs: dict[str, float]) -> None:
        self.state.log_history.append(self._dated(logs, self.state.global_step))
        self.control.should_log = False
        self.control = self.callbacks.on_log(self.args, self.state, self.control, logs)

    def _dated(self, logs: dict[str, float], step: int) -> dict[str, float]:
        return {**logs, "epoch": self.sampler.epoch(step), "step": step}

    def _evaluate(self) -> None:
        assert self.eval_examples is not None
        started = time.perf_counter()
        metrics = self._last_metrics = self._metrics(self.eval_examples)
        logs = {f"eval_{name}": value for name, value in metrics.measured.items() if name != "num_examples"}
        self._log(logs)
        self.control = self.callbacks.on_evaluate(self.args, self.state, self.control, dict(logs))
        if self.state.global_step and self._is_best(metrics):
            self.state.best_global_step = self.state.global_step
            self.state.best_model_checkpoint = str(self._best_checkpoint())
            self.control.should_save = True
        else:
            self._save_state()
        self._log_time += time.perf_counter() - started

    def _metrics(self, examples: Sequence[Example]) -> Metrics:
        return evaluate(self.engine, examples, self.config.max_new_tokens, self._rewards)

    def _is_best(self, metrics: Metrics) -> bool:
        metric = metrics.measured[self.config.metric_for_best_model]
        sign = -1.0 if self.config.metric_for_best_model == "loss" else 1.0
        if self.state.best_metric is not None and sign * metric <= sign * self.state.best_metric:
            return False
        self.state.best_metric = metric
        return True

    def _save_checkpoint(self) -> None:
        assert self._journal is not None
        started = time.perf_counter()
        self._journal.sync()
        path = checkpoint.checkpoint_path(self.run, self.state.global_step)
        checkpoint.write_checkpoint(path, self._write_checkpoint)
        checkpoint.rotate(self.run, self.config.save_total_limit, self._best_checkpoint())
        self._save_state()
        self.control = self.callbacks.on_save(self.args, self.state, self.control)
        self._log_time += time.perf_counter() - started

    def _write(self, folder: Path, metrics: Metrics | None) -> None:
        self.engine.save(folder)
        (folder / "README.md").write_text(model_card(self.config, self.header, self.state, metrics))
        (folder / checkpoint.STATE_NAME).write_text(state_json(self.state))

    def _write_checkpoint(self, folder: Path) -> None:
        self._write(folder, None)
        self.engine.save_optimizer(folder)

    def save_initial(self) -> None:
        """Writes `checkpoint-0`, for initial weights that no seed makes anew; a resumed run starts from it."""
        path = checkpoint.checkpoint_path(self.run, 0)
        if not path.exists() and not self._journal_path.exists():
            self.run.mkdir(parents=True, exist_ok=True)
            checkpoint.write_checkpoint(path, lambda folder: self._write(folder, None))

    def _best_checkpoint(self) -> Path | None:
        step = self.state.best_global_step
        return checkpoint.checkpoint_path(self.run, step) if step is not None else None

    def _save_state(self) -> None:
        assert self._journal is not None
        self._journal.sync()  # the state never speaks of steps that the journal may lose
        checkpoint.write_text(self.run / checkpoint.STATE_NAME, state_json(self.state))

    # --- journal and resume -----------------------------------------------------------------------------------------

    @property
    def _journal_path(self) -> Path:
        return self.run / checkpoint.JOURNAL_NAME

    def _open_journal(self) -> journal.Journal:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"output_dir {str(self.run)!r} is a file") from None
        if self._journal_path.exists() and not journal.is_cut_off(self._journal_path):
            if not self.config.resume_from_checkpoint:
                raise UserError(
                    f"output_dir {str(self.run)!r} holds a run already; resume_from_checkpoint goes on with it, "
                    "or choose another folder"
                )
            return self._resume()
        return journal.Journal.create(self._journal_path, self.header)

    def _resume(self) -> journal.Journal:
        """Weights from the newest usable checkpoint, then the journal's later records over them."""
        opened, contents = journal.Journal.resume(self._journal_path)
        try:
            checkpoint.remove_partial(self.run)
            if contents.dropped_bytes:
                logger.warning("dropped a torn record of %d bytes at the end of the journal", contents.dropped_bytes)
            check_header(contents.header, self.header, self._journal_path)
            self._check_schedule(contents.steps)
            usable = {
                s: p
                for s, p in checkpoint.checkpoints(self.run).items()
                if s <= len(contents.steps) and s % self.engine.resumes_every == 0
            }
            start = self._load_newest(usable)
            for records in contents.steps[start:]:
                self.engine.update(records)
            self._restore_state(contents.steps, self._saved_state(len(contents.steps), usable.get(start)))
        except BaseException:
            opened.close()
            raise
        logger.warning("resumed at step %d of %d", self.state.global_step, self.config.max_steps)
        return opened

    def _check_schedule(self, steps: Sequence[Sequence[Record]]) -> None:
        """Warns where another number of steps moves the rates that a schedule has for those to come."""
        if steps and steps[-1][0].learning_rate != self._learning_rate(len(steps) - 1):
            logger.warning(
                "lr_scheduler_type %s: from here learning rates are those of a run of %d steps; it began as another",
                self.config.lr_scheduler_type, self.config.max_steps,
            )  # fmt: skip

    def _load_newest(self, usable: dict[int, Path]) -> int:
        """Loads the newest checkpoint that is whole; returns its step, 0 if there is none."""
        for step, path in reversed(usable.items()):
            if checkpoint.is_whole(path):
                self.engine.load(path)
                self.engine.load_optimizer(path)
                return step
            logger.warning("%s is damaged and is not used; the journal makes its steps anew", path)
        return 0

    def _saved_state(self, last_step: int, loaded: Path | None) -> TrainerState:
        """The state as last written; if that is damaged, as it was at the checkpoint that was loaded."""
        for folder in (self.run, loaded):
            if folder is None or not (folder / checkpoint.STATE_NAME).exists():
                continue
            try:
                return checkpoint.read_state(folder / checkpoint.STATE_NAME, last_step)
            except UserError as error:
                logger.warning("%s: evaluations since the last checkpoint are forgotten", error)
        return TrainerState()

    def _restore_state(self, steps: list[list[Record]], saved: TrainerState) -> None:
        """What was saved, and the log entries since then from the journal."""
        self.state.log_history = saved.log_history
        self.state.best_metric, self.state.best_global_step = saved.best_metric, saved.best_global_step
        best = self._best_checkpoint()
        self.state.best_model_checkpoint = None if best is None else str(best)
        logged = max((int(entry["step"]) for entry in self.state.log_history if "loss" in entry), default=0)
        for step, records in enumerate(steps, start=1):
            if self._clip is not None:
                width = 2 * self.config.epsilon * len(records)
                self._clip.observe([(r.loss_plus - r.loss_minus) / width for r in records])
            self._asked += self._num_probes * records[0].num_tokens
            self._computed += records[0].computed_tokens
            if step <= logged:
                continue
            self._recent += records
            first = step == 1 and self.config.logging_first_step
            if step < len(steps) and (first or step % self.config.logging_steps == 0):
                entry = {**log_entry(self._recent), **reuse_entry(self._asked, self._computed)}
                self.state.log_history.append(self._dated(entry, step))
                self._recent = []
        self.state.global_step = len(steps)
        self.state.epoch = self.sampler.epoch(len(steps))
        self.state.num_input_tokens_seen = sum(records[0].num_tokens for records in steps)
        self._unfinished_step = saved.global_step < len(steps)

    # --- help -------------------------------------------------------------------------------------------------------

    def _event(self, name: str) -> None:
        self.control = getattr(self.callbacks, name)(self.args, self.state, self.control)

    def _watch_for_flat_losses(self, records: Sequence[Record]) -> None:
        """Says once that many steps in a row saw the same loss on all sides."""
        if self._flat_steps < FLAT_STEPS:
            self._flat_steps = 0 if any(r.coefficient for r in records) else self._flat_steps + 1
            if self._flat_steps == FLAT_STEPS:
                logger.warning(
                    "projected_grad was 0 in %d steps in a row: the losses on all sides are equal and nothing is "
                    "learned; raise epsilon (%g), use dtype float32 or look at the rows",
                    FLAT_STEPS, self.config.epsilon,
                )  # fmt: skip

    def _non_finite_message(self, step: int, finite: list[bool]) -> str:
        rows = [i for i, good in zip(self.sampler(step), finite, strict=True) if not good]
        listed = ", ".join(map(str, rows[:8])) + (" …" if len(rows) > 8 else "")
        shown = ""
        if rows:
            ids = self.train_examples[rows[0]].sequences[0].input_ids
            text = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
            shown = f" Row {rows[0]} begins {' '.join(text.split())[:60]!r}."
        return (
            f"the loss of step {step} is not finite for training rows {listed or '(their mean overflows)'}; the "
            f"weights are those after {step} steps, saved in checkpoint-{step}. Lower learning_rate or epsilon, or "
            f"look at these rows.{shown}"
        )


def make_estimator(config: MeZOConfig) -> Estimator:
    """The estimator that the config names."""
    return ESTIMATORS[config.estimator](config.seed, config.epsilon, config.num_queries)


def log_entry(records: Sequence[Record]) -> dict[str, float]:
    """The log entry of the steps since the last one."""
    last = records[-1]
    return {
        "loss": mean_loss(records),
        "projected_grad": last.coefficient,
        "loss_plus": last.loss_plus,
        "loss_minus": last.loss_minus,
        "learning_rate": last.learning_rate,
    }


def reuse_entry(asked: int, computed: int) -> dict[str, float]:
    """Tokens of all rows under all probes, those that went through the model, and the share that did not."""
    percent = round(100 * (1 - computed / max(asked, 1)), 2)
    return {"tokens_asked": asked, "tokens_computed": computed, "reuse_percent": percent}


def state_json(state: TrainerState) -> str:
    """transformers' own form of trainer_state.json."""
    return json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n"


def mean_loss(records: Sequence[Record]) -> float:
    """Mean of (loss_plus + loss_minus) / 2; NaN for no records."""
    return sum((r.loss_plus + r.loss_minus) / 2 for r in records) / len(records) if records else math.nan
