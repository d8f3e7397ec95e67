"""Two processes that are started once and then do one work after the other."""

import signal
import sys
import traceback
from multiprocessing import connection, get_context

import torch

from tests.support import HANG
from utils.launch import GRACE, Group, _joined, free_address
from utils.script import run_script
from utils.shard import ALONE, Shard


def serve(pipe, group, rank):
    """Do what comes through `pipe`, (work, argv), as process `rank` of `group`, until it closes.

    Every answer is an exit code and the lines of complaint; the code is None after an error that
    no script should have, with its traceback, and ends the process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C: the pipe closes then
    torch.set_num_threads(1)
    with _joined(group, rank):
        while True:
            try:
                work, argv = pipe.recv()
            except EOFError:
                return
            said = []
            try:
                code = run_script(lambda argv, do=work: do(argv, Shard(rank, 2), rank), argv,
                                  complain=said.append)  # fmt: skip
                pipe.send((code, said))
            except Exception:
                pipe.send((None, [traceback.format_exc()]))
                raise


class Pair:
    """Two processes, which start with their first work, and anew after one has failed the other."""

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
        answers = self.answers()
        said = [line for code, lines in answers if code is not None for line in lines]
        broken = [lines[0] for code, lines in answers if code is None]
        if broken or len(answers) < 2:
            self.end()
        assert not broken, "\n".join(broken)
        for line in dict.fromkeys(said):  # the same from both is told once
            print(line, file=sys.stderr)
        return max(code for code, _ in answers)

    def answers(self):
        """What both processes answer; of one alone where it fails and the other waits for it."""
        early = connection.wait(self.pipes, HANG)
        assert early, "neither of two processes comes back"
        answer = early[0].recv()
        (other,) = (pipe for pipe in self.pipes if pipe is not early[0])
        came = other.poll(GRACE if answer[0] else HANG)
        assert came or answer[0], "one of two processes does not come back"
        return [answer, other.recv()] if came else [answer]

    def end(self):
        """End both processes at once; the next work starts new ones."""
        for process in self.processes:
            process.kill()
        self.close()
        self.pipes, self.processes = [], []

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(HANG)
