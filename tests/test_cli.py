"""The command line end to end: train, eval, replay, merge, presets, env; precedence of options; start-up time."""

import json
import logging
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from mezo import cli, journal
from mezo.config import PRESETS, MeZOConfig
from mezo.errors import UserError
from tests.conftest import SENTIMENT_ROWS

LABEL_WORDS = ("--label_words", "0", "terrible", "1", "great")
MASKED = ("--template", "{text} it was [MASK] .", *LABEL_WORDS)
PROMPTED = ("--template", "{text} it was", *LABEL_WORDS)
LORA = ("--use_peft", "--lora_r", 4, "--learning_rate", 3e-2)
FULL = ("--learning_rate", 5e-4)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from more, and on a busy machine threads waiting for each other are 50 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Finished(NamedTuple):
    """What a command left: exit status and text."""

    status: int
    out: str
    err: str


def run_cli(capsys, *arguments):
    """`mezo ARGUMENTS` in this process, which is left as it was: the command quietens loggers and progress bars."""
    logger = logging.getLogger("mezo")
    before, level = (logger.handlers, logger.propagate), logger.level
    logger.handlers = []
    capsys.readouterr()
    status = 0
    try:
        with warnings.catch_warnings():
            cli.main([str(a) for a in arguments])
    except SystemExit as exit_request:
        status = int(exit_request.code or 0)
    finally:
        logger.handlers, logger.propagate = before
        logger.setLevel(level)
        transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity_warning()
        datasets.enable_progress_bars()
        datasets.logging.set_verbosity_warning()
        huggingface_hub.logging.set_verbosity_warning()
    return Finished(status, *capsys.readouterr())


def mezo(capsys, *arguments):
    """A command that must succeed; its standard output."""
    finished = run_cli(capsys, *arguments)
    assert finished.status == 0, finished.err
    return finished.out


def error_line(finished):
    """The message of a command that failed as it should: a status, one line, no traceback."""
    assert finished.status != 0
    assert "Traceback" not in finished.err
    lines = finished.err.splitlines()
    errors = [line for line in lines if line.startswith("mezo: error: ")]
    assert len(errors) == 1, finished.err
    assert lines[-1] == errors[0]
    assert [line for line in lines if not line.startswith("mezo: ")] == []
    return errors[0].removeprefix("mezo: error: ")


def train_arguments(model, data, output_dir, *options, steps=12):
    return (
        "train", "--model_name_or_path", model, "--dataset_name", data, "--output_dir", output_dir,
        "--max_steps", steps, "--per_device_train_batch_size", 8, "--disable_tqdm", *options,
    )  # fmt: skip


def weights(folder):
    (path,) = Path(folder).glob("*model.safetensors")
    return load_file(path)


def assert_same_weights(first, second):
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- start-up ---------------------------------------------------------------------------------------------------------


def test_help_answers_in_half_a_second():
    command = [str(Path(sys.executable).with_name("mezo")), "--help"]
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        seconds.append(time.perf_counter() - started)
    # The limit. The best of five, because the machine may be doing something else during any one of them.
    assert min(seconds) < 0.5, seconds
    for name in ("train", "eval", "replay", "merge", "presets", "env"):
        assert f"\n  {name} " in text


@pytest.mark.parametrize("arguments", [["--help"], ["presets"], ["train", "--help"]], ids=" ".join)
def test_help_and_presets_import_neither_torch_nor_transformers(arguments):
    script = f"""
import sys
from mezo.cli import main
try:
    main({arguments})
except SystemExit as request:
    assert request.code == 0, request.code
print("heavy:", sorted({{"torch", "transformers", "peft", "datasets", "numpy"}} & sys.modules.keys()))
"""
    text = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert text.splitlines()[-1] == "heavy: []"


