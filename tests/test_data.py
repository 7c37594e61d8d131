"""Rows from every kind of source; splits, held-out parts and samples by seed; which rows a step sees."""

import csv
import gzip
import json
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo.config import MeZOConfig
from mezo.data import BatchSampler, load_eval_rows, load_rows, load_splits, permutation
from mezo.errors import UserError

ROWS = [{"text": f"text {i}, with a comma", "label": i % 2} for i in range(20)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Files are converted by `datasets` into its cache; each test has its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows=ROWS) -> Path:
    """Writes rows in the format that the name asks for, without help of `datasets`."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as out:
        if name.endswith(".jsonl"):
            out.writelines(json.dumps(row) + "\n" for row in rows)
        elif name.endswith(".json"):
            json.dump(rows, out)
        else:
            table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def config(**options):
    return MeZOConfig(model_name_or_path="not used", **options)


def texts(rows):
    return list(rows["text"])


# --- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.gz", "csv.gz", "tsv.gz"])
def test_files(tmp_path, form):
    path = write(tmp_path / f"some.data.{form}")
    for source in (path, str(path)):
        assert load_rows(source, None, "train").to_list() == ROWS


def test_a_single_file_is_every_split(tmp_path):
    path = write(tmp_path / "data.jsonl")
    assert load_rows(path, None, "validation").to_list() == ROWS


def test_a_changed_file_is_read_anew(tmp_path):
    path = write(tmp_path / "data.jsonl")
    assert len(load_rows(path, None, "train")) == 20
    write(path, ROWS[:7])
    assert load_rows(path, None, "train").to_list() == ROWS[:7]


def test_blank_lines_and_letters_beyond_ascii(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "žluťoučký 馬"}\n\n{"text": "🐎"}\n', encoding="utf-8")
    assert texts(load_rows(path, None, "train")) == ["žluťoučký 馬", "🐎"]


def test_nested_columns(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": str(i)}]} for i in range(3)
    ]
    assert load_rows(write(tmp_path / "chat.jsonl", rows), None, "train").to_list() == rows


def test_rows_in_memory():
    assert load_rows(ROWS, None, "train").to_list() == ROWS
    assert load_rows(tuple(ROWS), None, "train").to_list() == ROWS
    dataset = Dataset.from_list(ROWS)
    assert load_rows(dataset, None, "train") is dataset


def test_a_dict_of_splits_in_memory():
    """What `datasets.load_dataset(name)` returns, passed on as it is."""
    splits = DatasetDict(train=Dataset.from_list(ROWS[:12]), test=Dataset.from_list(ROWS[12:]))
    assert load_rows(splits, None, "train").to_list() == ROWS[:12]
    assert load_rows(splits, None, "validation", "test").to_list() == ROWS[12:]
    with pytest.raises(UserError, match=r"no split 'dev'.*train, test"):
        load_rows(splits, None, "dev")


def test_a_data_set_that_is_a_script(tmp_path):
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "reviews.py").write_text("raise SystemExit")
    with pytest.raises(UserError, match=r"scripts are no longer supported, but found reviews\.py"):
        load_rows(str(tmp_path / "reviews"), None, "train")


def test_streams_are_refused():
    with pytest.raises(UserError, match="streaming"):
        load_rows(Dataset.from_list(ROWS).to_iterable_dataset(), None, "train")


@pytest.mark.parametrize("source", [[], (), Dataset.from_list([])])
def test_no_rows(source):
    with pytest.raises(UserError, match="holds no rows"):
        load_rows(source, None, "train")


# --- folders and splits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("train.jsonl", "validation.jsonl"),
        ("train.csv", "validation.jsonl.gz"),
        ("train.parquet", "validation.parquet"),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
    ],
)
def test_a_folder_has_the_splits_of_its_files(tmp_path, train, validation):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / train, ROWS[:12])
    write(folder / validation, ROWS[12:])
    assert load_rows(folder, None, "train").to_list() == ROWS[:12]
    assert load_rows(str(folder), None, "validation").to_list() == ROWS[12:]
    assert load_rows(folder, None, "missing", "validation").to_list() == ROWS[12:]


def test_an_unknown_split_names_those_there_are(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl")
    write(folder / "validation.jsonl")
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, validation"):
        load_rows(folder, None, "dev")


def test_a_folder_without_data(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load_rows(tmp_path / "empty", None, "train")


def test_what_save_to_disk_left(tmp_path):
    splits = DatasetDict(train=Dataset.from_list(ROWS[:12]), validation=Dataset.from_list(ROWS[12:]))
    splits.save_to_disk(tmp_path / "saved")
    assert load_rows(tmp_path / "saved", None, "train").to_list() == ROWS[:12]
    assert load_rows(tmp_path / "saved", None, "validation").to_list() == ROWS[12:]
    splits["train"].save_to_disk(tmp_path / "single")
    with pytest.raises(UserError, match="load_from_disk") as raised:
        load_rows(tmp_path / "single", None, "train")
    assert "\n" not in str(raised.value)


def test_evaluation_rows_come_from_the_first_source_named(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS[:12])
    write(folder / "validation.jsonl", ROWS[12:16])
    write(folder / "test.jsonl", ROWS[16:])
    other = write(tmp_path / "other.jsonl", ROWS[:3])

    assert load_splits(config(dataset_name=str(folder))).evaluation is None
    held_out = load_splits(config(dataset_name=str(folder), dataset_test_split="validation"))
    assert (held_out.train.to_list(), held_out.evaluation.to_list()) == (ROWS[:12], ROWS[12:16])
    named = config(dataset_name=str(folder), dataset_train_split="validation", eval_dataset_name=str(folder))
    assert load_splits(named).train.to_list() == ROWS[12:16]
    assert load_splits(named).evaluation.to_list() == ROWS[16:]  # "test" comes before "validation"
    assert load_splits(named, evaluation=other).evaluation.to_list() == ROWS[:3]
    assert load_splits(named, train=ROWS[:5]).train.to_list() == ROWS[:5]
    assert load_eval_rows(config(dataset_test_split="test"), train_source=folder).to_list() == ROWS[16:]


def test_no_source_at_all():
    with pytest.raises(UserError, match="dataset_name is missing"):
        load_splits(config())


# --- parts by seed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(0.25, 5), (0.1, 2), (0.99 - 0.04, 19), (1, 1), (7, 7), (19, 19)])
def test_held_out_part_is_disjoint_and_of_the_right_size(size, count):
    train, evaluation = load_splits(config(validation_size=size), ROWS)
    assert (len(train), len(evaluation)) == (20 - count, count)
    assert sorted(texts(train) + texts(evaluation)) == sorted(texts(Dataset.from_list(ROWS)))


def test_held_out_part_is_a_function_of_the_seed():
    def held_out(**options):
        return texts(load_splits(config(validation_size=6, **options), ROWS).evaluation)

    assert held_out(seed=1) == held_out(seed=1)
    assert set(held_out(seed=1)) != set(held_out(seed=2))
    assert held_out(seed=1) == held_out(seed=5, data_seed=1)
    assert set(held_out(seed=1)) != {row["text"] for row in ROWS[:6]}
    assert set(held_out(seed=1)) != {row["text"] for row in ROWS[-6:]}


@pytest.mark.parametrize("size", [0.01, 0.999, 20, 30])
def test_a_part_that_leaves_nothing_is_refused(size):
    with pytest.raises(UserError, match="validation_size"):
        load_splits(config(validation_size=size), ROWS)


def test_a_named_evaluation_split_wins_over_a_held_out_part(tmp_path):
    path = write(tmp_path / "data.jsonl")
    train, evaluation = load_splits(config(dataset_name=str(path), validation_size=5), evaluation=ROWS[:3])
    assert (len(train), evaluation.to_list()) == (20, ROWS[:3])


def test_samples_by_seed(caplog):
    def sample(**options):
        train, evaluation = load_splits(config(validation_size=8, **options), ROWS)
        return texts(train), texts(evaluation)

    train, evaluation = sample(max_train_samples=4, max_eval_samples=3, seed=1)
    all_train, all_evaluation = sample(seed=1)
    assert (len(set(train)), len(set(evaluation))) == (4, 3)
    assert set(train) < set(all_train)
    assert set(evaluation) < set(all_evaluation)
    assert (train, evaluation) == sample(max_train_samples=4, max_eval_samples=3, seed=1)
    assert train != sample(max_train_samples=4, seed=2)[0]
    more = sample(max_train_samples=13, max_eval_samples=13, seed=1)  # at most
    assert (sorted(more[0]), sorted(more[1])) == (sorted(all_train), sorted(all_evaluation))
    assert "max_train_samples is 13; there are 12 rows" in caplog.text


def test_the_rows_stay_where_they_were(tmp_path):
    """Loading never writes beside the user's file."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = write(folder / "data.jsonl")
    before = path.read_bytes()
    load_splits(config(dataset_name=str(path), validation_size=5, max_train_samples=3))
    assert [p.name for p in folder.iterdir()] == ["data.jsonl"]
    assert path.read_bytes() == before


