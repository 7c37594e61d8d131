"""Whatever the bytes, rows or options are: rows and configs, or an error that a user can read, and nothing else."""

import contextlib
import functools
import gzip
import importlib.util
import json
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mezo import journal
from mezo.cli import parse_train
from mezo.config import MeZOConfig, label_key
from mezo.data import load_rows, load_splits
from mezo.encoding import make_encoder
from mezo.engines.torch.loading import load_model_config, load_tokenizer
from mezo.errors import JournalError, UserError
from mezo.tasks import load_task

FUZZER = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz_journal.py"
few = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,  # the same inputs in every run
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
many = settings(few, max_examples=400)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


# --- the journal ------------------------------------------------------------------------------------------------------


@functools.cache
def fuzzer():
    spec = importlib.util.spec_from_file_location("fuzz_journal", FUZZER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ten_thousand_damaged_and_forged_journals(tmp_path):
    outcomes = fuzzer().fuzz(str(tmp_path / "journal"), 10_000, seed=1)
    assert set(outcomes) == {"damaged", "forged", "random"}
    assert outcomes["damaged"]["accepted whole"] > 10
    assert outcomes["damaged"]["accepted without its tail"] > 1000
    assert outcomes["damaged"]["refused: record n has a wrong checksum"] > 1000
    assert not any(outcome.startswith("accepted") for outcome in outcomes["random"])


def test_the_fuzzer_notices_a_reader_that_trusts_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_record_crc", lambda body, index: journal._CRC.unpack(b"\0\0\0\0")[0])
    with pytest.raises(AssertionError):
        fuzzer().fuzz(str(tmp_path / "journal"), 5000, seed=1)


@many
@given(header=json_values, records=st.lists(st.binary(min_size=60, max_size=60), max_size=3))
def test_any_header_and_records_under_right_checksums(tmp_path, header, records):
    tool = fuzzer()
    start = json.dumps(header).encode()
    start = journal.MAGIC + len(start).to_bytes(4, "little") + start
    data = start + tool.zlib.crc32(start).to_bytes(4, "little")
    for index, body in enumerate(records):
        data += body + tool.crc(body, index).to_bytes(4, "little")
    tool.check(str(tmp_path / "journal"), data, None)


# --- rows -------------------------------------------------------------------------------------------------------------


def one_line(error):
    assert "\n" not in str(error)


def rows_or_error(path):
    try:
        return list(load_rows(str(path), None, "train"))
    except UserError as error:
        return one_line(error)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # pandas leaves damaged files open
@few
@given(
    data=st.binary(max_size=80), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
)
def test_random_bytes_as_a_data_file(tmp_path, data, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(data)
    rows_or_error(path)


@few
@given(lines=st.lists(json_values | st.dictionaries(st.text(max_size=4), json_values, max_size=3), max_size=4),
       cut=st.integers(0, 20), zipped=st.booleans())  # fmt: skip
@example(lines=[{"": {}, "\0": None}], cut=0, zipped=False)
@example(lines=[{"": {"": {}, "0\0": None}}], cut=0, zipped=False)
@example(lines=[{"": {"": None, "\0": None}}], cut=0, zipped=False)
def test_random_json_lines(tmp_path, lines, cut, zipped):
    path = tmp_path / ("data.jsonl.gz" if zipped else "data.jsonl")
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    data = gzip.compress(data) if zipped else data
    path.write_bytes(data[: max(0, len(data) - cut)] if cut > 10 else data)
    rows = rows_or_error(path)
    if rows is not None and all(line and isinstance(line, dict) for line in lines) and cut <= 10:
        assert len(rows) == len(lines)


turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"])}, optional={"content": json_values}),
    max_size=3,
)
COLUMNS = ("text", "label", "prompt", "completion", "messages", "choices", "answers", "sentence")


@pytest.fixture(scope="module")
def models(model_folder):
    def parts(name):
        config = MeZOConfig(model_name_or_path=model_folder(name))
        return config, load_model_config(config), load_tokenizer(config)

    made = {"bert": parts("bert"), "llama": parts("llama")}
    made["llama"][2].chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }} {% endfor %}"
    return made