# --- train, eval, replay, merge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "method"), [("llama", (*PROMPTED, *LORA)), ("bert", (*MASKED, *FULL))], ids=["llama-lora", "bert-full"]
)
def test_train_eval_replay(capsys, model_folder, tmp_path, jsonl, model, method):
    base, run = model_folder(model), tmp_path / "run"
    train, test = jsonl(SENTIMENT_ROWS[:96], "train.jsonl"), jsonl(SENTIMENT_ROWS[96:], "test.jsonl")
    options = (*method, "--eval_dataset_name", test, "--eval_steps", 12)
    said = mezo(capsys, *train_arguments(base, train, run, *options))
    assert f"trained 12 steps, loss {mean_of_losses(run):.4f}: {run}" in said

    # Template, label words and column come from the journal beside the weights.
    where = ("--model_name_or_path", base, "--adapter_name_or_path", run) if "--use_peft" in method else (
        "--model_name_or_path", run)  # fmt: skip
    evaluated = json.loads(mezo(capsys, "eval", *where, "--dataset_name", test, "--json"))
    assert evaluated.keys() == {"accuracy", "loss", "num_examples"}
    assert evaluated["num_examples"] == 32
    (logged,) = [e for e in json.loads((run / "trainer_state.json").read_text())["log_history"] if "eval_loss" in e]
    # Exact: the same weights, rows and batches give the same bits, in whatever process.
    assert (logged["eval_loss"], logged["eval_accuracy"]) == (evaluated["loss"], evaluated["accuracy"])
    table = mezo(capsys, "eval", *where, "--dataset_name", test)
    for text in ("accuracy", "loss", "examples", f"{evaluated['accuracy']:.4f}", f"{evaluated['loss']:.4f}", "32"):
        assert text in table
        assert text in said  # train ends with the same table
    fewer = json.loads(mezo(capsys, "eval", *where, "--dataset_name", test, "--json", "--max_eval_samples", 5))
    assert fewer["num_examples"] == 5
    command = ("eval", *where, "--dataset_name", test, "--json", "--max_eval_samples", 5)
    assert json.loads(mezo(capsys, *command, "--seed", 1))["loss"] != fewer["loss"]  # other rows
    if "--use_peft" not in method:
        where = ("--model_name_or_path", base, "--adapter_name_or_path", run)
        finished = run_cli(capsys, "eval", *where, "--dataset_name", test)
        assert "is a whole model: name it model_name_or_path" in error_line(finished)

    assert str(tmp_path / "replayed") in mezo(capsys, "replay", run, "--output_dir", tmp_path / "replayed")
    assert_same_weights(run, tmp_path / "replayed")
    mezo(capsys, "replay", run / "journal", "--output_dir", tmp_path / "start", "--step", 0)
    with pytest.raises(AssertionError):  # training moved the weights, or the comparison above shows nothing
        assert_same_weights(run, tmp_path / "start")


def test_eval_of_what_the_training_held_out(capsys, caplog, model_folder, tmp_path, jsonl):
    base, run, data = model_folder("llama"), tmp_path / "run", jsonl(SENTIMENT_ROWS)
    mezo(capsys, *train_arguments(base, data, run, *PROMPTED, *LORA, "--validation_size", 24, "--eval_steps", 12))
    (logged,) = [e for e in json.loads((run / "trainer_state.json").read_text())["log_history"] if "eval_loss" in e]
    where = ("--model_name_or_path", base, "--adapter_name_or_path", run, "--dataset_name", data, "--json")
    found = json.loads(mezo(capsys, "eval", *where, "--validation_size", 24))
    assert (found["loss"], found["num_examples"]) == (logged["eval_loss"], 24)
    everything = run_cli(capsys, "eval", *where)
    assert json.loads(everything.out)["num_examples"] == len(SENTIMENT_ROWS)
    assert f"{data} holds the rows that the run trained on; --validation_size 24 evaluates those" in everything.err
    other = run_cli(capsys, "eval", *where, "--validation_size", 24, "--seed", 1)
    assert "the run held out other rows: validation_size 24 of train by seed 42" in other.err
    assert json.loads(other.out)["loss"] != found["loss"]
    shown = ("--validation_size", 24, "--num_demonstrations", 2)  # of the others
    assert json.loads(mezo(capsys, "eval", *where, *shown))["num_examples"] == 24
    refused = run_cli(capsys, "eval", *where, *shown, "--dataset_test_split", "train")  # the whole file
    assert "is evaluated as well" in error_line(refused)


