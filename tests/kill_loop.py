"""Trains in child processes that are ended at random instants, until enough of them were; then lets one finish.

Usage: python tests/kill_loop.py JOBS.json SEED, where jobs are pairs [config, number of kills]. Imports once and forks,
so that a round costs no start-up. Signals take turns: SIGKILL, SIGTERM, SIGINT (Ctrl-C).
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback

import torch

from mezo import api
from mezo.config import MeZOConfig

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def train(options: dict[str, object]) -> int:
    """Exit status of a child, as the command line's."""
    try:
        api.build_trainer(MeZOConfig.from_dict(options)).train()
    except KeyboardInterrupt:
        return 130
    return 0


def ended(child: int, deadline: float) -> int | None:
    """The child's wait status, or None if it still runs at the deadline."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def end_often(options: dict[str, object], num_kills: int, generator: random.Random, longest: float = 1.2) -> None:
    """Ends children of one run until `num_kills` were, each within `longest` seconds after its start.

    A run that finishes before, on a machine faster than expected, begins anew, and children are ended sooner.
    """
    while _run(options, num_kills, generator, longest) < num_kills:
        shutil.rmtree(str(options["output_dir"]))
        longest /= 2


def _run(options: dict[str, object], num_kills: int, generator: random.Random, longest: float) -> int:
    """How many children were ended before one finished."""
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = train(options)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        wait = generator.uniform(0.1 * longest, longest) if kills < num_kills else 600
        status = ended(child, time.monotonic() + wait)
        if status is None:
            os.kill(child, SIGNALS[kills % len(SIGNALS)])
            status = ended(child, time.monotonic() + 60)
            # Whatever the status: Ctrl-C inside another library's import may come back as an ImportError.
            if status is None:
                raise SystemExit(f"{SIGNALS[kills % len(SIGNALS)].name} did not end a child")
            kills += 1
        elif status:
            raise SystemExit(f"a round failed with wait status {status}")
        else:
            return kills


def main() -> None:
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    generator = random.Random(int(sys.argv[2]))
    torch.set_num_threads(1)  # as in the tests: the last bits of a forward pass depend on the number of threads
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
    for options, num_kills in jobs:
        end_often(options, num_kills, generator)


if __name__ == "__main__":
    main()
