"""What only a GPU can show; skipped without one."""

import gc
from dataclasses import replace
from functools import partial

import pytest
import torch

from inversion.audit.information import gradient_information_ratio
from inversion.objective import Losses, Objective
from inversion.optimise import Run, reconstruct
from inversion.pixel_gradient import exact, plain
from inversion.precision import in_precision
from inversion.settings import Loop, Weights
from inversion.step_graph import GraphError
from models.build import build_model
from models.gradient import ClientLoss
from tests import shared_work
from tests.support import attack, cosine, photos, smooth_network, target_of
from train.privacy import Mechanism, protect_per_sample
from utils.device import forbid_tensorfloat32
from utils.launch import Group, _joined, free_address, launch
from utils.shard import ALONE, Shard, sum_tensors
from utils.tensor_files import map_tensors

pytestmark = pytest.mark.gpu


def objective_on(device, train_mode=True):
    torch.manual_seed(0)
    forbid_tensorfloat32()
    model = build_model("resnet18", 8, (3, 64, 64))
    x, y = photos(4, 64)
    target = target_of(model, x, y, arch="resnet18", train_mode=train_mode)
    weights = Weights(priors={"tv": 0.01, "bn": 0.01})
    return Objective(model.to(device), target, y, weights, bn_source="batch")


def test_exact_equals_plain_and_the_cpu():
    x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    _, on_cpu = exact(objective_on("cpu"), x)
    _, on_gpu = exact(objective_on("cuda"), x.cuda())
    _, by_plain = plain(objective_on("cuda"), x.cuda())
    assert cosine(on_gpu, by_plain) > 0.999999
    assert cosine(on_gpu.cpu(), on_cpu) > 0.9999


@pytest.mark.parametrize("offload", [[], ["--offload-seeds"]])
def test_mlco_on_the_gpu(captured, tmp_path, offload):
    path = captured("-a", "lenet", "-b", "3")
    result, _ = attack(
        tmp_path, path, "--MinCombine", "--n-seed", 3, "--epochs", 20, "--T-in", 3, "--metric",
        "--gpu", 0, *offload,
    )  # fmt: skip
    assert result["device"].startswith("cuda:0")
    assert result["iterations"] == 3 * 12 + 8
    assert result["peak_memory_mib"] > 0


@pytest.mark.parametrize("train_mode", [True, False])
def test_measures_equal_those_of_the_cpu(train_mode):
    """Gradient information ratio and clipped samples, float64."""
    x, y = photos(4, 64)
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = build_model("resnet18", 8, (3, 64, 64)).double().to(device)
        images, labels = x.double().to(device), y.to(device)
        information = gradient_information_ratio(model, images, labels, ClientLoss(train_mode))
        figures = [information.norm, information.information, information.ratio]
        if not train_mode:
            gradient = [torch.zeros_like(p) for p in model.parameters()]
            how = Mechanism(0.1, 0.5, torch.Generator().manual_seed(0))
            sent = protect_per_sample(gradient, how, model, images, labels, ClientLoss(False))
            figures += [sent.sample_norms, torch.cat([g.flatten() for g in sent.gradient]).cpu()]
        found.append(torch.cat(figures))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_controls_on_the_gpu(captured, tmp_path):
    path = captured("-a", "convnet", "-b", "3", "--upload-bn", "--with-control")
    result, _ = attack(
        tmp_path, path, "--epochs", 5, "--BN", 0.01, "--exact-bn", "--metric", "--GInfoR",
        "--gpu", 0,
    )  # fmt: skip
    assert result["controls"].keys() == {"mean image", "prior only", "other gradient"}
    assert sum(result["information"]["ratio"]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("client", "method"),
    [
        (("-a", "lenet", "-b", "1", "--image-size", "16", "--outlayer-state", "keep"), "solved"),
        (("-a", "resnet18", "-b", "2", "--image-size", "32", "--upload-bn"), "stem"),
    ],
)
def test_a_gradient_is_solved_layer_by_layer_on_the_gpu(captured, tmp_path, client, method):
    found = []
    for name, where in (("gpu", ["--gpu", 0]), ("cpu", [])):
        result, _ = attack(
            tmp_path / name, captured(*client), "--attack", "layerwise", "--metric", *where
        )
        assert result["layerwise"]["method"] == method
        found.append(result["layerwise"]["layers"])
    on_gpu, on_cpu = found
    assert [layer["name"] for layer in on_gpu] == [layer["name"] for layer in on_cpu]
    assert all(layer["true_error"] < 1e-3 for layer in on_gpu)


