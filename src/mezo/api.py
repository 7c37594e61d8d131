"""From a config to a running trainer, and the operations of the command line as functions."""

from __future__ import annotations

import dataclasses
import logging
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from mezo import checkpoint, journal
from mezo.activation import activate, invocation_tokens
from mezo.adapter import add_adapter
from mezo.auto import size_warning
from mezo.blackbox import RewardFunction, Rewards, load_reward, make_rewards, reward_names
from mezo.config import (
    GENERATING,
    MeZOConfig,
    does_nothing,
    looks_like_rate_of_all_parameters,
    looks_like_wrong_rate,
)
from mezo.data import (
    Row,
    TrainData,
    data_seed,
    draw_demonstrations,
    evaluates_held_out,
    load_demonstrations,
    load_splits,
    load_test_rows,
)
from mezo.encoding import make_encoder
from mezo.engines.base import Engine
from mezo.engines.torch.engine import TorchEngine, trained_parameters
from mezo.engines.torch.layers import trainable_names
from mezo.engines.torch.loading import (
    LoadedModel,
    is_encoder,
    is_quantised,
    load_model,
    load_model_config,
    load_tokenizer,
    with_safetensors,
)
from mezo.engines.torch.optimizer import make_optimizer
from mezo.errors import JournalError, UserError
from mezo.evaluation import Metrics, evaluate
from mezo.fingerprint import checkpoint_digest, hub_file
from mezo.header import make_header
from mezo.objective import Example
from mezo.tasks import load_task
from mezo.trainer import MeZOTrainer, TrainResult, make_estimator, mean_loss, reuse_entry

logger = logging.getLogger(__name__)
# Defaults of `mezo_finetune`, objects of their own: method auto knows by identity what a caller has not named.
_LEARNING_RATE, _EPSILON = float("1e-6"), float("1e-3")


def mezo_finetune(
    model_path: str,
    train_dataset: TrainData | None = None,
    learning_rate: float = _LEARNING_RATE,
    batch_size: int = 64,
    num_steps: int = 10_000,
    epsilon: float = _EPSILON,
    normalize_perturbations: bool = False,
    lora_rank: int | None = None,
    weight_decay: float = 0.0,
    engine: str = "torch",
    output_dir: str | Path = "trainer_output",
    seed: int = 42,
    eval_dataset: TrainData | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    reward_funcs: RewardFunction | str | Sequence[RewardFunction | str] = (),
    **options: object,
) -> TrainResult:
    """Fine-tunes a language model with forward passes only. Defaults are the paper's RoBERTa setting but for num_steps.

    Args:
        model_path: folder or Hub name of a decoder language model or an encoder.
        train_dataset: file, Hub name, list of rows or `datasets.Dataset`; not needed with `task`.
        learning_rate: constant learning rate of SGD, 1e-6; with `method="auto"` the measured one if not given.
        batch_size: examples per step.
        num_steps: steps; each is two forward passes.
        epsilon: half the distance between the two evaluations, 1e-3; with `method="auto"` as `learning_rate`.
        normalize_perturbations: scale z of each tensor to unit norm.
        lora_rank: train LoRA of this rank (alpha 16) instead of all parameters.
        weight_decay: decoupled; biases and norms are skipped.
        engine: "torch" or "sglang".
        output_dir: the run's folder.
        seed: of directions, data order, splits and fresh parameters.
        eval_dataset: rows to evaluate on, as `train_dataset`.
        callbacks: `transformers.TrainerCallback`s.
        reward_funcs: functions to maximise in place of minimising the loss, TRL's way:
            `reward(prompts, completions, **columns)` returns a number for each completion; or their names, see
            `MeZOConfig`. Rows need a prompt.
        options: further fields of `MeZOConfig`: method, task, template, label_words, eval_steps, …

    Returns:
        Folder of the weights, path of the journal, mean training loss, metrics of the last evaluation.

    Raises:
        UserError: options, data or a model that cannot work.
        JournalError: a journal that does not belong to this run, or is damaged.
        EngineError: SGLang's servers do not answer as they should, or one example does not fit into memory.
        NonFiniteLossError: the loss became NaN or infinite; the last good weights are in a checkpoint.
    """
    named = isinstance(train_dataset, (str, Path))
    values: dict[str, object] = {
        "model_name_or_path": str(model_path),
        "dataset_name": str(train_dataset) if named else None,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "max_steps": num_steps,
        "epsilon": epsilon,
        "normalize_perturbations": normalize_perturbations,
        "weight_decay": weight_decay,
        "engine": engine,
        "output_dir": str(output_dir),
        "seed": seed,
    }
    if options.get("method") == "auto":
        values = {n: value for n, value in values.items() if value is not _LEARNING_RATE and value is not _EPSILON}
    if lora_rank is not None:
        values |= {"use_peft": True, "lora_r": lora_rank, "lora_alpha": 16.0}
    named_funcs = [reward_funcs] if callable(reward_funcs) or isinstance(reward_funcs, str) else list(reward_funcs)
    functions = [load_reward(f) if isinstance(f, str) else f for f in named_funcs]
    if functions:
        values |= {"objective": "reward", "reward_funcs": reward_names(named_funcs)}
    config = MeZOConfig.from_dict({**values, **options})
    rewards = make_rewards(config, functions)
    trainer = build_trainer(config, None if named else train_dataset, eval_dataset, callbacks, rewards=rewards)
    try:
        return trainer.train()
    finally:
        trainer.engine.close()


