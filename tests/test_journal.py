"""The journal file: every cut is recovered, every flipped bit is noticed, two processes cannot share it."""

import math
import os
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo import journal
from mezo.errors import JournalError
from mezo.estimator import Record

HEADER = {"format": journal.FORMAT_VERSION, "config": {"seed": 1}}


def record(step, query=0, num_queries=1):
    return Record(step, 2**63 + step, 1.5 + step, -0.25, 1e-9 * step, 1e-6, 640, 64, query, num_queries)


def write(path, steps, num_queries=1):
    opened = journal.Journal.create(path, HEADER)
    for step in range(steps):
        opened.append([record(step, query, num_queries) for query in range(num_queries)])
    opened.close()
    return path.read_bytes()


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "journal", 5, num_queries=3)
    contents = journal.read(tmp_path / "journal")
    assert contents.header == HEADER
    assert contents.steps == [[record(step, query, 3) for query in range(3)] for step in range(5)]
    assert contents.dropped_bytes == 0


@given(values=st.tuples(*[st.floats(width=64)] * 4), seed=st.integers(0, 2**64 - 1), index=st.integers(0, 2**40))
def test_a_record_is_64_bytes_and_keeps_every_bit(values, seed, index):
    original = Record(7, seed, *values, 10, 20, 1, 2)
    data = journal.pack(original, index)
    assert len(data) == journal.RECORD_SIZE == 64
    assert journal.pack(journal.unpack(data, index), index) == data


def test_twenty_thousand_steps_stay_under_two_megabytes(tmp_path):
    assert len(write(tmp_path / "journal", 20_000)) < 2_000_000


def test_steps_that_are_not_kept_take_no_memory(tmp_path):
    write(tmp_path / "journal", 5000, num_queries=2)
    peaks = []
    for read in (lambda path: journal.read(path).steps, lambda path: journal.stream(path)[1]):
        tracemalloc.start()
        assert sum(len(records) for records in read(tmp_path / "journal")) == 10_000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    file = 10_000 * journal.RECORD_SIZE
    assert peaks[1] < 1.2 * file
    assert peaks[0] > 4 * file


@pytest.mark.parametrize("num_queries", [1, 3])
def test_every_truncation_recovers_the_steps_before_it(tmp_path, num_queries):
    path = tmp_path / "journal"
    data = write(path, 4, num_queries)
    header_size = len(data) - 4 * num_queries * journal.RECORD_SIZE
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        if size < header_size:
            with pytest.raises(JournalError):
                journal.read(path)
            continue
        whole_steps = (size - header_size) // (journal.RECORD_SIZE * num_queries)
        assert list(journal.stream(path)[1]) == journal.read(path).steps
        opened, contents = journal.Journal.resume(path)
        assert len(contents.steps) == whole_steps
        assert contents.dropped_bytes == size - header_size - whole_steps * num_queries * journal.RECORD_SIZE
        opened.append([record(whole_steps, query, num_queries) for query in range(num_queries)])
        opened.close()
        assert len(journal.read(path).steps) == whole_steps + 1


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "journal"
    data = write(path, 3)
    original = journal.read(path).steps
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            steps = journal.read(path).steps
        except JournalError:
            continue
        # Damage in the very last record looks like a write that was cut off: that record is dropped, never changed.
        assert position >= len(data) - journal.RECORD_SIZE
        assert steps == original[:-1]


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300), after_magic=st.booleans())
def test_arbitrary_bytes_give_a_clear_error(tmp_path_factory, data, after_magic):
    path = tmp_path_factory.getbasetemp() / "arbitrary"
    path.write_bytes(journal.MAGIC + data if after_magic else data)
    with pytest.raises(JournalError):
        journal.read(path)


def test_records_swapped_or_repeated_are_noticed(tmp_path):
    path = tmp_path / "journal"
    data = write(path, 4)
    size = journal.RECORD_SIZE
    swapped = data[: -3 * size] + data[-2 * size : -size] + data[-3 * size : -2 * size] + data[-size:]
    path.write_bytes(swapped)
    with pytest.raises(JournalError, match="checksum"):
        journal.read(path)
    path.write_bytes(data + data[-size:] * 2)
    with pytest.raises(JournalError, match="checksum"):
        journal.read(path)


def test_a_journal_is_never_overwritten(tmp_path):
    write(tmp_path / "journal", 1)
    with pytest.raises(JournalError, match="exists already"):
        journal.Journal.create(tmp_path / "journal", HEADER)


def test_a_second_process_is_refused(tmp_path):
    opened = journal.Journal.create(tmp_path / "journal", HEADER)
    code = f"from pathlib import Path; from mezo.journal import Journal; Journal.resume(Path({str(opened.path)!r}))"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "another process is training in this folder" in second.stderr
    opened.close()


def test_a_failed_write_leaves_whole_records(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    opened = journal.Journal.create(path, HEADER)
    opened.append([record(0)])
    real_write = os.write

    def full_disk(fd, data):
        if len(data) <= 40:
            raise OSError(28, "No space left on device")
        return real_write(fd, data[:24])

    monkeypatch.setattr(os, "write", full_disk)
    with pytest.raises(OSError, match="No space left on device while writing the journal"):
        opened.append([record(1)])
    monkeypatch.undo()
    assert len(journal.read(path).steps) == 1
    opened.append([record(1)])
    assert len(journal.read(path).steps) == 2
    assert math.isfinite(journal.read(path).steps[1][0].loss_plus)
    opened.close()
