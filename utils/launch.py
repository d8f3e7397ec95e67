"""Starting, watching and ending the processes that share one computation."""

import contextlib
import ctypes
import datetime
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context

import torch
import torch.distributed as dist

from utils.errors import FaultError, InputError
from utils.script import run_script
from utils.shard import ALONE, Shard, is_lost_peer

#: How long processes wait for one another, in seconds: to meet, and in a collective. The latter is
#: long because one may still run a whole seed; a process that ended is noticed by its closed
#: connection or by whoever started it.
MEETING_TIMEOUT = 300
COLLECTIVE_TIMEOUT = 24 * 3600
#: How long the others may take to end when one process has failed, in seconds.
GRACE = 3.0
#: Flags that may differ between the nodes of one run; the number of processes is compared itself.
FLAGS_OF_A_NODE = {"rank", "gpu", "dist_url", "workers", "multiprocessing_distributed"}
#: What a process says that can only report the end of another.
LOST = "lost another one"


@dataclass(frozen=True)
class Group:
    """The processes that a command line asks for.

    local: on this node, numbers first … first + local − 1 of `size`. url: where they meet.
    joined: an outer launcher (torchrun) has started this process as rank `first`. flags: those
    that all of them must have been given alike, by name.
    """

    size: int = 1
    local: int = 1
    first: int = 0
    url: str = ""
    backend: str = "gloo"
    joined: bool = False
    flags: dict = field(default_factory=dict, repr=False)


def group_from(args) -> Group:
    """The processes that the flags, or torchrun's environment, ask for.

    Raises InputError for what cannot be.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend = args.dist_backend or ("nccl" if gpus else "gloo")
    if args.dist_backend == "nccl" and not gpus:
        raise InputError(
            "--dist-backend nccl: no CUDA device here; give --dist-backend gloo"
            + ("" if args.nproc else " and a number of processes, --nproc 2")
        )
    if args.multiprocessing_distributed and not (gpus or args.nproc):
        raise InputError(
            "--multiprocessing-distributed: one process a GPU, and here is none; give the number "
            "of processes, --nproc 2"
        )
    if under_torchrun or args.dist_url == "env://":
        return _group_of_environment(args, backend)
    nodes = 1 if args.world_size == -1 else args.world_size
    rank = 0 if args.rank == -1 else args.rank
    if nodes < 1:
        raise InputError(f"--world-size {args.world_size}: give the number of nodes, 1 or more")
    if not 0 <= rank < nodes:
        raise InputError(f"--rank {rank}: --world-size {nodes} has nodes 0 to {nodes - 1}")
    local = args.nproc or (gpus if args.multiprocessing_distributed and gpus else 1)
    _check_gpus(args, backend, local, gpus)
    size = nodes * local
    if size == 1:
        return Group()
    if args.dist_url is None and nodes > 1:
        raise InputError(
            f"--world-size {nodes}: several nodes need a place to meet; give --dist-url "
            "tcp://HOST:PORT of node 0"
        )
    url = args.dist_url or free_address()
    host, port = _address(url)
    if rank == 0 and args.dist_url is not None:
        _check_port_is_free(host, port, url)
    return Group(size, local, rank * local, url, backend, flags=_flags_of_all(args, local))


def _group_of_environment(args, backend: str) -> Group:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(
            f"--dist-url env://: {missing[0]} is not in the environment; start with torchrun, or "
            "give tcp://HOST:PORT"
        )
    for flag, value in (("--nproc", args.nproc), ("--multiprocessing-distributed",
                                                  args.multiprocessing_distributed)):  # fmt: skip
        if value:
            raise InputError(f"{flag}: torchrun starts the processes; leave it out")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        return Group()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    _check_gpus(args, backend, local, torch.cuda.device_count())
    flags = _flags_of_all(args, None)
    return Group(size, local, rank, "env://", backend, joined=True, flags=flags)


def _flags_of_all(args, local: int | None) -> dict:
    """The flags that may not differ; local: processes on this node where the flags decide."""
    given = {name: value for name, value in vars(args).items() if name not in FLAGS_OF_A_NODE}
    return given | {"nproc": local}


def _check_gpus(args, backend: str, local: int, gpus: int) -> None:
    available = 1 if args.gpu is not None else gpus
    if backend == "nccl" and local > available:
        which = f"--gpu {args.gpu} is one" if args.gpu is not None else f"here are {gpus}"
        raise InputError(
            f"--nproc {local}: nccl takes one process a GPU and {which}; give fewer, or "
            "--dist-backend gloo"
        )


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("tcp://").rpartition(":")
    if not url.startswith("tcp://") or not host or not port.isdecimal() or int(port) > 65535:
        raise InputError(f"--dist-url {url}: not of the form tcp://HOST:PORT or env://")
    return host, int(port)


def free_address() -> str:
    """A local address, tcp://127.0.0.1:PORT, at which processes of this node can meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _check_port_is_free(host: str, port: int, url: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"--dist-url {url}: cannot be opened here ({error.strerror}); give another port"
            ) from error


def launch(work: Callable[[list[str], Shard, int], int], argv: list[str], group: Group) -> int:
    """Run `work(argv, shard, local_rank)` in every process of `group`; return the exit code.

    One process: it is called here. Several: children are started and watched. Signals go on to
    them. When one fails its message is printed, once, and the others are ended; none outlives
    this process.
    """
    if group.size == 1:
        return work(argv, ALONE, 0)
    if group.joined:
        local = int(os.environ.get("LOCAL_RANK", 0))
        with _joined(group, group.first):
            return work(argv, Shard(group.first, group.size), local)
    context = get_context("spawn")
    failures = context.SimpleQueue()
    children = [
        context.Process(target=_child, args=(work, argv, group, local, failures, os.getpid()))
        for local in range(group.local)
    ]
    with _forwarded_signals(children) as signals:
        for child in children:
            child.start()
        return _watch(children, failures, group, signals)


