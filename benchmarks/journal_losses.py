"""What a run's journal says of long stretches: training loss and projected_grad, a row for every so many steps.

    python benchmarks/journal_losses.py JOURNAL [--steps 10000] [--output FILE.csv]

`commit` is that of this script; the run's own rows are in methods.csv.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from provenance import provenance, write

from mezo.journal import read


def stretches(path: Path, steps: int) -> list[dict[str, Any]]:
    """Mean loss of both signs and root mean square of projected_grad of each stretch."""
    records = [records[0] for records in read(path).steps]
    rows = []
    for first in range(0, len(records), steps):
        part = records[first : first + steps]
        loss = statistics.fmean((r.loss_plus + r.loss_minus) / 2 for r in part)
        grad = math.sqrt(statistics.fmean(r.coefficient**2 for r in part))
        rows.append({"first_step": first, "steps": len(part), "train_loss": f"{loss:.4f}",
                     "projected_grad": f"{grad:.3f}", **provenance()})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = stretches(arguments.journal, arguments.steps)
    for row in rows:
        print(f"{row['first_step']:7} + {row['steps']:6}  loss {row['train_loss']}  rms of projected_grad "
              f"{row['projected_grad']}")  # fmt: skip
    if arguments.output:
        write(arguments.output, rows)


if __name__ == "__main__":
    main()
