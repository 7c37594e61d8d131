"""Mutation fuzzer of the journal reader: damaged and forged journals by the million.

    python benchmarks/fuzz_journal.py [--inputs 1000000] [--seed 0] [--output FILE.csv]

Three kinds of input. Damaged: true journals with bits flipped, bytes overwritten, cut, repeated, swapped, zeroed; what
is accepted must be a prefix of the truth. Forged: random fields or headers under right checksums; they are accepted or
refused. Random bytes: refused. In every case `JournalError` is the only exception, and each accepted record is checked
against a checksum that is computed here. Ends with status 1 and the input at the first failure.
"""

import argparse
import collections
import contextlib
import csv
import json
import os
import random
import re
import struct
import sys
import time
import zlib
from pathlib import Path

from mezo import journal
from mezo.errors import JournalError
from mezo.estimator import Record

RECORD = struct.Struct("<IHHQddddIII")
HEADERS = ({"format": 1, "config": {"seed": 1}}, {"format": 1, "config": {}, "labels": ["0", "1"], "kind": "causal_lm"})


class Sample:
    """The bytes of a true journal, where its records start, and what it says."""

    def __init__(self, generator: random.Random):
        self.queries, num_steps = generator.choice((1, 1, 2, 3)), generator.randrange(6)
        text = json.dumps(generator.choice(HEADERS)).encode()
        start = journal.MAGIC + struct.pack("<I", len(text)) + text
        self.data = start + struct.pack("<I", zlib.crc32(start))
        self.offset = len(self.data)
        self.steps: list[list[Record]] = []
        for step in range(num_steps):
            losses = [generator.uniform(-3, 9) for _ in range(4)]
            records = [
                Record(step, generator.getrandbits(64), *losses, 9, 4, query, self.queries, 18)
                for query in range(self.queries)
            ]
            for query, record in enumerate(records):
                self.data += journal.pack(record, step * self.queries + query)
            self.steps.append(records)


def damaged(data: bytes, generator: random.Random) -> bytes:
    """One to three damages."""
    out = bytearray(data)
    for _ in range(generator.choice((1, 1, 1, 2, 3))):
        at, length, size = generator.randrange(len(out) + 1), generator.choice((1, 2, 4, 8, 60, 64, 128)), len(out)
        match generator.randrange(8):
            case 0 if size:
                out[at % size] ^= 1 << generator.randrange(8)
            case 1 if size:
                out[at % size] = generator.randrange(256)
            case 2:
                del out[at:]
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = generator.randbytes(length)
            case 5:
                out[at:at] = out[max(0, at - length) : at]
            case 6:
                out[at : at + length] = bytes(len(out[at : at + length]))
            case _:
                out += bytes(length) if generator.random() < 0.5 else generator.randbytes(length)
    return bytes(out)


def forged(sample: Sample, generator: random.Random) -> bytes:
    """Another header or other records, under right checksums."""
    texts = (b"", b"null", b"[]", b"3", b'"x"', b"{", b"\xff\xfe", b"[" * 5000, b'{"format": 1}', b'{"config": {}}',
             b'{"format": 1, "config": []}', b'{"format": 2, "config": {}}', b'{"format": 1e999, "config": {}}',
             b'{"format": 1, "config": {}}', b"1" * 5000)  # fmt: skip
    text = generator.choice(texts)
    start = journal.MAGIC + struct.pack("<I", len(text)) + text
    data = start + struct.pack("<I", zlib.crc32(start))
    if generator.random() < 0.7:
        data = sample.data[: sample.offset]
    for index in range(generator.randrange(6)):
        if generator.random() < 0.5:
            body = generator.randbytes(RECORD.size)
        else:
            counts = (generator.randrange(3), generator.randrange(3), generator.randrange(4))
            body = struct.pack("<IHH", *counts) + generator.randbytes(52)
        data += body + struct.pack("<I", crc(body, index))
    return data


def crc(body: bytes, index: int) -> int:
    return zlib.crc32(body + index.to_bytes(8, "little"))


def check(path: str, data: bytes, truth: list[list[Record]] | None) -> str:
    """What became of one input; raises AssertionError where the reader is wrong."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # ext4 writes a file that is emptied and filled again to the disk at once, a new one later
    with open(path, "wb") as file:
        file.write(data)
    try:
        contents = journal.read(path)
    except JournalError as error:
        reason = re.split(r"[,;]", str(error).removeprefix(f"{path}: "))[0]
        return "refused: " + re.sub(r"\d+", "n", reason)
    assert contents.valid_bytes + contents.dropped_bytes == len(data)
    offset = contents.valid_bytes - 64 * sum(map(len, contents.steps))
    for index in range(sum(map(len, contents.steps))):
        body, recorded = data[offset + 64 * index :][:60], data[offset + 64 * index + 60 :][:4]
        assert struct.unpack("<I", recorded)[0] == crc(body, index), "a record with a wrong checksum was accepted"
    for number, records in enumerate(contents.steps):
        assert [(r.step, r.query, r.num_queries) for r in records] == [
            (number, query, len(records)) for query in range(len(records))
        ], "records out of order"
    if truth is not None:
        assert contents.steps == truth[: len(contents.steps)], "accepted records are no prefix of the truth"
    return "accepted whole" if not contents.dropped_bytes else "accepted without its tail"


def fuzz(path: str, inputs: int, seed: int) -> dict[str, collections.Counter[str]]:
    """Outcomes of that many inputs by kind."""
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    sample = Sample(random.Random(seed))
    for number in range(inputs):
        generator = random.Random(f"{seed} {number}")
        if number % 100 == 0:
            sample = Sample(generator)
        kind = generator.choices(("damaged", "forged", "random"), (8, 1.5, 0.5))[0]
        truth: list[list[Record]] | None = None
        if kind == "damaged":
            data, truth = damaged(sample.data, generator), sample.steps
        elif kind == "forged":
            data = forged(sample, generator)
        else:
            data = generator.choice((b"", journal.MAGIC)) + generator.randbytes(generator.randrange(200))
        try:
            outcomes[kind][check(path, data, truth)] += 1
        except Exception:
            print(f"input {number} of seed {seed}, {kind}: {data.hex()}", file=sys.stderr)
            raise
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", default="/dev/shm/mezo-fuzz-journal", help="where inputs are written, in memory best")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    started = time.perf_counter()
    outcomes = fuzz(arguments.path, arguments.inputs, arguments.seed)
    seconds = time.perf_counter() - started
    for kind, counts in outcomes.items():
        print(f"{kind}: {counts.total():,}")
        for outcome, count in counts.most_common():
            print(f"  {count:9,} {outcome}")
    print(f"{arguments.inputs:,} inputs in {seconds:.0f} s, no wrong record accepted, no other exception")
    if arguments.output:
        write_rows(arguments.output, outcomes, {"seed": arguments.seed, "seconds": round(seconds)})


def write_rows(path: Path, outcomes: dict[str, collections.Counter[str]], facts: dict[str, object]) -> None:
    """A row for each outcome of each kind."""
    from provenance import provenance  # beside this script, which a test loads from elsewhere

    facts |= provenance()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["kind", "outcome", "inputs", *facts])
        writer.writeheader()
        for kind, counts in outcomes.items():
            for outcome, count in counts.most_common():
                writer.writerow({"kind": kind, "outcome": outcome, "inputs": count, **facts})


if __name__ == "__main__":
    main()