def _child(work, argv, group, local, failures, parent) -> None:
    """Body of a started process: join the others, work, report what went wrong."""
    os.setpgrp()  # a terminal's Ctrl-C reaches the parent, which passes it on once
    _die_with(parent)
    torch.set_num_threads(max(1, torch.get_num_threads() // group.local))
    rank = group.first + local

    def run(argv):
        with _joined(group, rank):
            return work(argv, Shard(rank, group.size), local)

    def report(text):
        failures.put((rank, text))

    sys.exit(run_script(run, argv, complain=report))


def _die_with(parent: int) -> None:
    """End this process when its parent ends, however that happens (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _joined(group: Group, rank: int):
    """Within this context the process is `rank` of the group."""
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT)
    waiting = datetime.timedelta(seconds=MEETING_TIMEOUT)
    try:
        if group.url == "env://":
            store, _, _ = next(dist.rendezvous("env://", timeout=waiting))
            store.set_timeout(waiting)
        else:
            host, port = _address(group.url)
            store = dist.TCPStore(
                host, port, is_master=rank == 0, timeout=waiting, wait_for_workers=False
            )
        _meet(store, group, rank)
        store.set_timeout(timeout)
        dist.init_process_group(
            group.backend, store=store, rank=rank, world_size=group.size, timeout=timeout
        )
    except InputError:
        raise
    except (RuntimeError, ValueError) as error:
        raise FaultError(
            f"process {rank} of {group.size} did not meet the others at {group.url} within "
            f"{MEETING_TIMEOUT} s: {' '.join(str(error).split())[:160]}"
        ) from error
    try:
        yield
    except RuntimeError as error:
        if is_lost_peer(error):
            raise FaultError(
                f"process {rank} of {group.size} {LOST}: {' '.join(str(error).split())[-160:]}"
            ) from error
        raise
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _meet(store: dist.Store, group: Group, rank: int) -> None:
    """Wait in the store for all processes of the group, and compare what they were started with.

    Before any collective: what differs would end, if at all, in a wrong result or in processes
    that wait for one another. All processes of a node have its flags, so that nodes are compared;
    under an outer launcher every process has its own.

    Raises InputError on every process where a flag differs.
    """
    who, share = ("process", 1) if group.joined else ("node", group.local)
    own, count = rank // share, group.size // share
    store.set(f"flags/{own}", json.dumps(group.flags, default=str))
    first = json.loads(store.get("flags/0"))
    for number in (own, *range(1, count)):
        other = json.loads(store.get(f"flags/{number}"))
        differing = [name for name in first | other if first.get(name) != other.get(name)]
        if not differing:
            continue
        if store.add(f"refusing/{own}", 1) == share:
            store.set(f"refused/{own}", "")
        with contextlib.suppress(RuntimeError):  # the store ends with the process that keeps it
            store.wait([f"refused/{number}" for number in range(count)])
        name = differing[0]
        raise InputError(
            f"--{name.replace('_', '-')}: {who} {number} has {other.get(name)}, {who} 0 has "
            f"{first.get(name)}; give the same flags on every {who}"
        )
    store.set(f"here/{rank}", "")
    store.wait([f"here/{number}" for number in range(group.size)])


@contextlib.contextmanager
def _forwarded_signals(children):
    """Pass SIGINT and SIGTERM on to the children; yields the list of those that came."""
    came = []

    def forward(number, frame):
        came.append(number)
        for child in children:
            if child.is_alive():
                os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(children, failures, group: Group, signals: Sequence[int]) -> int:
    """Wait for the children; end all when one fails. Returns the exit code.

    signals: those that were passed on; children may need a while to save what there is.
    """
    while all(child.exitcode in (None, 0) for child in children):
        if all(child.exitcode == 0 for child in children):
            return 0
        connection.wait([c.sentinel for c in children if c.exitcode is None], 1.0)
    first = next(c for c in children if c.exitcode not in (None, 0))
    saving = first.exitcode in (128 + signal.SIGINT, 128 + signal.SIGTERM)
    _wait(children, COLLECTIVE_TIMEOUT if saving else GRACE)
    for end in (lambda child: child.terminate(), lambda child: child.kill()):
        for child in children:
            if child.is_alive():
                end(child)
        _wait(children, GRACE)
    if signals:
        if not saving:
            print("interrupted", file=sys.stderr)
        return 128 + signals[0]
    complaints = []
    while not failures.empty():
        complaints.append(failures.get())
    # who lost a peer only suffers from what happened to that one
    complaints.sort(key=lambda complaint: LOST in complaint[1])
    if complaints and LOST not in complaints[0][1]:
        first = children[complaints[0][0] - group.first]
    said = set()
    for rank, text in complaints:
        if text not in said and (not said or LOST not in text):
            print(text if rank == 0 or group.size == 1 else f"{text} (process {rank})",
                  file=sys.stderr)  # fmt: skip
        said.add(text)
    if first.exitcode < 0 and not said:
        number = children.index(first) + group.first
        print(
            f"fault: process {number} of {group.size} was ended by signal {-first.exitcode}; the "
            "others were ended too",
            file=sys.stderr,
        )
    return first.exitcode if first.exitcode > 0 else 1


def _wait(children, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
