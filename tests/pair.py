"""Two processes that are started once and then do one work after the other."""

import signal
import traceback
from multiprocessing import get_context

import torch

from tests.support import HANG
from utils.launch import Group, _joined, free_address
from utils.script import run_script
from utils.shard import ALONE, Shard


def serve(pipe, group, rank):
    """Do what comes through `pipe`, (work, argv), as process `rank` of `group`, until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C: the pipe closes then
    torch.set_num_threads(1)
    with _joined(group, rank):
        while True:
            try:
                work, argv = pipe.recv()
            except EOFError:
                return
            try:
                pipe.send(run_script(lambda argv, do=work: do(argv, Shard(rank, 2), rank), argv))
            except Exception:
                pipe.send(traceback.format_exc())
                raise


class Pair:
    """Two processes, which start with their first work."""

    def __init__(self):
        self.pipes, self.processes = [], []

    def start(self):
        context = get_context("spawn")
        group = Group(2, 2, 0, free_address(), "gloo")
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, group, rank), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def launch(self, work, argv, group):
        """Do what utils.launch.launch does for a group of one or two, without its processes."""
        if group.size == 1:
            return work(argv, ALONE, 0)
        assert (group.size, group.local, group.joined) == (2, 2, False)
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((work, argv))
        codes = []
        for pipe in self.pipes:
            assert pipe.poll(HANG), "one of two processes does not come back"
            codes.append(pipe.recv())
            assert isinstance(codes[-1], int), codes[-1]
        return max(codes)

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(HANG)
