"""Starts, watches and ends the processes that share one computation."""

import contextlib
import ctypes
import datetime
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue

import torch
import torch.distributed as dist

from utils import interruption
from utils.errors import FaultError, InputError
from utils.flags import ProcessSettings
from utils.script import run_script
from utils.shard import ALONE, Shard, is_lost_peer

#: How long processes wait for one another to meet, in seconds.
MEETING_TIMEOUT = 300
#: How long a process waits for others in a collective, in seconds. It is a day, because another
#: process may still run a whole seed. The end of a process does not take this long to notice: its
#: connection closes, and the process that started it watches it.
COLLECTIVE_TIMEOUT = 24 * 3600
#: How long the others may take to end when one process has failed, in seconds.
GRACE = 3.0
#: Flags that may differ between the nodes of one run. The number of processes per node may not
#: differ; it is compared separately, because several flags decide it.
FLAGS_OF_A_NODE = {"rank", "gpu", "dist_url", "workers", "multiprocessing_distributed"}
#: Marks the error of a process that failed only because another one ended.
LOST = "lost another one"


@dataclass(frozen=True)
class Group:
    """The processes that a command line asks for."""

    #: Number of processes on all nodes.
    size: int = 1
    #: Number of processes on this node; their ranks are first … first + local − 1.
    local: int = 1
    #: Lowest rank on this node.
    first: int = 0
    #: Address at which the processes meet: tcp://HOST:PORT or env://.
    url: str = ""
    #: Backend of torch.distributed: "nccl" or "gloo".
    backend: str = "gloo"
    #: Whether an outer launcher (torchrun) has started this process as rank `first`.
    joined: bool = False
    #: Name → value of the flags that every node must have been given alike.
    flags: dict = field(default_factory=dict, repr=False)


def group_from(asked: ProcessSettings) -> Group:
    """Return the processes that the flags, or torchrun's environment, ask for.

    Raises InputError, naming the flag, for a group that cannot be started.
    """
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend = asked.dist_backend or ("nccl" if gpus else "gloo")
    if asked.dist_backend == "nccl" and not gpus:
        raise InputError(
            "--dist-backend nccl: no CUDA device here; give --dist-backend gloo"
            + ("" if asked.nproc else " and a number of processes, --nproc 2")
        )
    if asked.multiprocessing_distributed and not (gpus or asked.nproc):
        raise InputError(
            "--multiprocessing-distributed: one process a GPU, and here is none; give the number "
            "of processes, --nproc 2"
        )
    if under_torchrun or asked.dist_url == "env://":
        return _group_of_environment(asked, backend)
    nodes = 1 if asked.world_size == -1 else asked.world_size
    rank = 0 if asked.rank == -1 else asked.rank
    if nodes < 1:
        raise InputError(f"--world-size {asked.world_size}: give the number of nodes, 1 or more")
    if not 0 <= rank < nodes:
        raise InputError(f"--rank {rank}: --world-size {nodes} has nodes 0 to {nodes - 1}")
    local = asked.nproc or (gpus if asked.multiprocessing_distributed and gpus else 1)
    _check_gpus(asked, backend, local, gpus)
    size = nodes * local
    if size == 1:
        return Group()
    if asked.dist_url is None and nodes > 1:
        raise InputError(
            f"--world-size {nodes}: several nodes need a place to meet; give --dist-url "
            "tcp://HOST:PORT of node 0"
        )
    url = asked.dist_url or free_address()
    host, port = _address(url)
    if rank == 0 and asked.dist_url is not None:
        _check_port_is_free(host, port, url)
    return Group(size, local, rank * local, url, backend, flags=_flags_of_all(asked, local))


def _group_of_environment(asked: ProcessSettings, backend: str) -> Group:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise InputError(
            f"--dist-url env://: {missing[0]} is not in the environment; start with torchrun, or "
            "give tcp://HOST:PORT"
        )
    for flag, value in (("--nproc", asked.nproc), ("--multiprocessing-distributed",
                                                  asked.multiprocessing_distributed)):  # fmt: skip
        if value:
            raise InputError(f"{flag}: torchrun starts the processes; leave it out")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size == 1:
        return Group()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    _check_gpus(asked, backend, local, torch.cuda.device_count())
    flags = _flags_of_all(asked, None)
    return Group(size, local, rank, "env://", backend, joined=True, flags=flags)


def _flags_of_all(asked: ProcessSettings, local: int | None) -> dict:
    """Return the flags that may not differ between nodes.

    local: number of processes on this node; None if torchrun decides it.
    """
    given = {name: value for name, value in asked.record.items() if name not in FLAGS_OF_A_NODE}
    return given | {"nproc": local}