class Parts(NamedTuple):
    """An engine at its initial weights, and the hash of its base model."""

    engine: Engine
    model_digest: str


def build_trainer(
    config: MeZOConfig,
    train_dataset: TrainData | None = None,
    eval_dataset: TrainData | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    engine: Engine | None = None,
    rewards: Rewards | None = None,
) -> MeZOTrainer:
    """Loads data and model and puts the trainer together.

    Args:
        config: the run.
        train_dataset: wins over the one the config names.
        eval_dataset: the same.
        callbacks: `transformers.TrainerCallback`s.
        engine: an engine at its initial weights, in place of the one that the config describes.
        rewards: in place of those that the config names.

    Raises:
        UserError: options, data or a model that cannot work.
        EngineError: SGLang does not start or its servers do not answer.
    """
    for warning in (looks_like_wrong_rate(config), looks_like_rate_of_all_parameters(config)):
        _warn(warning)
    _check_split(config, train_dataset, eval_dataset)
    config = with_safetensors(config)
    model_config = load_model_config(config)
    tokenizer = load_tokenizer(config)
    encoder_model = is_encoder(model_config)
    if config.engine == "torch":
        check_movable(config, model_config)
    task = load_task(config.task) if config.task is not None else None
    if task is not None:
        test_split = reports_on_test_split(config, train_dataset, eval_dataset)
        if test_split and config.load_best_model_at_end:
            logger.warning(
                "the best checkpoint is chosen by the rows that task %s reports on; validation_size holds others out",
                config.task,
            )
        config = task.fill_in(config, encoder_model=encoder_model, test_split=test_split)
    splits = load_splits(config, train_dataset, eval_dataset, task)
    train_rows: list[Row] = list(splits.train)
    encoder = make_encoder(train_rows, config, model_config, tokenizer, encoder_model=encoder_model, training=True)
    train_examples = encoder(train_rows)
    _check_objective(config, train_examples)
    _check_balance(encoder.labels, train_examples)
    eval_examples: list[Example] | None = None
    if splits.evaluation is not None:
        _check_columns(splits.train, splits.evaluation)
        eval_rows: list[Row] = list(splits.evaluation)
        eval_encoder = make_encoder(
            eval_rows,
            config,
            model_config,
            tokenizer,
            encoder_model=encoder_model,
            labels=encoder.labels,
            demonstrations=draw_demonstrations(config, splits.train),
        )
        eval_examples = _answerable(config, eval_encoder(eval_rows))
    _check_metric(config, eval_examples)
    _warn(does_nothing(config, evaluates=eval_examples is not None))
    if config.lora_variant == "alora":
        tokens = config.alora_invocation_tokens or invocation_tokens(train_examples)
        config = dataclasses.replace(config, alora_invocation_tokens=tokens)
        train_examples = activate(train_examples, tokens)
        eval_examples = activate(eval_examples, tokens) if eval_examples is not None else None
    if engine is None:
        engine, model_digest = _trainable_engine(config, encoder.kind, encoder.labels, tokenizer)
    else:
        model_digest = checkpoint_digest(config.model_name_or_path, config.model_revision)
    if config.method == "auto":
        _check_size(config, engine.num_parameters())
    header = make_header(
        config,
        objective=encoder.name,
        kind=encoder.kind,
        labels=encoder.labels,
        model_digest=model_digest,
        initial_digest=engine.digest(),
        train_examples=train_examples,
    )
    rewards = rewards or make_rewards(config)
    return MeZOTrainer(config, engine, train_examples, eval_examples, header, callbacks, rewards=rewards)


