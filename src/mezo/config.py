"""One flat, frozen configuration with Hugging Face's names, and the paper's settings as presets."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from mezo import auto
from mezo.errors import UserError
from mezo.names import unknown_key_message

_Config = TypeVar("_Config")


def _refuses_auto(cls: type[_Config]) -> type[_Config]:
    """Has the constructor refuse method auto without all that it sets: defaults would hide what is named."""
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: _Config, **named: object) -> None:
        if named.get("method") == "auto" and not named.keys() >= set(auto.OPTIONS):
            raise UserError("method auto is resolved by MeZOConfig.from_dict, not by MeZOConfig: use that")
        init(self, **named)

    cls.__init__ = checked  # type: ignore[method-assign, assignment]
    return cls


@_refuses_auto
@dataclass(frozen=True, kw_only=True)
class MeZOConfig:
    """Everything that decides a run. Defaults are the paper's RoBERTa setting (arXiv 2305.17333, appendix E.3), but for
    `max_steps`, a tenth of its 100,000.

    Args:
        model_name_or_path: Folder or Hub name of a decoder language model or an encoder.
        model_revision: Branch, tag or commit on the Hub.
        dtype: Weights' type: auto, float32, bfloat16 or float16. auto is the checkpoint's on a GPU, float32 on a CPU.
        load_in_4bit: Quantise linear layers of the base model to 4 bits (NF4, by bitsandbytes) as it is loaded; what is
            trained then is an adapter.
        load_in_8bit: The same to 8 bits (LLM.int8(), which rounds activations, too).
        attn_implementation: Attention of transformers: sdpa, eager, …; transformers' choice if not given.
        trust_remote_code: Run modelling code that comes with the model.
        engine: Engine that evaluates the model: torch or sglang.
        sglang_mode: colocate starts SGLang in this process; server uses running ones.
        sglang_server_base_url: Addresses of running servers; rows are split over them.
        sglang_api_key: Key of the servers, also from the environment variable SGLANG_API_KEY. It is written nowhere.
        sglang_admin_api_key: Their admin key, if they have one besides, also from SGLANG_ADMIN_API_KEY.
        sglang_tp_size: GPUs of the engine that is started here.
        sglang_updates: workers writes the adapter inside SGLang; public loads it again at each step by SGLang's own
            calls, which is slow but needs no plugin in the server.
        sglang_engine_args: Further arguments of the engine that is started here, as SGLang names them; values as in
            YAML.
        enable_kv_cache_optimization: Compute once whatever is exactly the same: prefixes that rows share under the same
            perturbation, prompts of an activated LoRA, layers below the first trained one. Off: every row is computed
            whole.
        kv_cache_gb: Memory for what is kept from step to step on the torch engine (prompts' keys and values, hidden
            states below the first trained layer), in GB; the least recently used goes first.
        kv_cache_device: Where that lies: model, beside the weights, or cpu.
        max_memory_gb: GPU memory that this process may take, in GB. Passes that do not fit, into this or into the GPU,
            are cut in halves; the losses stay the same.
        use_cpu: Stay on the CPU even if there is a GPU.
        task: Task of the paper by name (sst2, sst5, snli, mnli, rte, trec, cb, boolq, wsc, wic, multirc, copa, record,
            squad, drop) or a YAML file: gives data set, splits, template, label words and the form of the rows where
            they are not given.
        num_shots: Train on that many rows per label, drawn by seed, and evaluate on as many others of the training
            split (k-shot, as in LM-BFF).
        num_demonstrations: In-context examples before each prompt at evaluation: training rows, drawn by seed.
        dataset_name: jsonl, json, csv or parquet file, folder of such files, or Hub name.
        dataset_config: Configuration of the data set on the Hub (`sst2` of `glue`, say).
        dataset_train_split: Split to train on.
        dataset_test_split: Split to evaluate on.
        eval_dataset_name: File, folder or Hub name to evaluate on, if that is another than dataset_name.
        validation_size: Rows held out of the training split by seed: a share below 1, or a number of rows.
        max_train_samples: Train on at most that many rows, drawn by seed.
        max_eval_samples: Evaluate on at most that many rows, drawn by seed.
        template: Prompt with the row's columns in braces, `{text} It was [MASK].`; [MASK] stands for the mask token.
        label_words: Word for each label, `{"0": "terrible", "1": "great"}`.
        label_column: Column that holds the label.
        train_as_classification: On a decoder, train the cross-entropy over the options; off: the cross-entropy of the
            right option's tokens alone (teacher forcing). On, if the task does not say otherwise.
        objective: What is trained: loss, the cross-entropy; or, without any gradient, accuracy over the options, f1 or
            exact_match of generated answers, reward of generated texts.
        reward_funcs: Functions of objective reward, `package.module.function` or `file.py:function`, with TRL's
            signature: function(prompts, completions, **columns) returns a number for each completion.
        reward_weights: Their weights in the sum; 1 each if not given.
        max_length: Longest input in tokens; the model's context if not given.
        max_new_tokens: Longest generated answer in tokens, where answers are generated.
        use_peft: Train an adapter instead of all parameters.
        peft_type: Kind of adapter: lora or prefix_tuning.
        lora_r: Rank of LoRA.
        lora_alpha: LoRA's update is multiplied by lora_alpha / lora_r.
        lora_target_modules: Names of the linear modules that get an adapter; queries and values if not given.
        lora_variant: lora, or alora: the adapter acts from the invocation tokens on, so that the prompt before them is
            the base model's and is computed once for all steps.
        alora_invocation_tokens: Token ids whose last occurrence switches an activated LoRA on, as in PEFT; if not
            given, what all training prompts end with, at most 16 tokens.
        trainable_layers: Train only these: `last:4` is the last four layers and the norm or classification head above
            them, `last:1/3` the last third; anything else is a regular expression over parameter names. Layers below
            are computed once per row.
        num_virtual_tokens: Length of the prefix.
        method: mezo is what the options say, as published if they say nothing; auto sets estimator, optimizer,
            directions, epsilon and learning rate as measurements chose them for all parameters (dense or low-rank
            directions), upper layers or LoRA, wherever an option is not named (see docs/methods.md). It is resolved by
            `from_dict`, `mezo_finetune` and the command line, which know what is named.
        output_dir: Folder of the run: journal, checkpoints, final weights, trainer_state.json.
        max_steps: Steps to train.
        per_device_train_batch_size: Examples in a forward pass.
        gradient_accumulation_steps: Batches of that size in a step.
        per_device_eval_batch_size: Examples in a forward pass of the evaluation.
        learning_rate: The highest learning rate; constant unless lr_scheduler_type says otherwise.
        head_init: The layer that feeds a fresh classification head through tanh (BERT's pooler, the dense layer of
            RoBERTa's head): centered makes it subtract the mean hidden state, random leaves transformers' values.
        head_learning_rate: Learning rate of a fresh classification head; learning_rate if not given. z of the head is
            drawn wider by the square root of their ratio, so that one projected_grad serves both.
        weight_decay: Decoupled weight decay; biases and norms are skipped.
        epsilon: Half the distance between the two evaluations, in units of z.
        estimator: From losses to a direction's coefficient: spsa, as published; fzoo, one-sided and scaled by the
            losses' standard deviation; 1.5-spsa, scaled by curvature; es, by ranks. See `mezo.estimator`.
        num_queries: Directions in a step. spsa and es evaluate each on both sides.
        clip_quantile: Limit |projected_grad| of spsa to this quantile of the values before; off if not given.
        clip_window: How many values before.
        optim: sgd; momentum (the mean of past estimates, decaying) or adam where the state is small: adapters, and
            low-rank directions, whose state starts anew with each window; muon, which orthogonalises a subspace's
            momentum.
        momentum: Decay of momentum, muon's too.
        adam_beta1: Decay of Adam's first moment.
        adam_beta2: Decay of its second moment.
        adam_epsilon: Added to the root of the second moment.
        lr_scheduler_type: constant, linear or cosine, down to 0 at max_steps.
        warmup_steps: Steps in which the learning rate grows from 0.
        direction: What z of a matrix is when all parameters are trained: dense, every entry drawn, as published; or
            low_rank, U Vᵀ / √r with V held for a window of steps (LOZO, arXiv 2410.07698), whose entries have variance
            1 too; or subspace, U Z Vᵀ / r with U and V held (SubZero, arXiv 2410.08989), made for many queries and
            adam. Vectors are dense in all.
        direction_rank: r of low_rank and subspace.
        direction_refresh_steps: Steps of a window of theirs; weights are written once a window.
        normalize_perturbations: Scale z of each tensor to unit norm. The learning rate must grow by about ‖z‖², that
            is the tensor's number of elements, to move the weights as before, and epsilon by ‖z‖.
        seed: Seed of directions, data order, splits and fresh parameters.
        data_seed: Another seed for the data order and splits.
        logging_steps: Steps between two log entries.
        logging_first_step: Log the first step too.
        eval_steps: Steps between two evaluations; only at the end if not given.
        eval_on_start: Evaluate before the first step too.
        save_steps: Steps between two checkpoints.
        save_total_limit: Checkpoints to keep; the best one is always kept.
        load_best_model_at_end: Make the best checkpoint the final result.
        metric_for_best_model: Evaluation metric that decides which checkpoint is the best: loss, accuracy, f1,
            exact_match or reward. Checkpoints are evaluated where eval_steps is given.
        resume_from_checkpoint: Go on with the run in output_dir, if there is one, where its journal ends.
        push_to_hub: Upload the finished run to the Hub, with the account of `hf auth login` or HF_TOKEN.
        hub_model_id: Its repository; the name of output_dir if not given.
        hub_private_repo: Whether a new repository is private; the account's default if not given.
        report_to: Trackers as in transformers: none, tensorboard, wandb, trackio, …
        run_name: Name of the run for the trackers.
        disable_tqdm: Show no progress bar.
    """

    model_name_or_path: str
    model_revision: str = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    engine: Literal["torch", "sglang"] = "torch"
    use_cpu: bool = False
    max_memory_gb: float | None = None

    sglang_mode: Literal["colocate", "server"] = "colocate"
    sglang_server_base_url: list[str] | None = None
    sglang_api_key: str | None = None
    sglang_admin_api_key: str | None = None
    sglang_tp_size: int = 1
    sglang_updates: Literal["workers", "public"] = "workers"
    sglang_engine_args: dict[str, str] | None = None
    enable_kv_cache_optimization: bool = True
    kv_cache_gb: float = 4.0
    kv_cache_device: Literal["model", "cpu"] = "model"

    task: str | None = None
    num_shots: int | None = None
    num_demonstrations: int | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    eval_dataset_name: str | None = None
    validation_size: float = 0.0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    template: str | None = None
    label_words: dict[str, str] | None = None
    label_column: str = "label"
    train_as_classification: bool | None = None
    objective: Literal["loss", "accuracy", "f1", "exact_match", "reward"] = "loss"
    reward_funcs: list[str] | None = None
    reward_weights: list[float] | None = None
    max_length: int | None = None
    max_new_tokens: int = 50

    use_peft: bool = False
    peft_type: Literal["lora", "prefix_tuning"] = "lora"
    lora_r: int = 8
    lora_alpha: float = 16.0
    lora_target_modules: list[str] | None = None
    lora_variant: Literal["lora", "alora"] = "lora"
    alora_invocation_tokens: list[int] | None = None
    trainable_layers: str | None = None
    num_virtual_tokens: int = 5

    method: Literal["mezo", "auto"] = "mezo"
    output_dir: str = "trainer_output"
    max_steps: int = 10_000
    per_device_train_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    per_device_eval_batch_size: int = 64
    learning_rate: float = 1e-6
    head_init: Literal["centered", "random"] = "centered"
    head_learning_rate: float | None = None
    weight_decay: float = 0.0
    epsilon: float = 1e-3
    estimator: Literal["spsa", "fzoo", "1.5-spsa", "es"] = "spsa"
    num_queries: int = 1
    clip_quantile: float | None = None
    clip_window: int = 100
    optim: Literal["sgd", "momentum", "adam", "muon"] = "sgd"
    momentum: float = 0.9
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    direction: Literal["dense", "low_rank", "subspace"] = "dense"
    direction_rank: int = 2
    direction_refresh_steps: int = 50
    normalize_perturbations: bool = False
    seed: int = 42
    data_seed: int | None = None

    logging_steps: int = 100
    logging_first_step: bool = True
    eval_steps: int | None = None
    eval_on_start: bool = False
    save_steps: int = 500
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = False
    metric_for_best_model: Literal["loss", "accuracy", "f1", "exact_match", "reward"] = "loss"
    resume_from_checkpoint: bool = False
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    report_to: str = "none"
    run_name: str | None = None
    disable_tqdm: bool = False

    def __post_init__(self) -> None:
        if self.label_words is not None:
            words = {label_key(key): str(word) for key, word in self.label_words.items()}
            object.__setattr__(self, "label_words", words)
        for wrong, message in (*self._numbers(), *self._combinations()):
            if wrong:
                raise UserError(message)

    def _numbers(self) -> Iterator[tuple[bool, str]]:
        """What each number must be, and whether it is not."""
        for name in _POSITIVE:
            value = getattr(self, name)
            wrong = value is not None and not (math.isfinite(value) and value > 0)
            yield wrong, f"{name} must be a positive number, got {value}"
        for name in _COUNTS:
            value = getattr(self, name)
            yield value is not None and value < 1, f"{name} must be at least 1, got {value}"
        for name in ("momentum", "adam_beta1", "adam_beta2"):
            yield not 0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), got {getattr(self, name)}"
        decay, size, quantile = self.weight_decay, self.validation_size, self.clip_quantile
        yield not (math.isfinite(decay) and decay >= 0), f"weight_decay must be 0 or more, got {decay}"
        yield self.warmup_steps < 0, f"warmup_steps must be 0 or more, got {self.warmup_steps}"
        yield not 0 <= self.seed < 2**63, f"seed must lie in [0, 2**63), got {self.seed}"
        yield (
            size < 0 or (size >= 1 and size % 1 != 0),
            f"validation_size must be a share below 1 or a whole number of rows, got {size}",
        )
        yield quantile is not None and not 0 < quantile <= 1, f"clip_quantile must be above 0, up to 1; got {quantile}"

    def _combinations(self) -> Iterator[tuple[bool, str]]:
        """What does not go together."""
        low_rank, lora = self.direction != "dense", self.use_peft and self.peft_type == "lora"
        yield (
            self.num_shots is not None and self.validation_size != 0,
            "num_shots draws rows to evaluate on by itself; leave out validation_size",
        )
        yield self.load_in_4bit and self.load_in_8bit, "load_in_4bit and load_in_8bit: name one of them"
        yield (
            self.bits is not None and self.engine == "sglang",
            "load_in_4bit and load_in_8bit are for engine torch; SGLang's own options go by sglang_engine_args",
        )
        yield self.lora_variant == "alora" and not lora, "lora_variant alora needs use_peft with peft_type lora"
        yield self.alora_invocation_tokens == [], "alora_invocation_tokens is empty"
        yield (
            self.estimator in ("fzoo", "es") and self.num_queries < 2,
            f"estimator {self.estimator} compares directions: num_queries must be at least 2",
        )
        yield (
            self.clip_quantile is not None and self.estimator != "spsa",
            f"clip_quantile is for estimator spsa; {self.estimator} scales its coefficients itself",
        )
        yield (
            self.optim != "sgd" and not (self.use_peft or low_rank),
            f"optim {self.optim} keeps a state as large as the weights; it is for adapters and directions of low rank",
        )
        yield (
            self.optim == "muon" and self.direction != "subspace",
            "optim muon orthogonalises the r x r matrices of a subspace; it needs direction subspace",
        )
        yield self.optim != "sgd" and self.engine == "sglang", f"optim {self.optim} needs engine torch"
        yield (
            (self.objective == "reward") != bool(self.reward_funcs),
            "objective reward and reward_funcs go together: name both",
        )
        yield (
            self.objective in GENERATING and self.lora_variant == "alora",
            f"objective {self.objective} generates answers, which lora_variant alora cannot",
        )
        yield (
            low_rank and self.use_peft,
            f"direction {self.direction} is for all parameters; an adapter is of low rank already",
        )
        yield low_rank and self.normalize_perturbations, "normalize_perturbations needs direction dense"

    @property
    def bits(self) -> int | None:
        """To how many the base model's linear layers are quantised as it is loaded, if they are."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else None

    @property
    def batch_size(self) -> int:
        """Examples in a step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def to_dict(self) -> dict[str, object]:
        """All fields, JSON-compatible."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> MeZOConfig:
        """The config of `to_dict`, or of the options that are named; method auto sets others beside them.

        Raises:
            UserError: an unknown key, with the nearest valid one; values or combinations that cannot work.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise UserError(unknown_key_message(key, names))
        hints = get_type_hints(cls)
        named: dict[str, Any] = {key: coerced(key, value, hints[key]) for key, value in values.items()}
        if named.get("method") == "auto":
            named = {**{key: getattr(cls, key) for key in auto.OPTIONS}, **auto.resolved(named)}
        return cls(**named)


def coerced(name: str, value: object, hint: object) -> Any:
    """The value as the type of its option: numbers written as text become numbers (YAML reads 1e-6 as text)."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    (wanted,) = (option for option in options if option is not type(None))
    if get_origin(wanted) is Literal:
        if value in get_args(wanted):
            return value
        raise UserError(f"{name} must be one of {', '.join(map(str, get_args(wanted)))}, got {value!r}")
    if get_origin(wanted) is dict and isinstance(value, Mapping):
        return {label_key(key): str(word) for key, word in value.items()}
    if get_origin(wanted) is list and isinstance(value, Sequence):
        (kind,) = get_args(wanted)
        entries = [value] if isinstance(value, str) else value
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return [kind(entry) for entry in entries]
    if wanted is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return float(value)  # type: ignore[arg-type]
    if isinstance(wanted, type) and type(value) is wanted:
        return value
    shown = "something else" if name.endswith("api_key") else repr(value)
    raise UserError(f"{name} must be {getattr(wanted, '__name__', wanted)}, got {shown}")


def looks_like_wrong_rate(config: MeZOConfig) -> str | None:
    """A warning when learning rate and normalisation belong to different settings, else None."""
    rate = config.learning_rate
    if config.normalize_perturbations and rate <= 1e-5:
        return (
            f"learning_rate {rate:g} belongs to unnormalised directions; with normalize_perturbations z of a tensor is "
            "shorter by the square root of its size, and rates of about 1e-3 are usual"
        )
    adapter = config.use_peft
    if config.method == "auto" or config.estimator in ("fzoo", "es"):
        return None  # rates that belong to other estimators than the paper's
    if not config.normalize_perturbations and rate >= (1e-1 if adapter else 1e-3):
        return (
            f"learning_rate {rate:g} is far above the paper's for unnormalised directions (1e-6; adapters 1e-4 to 1e-2)"
        )
    return None


def looks_like_rate_of_all_parameters(config: MeZOConfig) -> str | None:
    """A warning when an adapter is trained at a rate of all parameters, with which it hardly moves, else None."""
    published = (config.estimator, config.optim, config.normalize_perturbations) == ("spsa", "sgd", False)
    if not config.use_peft or not published or config.method == "auto" or config.learning_rate >= 5e-6:
        return None
    return (
        f"learning_rate {config.learning_rate:g} is one of all parameters; the paper trains LoRA with 1e-5 to 1e-4, "
        "prefixes with 1e-3 to 1e-2 (--method auto and mezo tune find one)"
    )


def does_nothing(config: MeZOConfig, *, evaluates: bool) -> str | None:
    """A warning about options that are named and have no effect in this run, else None.

    Args:
        config: the run.
        evaluates: whether it has rows to evaluate on.
    """
    for names, wanted, there in (
        (_OF_ADAPTERS, "use_peft; all parameters are trained", config.use_peft or config.engine == "sglang"),
        (_OF_EVALUATION, "rows to evaluate on (validation_size holds some out)", evaluates),
    ):
        named = [name for name in names if getattr(config, name) != getattr(MeZOConfig, name, None)]
        if named and not there:
            return f"{', '.join(named)} {'do' if len(named) > 1 else 'does'} nothing without {wanted}"
    return None


_OF_ADAPTERS = ("peft_type", "lora_r", "lora_alpha", "lora_target_modules", "num_virtual_tokens")
_OF_EVALUATION = ("eval_steps", "eval_on_start", "load_best_model_at_end", "max_eval_samples", "num_demonstrations")
GENERATING = ("f1", "exact_match", "reward")  # objectives
_POSITIVE = (
    "learning_rate", "head_learning_rate", "epsilon", "lora_alpha", "kv_cache_gb", "max_memory_gb", "adam_epsilon",
)  # fmt: skip
_COUNTS = (
    "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size",
    "lora_r", "num_virtual_tokens", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "max_length",
    "max_train_samples", "max_eval_samples", "num_shots", "num_demonstrations", "max_new_tokens", "sglang_tp_size",
    "direction_rank", "direction_refresh_steps", "num_queries", "clip_window",
)  # fmt: skip


def label_key(value: object) -> str:
    """The name under which a label value appears in `label_words`: 1, 1.0 and "1" are "1", True is "True"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


AUTO_OR_PRESET = "method auto and a preset both choose learning rate and options; leave one of them out"


@dataclass(frozen=True)
class Preset:
    """A setting of the paper: the learning rates it searches, and config values to start from."""

    source: str
    learning_rates: tuple[float, ...]
    values: Mapping[str, object]

    def config(self, **values: object) -> MeZOConfig:
        """A config from this preset; `values` win over it. Starts from the middle of the learning-rate grid.

        Raises:
            UserError: as `MeZOConfig.from_dict`; or `values` have method auto.
        """
        if values.get("method") == "auto":
            raise UserError(AUTO_OR_PRESET)
        middle = sorted(self.learning_rates)[len(self.learning_rates) // 2]
        return MeZOConfig.from_dict({"learning_rate": middle, **self.values, **values})


_ROBERTA = {"per_device_train_batch_size": 64, "max_steps": 100_000, "eval_steps": 10_000}
_OPT = {"per_device_train_batch_size": 16, "max_steps": 20_000, "eval_steps": 4_000}
_LORA = {"use_peft": True, "peft_type": "lora", "lora_r": 8, "lora_alpha": 16.0}
_PREFIX = {"use_peft": True, "peft_type": "prefix_tuning", "num_virtual_tokens": 5, "epsilon": 1e-1}
_TABLE_ROBERTA = "MeZO, arXiv 2305.17333v3, table 15 (RoBERTa-large)"
_TABLE_OPT = "MeZO, arXiv 2305.17333v3, table 16 (OPT)"

PRESETS: Mapping[str, Preset] = {
    "roberta-full": Preset(_TABLE_ROBERTA, (1e-7, 1e-6, 1e-5), {**_ROBERTA, "epsilon": 1e-3, "weight_decay": 0.0}),
    "roberta-lora": Preset(
        _TABLE_ROBERTA, (1e-5, 5e-5, 1e-4), {**_ROBERTA, **_LORA, "epsilon": 1e-3, "weight_decay": 0.1}
    ),
    "roberta-prefix": Preset(_TABLE_ROBERTA, (1e-3, 5e-3, 1e-2), {**_ROBERTA, **_PREFIX, "weight_decay": 0.0}),
    "opt-full": Preset(_TABLE_OPT, (1e-7, 1e-6), {**_OPT, "epsilon": 1e-3, "weight_decay": 0.0}),
    "opt-lora": Preset(_TABLE_OPT, (5e-5, 1e-4), {**_OPT, **_LORA, "epsilon": 1e-2, "weight_decay": 0.0}),
    "opt-prefix": Preset(_TABLE_OPT, (1e-3, 1e-2), {**_OPT, **_PREFIX, "weight_decay": 0.0}),
}


def preset(name: str) -> Preset:
    """The paper's setting of that name, one of `PRESETS`."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
