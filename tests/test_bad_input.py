"""Every kind of bad input ends in one clear line, a non-zero status and no traceback; nothing written is lost."""

import errno
import gzip
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mezo import journal
from mezo.api import build_trainer, eval_model, mezo_finetune
from mezo.cli import parse_train
from mezo.config import MeZOConfig
from mezo.data import BatchSampler
from mezo.errors import NonFiniteLossError, UserError
from tests.conftest import SENTIMENT_ROWS
from tests.test_cli import (
    FULL,
    LORA,
    MASKED,
    PROMPTED,
    Finished,
    assert_same_weights,
    error_line,
    mezo,
    one_thread,  # noqa: F401  # acts on every test here
    run_cli,
    train_arguments,
)

GOOD_LINE = '{"text": "the film was good", "label": 1}\n'
WORDS = {"0": "terrible", "1": "great"}


@pytest.fixture
def fails(capsys, model_folder, tmp_path):
    """Trains with something wrong; returns the one line that it says, and checks that no run was started."""

    def train(data, *options, model=None, task=MASKED):
        output_dir = tmp_path / "never"
        model = model_folder("bert") if model is None else model
        finished = run_cli(capsys, *train_arguments(model, data, output_dir, *task, *options))
        assert not output_dir.exists()
        return error_line(finished)

    return train


def make_config(model, output_dir, **options):
    values = {"model_name_or_path": model, "output_dir": str(output_dir), "per_device_train_batch_size": 4,
              "learning_rate": 1e-4, "max_steps": 2, "disable_tqdm": True}  # fmt: skip
    return MeZOConfig.from_dict({**values, **options})


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.jsonl", "missing/data.parquet", "data"])
def test_missing_file(fails, tmp_path, name):
    message = fails(tmp_path / name)
    assert "no file" in message
    assert name in message


def test_missing_file_for_eval_and_evaluation_during_training(capsys, fails, jsonl, model_folder, tmp_path):
    missing = tmp_path / "none.jsonl"
    assert str(missing) in fails(jsonl(SENTIMENT_ROWS), "--eval_dataset_name", missing)
    arguments = ("eval", "--model_name_or_path", model_folder("bert"), "--dataset_name", missing, *MASKED)
    assert str(missing) in error_line(run_cli(capsys, *arguments))


def test_a_file_has_no_split_to_evaluate(fails, jsonl):
    assert "is one file, without splits" in fails(jsonl(SENTIMENT_ROWS), "--dataset_test_split", "validation")


def test_an_untrained_head_is_not_evaluated(capsys, model_folder, jsonl):
    arguments = ("eval", "--model_name_or_path", model_folder("bert"), "--dataset_name", jsonl(SENTIMENT_ROWS))
    assert "has no trained classification head" in error_line(run_cli(capsys, *arguments))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "said"),
    [('{"text": "cut off', "malformed JSON"), ("text,label", "malformed JSON"), ("[1, 2]", "not a JSON object"),
     ("7", "not a JSON object"), ("null", "not a JSON object")],
)  # fmt: skip
def test_malformed_jsonl_names_the_line(fails, tmp_path, suffix, line, said):
    path = tmp_path / f"data{suffix}"
    text = (2 * GOOD_LINE + "\n" + line + "\n" + GOOD_LINE).encode()  # the blank third line is no row, but counts
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    message = fails(path)
    assert f"{path}, line 4: " in message
    assert said in message