@settings(few, max_examples=100)
@given(
    name=st.sampled_from(["bert", "llama"]),
    rows=st.lists(
        st.dictionaries(st.sampled_from(COLUMNS), json_values | turns, min_size=1, max_size=4), min_size=1, max_size=3
    ),
    words=st.none() | st.just({"0": "bad", "1": "good"}),
    template=st.none() | st.sampled_from(["{text} it was [MASK] .", "{text}", "{prompt}{nothing}", "", "{"]),
)
@example(name="llama", rows=[{"messages": [None]}], words=None, template=None)
@example(name="llama", rows=[{"messages": [{"role": "assistant", "content": None}]}], words=None, template=None)
@example(name="llama", rows=[{"prompt": [{"role": "user", "content": "a"}], "completion": "a"}], words=None,
         template=None)  # fmt: skip
@example(name="bert", rows=[{"text": None, "label": None}], words=None, template=None)
@example(name="bert", rows=[{"text": [0, False]}], words=None, template=None)
def test_rows_of_any_columns_and_values_become_examples_or_an_error(models, name, rows, words, template):
    config, model_config, tokenizer = models[name]
    config = MeZOConfig.from_dict({**config.to_dict(), "label_words": words, "template": template})
    try:
        rows = list(load_rows(rows, None, "train"))
        encoder = make_encoder(rows, config, model_config, tokenizer, encoder_model=name == "bert")
        assert len(encoder(rows)) == len(rows)
    except UserError:
        pass


@few
@given(
    labels=st.lists(st.integers(0, 2) | st.none(), min_size=1, max_size=6),
    options=st.fixed_dictionaries({}, optional={
        "validation_size": st.floats(0, 8), "max_train_samples": st.integers(1, 8), "num_shots": st.integers(1, 4),
        "max_eval_samples": st.integers(1, 8), "dataset_test_split": st.just("test"),
    }),
)  # fmt: skip
def test_splits_of_few_rows(labels, options):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    try:
        splits = load_splits(MeZOConfig.from_dict({"model_name_or_path": "m", **options}), rows)
        assert 0 < len(splits.train) <= len(rows)
    except UserError:
        pass


# --- options ----------------------------------------------------------------------------------------------------------

NAMES = sorted(MeZOConfig.__dataclass_fields__)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=8)
values = plain | st.lists(plain, max_size=3) | st.dictionaries(plain, plain, max_size=3)
named = st.dictionaries(st.sampled_from(NAMES), values, max_size=4)


@many
@given(options=named | st.dictionaries(st.text(max_size=5), values, max_size=2))
@example(options={"seed": 10**400})
@example(options={"learning_rate": 10**400})
@example(options={"max_steps": 10**30})
def test_any_values_give_a_config_or_an_error(options):
    try:
        config = MeZOConfig.from_dict({"model_name_or_path": "m", **options})
    except UserError:
        return
    assert MeZOConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict().keys() == config.to_dict().keys()


@settings(few, max_examples=200)
@given(content=named.map(lambda options: yaml.safe_dump(options, allow_unicode=True)) | st.text(max_size=30)
       | st.binary(max_size=30))  # fmt: skip
@example(content="? [a]\n: b")
@example(content="1: 2")
@example(content="&a [*a]")
@example(content="label_words: &a {0: *a}")
@example(content="seed: 2026-13-45")
def test_any_config_file_gives_a_config_or_an_error(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        assert isinstance(parse_train(["--model_name_or_path", "m", "--config", str(path)]), MeZOConfig)
    except UserError as error:
        one_line(error)


@few
@given(arguments=st.lists(
    st.sampled_from([f"--{name}" for name in NAMES]) | st.text(string.printable, max_size=6), max_size=4))  # fmt: skip
def test_any_command_line_gives_a_config_or_an_error(arguments):
    if {"-h", "--help"} & set(arguments) or any(a.startswith("--config") for a in arguments):
        return
    try:
        parse_train(["--model_name_or_path", "m", *arguments])
    except UserError as error:
        one_line(error)
    except SystemExit:  # tyro has said what does not parse
        pass


@few
@given(content=st.text(max_size=40) | json_values.map(json.dumps))
def test_any_task_file_gives_a_task_or_an_error(tmp_path, content):
    path = tmp_path / "task.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        load_task(str(path))


@given(value=json_values)
def test_any_value_has_a_label_key(value):
    assert isinstance(label_key(value), str)


def test_a_journal_error_is_a_user_error():
    assert issubclass(JournalError, UserError)