# --- batches --------------------------------------------------------------------------------------------------------


@settings(deadline=None)  # machines stall
@given(count=st.integers(1, 300), seed=st.integers(0, 2**63 - 1))
def test_a_permutation_holds_everything_once(count, seed):
    assert sorted(permutation(count, seed)) == list(range(count))
    assert permutation(count, seed) == permutation(count, seed)


@settings(deadline=None)  # machines stall
@given(
    num_examples=st.integers(1, 40), batch_size=st.integers(1, 90), seed=st.integers(0, 2**63 - 1), epochs=st.just(3)
)
def test_every_example_once_per_epoch_across_batch_ends(num_examples, batch_size, seed, epochs):
    sampler = BatchSampler(num_examples, batch_size, seed)
    steps = -(-epochs * num_examples // batch_size)
    batches = [sampler(step) for step in range(steps)]
    assert {len(batch) for batch in batches} == {batch_size}
    stream = [i for batch in batches for i in batch]
    for epoch in range(epochs):
        assert sorted(stream[epoch * num_examples : (epoch + 1) * num_examples]) == list(range(num_examples))


def test_epochs_have_different_orders_and_batches_cross_their_ends():
    sampler = BatchSampler(10, 4, seed=3)
    stream = [i for step in range(5) for i in sampler(step)]
    assert stream[:10] != stream[10:]
    assert sampler(2) == stream[8:12]
    assert [sampler.epoch(step) for step in (0, 1, 5)] == [0.0, 0.4, 2.0]


@settings(deadline=None)  # machines stall
@given(
    order=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    num_examples=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 1000),
)
def test_a_batch_is_a_function_of_seed_and_step_in_whatever_order_it_is_asked_for(
    order, num_examples, batch_size, seed
):
    sampler = BatchSampler(num_examples, batch_size, seed)
    for step in order:
        assert sampler(step) == BatchSampler(num_examples, batch_size, seed)(step)


def test_another_seed_gives_other_batches():
    assert BatchSampler(50, 20, 1)(0) != BatchSampler(50, 20, 2)(0)
