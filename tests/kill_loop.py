"""Trains in child processes that are killed by SIGKILL at random instants, until enough kills; then lets one finish.

Usage: python tests/kill_loop.py CONFIG.json NUM_KILLS SEED. Imports once and forks, so that a round costs no start-up.
"""

import json
import os
import random
import signal
import sys
import time

import torch

from mezo import api
from mezo.config import MeZOConfig


def train(options: dict[str, object]) -> None:
    api.build_trainer(MeZOConfig.from_dict(options)).train()


def main() -> None:
    with open(sys.argv[1]) as file:
        options = json.load(file)
    torch.set_num_threads(1)  # as in the tests: the last bits of a forward pass depend on the number of threads
    num_kills, generator = int(sys.argv[2]), random.Random(int(sys.argv[3]))
    kills = 0
    while True:
        child = os.fork()
        if child == 0:
            train(options)
            os._exit(0)
        deadline = time.monotonic() + (generator.uniform(0.2, 1.2) if kills < num_kills else 600)
        done = 0
        while done == 0 and time.monotonic() < deadline:
            time.sleep(0.002)
            done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"a round failed with status {status}")
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    print(kills)


if __name__ == "__main__":
    main()