def _warn(warning: str | None) -> None:
    """Of what the caller of `build_trainer` names."""
    if warning is not None:
        warnings.warn(warning, stacklevel=3)


def reports_on_test_split(
    config: MeZOConfig, train: TrainData | None = None, evaluation: TrainData | None = None
) -> bool:
    """Whether a task's test split is evaluated during training: not if other rows are, nor in a single file."""
    if config.num_shots is not None or config.validation_size or config.eval_dataset_name is not None:
        return False
    if config.dataset_test_split is not None:
        return False
    source = train if train is not None else config.dataset_name
    in_splits = source is None or (isinstance(source, (str, Path)) and not Path(source).is_file())
    return evaluation is None and in_splits


def _check_split(config: MeZOConfig, train: TrainData | None, evaluation: TrainData | None) -> None:
    """A single file would be evaluated whole, whatever split is named."""
    source = train if train is not None else config.dataset_name
    named = config.dataset_test_split not in (None, config.dataset_train_split)
    in_file = isinstance(source, (str, Path)) and Path(source).is_file()
    if named and in_file and evaluation is None and config.eval_dataset_name is None:
        raise UserError(
            f"dataset_test_split {config.dataset_test_split!r}: {str(source)!r} is one file, without splits; "
            "validation_size holds rows out, eval_dataset_name names others"
        )


def _check_columns(train: Dataset, evaluation: Dataset) -> None:
    missing = sorted(set(train.column_names) - set(evaluation.column_names))
    if missing:
        raise UserError(f"evaluation rows lack column {missing[0]!r}; found {', '.join(evaluation.column_names)}")


def _check_balance(labels: Sequence[str], examples: Sequence[Example]) -> None:
    """Warns of a label that no training row has, or that nearly all have."""
    counts = Counter(labels[e.label] for e in examples if labels and e.label is not None)
    if not counts:
        return
    missing = [label for label in labels if label not in counts]
    most, count = counts.most_common(1)[0]
    if missing:
        logger.warning("no training row has label %s; the model will hardly ever give it", ", ".join(missing))
    elif count > 0.9 * counts.total():
        logger.warning("%d of %d training rows have label %s; accuracy says little then", count, counts.total(), most)


def _answerable(config: MeZOConfig, examples: list[Example]) -> list[Example]:
    """The examples without their questions where nothing can generate answers."""
    if config.lora_variant != "alora" or all(e.question is None for e in examples):
        return examples
    logger.warning("lora_variant alora generates no answers: evaluation gives loss and accuracy of tokens, no f1")
    return [dataclasses.replace(e, question=None) for e in examples]


def _check_objective(config: MeZOConfig, examples: Sequence[Example]) -> None:
    if config.objective == "accuracy" and any(e.label is None for e in examples):
        raise UserError("objective accuracy needs rows with options: label words, choices or classes")
    if config.objective in GENERATING and any(e.question is None for e in examples):
        wanted = "a prompt" if config.objective == "reward" else "prompt and answers"
        raise UserError(f"objective {config.objective} needs a decoder and rows with {wanted}")


