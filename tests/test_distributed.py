"""Several processes compute what one computes, share the work, and end together."""

import datetime
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from inversion.pixel_gradient import exact
from inversion.restarts import Restarts, noise_generator
from inversion.settings import Loop
from inversion.strategies import mean
from models.batchnorm import whole_batch_normalisation
from models.checkpoint import load
from tests import endings, shared_work
from tests.support import HANG, ROOT, attack, call, no_hang, wait_until
from utils import launch as launching
from utils.errors import FaultError, InputError
from utils.flags import process_settings
from utils.launch import Group, free_address, group_from, launch
from utils.shard import ALONE, Shard


def group(size):
    return Group(size, size, 0, free_address(), "gloo")


@pytest.fixture(scope="module")
def figures(tmp_path_factory, pair):
    """Number of processes → what each of them computed."""
    folder = tmp_path_factory.mktemp("figures")
    iterates, signs = shared_work.sign_descent()
    torch.save(iterates, folder / "iterates")
    found = {1: [shared_work.everything(ALONE) | {"signs": signs}]}
    for size, start in ((2, pair.launch), (3, launch)):
        path = folder / f"of_{size}"
        argv = [str(path), str(folder / "iterates")][: 2 if size == 2 else 1]
        assert start(shared_work.work, argv, group(size)) == 0
        found[size] = [torch.load(f"{path}.{rank}") for rank in range(size)]
    return found


@pytest.mark.parametrize(
    ("size", "part", "tolerance"),
    [
        (2, "derivatives", 1e-10), (2, "captures", 1e-10), (2, "measures", 1e-10),
        (2, "runs", 1e-8), (3, "derivatives", 1e-10), (3, "captures", 1e-10),
    ],
)  # fmt: skip
def test_several_processes_equal_one(figures, size, part, tolerance):
    (alone,) = figures[1]
    assert len(alone[part]) >= 7
    for others in figures[size]:
        for key, value in alone[part].items():
            error = (others[part][key].double() - value.double()).abs().max().item()
            assert error <= tolerance * max(1, value.abs().max().item()), key


def test_whole_seeds_give_the_same_bits(figures):
    (alone,) = figures[1]
    for size in (2, 3):
        for others in figures[size]:
            for key, value in alone["whole_seeds"].items():
                assert torch.equal(others["whole_seeds"][key], value), key


def test_signs_agree_in_float32(figures):
    ours = figures[1][0]["signs"]
    assert len(ours) == 20
    agree = (figures[2][0]["signs"] == ours).float().mean().item()
    assert agree >= 0.999
    assert ours.unique().numel() >= 2


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 7, 256])
def test_blocks_cover_the_batch(count):
    for size in (1, 2, 3, 8):
        shards = [Shard(rank, size) for rank in range(size)]
        whole = torch.arange(count)
        assert torch.equal(torch.cat([shard.split(whole) for shard in shards]), whole)
        lengths = [len(shard.split(whole)) for shard in shards]
        assert max(lengths) - min(lengths) <= 1
        assert [sum(s.owns(i) for s in shards) for i in range(count)] == [1] * count


def test_an_error_of_one_process_ends_all(capfd):
    """The other one waits for it in a collective, and would for a day."""
    with no_hang():
        assert launch(endings.one_fails, [], group(2)) == 2
    assert "error: --flag: only process 1 objects (process 1)" in capfd.readouterr().err