def _check_gpus(asked: ProcessSettings, backend: str, local: int, gpus: int) -> None:
    available = 1 if asked.gpu is not None else gpus
    if backend == "nccl" and local > available:
        which = f"--gpu {asked.gpu} is one" if asked.gpu is not None else f"here are {gpus}"
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
    """Return a free local address, tcp://127.0.0.1:PORT, where processes of this node can meet."""
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

    A group of one runs in this process. For several, this process starts and watches children and
    passes signals on to them. When one child fails, its message is printed once and the others are
    ended. No child outlives this process.
    """
    if group.size == 1:
        return work(argv, ALONE, 0)
    if group.joined:
        local = int(os.environ.get("LOCAL_RANK", 0))
        with _joined(group, group.first):
            return work(argv, Shard(group.first, group.size), local)
    context = get_context("spawn")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is said in one line
    failures = context.SimpleQueue()
    children = [
        context.Process(target=_child, args=(work, argv, group, local, failures, os.getpid()))
        for local in range(group.local)
    ]
    try:
        with _forwarded_signals(children) as signals:
            with interruption.held_back():  # a signal reaches all children or none
                for child in children:
                    child.start()
            return _watch(children, failures, group, signals)
    finally:
        for child in children:
            if child.pid is not None:  # it was started
                child.kill()
                child.join()
            child.close()
        failures.close()


def _child(
    work: Callable[[list[str], Shard, int], int],
    argv: list[str],
    group: Group,
    local: int,
    failures: SimpleQueue,
    parent: int,
) -> None:
    """Join the other processes, work, and report what went wrong: the body of a child."""
    die_with(parent)
    interruption.begin(started_by_another=True)
    torch.set_num_threads(max(1, torch.get_num_threads() // group.local))
    rank = group.first + local

    def run(argv):
        with _joined(group, rank):
            return work(argv, Shard(rank, group.size), local)

    def report(text):
        failures.put((rank, text))

    interruption.leave(run_script(run, argv, complain=report))


def die_with(parent: int) -> None:
    """Let the kernel end this process when its parent ends, however that happens (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _joined(group: Group, rank: int) -> Iterator[None]:
    """Make this process number `rank` of the group for as long as the context lasts."""
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
        interruption.end_on_the_spot()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _meet(store: dist.Store, group: Group, rank: int) -> None:
    """Wait in the store for all processes of the group, and compare the flags they were given.

    This comes before any collective, because different flags would lead to a wrong result or to
    processes that wait for one another for ever. All processes of a node have the node's flags, so
    nodes are compared; under an outer launcher every process is.

    Raises InputError, on every process, if a flag differs.
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
def _forwarded_signals(children: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Pass signals on to the children; yield the list of those that came."""
    came: list[int] = []

    def forward(number, frame):
        came.append(number)
        for child in children:
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, number)

    before = {number: signal.signal(number, forward) for number in interruption.heeded()}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(
    children: Sequence[BaseProcess], failures: SimpleQueue, group: Group, signals: Sequence[int]
) -> int:
    """Wait for the children, end all of them when one fails, and return the exit code.

    signals: the signals that were passed on. After the first one the children may take long,
    because they save what they have; after the second they have little time.
    """
    while all(child.exitcode in (None, 0) for child in children) and len(signals) < 2:
        if all(child.exitcode == 0 for child in children):
            return 0
        connection.wait([c.sentinel for c in children if c.exitcode is None], 1.0)
    first = next((c for c in children if c.exitcode not in (None, 0)), children[0])
    complaints = _taken(failures)
    saving = first.exitcode in [128 + number for number in interruption.SIGNALS] and not any(
        text == interruption.LINE for _, text in complaints
    )
    _wait(children, COLLECTIVE_TIMEOUT if saving else GRACE, signals)
    for last in (signal.SIGKILL,) if signals else (signal.SIGTERM, signal.SIGKILL):
        for child in children:
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, last)
        _wait(children, GRACE)
    if signals:
        if not saving:  # else a child has said what it saved
            interruption.print_line(interruption.LINE)
        return 128 + signals[0]
    complaints += _taken(failures)
    # a process that lost another one reports only the consequence: the cause comes first
    complaints.sort(key=lambda complaint: LOST in complaint[1])
    if complaints and LOST not in complaints[0][1]:
        first = children[complaints[0][0] - group.first]
    said: set[str] = set()
    for rank, text in complaints:
        if text not in said and (not said or LOST not in text):
            interruption.print_line(
                text if rank == 0 or group.size == 1 else f"{text} (process {rank})"
            )
        said.add(text)
    code = first.exitcode or 1
    if code < 0 and not said:
        number = children.index(first) + group.first
        interruption.print_line(
            f"fault: process {number} of {group.size} was ended by signal {-code}; the "
            "others were ended too"
        )
    return code if code > 0 else 1


def _taken(failures: SimpleQueue) -> list[tuple[int, str]]:
    """Return what children have complained of since the last call: their ranks and lines."""
    complaints = []
    while not failures.empty():
        complaints.append(failures.get())
    return complaints


def _wait(children: Sequence[BaseProcess], seconds: float, signals: Sequence[int] = ()) -> None:
    """Wait for the end of the children, until so many seconds have passed or a second signal."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and len(signals) < 2:
        running = [child.sentinel for child in children if child.exitcode is None]
        if not running:
            return
        connection.wait(running, min(left, 1.0))