def test_a_line_that_is_no_utf8(fails, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(2 * GOOD_LINE.encode() + b'{"text": "\xff\xfe", "label": 1}\n')
    assert f"{path}, line " in fails(path)


@pytest.mark.parametrize("damage", ["cut off", "no gzip"])
def test_damaged_gzip(fails, tmp_path, damage):
    path = tmp_path / "data.jsonl.gz"
    data = gzip.compress(20 * GOOD_LINE.encode())
    path.write_bytes(data[:-9] if damage == "cut off" else GOOD_LINE.encode())
    assert f"{path}: damaged gzip file" in fails(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [("zero.jsonl", b""), ("blank.jsonl", b"\n \n\n"), ("zero.jsonl.gz", gzip.compress(b"", mtime=0)),
     ("blank.jsonl.gz", gzip.compress(b"\n\n", mtime=0)), ("zero.json", b""), ("list.json", b"[]"), ("zero.csv", b""),
     ("header.csv", b"text,label\n")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_empty_files(fails, tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    assert f"{path} holds no rows" in fails(path)


@pytest.mark.parametrize(
    ("name", "data"),
    [("data.json", b'[{"text": '), ("rows.json", b'[{"text": "a", "label": 1}, 3]'), ("data.parquet", b"PAR1 no more"),
     ("data.csv", b'text,label\na,0\n"b,1\n'), ("wide.csv", b"text,label\na,0\nb,1,2,3\n")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_other_damaged_files(fails, tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    assert f"{path}: " in fails(path)


def test_a_real_process_prints_nothing_but_the_line(model_folder, tmp_path):
    """A file that `datasets` logs about; its logger holds a standard error from before any capture in this process."""
    path = tmp_path / "data.json"
    path.write_text("{")
    arguments = train_arguments(model_folder("bert"), path, tmp_path / "run", *MASKED)
    command = [sys.executable, "-c", "from mezo.cli import main; main()", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert str(path) in error_line(Finished(process.returncode, process.stdout, process.stderr))
    assert len(process.stderr.splitlines()) == 1
    assert process.stdout == ""


def test_empty_list_and_empty_evaluation(model_folder, tmp_path):
    config = make_config(model_folder("bert"), tmp_path / "run", template="{text} [MASK]", label_words=WORDS)
    with pytest.raises(UserError, match="the data set holds no rows"):
        build_trainer(config, [])
    with pytest.raises(UserError, match="the data set holds no rows"):
        build_trainer(config, SENTIMENT_ROWS, [])
    with pytest.raises(UserError, match="the data set holds no rows"):
        mezo_finetune(model_folder("bert"), [], output_dir=tmp_path / "run")
    with pytest.raises(UserError, match="the data set holds no rows"):
        eval_model(config, dataset=[])


def test_unknown_file_type_and_a_file_where_the_run_should_be(capsys, fails, tmp_path, jsonl, model_folder):
    path = tmp_path / "data.xml"
    path.write_text("<rows/>")
    assert "unknown file type" in fails(path)
    taken = tmp_path / "taken"
    taken.write_text("mine")
    arguments = train_arguments(model_folder("bert"), jsonl(SENTIMENT_ROWS), taken, *MASKED)
    assert str(taken) in error_line(run_cli(capsys, *arguments))
    assert taken.read_text() == "mine"


# --- columns and labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "task", "row", "missing"),
    [
        ("bert", MASKED, {"sentence": "a", "label": 1}, "column 'text' is missing; found label, sentence"),
        ("bert", MASKED, {"text": "a", "class": 1}, "column 'label' is missing; found class, text"),
        ("bert", (), {"headline": "a", "label": 1}, "column 'text' is missing; found headline, label"),
        ("bert", (), {"text": "a"}, "column 'label' is missing; found text"),
        ("bert", ("--label_column", "y"), {"text": "a", "label": 1}, "column 'y' is missing; found label, text"),
        ("llama", PROMPTED, {"sentence": "a", "label": 1}, "column 'text' is missing; found label, sentence"),
        ("llama", PROMPTED, {"text": "a"}, "column 'label' is missing; found text"),
        ("llama", (), {"prompt": "a", "choices": ["b", "c"]}, "column 'label' is missing; found choices, prompt"),
        ("llama", (), {"question": "a", "answer": "b"}, "columns answer, question are none of these"),
    ],
)
def test_missing_columns_name_those_found(fails, jsonl, model_folder, model, task, row, missing):
    assert missing in fails(jsonl([row, row]), model=model_folder(model), task=task)


def test_evaluation_rows_lack_a_column(fails, jsonl):
    rows = [{"text": "a"}, {"text": "b"}]
    message = fails(jsonl(SENTIMENT_ROWS), "--eval_dataset_name", jsonl(rows, "eval.jsonl"))
    assert "evaluation rows lack column 'label'; found text" in message


@pytest.mark.parametrize(
    ("model", "task"), [("bert", MASKED), ("bert", ()), ("llama", PROMPTED)], ids=["masked", "head", "prompted"]
)
@pytest.mark.parametrize("column", ["text", "label"])
def test_one_row_without_a_value_is_named(fails, jsonl, model_folder, model, task, column):
    """`datasets` fills the gap with None, which must not be trained on as the text or the class "None"."""
    rows = [dict(row) for row in SENTIMENT_ROWS[:8]]
    del rows[5][column]
    message = fails(jsonl(rows), model=model_folder(model), task=task)
    assert "row 5: " in message
    assert column in message


@pytest.mark.parametrize(("model", "task"), [("bert", MASKED), ("llama", PROMPTED)])
def test_label_not_among_the_label_words(fails, jsonl, model_folder, model, task):
    rows = [*SENTIMENT_ROWS[:3], {"text": "the film was", "label": 2}]
    assert "row 3: label '2' is not among the labels 0, 1" in fails(jsonl(rows), model=model_folder(model), task=task)


def test_label_that_training_did_not_see(fails, jsonl):
    message = fails(
        jsonl(SENTIMENT_ROWS), "--eval_dataset_name", jsonl([{"text": "a", "label": 5}], "e.jsonl"), task=()
    )
    assert "row 0: label '5' is not among the labels 0, 1" in message


def test_a_single_label_is_nothing_to_classify(fails, jsonl):
    assert "single label, '1'" in fails(jsonl([{"text": "a", "label": 1}, {"text": "b", "label": 1}]), task=())


@pytest.mark.parametrize("label", [2, -1, "yes"])
def test_label_that_is_no_index_into_the_choices(fails, jsonl, model_folder, label):
    rows = [{"prompt": "the film", "choices": ["good", "bad"], "label": label}]
    message = fails(jsonl(rows), model=model_folder("llama"), task=())
    assert f"row 0: label {label!r} is not an index into its 2 choices" in message


def test_label_word_of_several_tokens(fails, jsonl):
    words = ("--label_words", "0", "terrible", "1", "very good")
    message = fails(jsonl(SENTIMENT_ROWS), task=("--template", "{text} it was [MASK]", *words))
    assert "label word 'very good' is 2 tokens for this model, one is needed" in message


def test_label_word_that_the_model_does_not_know(fails, jsonl):
    words = ("--label_words", "0", "terrible", "1", "splendid")
    assert "label word 'splendid'" in fails(jsonl(SENTIMENT_ROWS), task=("--template", "{text} [MASK]", *words))


def test_a_decoder_takes_label_words_of_several_tokens(model_folder, tmp_path):
    words = {"0": "terrible", "1": "very good"}
    config = make_config(model_folder("llama"), tmp_path / "run", template="{text} it was", label_words=words)
    lengths = {len(s.targets) for e in build_trainer(config, SENTIMENT_ROWS).train_examples for s in e.sequences}
    assert lengths == {1, 2}


@pytest.mark.parametrize(
    ("task", "said"),
    [(MASKED[2:], "label_words need a template"), (("--template", "{text} it was", *MASKED[2:]), "has no [MASK]"),
     (MASKED[:2], "label_words are missing"), (("--template", "it was [MASK]", *MASKED[2:]), "names no column")],
)  # fmt: skip
def test_template_and_label_words_that_do_not_fit(fails, jsonl, task, said):
    assert said in fails(jsonl(SENTIMENT_ROWS), task=task)


# --- length -----------------------------------------------------------------------------------------------------------

CONTEXT = 64  # of every tiny model
LONG = " ".join(
    f"{word} one two three four five six seven" for word in ("film story plot acting " * 3).split()
)  # 96 words


def decoded(config, example):
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    return [tokenizer.convert_ids_to_tokens(s.input_ids) for s in example.sequences]


@pytest.mark.parametrize("model", ["gpt2", "opt", "llama"])
def test_long_prompts_of_a_decoder_lose_their_start_and_keep_the_answer(model_folder, tmp_path, caplog, model):
    short = {"prompt": "the film was", "completion": " good"}
    rows = [short, {"prompt": LONG, "completion": " very dull"}, short, {"prompt": LONG, "completion": " fine"}]
    config = make_config(model_folder(model), tmp_path / "run")
    trainer = build_trainer(config, rows)
    assert "2 rows were longer than 64 tokens and were cut" in caplog.text
    (tokens,) = decoded(config, trainer.train_examples[1])
    kept = [*LONG.split(), "very", "dull", "</s>"][-(CONTEXT - 1) :]
    assert tokens == ["<s>", *kept]
    (sequence,) = trainer.train_examples[1].sequences
    # Position i predicts token i + 1: the answer's two words and the end, nothing of the prompt.
    assert [(t.position, t.token) for t in sequence.targets] == [(i - 1, sequence.input_ids[i]) for i in (61, 62, 63)]
    assert decoded(config, trainer.train_examples[0]) == [["<s>", "the", "film", "was", "good", "</s>"]]
    assert trainer.train().global_step == 2  # the longest input really fits the model


def test_long_prompts_before_label_words_count_once_per_row(model_folder, tmp_path, caplog):
    rows = [{"text": LONG, "label": 0}, *SENTIMENT_ROWS[:3]]
    config = make_config(model_folder("llama"), tmp_path / "run", template="{text} it was", label_words=WORDS)
    trainer = build_trainer(config, rows)
    assert "1 rows were longer" in caplog.text
    assert [tokens[-3:] for tokens in decoded(config, trainer.train_examples[0])] == [
        ["it", "was", "terrible"], ["it", "was", "great"]]  # fmt: skip


@pytest.mark.parametrize("model", ["bert", "roberta"])
@pytest.mark.parametrize(
    ("template", "kept"),
    [
        ("{text} it was [MASK] .", lambda room: [*LONG.split(), "it", "was", "MASK", "."][-room:]),
        ("it was [MASK] : {text}", lambda room: ["it", "was", "MASK", ":", *LONG.split()][:room]),
    ],
    ids=["mask last", "mask first"],
)
def test_long_prompts_of_an_encoder_keep_the_mask(model_folder, tmp_path, caplog, model, template, kept):
    config = make_config(model_folder(model), tmp_path / "run", template=template, label_words=WORDS)
    trainer = build_trainer(config, [{"text": LONG, "label": 0}, *SENTIMENT_ROWS[:7]])
    assert "1 rows were longer than 64 tokens and were cut" in caplog.text
    (tokens,) = decoded(config, trainer.train_examples[0])
    assert len(tokens) == CONTEXT
    mask = {"bert": "[MASK]", "roberta": "<mask>"}[model]
    assert tokens[1:-1] == [mask if word == "MASK" else word for word in kept(CONTEXT - 2)]
    position = tokens.index(mask)
    assert {t.position for t in trainer.train_examples[0].sequences[0].targets} == {position}
    assert trainer.train().global_step == 2


def test_the_mask_survives_between_two_long_texts(model_folder, tmp_path, caplog):
    """The paper's template of entailment, `{premise} ? [MASK] , {hypothesis}`, with both parts too long."""
    config = make_config(model_folder("bert"), tmp_path / "run", template="{text} ? [MASK] , {text}", label_words=WORDS)
    trainer = build_trainer(config, [{"text": LONG, "label": 0}, *SENTIMENT_ROWS[:7]])
    assert "1 rows were longer" in caplog.text
    (tokens,) = decoded(config, trainer.train_examples[0])
    assert len(tokens) == CONTEXT
    assert tokens.count("[MASK]") == 1


def test_long_texts_before_a_classification_head(model_folder, tmp_path, caplog):
    config = make_config(model_folder("bert"), tmp_path / "run")
    trainer = build_trainer(config, [{"text": LONG, "label": 0}, *SENTIMENT_ROWS[:7]])
    assert "1 rows were longer" in caplog.text
    (tokens,) = decoded(config, trainer.train_examples[0])
    assert len(tokens) == CONTEXT
    assert (tokens[0], tokens[-1]) == ("[CLS]", "[SEP]")


def test_training_and_evaluation_say_how_many_rows_they_cut(capsys, model_folder, tmp_path, jsonl):
    data = jsonl([{"text": LONG, "label": 0}, *SENTIMENT_ROWS[:7]])
    for command in (
        train_arguments(model_folder("bert"), data, tmp_path / "run", *MASKED, *FULL, steps=2),
        ("eval", "--model_name_or_path", tmp_path / "run", "--dataset_name", data),
    ):
        finished = run_cli(capsys, *command)
        assert finished.status == 0
        assert "mezo: 1 rows were longer" in finished.err, command[0]


def test_an_answer_longer_than_the_context(fails, jsonl, model_folder):
    rows = [{"prompt": "the film", "completion": " good"}, {"prompt": "the film", "completion": LONG}]
    message = fails(jsonl(rows), model=model_folder("llama"), task=())
    # 96 words and the end token.
    assert f"row 1: the answer alone has {len(LONG.split()) + 1} tokens, more than max_length {CONTEXT}" in message


def test_max_length_above_the_context(fails, jsonl):
    assert f"max_length 65 is more than the model's context of {CONTEXT}" in fails(
        jsonl(SENTIMENT_ROWS), "--max_length", 65
    )


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}', "'t5' is neither"),
        ('{"model_type": "llama", "is_causal": false}', "this llama attends to what follows a token"),
        ('{"model_type": "gemma3_text", "use_bidirectional_attention": true}', "this gemma3_text attends to"),
        ('{"model_type": "vit"}', "'vit' is neither"),
        ('{"model_type": "nonsense"}', "nonsense"),
        ('{"colour": "blue"}', "model_type"),
        ("{ this is no JSON", "config.json"),
    ],
    ids=["t5", "both sides", "both sides, gemma", "vit", "unknown", "no type", "no JSON"],
)
def test_unknown_architecture(fails, jsonl, tmp_path, text, said):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    assert said in fails(jsonl(SENTIMENT_ROWS), model=folder)


def test_missing_model_folder(fails, jsonl, tmp_path):
    message = fails(jsonl(SENTIMENT_ROWS), model=tmp_path / "none")
    assert f"model_name_or_path: there is no folder '{tmp_path / 'none'}'" in message


def test_a_data_folder_without_rows_to_train_on(fails, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number, row in enumerate(('{"text": "good"}', '{"label": 1}')):
        (folder / f"part{number}.jsonl").write_text(row)
    message = fails(folder)
    assert f"dataset_name '{folder}' has no file train.jsonl or of another type that is known" in message
    assert "it has part0.jsonl, part1.jsonl (" in message


@pytest.mark.parametrize("data", [None, b"damaged weights, not safetensors", b""], ids=["missing", "damaged", "empty"])
def test_model_folder_without_usable_weights(fails, jsonl, model_folder, tmp_path, data):
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.unlink() if data is None else weights.write_bytes(data)
    assert f"model_name_or_path '{folder}'" in fails(jsonl(SENTIMENT_ROWS), model=folder)


def test_model_folder_without_tokenizer(fails, jsonl, model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder("bert"), tmp_path / "model"))
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert str(folder) in fails(jsonl(SENTIMENT_ROWS), model=folder)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [("learning_rate", 0.0), ("learning_rate", -1e-6), ("learning_rate", float("nan")), ("learning_rate", float("inf")),
     ("epsilon", 0.0), ("epsilon", -1e-3), ("epsilon", float("nan"))],
)  # fmt: skip
def test_learning_rate_and_epsilon_must_be_positive(fails, jsonl, model_folder, tmp_path, option, value):
    said = f"{option} must be a positive number, got {value}"
    assert said in fails(tmp_path / "not even read.jsonl", f"--{option}", value)
    with pytest.raises(UserError, match=said):
        mezo_finetune(model_folder("bert"), SENTIMENT_ROWS, output_dir=tmp_path / "run", **{option: value})
    config = tmp_path / "config.yaml"
    config.write_text(f"{option}: {str(value).replace('nan', '.nan').replace('inf', '.inf')}\n")
    if value != -1e-6:  # which YAML 1.1 reads as a text: see test_yaml_as_people_write_it
        with pytest.raises(UserError, match=said):
            parse_train(["--model_name_or_path", "m", "--config", str(config)])


def test_unknown_keys_name_the_nearest_valid_one(fails, jsonl, model_folder, tmp_path):
    said = "unknown option {0}learning_rte{0}; the nearest valid one is {0}learning_rate{0}"
    data = jsonl(SENTIMENT_ROWS)
    assert said.format("") in fails(data, "--learning_rte", 0.1)
    assert said.format("") in fails(data, "--learning-rte=0.1")
    config = tmp_path / "config.yaml"
    config.write_text("learning_rte: 0.1\n")
    assert said.format("'") in fails(data, "--config", config)
    with pytest.raises(UserError, match=said.format("'")):
        MeZOConfig.from_dict({"model_name_or_path": "m", "learning_rte": 0.1})
    with pytest.raises(UserError, match=said.format("'")):
        mezo_finetune(model_folder("bert"), SENTIMENT_ROWS, output_dir=tmp_path / "run", learning_rte=0.1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("trian",), "the nearest one is 'train'"),
        (("eval", "--jsn"), "nearest valid one is json"),
        (("merge", "--output", "x"), "nearest valid one is output_dir"),
        (("replay", "run", "--steps", "3"), "nearest valid one is step"),
        (("train", "--confg", "x.yaml"), "nearest valid one is config"),
        (("train", "--presett", "opt-full"), "nearest valid one is preset"),
        (("train", "--preset", "opt-ful"), "opt-full"),
        (("train", "--config"), "--config needs a value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_unknown_commands_options_and_presets(capsys, arguments, said):
    assert said in error_line(run_cli(capsys, *arguments))


@pytest.mark.parametrize(
    ("text", "said"),
    [("- max_steps", "a mapping"), ("", "a mapping"), ("max_steps: [", "config.yaml"),
     ("learning_rate: fast", "learning_rate"), ("max_steps: many", "max_steps"), ("max_steps: 2.5", "max_steps"),
     ("use_peft: 'no'", "use_peft"), ("dtype: float99", "dtype"), ("label_words: great", "label_words")],
)  # fmt: skip
def test_config_files_that_do_not_fit(fails, jsonl, tmp_path, text, said):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    task = MASKED if "label_words" not in text else MASKED[:2]
    # max_steps is a flag of every run here, so it is read without one.
    if "max_steps" in said:
        with pytest.raises(UserError, match=said):
            parse_train(["--model_name_or_path", "m", "--config", str(config)])
    else:
        assert said in fails(jsonl(SENTIMENT_ROWS), "--config", config, task=task)


def test_missing_config_file(fails, jsonl, tmp_path):
    assert str(tmp_path / "none.yaml") in fails(jsonl(SENTIMENT_ROWS), "--config", tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("option", "value"), [("max_steps", 0), ("per_device_train_batch_size", 0), ("lora_r", -1), ("weight_decay", -0.1)]
)
def test_counts_and_decay_out_of_range(option, value):
    with pytest.raises(UserError, match=f"{option} must be .*got {value}"):
        MeZOConfig.from_dict({"model_name_or_path": "m", option: value})


# --- a loss that is not finite ----------------------------------------------------------------------------------------

POISONED = "maybe"  # a word of the vocabulary that no row has of itself


@pytest.fixture
def poisoned_model(model_folder, tmp_path):
    """A decoder whose embedding of one word is NaN; its head is not tied, so that rows without the word are finite."""
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "poisoned"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(POISONED)] = (
        torch.nan
    )
    assert "lm_head.weight" in tensors
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def poison(row):
    return {**row, "text": f"{POISONED} {row['text']}"}


@pytest.mark.parametrize("method", [FULL, LORA], ids=["full", "lora"])
def test_training_stops_at_a_nan_loss_and_keeps_the_last_good_state(capsys, poisoned_model, tmp_path, jsonl, method):
    rows = list(SENTIMENT_ROWS)
    sampler = BatchSampler(len(rows), 8, seed=42)
    bad = sorted(sampler(5)[i] for i in (2, 6))
    assert all(row not in sampler(step) for step in range(5) for row in bad)
    for row in bad:
        rows[row] = poison(rows[row])
    arguments = train_arguments(poisoned_model, jsonl(rows), tmp_path / "run", *PROMPTED, *method)
    message = error_line(run_cli(capsys, *arguments))
    assert "loss of step 5 is not finite" in message
    listed = message.partition("training rows ")[2].partition(";")[0]
    assert sorted(map(int, listed.split(", "))) == bad
    assert "checkpoint-5" in message

    contents = journal.read(tmp_path / "run" / "journal")
    assert (len(contents.steps), contents.dropped_bytes) == (5, 0)
    assert all(abs(r.coefficient) < float("inf") for (r,) in contents.steps)
    # The checkpoint is what five steps give, on rows that the five steps see unchanged.
    mezo(capsys, *train_arguments(poisoned_model, jsonl(rows), tmp_path / "five", *PROMPTED, *method, steps=5))
    assert_same_bits(tmp_path / "run" / "checkpoint-5", tmp_path / "five")
    if method is FULL:
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-5")
    assert not list((tmp_path / "run").glob(".*"))
    # Going on meets the same rows: it says so again and loses nothing.
    assert "loss of step 5" in error_line(run_cli_resumed(capsys, arguments))
    assert journal.read(tmp_path / "run" / "journal").steps == contents.steps
    assert_same_bits(tmp_path / "run" / "checkpoint-5", tmp_path / "five")


def run_cli_resumed(capsys, arguments):
    finished = run_cli(capsys, *arguments, "--resume_from_checkpoint")
    lines = finished.err.splitlines(keepends=True)
    assert lines[0].startswith("mezo: resumed at step 5")
    return finished._replace(err="".join(lines[1:]))


def assert_same_bits(first, second):
    """As assert_same_weights, for tensors that hold NaN, which equals nothing."""
    (a,), (b,) = ([load_file(p) for p in Path(folder).glob("*model.safetensors")] for folder in (first, second))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)), name


def test_a_nan_in_the_first_step_leaves_the_untouched_model(poisoned_model, tmp_path):
    options = {"template": "{text} it was", "label_words": WORDS}
    trainer = build_trainer(
        make_config(poisoned_model, tmp_path / "run", **options), [poison(r) for r in SENTIMENT_ROWS]
    )
    with pytest.raises(NonFiniteLossError, match="loss of step 0 is not finite for training rows"):
        trainer.train()
    assert journal.read(tmp_path / "run" / "journal").steps == []
    assert_same_bits(tmp_path / "run" / "checkpoint-0", poisoned_model)


# --- a full disk ------------------------------------------------------------------------------------------------------

PAGE = 4096  # a tmpfs gives out whole pages


class SmallDisk:
    """A file system that can be filled up to a few free pages."""

    def __init__(self, path):
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, free_pages):
        """Takes everything but `free_pages` pages of 4 KiB."""
        self._ballast.write_bytes(bytes(shutil.disk_usage(self.path).free - free_pages * PAGE))

    def empty(self):
        self._ballast.unlink()


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "mezo-test", str(path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield SmallDisk(path)
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def assert_going_on_equals_a_straight_run(capsys, arguments, run, straight):
    """`arguments` trains into `run`; run again with room on the disk it ends where an undisturbed run does."""
    mezo(capsys, *arguments, "--resume_from_checkpoint")
    mezo(capsys, *(straight if a == run else a for a in arguments))
    assert_same_weights(run, straight)
    assert journal.read(run / "journal").steps == journal.read(straight / "journal").steps


def test_disk_full_in_the_journal(capsys, small_disk, model_folder, tmp_path, jsonl):
    run = small_disk.path / "run"
    arguments = train_arguments(
        model_folder("llama"),
        jsonl(SENTIMENT_ROWS),
        run,
        *PROMPTED,
        *LORA,
        "--per_device_train_batch_size",
        2,
        steps=80,
    )
    small_disk.fill(free_pages=1)
    message = error_line(run_cli(capsys, *arguments))
    assert "No space left on device while writing the journal" in message
    contents = journal.read(run / "journal")
    # One page holds the header and as many whole records as fit behind it; nothing is torn.
    assert 0 < len(contents.steps) < PAGE // journal.RECORD_SIZE
    assert contents.dropped_bytes == 0
    assert contents.valid_bytes + journal.RECORD_SIZE > PAGE
    small_disk.empty()
    assert_going_on_equals_a_straight_run(capsys, arguments, run, tmp_path / "straight")


@pytest.mark.parametrize(
    ("model", "method", "start", "more"), [("llama", (*PROMPTED, *LORA), 2, 1), ("bert", (*MASKED, *FULL), 3, 4)],
    ids=["lora", "full"],
)  # fmt: skip
@pytest.mark.parametrize("save_steps", [4, 50], ids=["checkpoint", "final weights"])
def test_disk_full_in_every_file_of_a_checkpoint(
    capsys, small_disk, model_folder, tmp_path, jsonl, model, method, start, more, save_steps
):
    """Every run gets a little more room than the last, until everything fits: each file once is the one too many."""
    run = small_disk.path / "run"
    options = (*method, "--save_steps", save_steps)
    arguments = train_arguments(model_folder(model), jsonl(SENTIMENT_ROWS), run, *options, steps=6)
    failures = 0
    for free_pages in range(start, 100, more):
        # What an earlier attempt left counts as room that is taken: a run starts with all but `free_pages` pages used.
        small_disk.fill(free_pages)
        finished = run_cli(capsys, *arguments, "--resume_from_checkpoint")
        small_disk.empty()
        if finished.status == 0:
            break
        failures += 1
        message = error_line(finished)
        assert "No space left on device" in message
        assert str(run) in message
        contents = journal.read(run / "journal")
        assert len(contents.steps) in (4, 6)
        assert contents.dropped_bytes == 0
        for whole in run.glob("checkpoint-*"):  # half a checkpoint never appears under its name
            assert (whole / "trainer_state.json").exists()
    else:
        pytest.fail("never fitted")
    assert failures > 3
    assert_going_on_equals_a_straight_run(capsys, arguments, run, tmp_path / "straight")


def test_earlier_checkpoints_survive_a_full_disk(capsys, small_disk, model_folder, tmp_path, jsonl):
    run = small_disk.path / "run"
    arguments = train_arguments(
        model_folder("llama"), jsonl(SENTIMENT_ROWS), run, *PROMPTED, *LORA, "--save_steps", 2, "--save_total_limit", 1,
    )  # fmt: skip
    mezo(capsys, *(2 if a == 12 else a for a in arguments))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "journal"}
    small_disk.fill(free_pages=2)
    finished = run_cli(capsys, *arguments, "--resume_from_checkpoint")
    assert "No space left on device" in error_line(finished)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "journal"} == before
    assert len(journal.read(run / "journal").steps) == 4
    small_disk.empty()
    assert_going_on_equals_a_straight_run(capsys, arguments, run, tmp_path / "straight")