# The scripts --------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_two_processes")
def test_training_in_two_processes(captured):
    """With shares of different sizes, 4 and 3 images."""
    flags = ("-a", "convnet", "-b", "7", "--target-idx", "1", "--upload-bn")
    alone, shared = (load(str(captured(*flags, "--nproc", str(n)))) for n in (1, 2))
    for key in ("target_gradient", "bn_mean_list", "bn_var_list"):
        for a, b in zip(alone[key], shared[key], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert torch.equal(alone["x_true"], shared["x_true"])


@pytest.mark.usefixtures("in_two_processes")
def test_two_processes_compare_what_was_sent_of_a_sparse_update(tmp_path, captured):
    path = captured("-a", "lenet", "-b", "3", "--defence", "topk:0.2")
    alone, shared = (
        attack(tmp_path / n, path, "--epochs", 3, "--nproc", n)[0]["losses"] for n in ("1", "2")
    )
    assert shared == pytest.approx(alone, rel=1e-3)


@pytest.mark.usefixtures("in_two_processes")
def test_attack_in_two_processes(tmp_path, captured):
    path = captured("-a", "convnet", "-b", "5", "--upload-bn")
    flags = (
        "--epochs", "10", "--MinCombine", "--n-seed", "3", "--T-in", "2", "--TV", "0.01",
        "--BN", "0.01", "--exact-bn", "--metric", "--pseudo-label-init", "from_grads",
    )  # fmt: skip
    alone, one = attack(tmp_path / "1", path, *flags)
    found = {}
    for shard in ("batch", "seeds"):
        extra = ("--nproc", "2", "--shard", shard)
        result, folder = attack(tmp_path / shard, path, *flags, *extra)
        assert result["processes"] == 2
        assert result["iterations"] == alone["iterations"]
        assert result["labels"]["reconstructed"] == alone["labels"]["reconstructed"]
        assert len(result["rounds"]) == len(alone["rounds"])
        found[shard] = torch.load(folder / "x_recon.pth", weights_only=True)
        lines = [(f / "losses.csv").read_text().splitlines() for f in (one, folder)]
        assert len(lines[0]) == len(lines[1])
    ours = torch.load(one / "x_recon.pth", weights_only=True)
    # one thread or two sum in another order: float32 to rounding
    torch.testing.assert_close(found["seeds"], ours, rtol=0, atol=1e-2)
    torch.testing.assert_close(found["batch"], ours, rtol=0, atol=1e-2)


@pytest.fixture
def script():
    """script(*words): a started process, which is ended with the test whatever happens."""
    started = []

    def start(*words):
        process = subprocess.Popen(
            [str(word) for word in words], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def children_of(pid):
    """The processes that share the work of `pid`, not multiprocessing's own helpers."""
    return [
        int(text)
        for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if b"spawn_main" in Path(f"/proc/{text}/cmdline").read_bytes()
    ]


def running(script, tmp_path, path, *flags):
    """run.py with two processes, in the middle of its work."""
    process = script(
        sys.executable, "run.py", "--root", tmp_path, "--checkpoint", path, "--epochs", 100000,
        "--lr", 0.1, "-p", 5, "--nproc", 2, *flags,
    )  # fmt: skip
    for line in process.stdout:
        if "iteration 10/" in line:
            break
    return process, children_of(process.pid)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def all_end(pids):
    """Wait for the end of the processes."""
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_killing_one_process_ends_the_other(tmp_path, captured, script):
    process, children = running(script, tmp_path, captured("-a", "lenet", "-b", "5"))
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 1
    assert re.search("fault: process .* (ended by signal 9|lost another one)", err), err
    all_end(children)


def test_nothing_outlives_a_killed_launcher(tmp_path, script):
    path = tmp_path / "pid"
    process = script(sys.executable, "-m", "tests.endings", path, group(2).url)
    children = [Path(f"{path}.{rank}") for rank in range(2)]
    wait_until(lambda: all(child.exists() and child.read_text() for child in children), process)
    children = [int(child.read_text()) for child in children]
    assert all(alive(pid) for pid in children)
    process.kill()
    process.communicate(timeout=HANG)
    all_end(children)


def test_an_interruption_saves_what_there_is(tmp_path, captured, script):
    process, children = running(script, tmp_path, captured("-a", "lenet", "-b", "5"))
    assert len(children) == 2
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG)
    assert process.returncode == 130, err
    assert "interrupted after" in out
    x = torch.load(tmp_path / "results" / "exp" / "test" / "x_recon.pth", weights_only=True)
    assert x.shape == (5, 3, 32, 32)
    all_end(children)


# What is refused ----------------------------------------------------------------------------


def flags(**given):
    defaults = {
        "multiprocessing_distributed": False, "nproc": None, "world_size": -1, "rank": -1,
        "dist_url": None, "dist_backend": None, "gpu": None,
    }  # fmt: skip
    return process_settings(SimpleNamespace(**(defaults | given)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world_size": 2, "rank": 2}, "--rank 2: --world-size 2 has nodes 0 to 1"),
        ({"multiprocessing_distributed": True}, "here is none; give the number of processes"),
        ({"world_size": 0}, "--world-size 0: give the number of nodes"),
        ({"world_size": 2, "rank": 0}, "several nodes need a place to meet; give --dist-url"),
        ({"nproc": 2, "dist_url": "localhost:80"}, "not of the form tcp://HOST:PORT"),
        ({"nproc": 2, "dist_url": "env://"}, "RANK is not in the environment"),
        ({"nproc": 2, "dist_url": "tcp://192.0.2.1:2345"}, "cannot be opened here"),
    ],
)
def test_what_cannot_be_is_refused(given, message, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=re.escape(message)):
        group_from(flags(**given))


def test_a_taken_port_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=r"cannot be opened here \(Address already in use\)"):
            group_from(flags(nproc=2, dist_url=url))


