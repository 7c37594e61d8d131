"""Options of the commands other than `train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Accuracy and loss of a model, or of a model with an adapter.

    Task, template, label words and label column come from the journal beside the adapter or model if they are not
    given.

    Args:
        model_name_or_path: Folder or Hub name of the model.
        dataset_name: File, folder or Hub name of the rows; the task's if not given.
        adapter_name_or_path: Folder of a PEFT adapter for the model.
        task: Task of the paper by name (sst2, rte, squad, …) or a YAML file: data set, split, template, label words.
        num_demonstrations: In-context examples before each prompt: rows of the training split, drawn by seed.
        seed: Seed of what is drawn; for validation_size that of the training (its data_seed, if it had one).
        dataset_config: Configuration of the data set on the Hub.
        dataset_train_split: Split of the in-context examples, and of validation_size.
        dataset_test_split: Split to evaluate; the task's, or validation, test or train, the first there is.
        eval_dataset_name: File, folder or Hub name to evaluate on, if that is another than the in-context examples'.
        validation_size: Evaluate the rows that a training with this option held out (a share below 1, or a number),
            if no others are named.
        max_eval_samples: Evaluate at most that many rows, drawn by seed.
        template: Prompt with the row's columns in braces.
        label_words: Word for each label.
        label_column: Column that holds the label.
        max_length: Longest input in tokens.
        max_new_tokens: Longest generated answer in tokens, where answers are generated.
        reward_funcs: Functions that judge generated texts, as in `mezo train`.
        lm_eval: Tasks of lm-evaluation-harness to evaluate instead, without and with the adapter.
        lm_eval_include_path: Folder with tasks of one's own for it.
        per_device_eval_batch_size: Examples in a forward pass.
        dtype: Weights' type.
        load_in_4bit: Quantise the model's linear layers to 4 bits as it is loaded.
        load_in_8bit: The same to 8 bits.
        use_cpu: Stay on the CPU even if there is a GPU.
        trust_remote_code: Run modelling code that comes with the model.
        json: Print one JSON object instead of a table.
    """

    model_name_or_path: str
    dataset_name: str | None = None
    adapter_name_or_path: str | None = None
    task: str | None = None
    num_demonstrations: int | None = None
    seed: int = 42
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    eval_dataset_name: str | None = None
    validation_size: float = 0.0
    max_eval_samples: int | None = None
    template: str | None = None
    label_words: dict[str, str] | None = None
    label_column: str = "label"
    max_length: int | None = None
    max_new_tokens: int = 50
    reward_funcs: list[str] | None = None
    lm_eval: list[str] | None = None
    lm_eval_include_path: str | None = None
    per_device_eval_batch_size: int = 64
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    use_cpu: bool = False
    trust_remote_code: bool = False
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Rebuilds the trained weights of RUN from the base model and the journal alone: `mezo replay RUN --output_dir W`.

    Args:
        run: Folder of the run, or its journal.
        output_dir: Folder for the weights; must not exist.
        model_name_or_path: The base model, if it has moved since.
        step: Apply that many steps; as many as the run's final weights hold if not given.
        trust_remote_code: Run modelling code that comes with the model.
    """

    run: str
    output_dir: str
    model_name_or_path: str | None = None
    step: int | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Summary of RUN's journal: settings, steps, losses, tokens computed and reused.

    Args:
        run: Folder of the run, or its journal.
        json: Print one JSON object instead of a table.
    """

    run: str
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What ails RUN: findings from its journal and log, with numbers and next steps: `mezo doctor RUN`.

    Args:
        run: Folder of the run, or its journal; it may still be training.
        json: Print one JSON object a line, a finding each, instead of a list.
    """

    run: str
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Plots runs side by side: losses, evaluations, projected_grad, speed; as a PNG and as one HTML file.

    Args:
        runs: Folders of the runs, or their journals.
        output: Where the PNG goes; the HTML file beside it. plot.png in the first run's folder if not given.
        format: What is written.
    """

    runs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]", help_behavior_hint="(required)")
    ]
    output: str | None = None
    format: Literal["png", "html", "both"] = "both"


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Adds a LoRA adapter to its base model's weights and saves a transformers model.

    Args:
        adapter_name_or_path: Folder of the adapter.
        output_dir: Folder for the model; must not exist.
        model_name_or_path: The base model, if it has moved since.
    """

    adapter_name_or_path: str
    output_dir: str
    model_name_or_path: str | None = None


@dataclass(frozen=True, kw_only=True)
class PresetsOptions:
    """No options."""


@dataclass(frozen=True)
class TuneOptions:
    """Tries learning rates and epsilons in short runs, of which the better ones go on; prints what to run next.

    Args:
        learning_rates: Candidates; the preset's if there is one, else four around learning_rate, half a decade apart.
        epsilons: Candidates; epsilon alone if not given.
        rounds: Rounds of successive halving; 1 trains every candidate to the end.
        reduction: One of so many candidates goes on after a round, and the next round has so many times the steps.
    """

    learning_rates: tuple[float, ...] = ()
    epsilons: tuple[float, ...] = ()
    rounds: int = 3
    reduction: int = 3