def _check_metric(config: MeZOConfig, examples: Sequence[Example] | None) -> None:
    """Fails before the training, not at its first evaluation."""
    metric = config.metric_for_best_model
    if metric == "reward" and config.objective != "reward":
        raise UserError("metric_for_best_model reward needs objective reward")
    if metric in ("f1", "exact_match") and all(e.question is None for e in examples or ()):
        raise UserError(f"metric_for_best_model {metric} needs evaluation rows with answers to generate")


def check_movable(config: MeZOConfig, model_config: PretrainedConfig) -> None:
    """Fails, before weights are loaded, where quantised ones would be trained."""
    if is_quantised(config, model_config) and not config.use_peft:
        raise UserError("quantised weights cannot take small steps; use_peft trains an adapter on them")


def _check_size(config: MeZOConfig, num_parameters: int) -> None:
    """Warns where method auto's learning rate was measured at other sizes."""
    warning = size_warning(config.to_dict(), num_parameters)
    if warning is not None:
        logger.warning("%s", warning)


def make_engine(
    config: MeZOConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    fresh_modules: Sequence[str] = (),
) -> TorchEngine:
    """The engine of a config around a loaded model; `fresh_modules` are those with a `head_learning_rate`."""
    if config.max_memory_gb is not None:
        limit_memory(config.max_memory_gb, model.device)
    widths: dict[str, float] = {}
    if config.head_learning_rate is not None:
        width = math.sqrt(config.head_learning_rate / config.learning_rate)
        for name in trained_parameters(model):
            if name.removeprefix("base_model.model.").rpartition(".")[0] in fresh_modules:
                widths[name] = width
        if not widths:
            raise UserError("head_learning_rate is given, but the model has no fresh classification head")
    return TorchEngine(
        model,
        tokenizer,
        normalize_perturbations=config.normalize_perturbations,
        widths=widths,
        weight_decay=config.weight_decay,
        train_batch_size=config.per_device_train_batch_size,
        eval_batch_size=config.per_device_eval_batch_size,
        share=config.enable_kv_cache_optimization,
        store_bytes=int(config.kv_cache_gb * 1e9),
        store_device=torch.device("cpu") if config.kv_cache_device == "cpu" else None,
        low_rank=(config.direction_rank, config.direction_refresh_steps) if config.direction != "dense" else None,
        subspace=config.direction == "subspace",
        optimizer=make_optimizer(config),
    )


def limit_memory(gigabytes: float, device: torch.device) -> None:
    """Lets this process take no more than that of the GPU's memory.

    Raises:
        UserError: the model is not on a GPU, or the GPU has less.
    """
    if device.type != "cuda":
        raise UserError("max_memory_gb is the memory of a GPU, but the model is on the CPU")
    total = torch.cuda.get_device_properties(device).total_memory
    if gigabytes * 1e9 > total:
        raise UserError(f"max_memory_gb is {gigabytes}, but the GPU has {total / 1e9:.1f}")
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / total, device)


def _trainable_engine(
    config: MeZOConfig, kind: str, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Parts:
    """The model at its initial values, adapter included, in an engine."""
    model_digest = checkpoint_digest(config.model_name_or_path, config.model_revision)
    if config.engine == "sglang":
        from mezo.engines.sglang.build import build_engine

        num_probes = len(make_estimator(config).probes(0))
        return Parts(build_engine(config, kind, tokenizer, num_probes), model_digest)
    return Parts(trainable_engine(config, kind, load_model(config, kind, labels), tokenizer), model_digest)


def trainable_engine(
    config: MeZOConfig, kind: str, loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase
) -> TorchEngine:
    """An engine that trains what the config says of a loaded base model."""
    base, fresh_modules, centred_module = loaded
    if not config.use_peft:
        names = None if config.trainable_layers is None else set(trainable_names(base, config.trainable_layers))
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and (names is None or name in names))
    model = add_adapter(base, config, kind, fresh_modules, centred_module) if config.use_peft else base
    return make_engine(config, model, tokenizer, fresh_modules)


