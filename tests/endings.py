"""What processes do in tests that watch how they end; it imports little, since it is started often.

python -m tests.endings FILE URL: two processes that wait.
"""

import os
import sys
import time

import torch

from utils.errors import InputError
from utils.launch import Group, launch


def one_fails(argv, shard, local_rank):
    """Process 1 fails while the others wait for it."""
    if shard.rank == 1:
        raise InputError("--flag: only process 1 objects")
    shard.sum(torch.ones(1))
    return 0


def wait_forever(argv, shard, local_rank):
    """Leave this process's number in argv[0].rank and go on until ended."""
    with open(f"{argv[0]}.{shard.rank}", "w") as file:
        file.write(str(os.getpid()))
    while True:
        shard.sum(torch.ones(1))
        time.sleep(0.05)


if __name__ == "__main__":
    sys.exit(launch(wait_forever, sys.argv[1:], Group(2, 2, 0, sys.argv[2], "gloo")))