def test_usable_defaults():
    assert group_from(flags()) == Group()
    found = group_from(flags(nproc=2, dist_backend="gloo"))
    assert (found.size, found.local, found.first) == (2, 2, 0)
    assert re.fullmatch(r"tcp://127\.0\.0\.1:\d+", found.url)
    second = group_from(
        flags(nproc=2, world_size=2, rank=1, dist_url="tcp://10.0.0.1:99", dist_backend="gloo")
    )
    assert (second.size, second.local, second.first) == (4, 2, 2)


def test_a_peer_that_does_not_come(monkeypatch):
    """A timeout that names the address."""
    monkeypatch.setattr(launching, "MEETING_TIMEOUT", 2)
    lonely = Group(2, 1, 0, group(1).url, "gloo")
    with (
        pytest.raises(FaultError, match=rf"did not meet the others at {lonely.url} within 2 s"),
        launching._joined(lonely, 0),
    ):
        pass


def test_nodes_with_different_flags_are_refused_on_every_node(tmp_path, captured, script):
    path, url = captured("-a", "lenet", "-b", "5"), free_address()
    nodes = [
        script(
            sys.executable, "run.py", "--root", tmp_path, "--checkpoint", path, "--epochs", 2,
            "--lr", rate, "--world-size", 2, "--rank", rank, "--dist-url", address,
            "--dist-backend", "gloo", "-p", 7,
        )
        for rank, rate, address in ((0, 0.1, url), (1, 0.2, url.replace("127.0.0.1", "localhost")))
    ]  # fmt: skip
    for rank, node in enumerate(nodes):
        out, err = node.communicate(timeout=HANG)
        assert node.returncode == 2, err
        says = "error: --lr: node 1 has 0.2, node 0 has 0.1; give the same flags on every node"
        assert err == f"{says}{' (process 1)' if rank else ''}\n"
        assert out == ""
    assert not list(tmp_path.iterdir())


def met(groups):
    """What became of the processes of several nodes that meet, a node a group: None or the words.

    Processes are threads here, and the store that they share lies in memory.
    """
    store = torch.distributed.HashStore()
    store.set_timeout(datetime.timedelta(seconds=HANG))

    def process(group, rank):
        try:
            launching._meet(store, group, rank)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        found = [
            pool.submit(process, group, group.first + local)
            for group in groups
            for local in range(1 if group.joined else group.local)
        ]
        return [one.result(HANG) for one in found]


def nodes(*given):
    """Groups of as many nodes as there are mappings of flags."""
    common = {"world_size": len(given), "dist_url": "tcp://10.0.0.1:99", "dist_backend": "gloo"}
    return [
        group_from(flags(**(common | {"rank": rank, "lr": 0.1, "TV_end": None} | own)))
        for rank, own in enumerate(given)
    ]