def replay(
    run: str | Path,
    output_dir: str | Path,
    *,
    model_name_or_path: str | None = None,
    step: int | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Rebuilds trained weights from the base model and the journal alone.

    Args:
        run: folder of a run, or its journal.
        output_dir: folder for the weights; must not exist.
        model_name_or_path: the base model, if it has moved since.
        step: how many steps to apply; if not given, as many as the run's final weights hold.
        trust_remote_code: run modelling code that comes with the model; what the journal says of it does not count.

    Returns:
        `output_dir`.

    Raises:
        UserError: `output_dir` exists, or the journal has fewer steps.
        JournalError: the journal is damaged, or another model or other initial weights than the run's are there.
    """
    path = Path(run) / checkpoint.JOURNAL_NAME if Path(run).is_dir() else Path(run)
    contents = journal.read(path)
    if contents.dropped_bytes:
        logger.warning("left out a torn record of %d bytes at the end of the journal", contents.dropped_bytes)
    config = dataclasses.replace(journal_config(contents), engine="torch", trust_remote_code=trust_remote_code)
    if config.peft_type == "lora":  # whose matrices do not depend on how the base was loaded
        config = dataclasses.replace(config, load_in_4bit=False, load_in_8bit=False)
    if model_name_or_path is not None:
        config = dataclasses.replace(config, model_name_or_path=model_name_or_path)
    count = _final_step(path.parent, config, len(contents.steps)) if step is None else step
    if not 0 <= count <= len(contents.steps):
        raise UserError(f"step {count}: the journal holds steps 0 to {len(contents.steps)}")
    if Path(output_dir).exists():
        raise UserError(f"output_dir {str(output_dir)!r} exists already")
    header = contents.header
    labels: list[str] = header["labels"]  # type: ignore[assignment]
    engine, model_digest = _trainable_engine(config, str(header["kind"]), labels, load_tokenizer(config))
    for key, present in (("model_digest", model_digest), ("initial_digest", engine.digest())):
        if header[key] != present:
            raise JournalError(f"{config.model_name_or_path!r} is not the model of this journal: {key} differs")
    for records in contents.steps[:count]:
        engine.update(records)
    checkpoint.write_folder(Path(output_dir), engine.save)
    return Path(output_dir)


def summary(run: str | Path) -> dict[str, object]:
    """What a run's journal says: settings, steps, losses, and the tokens that were computed and reused.

    Args:
        run: folder of a run, or its journal.

    Returns:
        What `mezo inspect --json` prints: losses in nats an example (of other objectives: what they minimise), tokens
        as numbers, seconds.

    Raises:
        JournalError: the journal is missing or damaged.
    """
    path = Path(run) / checkpoint.JOURNAL_NAME if Path(run).is_dir() else Path(run)
    contents = journal.read(path)
    config, header, steps = journal_config(contents), contents.header, contents.steps
    facts: dict[str, object] = {
        "model": config.model_name_or_path,
        "objective": header["objective"],
        "engine": config.engine,
        "trained": config.lora_variant if config.use_peft and config.peft_type == "lora" else
        config.peft_type if config.use_peft else config.trainable_layers or "all parameters",
        "method": config.method,
        "estimator": f"{config.estimator}, {config.num_queries} {'query' if config.num_queries == 1 else 'queries'}",
        "direction": config.direction,
        "optim": config.optim,
        "learning_rate": config.learning_rate,
        "epsilon": config.epsilon,
        "batch_size": config.batch_size,
        "steps": f"{len(steps)} of {config.max_steps}",
    }  # fmt: skip
    if steps:
        window = max(1, min(100, len(steps) // 2))
        facts["loss, first steps"] = mean_loss([r for records in steps[:window] for r in records])
        facts["loss, last steps"] = mean_loss([r for records in steps[-window:] for r in records])
        asked = len(make_estimator(config).probes(0)) * sum(records[0].num_tokens for records in steps)
        facts |= reuse_entry(asked, sum(records[0].computed_tokens for records in steps))
    state_path = path.parent / checkpoint.STATE_NAME
    if state_path.exists():
        history = checkpoint.read_state(state_path, len(steps)).log_history
        logged = [entry["seconds_saved"] for entry in history if "seconds_saved" in entry]
        facts |= {"seconds_saved": logged[-1]} if logged else {}
    return facts


def journal_config(contents: journal.Contents) -> MeZOConfig:
    """The config that a journal's run was started with."""
    recorded = contents.header["config"]
    assert isinstance(recorded, dict)
    return MeZOConfig.from_dict(recorded)


def _final_step(run: Path, config: MeZOConfig, num_steps: int) -> int:
    """With `load_best_model_at_end` the final weights are those of the best step, which only the state file names."""
    state_path = run / checkpoint.STATE_NAME
    if config.load_best_model_at_end and state_path.exists():
        return checkpoint.read_state(state_path, num_steps).best_global_step or num_steps
    return num_steps


def eval_model(config: MeZOConfig, adapter: str | Path | None = None, dataset: TrainData | None = None) -> Metrics:
    """Evaluates a model, or a model with an adapter, on the rows that the config names.

    What the config leaves open (task, template, label words, label column, length) is taken from the journal beside the
    adapter or the model, if there is one; what is open then, from the task.

    Args:
        config: model, rows, batch size and dtype.
        adapter: folder of a PEFT adapter for the model.
        dataset: rows in place of those that the config names.

    Returns:
        Mean loss in nats an example, accuracy, and F1 and exact match or reward where answers are generated.

    Raises:
        UserError: options, data or a model that cannot work.
    """
    journal_path = Path(adapter or config.model_name_or_path) / checkpoint.JOURNAL_NAME
    labels: Sequence[str] | None = None
    recorded: MeZOConfig | None = None
    if journal_path.exists():
        contents = journal.read(journal_path)
        recorded = journal_config(contents)
        config = _filled_in(config, recorded)
        labels = contents.header["labels"] or None  # type: ignore[assignment]
    config = with_safetensors(config)
    model_config = load_model_config(config)
    if labels is None and any("ForSequenceClassification" in a for a in model_config.architectures or ()):
        labels = [model_config.id2label[i] for i in range(model_config.num_labels)]
    tokenizer = load_tokenizer(config)
    encoder_model = is_encoder(model_config)
    task = load_task(config.task) if config.task is not None else None
    if task is not None:
        own_rows = dataset is not None or config.eval_dataset_name is not None or config.validation_size > 0
        config = task.fill_in(config, encoder_model=encoder_model, test_split=not own_rows)
    if recorded is not None and recorded.bits is not None and config.bits is None:
        logger.warning("the run trained on quantised weights; --load_in_%dbit evaluates on them", recorded.bits)
    if recorded is not None and dataset is None:
        _warn_of_rows(config, recorded)
    rows: list[Row] = list(load_test_rows(config, dataset, task))
    encoder = make_encoder(
        rows,
        config,
        model_config,
        tokenizer,
        encoder_model=encoder_model,
        labels=labels,
        demonstrations=load_demonstrations(config, dataset, task),
    )
    examples = encoder(rows)
    loaded = load_model(config, encoder.kind, encoder.labels)
    model: PreTrainedModel | PeftModel = loaded.model
    if loaded.fresh_modules and adapter is None:
        raise UserError(
            f"{config.model_name_or_path!r} has no trained classification head; with template and label_words its own "
            "head reads the label"
        )
    if adapter is not None:
        model = load_adapter(model, adapter)
        tokens = getattr(model.peft_config["default"], "alora_invocation_tokens", None)
        if tokens:
            examples = activate(examples, tokens)
    return evaluate(make_engine(config, model, tokenizer), examples, config.max_new_tokens, make_rewards(config))


def _warn_of_rows(config: MeZOConfig, recorded: MeZOConfig) -> None:
    """Where those to evaluate are of the data that the run trained on, and may be the same."""
    evaluated = config.eval_dataset_name or config.dataset_name
    if evaluated != recorded.dataset_name:
        return
    size = recorded.validation_size
    if evaluates_held_out(config, None):
        same = ("dataset_config", "dataset_train_split", "validation_size")
        if data_seed(config) != data_seed(recorded) or any(getattr(config, n) != getattr(recorded, n) for n in same):
            logger.warning(
                "the run held out other rows: validation_size %g of %s by seed %d",
                size, recorded.dataset_train_split, data_seed(recorded),
            )  # fmt: skip
    elif Path(str(evaluated)).is_file():  # which has no split but the one that was trained on
        advice = f"; --validation_size {size:g} evaluates those that it held out" if size else ""
        logger.warning("%s holds the rows that the run trained on%s", evaluated, advice)


def _filled_in(config: MeZOConfig, recorded: MeZOConfig) -> MeZOConfig:
    fields = ("task", "template", "label_words", "max_length", "train_as_classification")
    values = {name: getattr(recorded, name) for name in fields if getattr(config, name) is None}
    if config.label_column == MeZOConfig.label_column:
        values["label_column"] = recorded.label_column
    return dataclasses.replace(config, **values)


def load_adapter(model: PreTrainedModel, adapter: str | Path) -> PeftModel:
    """A PEFT adapter from a folder on a loaded base model, in eval mode; its parameters are the trained ones."""
    try:
        if hub_file(str(adapter), SAFETENSORS_WEIGHTS_NAME) is None:  # PEFT would look for pickled ones
            if hub_file(str(adapter), "config.json") is not None:
                raise UserError(f"adapter_name_or_path {str(adapter)!r} is a whole model: name it model_name_or_path")
            if not Path(adapter).is_dir():
                raise UserError(f"adapter_name_or_path {str(adapter)!r}: no folder of that name, none found on the Hub")
            raise UserError(
                f"adapter_name_or_path {str(adapter)!r}: no {SAFETENSORS_WEIGHTS_NAME}; pickled weights "
                "(adapter_model.bin) can run code and are not loaded"
            )
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True).eval()
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"adapter_name_or_path {str(adapter)!r}: {str(error).splitlines()[0]}") from None