def start_on_gpu(seed=1):
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(seed)).cuda()


BOX = (torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0))
LOOP = Loop(30, 0.01, noise=0.1, box=BOX, keep_best=True)


@pytest.mark.parametrize("pixel_gradient", [exact, plain])
@pytest.mark.parametrize("graph", [False, True])
def test_iterations_do_not_wait_for_the_host(pixel_gradient, graph):
    """torch raises where an operation waits; only the reading of rows may."""
    objective = objective_on("cuda")
    loop = replace(LOOP, read_every=5, cuda_graph=graph)
    run = Run(partial(pixel_gradient, objective), start_on_gpu(), loop, ALONE, None)
    generator = torch.Generator("cuda").manual_seed(0)
    run.improve(range(5), generator)
    state = map_tensors(torch.Tensor.cuda, run.state())
    run = Run(partial(pixel_gradient, objective), run.x, loop, ALONE, state)
    run.improve(range(5), generator)  # with it warm-ups, and the recording
    if graph:
        run._graph.prepare([(0.5, 0.01)] * 5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        if graph:
            for _ in range(5):
                run._graph.step()
                run._project(0.01, generator)
        else:
            run._computed(range(5, 10), generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("graph", "read_every"), [(False, 7), (True, 1), (True, 7)])
def test_graphs_and_rare_readings_change_no_number(graph, read_every):
    """But by rounding: a GPU may add in another order each time. A smooth network, float64."""
    torch.manual_seed(0)
    x, y = photos(4, 32)
    model = smooth_network()
    target = target_of(model, x.double(), y % 4, num_classes=4)
    weights = Weights(priors={"tv": 1e-3, "bn": 1e-2}, priors_end={"tv": 1e-4})
    objective = Objective(model.cuda(), target, y % 4, weights, bn_source="batch")
    start = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double().cuda()
    found = []
    for how in (Loop(1, 1.0), Loop(1, 1.0, cuda_graph=graph, read_every=read_every)):
        loop = replace(LOOP, cuda_graph=how.cuda_graph, read_every=how.read_every)
        totals = []
        run = reconstruct(
            partial(exact, objective),
            start,
            loop,
            generator=torch.Generator("cuda").manual_seed(2),
            on_step=lambda _, losses, __, to=totals: to.append(losses.total),
        )
        found.append((run.x, torch.tensor(totals), run.losses.total, run.steps))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-7, atol=0)
    assert found[1][2:] == (pytest.approx(found[0][2], rel=1e-7), found[0][3])


@pytest.mark.parametrize("graph", [False, True])
def test_a_loss_that_is_not_finite_ends_a_loop_that_is_read_rarely(graph):
    def root(x, progress):
        value = x.sum() / (x[0, 0, 0, 0] > 0.5)  # infinite, once a pixel has come down to 0.5
        return Losses(value, value, {}), torch.ones_like(x)

    start = torch.ones(2, 3, 2, 2)
    true = reconstruct(root, start, Loop(30, 0.1))
    loop = Loop(30, 0.1, read_every=7, cuda_graph=graph)
    found = reconstruct(root, start.cuda(), loop)
    assert (found.stopped, found.steps, found.reason) == (true.stopped, true.steps, true.reason)
    torch.testing.assert_close(found.x.cpu(), true.x)


