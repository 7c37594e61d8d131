"""The journal: everything that moved the weights, in order, in 64 bytes a direction.

A file is a header and then records, nothing else; it is only ever appended to.

    header   8 bytes  magic b"MEZOJRNL"
             4 bytes  length N of the JSON text, little-endian unsigned
             N bytes  JSON, UTF-8: versions, config, hash of the model's initial weights
             4 bytes  CRC-32 of everything before
    record  60 bytes  step u32, query u16, num_queries u16, seed u64, loss_plus f64, loss_minus f64,
                      coefficient f64, learning_rate f64, num_tokens u32, num_examples u32, computed_tokens u32
             4 bytes  CRC-32 of the 60 bytes and of the record's index in the file

A record is written before the weights move. A file that ends in the middle of a record, or of a step's records, was
cut off while being written: the tail is dropped. So is a tail of zeros, which file systems leave after a power failure
when a file had grown but its data had not reached the disk. A wrong checksum anywhere else is corruption and an error.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mezo.errors import JournalError
from mezo.estimator import Record

logger = logging.getLogger(__name__)

MAGIC = b"MEZOJRNL"
FORMAT_VERSION = 1
_LENGTH = struct.Struct("<I")
_CRC = struct.Struct("<I")
_BODY = struct.Struct("<IHHQddddIII")
RECORD_SIZE = _BODY.size + _CRC.size
_MAX_HEADER = 1 << 20

JsonObject = dict[str, object]


class Contents(NamedTuple):
    """What a journal file holds."""

    header: JsonObject
    steps: list[list[Record]]  # one list of records per step, in order
    valid_bytes: int
    dropped_bytes: int  # torn tail after `valid_bytes`


def pack(record: Record, index: int) -> bytes:
    """The 64 bytes of one record, the `index`-th of its file."""
    body = _BODY.pack(
        record.step, record.query, record.num_queries, record.seed, record.loss_plus, record.loss_minus,
        record.coefficient, record.learning_rate, record.num_tokens, record.num_examples, record.computed_tokens,
    )  # fmt: skip
    return body + _CRC.pack(_record_crc(body, index))


def unpack(data: bytes, index: int) -> Record | None:
    """The record in 64 bytes, or None if its checksum is wrong."""
    body = data[: _BODY.size]
    if _CRC.unpack_from(data, _BODY.size)[0] != _record_crc(body, index):
        return None
    step, query, num_queries, seed, plus, minus, coefficient, rate, tokens, examples, computed = _BODY.unpack(body)
    return Record(step, seed, plus, minus, coefficient, rate, tokens, examples, query, num_queries, computed)


def read(path: str | os.PathLike[str]) -> Contents:
    """Reads a journal; a torn tail is left out and counted.

    Raises:
        JournalError: the file is missing, is no journal, or is corrupt before its tail.
    """
    data = _read_file(path)
    header, offset = _read_header(data, path)
    steps = list(_group(_read_records(data, offset, path), path))
    valid_bytes = offset + RECORD_SIZE * sum(map(len, steps))
    return Contents(header, steps, valid_bytes, len(data) - valid_bytes)


def stream(path: str | os.PathLike[str]) -> tuple[JsonObject, Iterator[list[Record]]]:
    """Header and steps of a journal as `read` gives them, for who keeps no records: they take ten times the file."""
    data = _read_file(path)
    header, offset = _read_header(data, path)
    return header, _group(_read_records(data, offset, path), path)


def is_cut_off(path: Path) -> bool:
    """Whether the file ends within its header, so that nothing was trained yet."""
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        return MAGIC.startswith(data)
    start = len(MAGIC) + _LENGTH.size
    length: int = _LENGTH.unpack_from(data.ljust(start, b"\0"), len(MAGIC))[0]
    return length <= _MAX_HEADER and len(data) < start + length + _CRC.size


class Journal:
    """A journal open for appending, locked against other processes."""

    def __init__(self, path: Path, fd: int, num_records: int):
        self.path = path
        self._fd = fd
        self._num_records = num_records

    @classmethod
    def create(cls, path: Path, header: JsonObject) -> Journal:
        """Starts a new journal; an existing file is an error, unless it is cut off in its header."""
        journal = cls(path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 0)
        journal._lock()
        if not is_cut_off(path):
            journal.close()
            raise JournalError(f"{path}: a journal exists already")
        os.ftruncate(journal._fd, 0)
        text = json.dumps(header, sort_keys=True).encode()
        start = MAGIC + _LENGTH.pack(len(text)) + text
        journal._write(start + _CRC.pack(zlib.crc32(start)))
        journal.sync()
        return journal

    @classmethod
    def resume(cls, path: Path) -> tuple[Journal, Contents]:
        """Opens an existing journal behind its last whole step; cuts a torn tail off."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        except FileNotFoundError:
            raise JournalError(f"{path}: no journal to resume from") from None
        journal = cls(path, fd, 0)
        journal._lock()
        try:
            contents = read(path)
            os.ftruncate(fd, contents.valid_bytes)
        except BaseException:
            journal.close()
            raise
        journal._num_records = sum(map(len, contents.steps))
        return journal, contents

    def append(self, records: Sequence[Record]) -> None:
        """Writes one step's records in a single call; returns when the operating system has them."""
        self._write(b"".join(pack(r, self._num_records + i) for i, r in enumerate(records)))
        self._num_records += len(records)

    def sync(self) -> None:
        """Waits until everything appended is on the disk itself."""
        with self._named("syncing"):
            os.fsync(self._fd)

    def close(self) -> None:
        """Releases the file and its lock."""
        os.close(self._fd)

    def _write(self, data: bytes) -> None:
        start = os.fstat(self._fd).st_size
        written = 0
        try:
            with self._named("writing"):
                while written < len(data):
                    written += os.write(self._fd, data[written:])
        except OSError:
            with contextlib.suppress(OSError):  # a torn tail that cannot be cut off is dropped by who reads it
                os.ftruncate(self._fd, start)
            raise

    @contextlib.contextmanager
    def _named(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} while {doing} the journal", str(self.path)) from None

    def _lock(self) -> None:
        """Held until the file is closed or the process ends, however it ends."""
        import fcntl  # not on Windows, where this module can be imported all the same

        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise JournalError(f"{self.path}: another process is training in this folder") from None
        except OSError as error:
            logger.warning("%s: no locks on this file system (%s); see to it that one process trains here alone",
                           self.path, error.strerror)  # fmt: skip