def mean_of_losses(run):
    records = [r for step in journal.read(run / "journal").steps for r in step]
    return math.fsum((r.loss_plus + r.loss_minus) / 2 for r in records) / len(records)


@pytest.mark.parametrize(
    ("model", "task", "auto_class"),
    [("llama", PROMPTED, AutoModelForCausalLM), ("bert", MASKED, AutoModelForMaskedLM),
     ("bert", (), AutoModelForSequenceClassification)],
    ids=["causal_lm", "masked_lm", "sequence_classification"],
)  # fmt: skip
@torch.no_grad()
def test_merged_model_computes_what_the_adapter_does(capsys, model_folder, tmp_path, jsonl, model, task, auto_class):
    base, run, merged = model_folder(model), tmp_path / "run", tmp_path / "merged"
    data = jsonl(SENTIMENT_ROWS)
    mezo(capsys, *train_arguments(base, data, run, *task, *LORA, "--learning_rate", 9e-2, steps=60))
    assert str(merged) in mezo(capsys, "merge", "--adapter_name_or_path", run, "--output_dir", merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    inputs = tokenizer("the film was very lovely .", return_tensors="pt")
    plain, loading = auto_class.from_pretrained(merged, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    plain_logits = plain.eval()(**inputs).logits
    if task:  # a classification head is fresh: its values lie in the adapter, the base alone says nothing
        start = auto_class.from_pretrained(base).eval()
        start_logits = start(**inputs).logits
        adapter_logits = PeftModel.from_pretrained(start, str(run)).eval()(**inputs).logits
        # W + sBA is rounded once to float32 (2⁻²⁴ relative) where the adapter adds two rounded products; through two
        # layers on logits of order 1 that is about 1e-7, and 1e-5 leaves room for other BLAS libraries.
        torch.testing.assert_close(plain_logits, adapter_logits, atol=1e-5, rtol=0)
        assert (plain_logits - start_logits).abs().max() > 1e-4  # what was merged is above ten times that
    by_adapter = json.loads(mezo(capsys, *eval_arguments(base, data), "--adapter_name_or_path", run))
    by_merged = json.loads(mezo(capsys, *eval_arguments(merged, data), *task))
    # The same rounding as above, in a mean of cross-entropies of order 1.
    assert by_merged["loss"] == pytest.approx(by_adapter["loss"], rel=1e-5)
    assert by_merged["num_examples"] == by_adapter["num_examples"] == len(SENTIMENT_ROWS)


def eval_arguments(model, data):
    return "eval", "--model_name_or_path", model, "--dataset_name", data, "--json"


def test_merge_and_replay_refuse_what_they_cannot_do(capsys, model_folder, tmp_path, jsonl):
    run, data = tmp_path / "run", jsonl(SENTIMENT_ROWS[:16])
    mezo(capsys, *train_arguments(model_folder("bert"), data, run, *MASKED, *FULL, steps=2))
    kept = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    merge = ("merge", "--adapter_name_or_path", run, "--output_dir", tmp_path / "merged")
    line = error_line(run_cli(capsys, *merge))
    assert "no adapter in" in line
    assert "is a whole model" in line
    assert "exists already" in error_line(run_cli(capsys, "replay", run, "--output_dir", run))
    assert "exists already" in error_line(run_cli(capsys, *merge[:-1], run))
    assert "steps 0 to 2" in error_line(run_cli(capsys, "replay", run, "--output_dir", tmp_path / "w", "--step", 3))
    assert "no journal" in error_line(run_cli(capsys, "replay", tmp_path / "none", "--output_dir", tmp_path / "w"))
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == kept
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "w").exists()


def test_warnings_are_shown_where_the_root_logger_was_quietened(capsys, model_folder, tmp_path, jsonl):
    """As SGLang does when it is started in this process."""
    data = jsonl([row for row in SENTIMENT_ROWS if row["label"]])
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        arguments = train_arguments(model_folder("llama"), data, tmp_path / "run", *PROMPTED, *LORA, steps=1)
        finished = run_cli(capsys, *arguments)
    finally:
        root.setLevel(before)
    assert "mezo: no training row has label 0" in finished.err


# --- running a command again ------------------------------------------------------------------------------------------


def test_an_output_dir_with_a_run_is_refused_and_left_alone(capsys, model_folder, tmp_path, jsonl):
    arguments = train_arguments(model_folder("bert"), jsonl(SENTIMENT_ROWS), tmp_path / "run", *MASKED, *FULL, steps=3)
    mezo(capsys, *arguments)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    message = error_line(run_cli(capsys, *arguments))
    assert "holds a run already" in message
    assert "resume_from_checkpoint" in message
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == kept


@pytest.mark.parametrize(
    ("model", "method"), [("llama", (*PROMPTED, *LORA)), ("bert", (*MASKED, *FULL))], ids=["llama-lora", "bert-full"]
)
def test_resuming_a_completed_run_with_more_steps_equals_a_straight_run(
    capsys, model_folder, tmp_path, jsonl, model, method
):
    base, data = model_folder(model), jsonl(SENTIMENT_ROWS)
    mezo(capsys, *train_arguments(base, data, tmp_path / "straight", *method, steps=17))
    mezo(capsys, *train_arguments(base, data, tmp_path / "run", *method, steps=9))
    short = weights(tmp_path / "run")
    again = train_arguments(base, data, tmp_path / "run", *method, "--resume_from_checkpoint", steps=17)
    assert "trained 17 steps" in mezo(capsys, *again)
    assert_same_weights(tmp_path / "straight", tmp_path / "run")
    steps = [journal.read(tmp_path / name / "journal").steps for name in ("straight", "run")]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 17
    assert any(not torch.equal(short[name], tensor) for name, tensor in weights(tmp_path / "run").items())
    # The same command once more has nothing to do and changes nothing.
    assert "trained 17 steps" in mezo(capsys, *again)
    assert_same_weights(tmp_path / "straight", tmp_path / "run")


def test_resume_from_checkpoint_starts_a_run_that_is_not_there(capsys, model_folder, tmp_path, jsonl):
    options = (*MASKED, *FULL, "--resume_from_checkpoint")
    arguments = train_arguments(model_folder("bert"), jsonl(SENTIMENT_ROWS), tmp_path / "run", *options, steps=2)
    assert "trained 2 steps" in mezo(capsys, *arguments)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_flags_win_over_config_over_preset_over_defaults(config_file):
    path = config_file("model_name_or_path: m\nmax_steps: 77\nweight_decay: 0.5\nlora_r: 3\nuse_peft: true\nseed: 42\n")
    flags = ["--weight_decay", "0.25", "--epsilon", "0.001", "--no_use_peft", "--output_dir", "o"]
    config = cli.parse_train([*flags, "--config", path, "--preset", "opt-lora"])
    preset = PRESETS["opt-lora"].config(model_name_or_path="m")
    assert config.weight_decay == 0.25  # a flag over the file's 0.5
    assert config.epsilon == MeZOConfig.epsilon == 0.001 != preset.epsilon  # also a flag that says the default
    assert config.use_peft is False  # a flag over file and preset
    assert (config.max_steps, config.lora_r) == (77, 3) != (preset.max_steps, preset.lora_r)  # the file over the preset
    # The preset over the defaults.
    assert config.learning_rate == preset.learning_rate == 1e-4 != MeZOConfig.learning_rate
    assert config.per_device_train_batch_size == preset.per_device_train_batch_size == 16
    assert config.per_device_eval_batch_size == MeZOConfig.per_device_eval_batch_size
    # Order and form of the flags make no difference.
    assert cli.parse_train([f"--config={path}", "--preset=opt-lora", *flags]) == config
    assert cli.parse_train(["--preset", "opt-lora", *(f.replace("_", "-") for f in flags), "--config", path]) == config


def test_without_file_and_preset_a_command_line_is_the_defaults():
    assert cli.parse_train(["--model_name_or_path", "m"]) == MeZOConfig(model_name_or_path="m")


def test_every_field_of_the_config_can_come_from_a_file_that_another_run_recorded(config_file):
    config = MeZOConfig(
        model_name_or_path="m", label_words={"0": "bad", "1": "good"}, lora_target_modules=["q", "v"], epsilon=0.01
    )
    assert cli.parse_train(["--config", config_file(json.dumps(config.to_dict()))]) == config


@pytest.mark.parametrize(
    "words", [('{"0": "bad", "1": "good"}',), ("{0: 'bad', 1: 'good'}",), ("0", "bad", "1", "good")]
)
def test_label_words_as_in_python_and_as_pairs(words):
    config = cli.parse_train(["--model_name_or_path", "m", "--label_words", *words, "--seed", "3"])
    assert (config.label_words, config.seed) == ({"0": "bad", "1": "good"}, 3)


def test_label_words_that_are_no_mapping():
    with pytest.raises(UserError, match="write label and word in turn"):
        cli.parse_train(["--model_name_or_path", "m", "--label_words", "{0: bad"])


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [("learning_rate: 1e-6", "learning_rate", 1e-6), ("epsilon: 1", "epsilon", 1.0),
     ("label_words: {0: bad, 1: good}", "label_words", {"0": "bad", "1": "good"})],
)  # fmt: skip
def test_yaml_as_people_write_it(config_file, text, field, value):
    """YAML 1.1 reads 1e-6, which has no point, as a text, and an unquoted 0 as a number."""
    config = cli.parse_train(["--model_name_or_path", "m", "--config", config_file(text)])
    assert getattr(config, field) == value