def test_a_limit_on_file_size_in_the_journal(model_folder, tmp_path):
    """What a full disk does, where no file system can be mounted: EFBIG. Python ignores the signal SIGXFSZ."""
    options = {
        "template": "{text} it was",
        "label_words": WORDS,
        "use_peft": True,
        "max_steps": 12,
        "learning_rate": 1e-2,
    }
    config = make_config(model_folder("llama"), tmp_path / "run", **options)
    trainer = build_trainer(config, SENTIMENT_ROWS)
    header = header_size(trainer.header, tmp_path / "header")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (header + 5 * journal.RECORD_SIZE + 20, hard))  # ends within a record
    try:
        with pytest.raises(OSError, match="while writing the journal") as caught:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    contents = journal.read(tmp_path / "run" / "journal")
    assert (len(contents.steps), contents.dropped_bytes) == (5, 0)
    resumed = MeZOConfig.from_dict({**config.to_dict(), "resume_from_checkpoint": True})
    build_trainer(resumed, SENTIMENT_ROWS).train()
    build_trainer(
        MeZOConfig.from_dict({**config.to_dict(), "output_dir": str(tmp_path / "straight")}), SENTIMENT_ROWS
    ).train()
    assert_same_weights(tmp_path / "run", tmp_path / "straight")


def header_size(header, path):
    journal.Journal.create(path, header).close()
    return path.stat().st_size


def test_a_folder_that_cannot_be_written(capsys, model_folder, jsonl):
    arguments = train_arguments(model_folder("bert"), jsonl(SENTIMENT_ROWS), "/proc/mezo-run", *MASKED)
    assert "/proc/mezo-run" in error_line(run_cli(capsys, *arguments))


def test_an_evaluation_of_damaged_rows_says_one_line_too(capsys, model_folder, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(GOOD_LINE + "{\n")
    arguments = ("eval", "--model_name_or_path", model_folder("bert"), "--dataset_name", path, "--json", *MASKED)
    finished = run_cli(capsys, *arguments)
    assert "line 2" in error_line(finished)
    assert finished.out == ""
    path.write_text(json.dumps({"text": "a", "label": 3}) + "\n")
    assert "label '3'" in error_line(run_cli(capsys, *arguments))