def test_nodes_meet_with_the_same_flags(monkeypatch):
    monkeypatch.setattr(launching, "_check_port_is_free", lambda *_: None)
    own = {"nproc": 2, "workers": 3, "gpu": None, "dist_url": "tcp://a.example:99"}
    assert met(nodes({"nproc": 2}, own, {"nproc": 2})) == [None] * 6


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([{}, {"TV_end": 0.5}, {}], "--TV-end: node 1 has 0.5, node 0 has None"),
        ([{}, {}, {"lr": 0.3, "TV_end": 1}], "--lr: node 2 has 0.3, node 0 has 0.1"),
        ([{"nproc": 3}, {"nproc": 2}], "--nproc: node 1 has 2, node 0 has 3"),
        ([{"nproc": 2}, {"nproc": 2, "verbose": 1}], "--verbose: node 1 has 1, node 0 has None"),
    ],
)
def test_every_process_is_told_the_first_flag_that_differs(given, says, monkeypatch):
    monkeypatch.setattr(launching, "_check_port_is_free", lambda *_: None)
    groups = nodes(*given)
    told = met(groups)
    assert len(told) == sum(group.local for group in groups)
    assert set(told) == {f"{says}; give the same flags on every node"}


def test_an_outer_launcher_may_not_give_different_flags_either():
    groups = [
        Group(2, 2, rank, "env://", "gloo", joined=True, flags={"lr": 0.1 * (1 + rank)})
        for rank in range(2)
    ]
    says = "--lr: process 1 has 0.2, process 0 has 0.1; give the same flags on every process"
    assert met(groups) == [says] * 2


def test_nccl_takes_one_process_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert group_from(flags(multiprocessing_distributed=True)).size == 2
    with pytest.raises(InputError, match="--nproc 3: nccl takes one process a GPU and here are 2"):
        group_from(flags(nproc=3))
    with pytest.raises(InputError, match="--nproc 2: nccl takes one process a GPU and --gpu 0"):
        group_from(flags(nproc=2, gpu=0))
    for name, value in (("RANK", 0), ("WORLD_SIZE", 3), ("MASTER_ADDR", "a"), ("MASTER_PORT", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match="nccl takes one process a GPU"):
        group_from(flags(dist_url="env://"))


def test_one_value_a_channel_is_refused_as_by_one_process():
    x = torch.randn(1, 3)
    layer = torch.nn.BatchNorm1d(3)
    for images, fails in ((1, True), (2, False)):
        with whole_batch_normalisation(layer, ALONE, truncated=True, images=images):
            if fails:
                with pytest.raises(ValueError, match="more than 1 value per channel"):
                    layer(x)
            else:
                layer(x)


def test_seeds_that_nobody_started_are_left_out_of_the_mean():
    objective = shared_work.objective_of(ALONE, "conv", 7)
    stopped = []

    def stop_the_second(index, step, losses, rate):
        stopped.append(index)
        return index == 1

    class Pair(Shard):
        """The first of two processes; the other never started its seed."""

        device = "cpu"

        def objects(self, own):
            return [own, {}]

        def sum(self, x):
            return x

    starts = [shared_work.start(seed, 7) for seed in range(2)]
    restarts = Restarts(
        starts,
        generators=[noise_generator(seed, torch.device("cpu")) for seed in range(2)],
        loop=Loop(3, 0.02),
        on_step=stop_the_second,
        seed_shard=Pair(0, 2),
    )
    outcome = mean(objective, exact, restarts)
    assert outcome.runs[1].steps == 0
    assert torch.equal(outcome.runs[1].x, starts[1])
    assert torch.equal(outcome.final.x, outcome.runs[0].x)
    assert set(stopped) == {0}


def test_lbfgs_is_refused_on_a_shared_batch(captured, tmp_path):
    path = captured("-a", "lenet", "-b", "5")
    base = ("--checkpoint", path, "--root", tmp_path, "--lr", 1, "--epochs", 1, "--optim", "LBFGS")
    outcome = call("run.py", *base, "--nproc", "2")
    assert outcome.code == 2
    assert "--optim LBFGS: its line search needs the whole batch" in outcome.err