def merge(adapter: str | Path, output_dir: str | Path, *, model_name_or_path: str | None = None) -> Path:
    """Adds a LoRA adapter to its base model's weights and saves a transformers model.

    Args:
        adapter: folder of the adapter.
        output_dir: folder for the model; must not exist.
        model_name_or_path: the base model, if it has moved since.

    Returns:
        `output_dir`.

    Raises:
        UserError: `output_dir` exists, there is no adapter, or it is not LoRA.
    """
    if Path(output_dir).exists():
        raise UserError(f"output_dir {str(output_dir)!r} exists already")
    if Path(adapter).is_dir() and not (Path(adapter) / CONFIG_NAME).exists():  # PEFT would ask the Hub
        what = "is a whole model" if (Path(adapter) / "config.json").exists() else f"has no {CONFIG_NAME}"
        raise UserError(f"no adapter in {str(adapter)!r}: it {what}")
    try:
        peft_config = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError) as error:
        raise UserError(f"no adapter in {str(adapter)!r}: {str(error).splitlines()[0]}") from None
    if peft_config.peft_type != "LORA":
        raise UserError(f"a {peft_config.peft_type} adapter cannot be merged into weights; only LoRA can")
    base = model_name_or_path or peft_config.base_model_name_or_path
    assert base is not None
    config = MeZOConfig(model_name_or_path=base)
    kinds = {"CAUSAL_LM": "causal_lm", "FEATURE_EXTRACTION": "masked_lm", "SEQ_CLS": "sequence_classification"}
    journal_path = Path(adapter) / checkpoint.JOURNAL_NAME
    labels: Sequence[str] = ()
    if journal_path.exists():
        contents = journal.read(journal_path)
        labels = contents.header["labels"]  # type: ignore[assignment]
        config = dataclasses.replace(config, dtype=journal_config(contents).dtype)
    model = load_model(config, kinds[str(peft_config.task_type)], labels).model
    if is_quantised(config, model.config):
        raise UserError(f"{base!r} is quantised: an adapter added to it would be rounded; serve it beside the model")
    merged = load_adapter(model, adapter).merge_and_unload()
    tokenizer = load_tokenizer(config)

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    checkpoint.write_folder(Path(output_dir), write)
    return Path(output_dir)