def test_a_run_trains_with_the_options_of_its_config_file(capsys, model_folder, tmp_path, jsonl, config_file):
    data = jsonl(SENTIMENT_ROWS[:16])
    path = config_file(
        f"model_name_or_path: {model_folder('bert')}\ndataset_name: {data}\noutput_dir: {tmp_path / 'run'}\n"
        "template: '{text} it was [MASK] .'\nlabel_words: {'0': terrible, '1': great}\n"
        "max_steps: 50\nlearning_rate: 0.0002\ndisable_tqdm: true\n"
    )
    mezo(capsys, "train", "--config", path, "--max_steps", 2)
    contents = journal.read(tmp_path / "run" / "journal")
    assert [r.learning_rate for (r,) in contents.steps] == [0.0002, 0.0002]
    assert contents.header["config"]["max_steps"] == 2


def test_presets_lists_all_names(capsys):
    text = mezo(capsys, "presets")
    for name, preset in PRESETS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert all(f"{rate:g}" in line for rate in preset.learning_rates)
        assert all(f"{key}={value}" in line for key, value in preset.values.items())


def test_env_prints_versions(capsys):
    import transformers

    import mezo as package

    lines = dict(line.split(maxsplit=1) for line in mezo(capsys, "env").splitlines())
    assert lines["mezo"].strip() == package.__version__
    assert lines["torch"].strip() == torch.__version__
    assert lines["transformers"].strip() == transformers.__version__
    assert lines["python"].strip() == ".".join(map(str, sys.version_info[:3]))
    assert {"peft", "datasets", "safetensors", "numpy", "platform", "gpu"} <= lines.keys()


def test_version(capsys):
    import mezo as package

    assert mezo(capsys, "--version") == f"mezo {package.__version__}\n"