def test_a_step_that_waits_for_the_gpu_is_no_graph():
    def waits(x, progress):
        value = x.square().sum()
        return Losses(value * float(value > 0), value, {}), 2 * x

    with pytest.raises(GraphError):
        reconstruct(waits, start_on_gpu(), Loop(9, 0.1, cuda_graph=True))
    assert torch.ones(2, device="cuda").sum().item() == 2  # the device is as good as before


def test_a_graph_gives_its_memory_back():
    objective = objective_on("cuda")
    loop = replace(LOOP, read_every=5, cuda_graph=True)
    held = []
    for _ in range(3):
        reconstruct(partial(exact, objective), start_on_gpu(), loop)
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[2] <= held[0] + 2**22


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_number_format_rounds_and_leaves_no_trace(precision):
    # in train mode random weights would multiply every rounding
    objective, x = objective_on("cuda", train_mode=False), start_on_gpu()
    before = objective.gradient_distance(x)
    _, true = exact(objective, x)
    _, found = in_precision(exact, precision)(objective, x, 0.0)
    assert found.dtype == torch.float32
    assert not torch.equal(found, true)
    assert cosine(found, true) > 0.9
    assert objective.gradient_distance(x) == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("flags", [
    ("--cuda-graph", "--MinCombine", "--n-seed", "2", "--T-in", "3"),
    ("--cuda-graph", "--precision", "tf32", "--input-boxed", "--input-noise", "0.1"),
    ("--precision", "bf16", "--n-seed", "2", "--offload-seeds"),
])  # fmt: skip
def test_a_run_by_graphs_and_in_other_formats(captured, tmp_path, flags):
    path = captured("-a", "convnet", "-b", "3", "--upload-bn")
    result, _ = attack(
        tmp_path, path, "--epochs", 20, "--TV", 0.01, "--TV-end", 0.001, "--BN", 0.01, "--exact-bn",
        "--grad-sign", "--min-grads-loss", "--metric", "--no-controls", "--gpu", 0, *flags,
    )  # fmt: skip
    assert result["device"].startswith("cuda:0")
    assert result["losses"]["gradient"] > 0


def test_seeds_side_by_side_on_one_gpu(captured, tmp_path):
    """Each of two processes runs whole seeds on the same GPU."""
    path, found = captured("-a", "lenet", "-b", "3"), []
    for several in ((), ("--nproc", "2", "--shard", "seeds", "--dist-backend", "gloo")):
        result, folder = attack(
            tmp_path / str(len(several)), path, "--epochs", 10, "--lr", 0.01, "--n-seed", 3,
            *several,
        )  # fmt: skip
        assert result["device"].startswith("cuda:0")
        found.append((torch.load(folder / "x_recon.pth"), result["iterations"]))
    assert found[0][1] == found[1][1] == 30
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-3)


def test_two_processes_on_one_gpu(tmp_path):
    """gloo over CUDA tensors: the same derivatives and gradients as one process."""
    path = tmp_path / "figures"
    group = Group(2, 2, 0, free_address(), "gloo")
    assert launch(shared_work.on_the_gpu, [str(path)], group) == 0
    alone = shared_work.derivatives(ALONE, "cuda")
    for rank in range(2):
        others = torch.load(f"{path}.{rank}")
        for key, value in alone.items():
            torch.testing.assert_close(others[key].cuda(), value, rtol=0, atol=1e-8)


def test_nccl_with_one_process(captured, tmp_path):
    """A group of one that calls itself one of two: every collective really goes through nccl."""
    with _joined(Group(1, 1, 0, free_address(), "nccl"), 0):
        shard = Shard(0, 2)
        x = torch.randn(5, device="cuda")
        assert torch.equal(shard.sum(x), x)
        assert not shard.any(False)
        assert shard.any(True)
        assert torch.equal(shard.gather(x[:3], 6)[:3], x[:3])
        objective = objective_on("cuda")
        start = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).cuda()
        gradient, terms = objective.gradient_and_priors(start)
        whole = sum_tensors(gradient.values, shard)
        for a, b in zip(whole, gradient.values, strict=True):
            torch.testing.assert_close(a, b.detach())