def _record_crc(body: bytes, index: int) -> int:
    return zlib.crc32(index.to_bytes(8, "little"), zlib.crc32(body))


def _read_file(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise JournalError(f"{path}: no journal here") from None


def _read_header(data: bytes, path: str | os.PathLike[str]) -> tuple[JsonObject, int]:
    """The header and the offset of the first record."""
    if data[: len(MAGIC)] != MAGIC:
        raise JournalError(f"{path}: not a mezo journal")
    start = len(MAGIC) + _LENGTH.size
    length = _LENGTH.unpack_from(data.ljust(start, b"\0"), len(MAGIC))[0]
    stop = start + length
    if length > _MAX_HEADER or len(data) < stop + _CRC.size:
        raise JournalError(f"{path}: the journal's header is cut off; nothing was trained yet, delete the file")
    if _CRC.unpack_from(data, stop)[0] != zlib.crc32(data[:stop]):
        raise JournalError(f"{path}: the journal's header has a wrong checksum")
    try:
        header = json.loads(data[start:stop])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("config"), dict):
        raise JournalError(f"{path}: the journal's header is no JSON object with a config")
    if header.get("format") != FORMAT_VERSION:
        raise JournalError(f"{path}: journal format {header.get('format')!r}, this version reads {FORMAT_VERSION}")
    return header, stop + _CRC.size


def _read_records(data: bytes, offset: int, path: str | os.PathLike[str]) -> Iterator[Record]:
    for index in itertools.count():
        if offset + RECORD_SIZE > len(data):
            return
        record = unpack(data[offset : offset + RECORD_SIZE], index)
        offset += RECORD_SIZE
        if record is None:
            if offset + RECORD_SIZE <= len(data) and data[offset:].strip(b"\0"):
                raise JournalError(f"{path}: record {index} has a wrong checksum, and records follow it")
            return
        yield record


def _group(records: Iterator[Record], path: str | os.PathLike[str]) -> Iterator[list[Record]]:
    """Records by step; an incomplete last step is left out."""
    start = 0
    for step, first in enumerate(records):
        group = [first, *itertools.islice(records, max(1, first.num_queries) - 1)]
        if len(group) < first.num_queries:
            return
        expected = [(step, query, len(group)) for query in range(len(group))]
        if [(r.step, r.query, r.num_queries) for r in group] != expected:
            raise JournalError(f"{path}: records {start} … {start + len(group) - 1} are not those of step {step}")
        yield group
        start += len(group)
