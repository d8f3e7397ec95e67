"""An audit from Python is that of run.py, for any network; the page's recipes run."""

import re

import pytest
import torch
from torch import nn

from inversion.audit.interface import LAYERWISE, MATCHING, audit_gradient, ground_truth
from inversion.settings import AttackSettings, Loop, Weights
from models.checkpoint import Task, load
from models.gradient import ClientLoss, Update, whole_batch_gradient
from models.reading import target_from_checkpoint, truth_from_checkpoint
from models.target import model_of
from tests.support import ROOT, attack
from utils.errors import InputError
from utils.tensor_files import load_plain

CLASSES, SHAPE = 3, (3, 16, 16)


def own_network():
    """A network that models/build.py does not know."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(384, CLASSES)
    )


def own_task(**loss):
    return Task("own", 2, SHAPE, CLASSES, [0.4] * 3, [0.2] * 3, ClientLoss(False, **loss))


def own_truth(net, **options):
    draw = torch.Generator().manual_seed(0)
    images, pool = torch.rand(2, *SHAPE, generator=draw), torch.rand(30, *SHAPE, generator=draw)
    return ground_truth(net, own_task(), images, [0, 2], pool, [0, 1, 2] * 10, **options)


def own_gradient(net, truth):
    return whole_batch_gradient(net, truth.x, truth.y, own_task().loss)


def test_every_block_of_the_page_runs(tmp_path, monkeypatch):
    """As written, but with fewer iterations, and a small network in the place of ResNet-18."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 6
    assert max(len(block.splitlines()) for block in blocks) <= 40
    space = {}
    for number, block in enumerate(blocks):
        block = re.sub(r"steps=\d{2,}", "steps=30", block)
        block = block.replace('"resnet18"', '"convnet"').replace("32, 32", "16, 16")
        exec(compile(block, f"docs/python.md, block {number}", "exec"), space)
    assert space["audit"].verdict.startswith("leakage: ")
    assert (space["folder"] / "controls.png").exists()
    assert "opposite sign" in space["wrong_finding"]
    assert space["check"].scores["truth_gradient"]["kind"] == "same"
    assert space["blind"].verdict == "not judged"
    assert space["blind"].case.y.tolist() == [0, 1]
    assert space["found"].keys() == {"plain", "noisy", "largest"}
    assert space["control"].certificate is not None


@pytest.fixture(scope="module")
def by_script(captured, tmp_path_factory):
    """A short attack of run.py: its checkpoint, its result and its folder."""
    path = captured("-a", "lenet", "-b", "2", "--with-control", "--decoys", "30")
    flags = ("--epochs", 4, "--lr", 0.05, "--TV", 1e-3, "--grad-sign", "--metric")
    return load(str(path)), *attack(tmp_path_factory.mktemp("script"), path, *flags)


def test_it_is_what_run_py_does(by_script):
    """The same images bit by bit, and the same scores, controls and verdict."""
    checkpoint, result, folder = by_script
    target, setup = target_from_checkpoint(checkpoint), checkpoint["dataset_setup"]
    task = Task("lenet", 2, target.image_shape, 8, setup["mean"], setup["std"], target.loss)
    settings = AttackSettings(Weights(priors={"tv": 1e-3}), Loop(4, 0.05, signed=True))
    truth = truth_from_checkpoint(checkpoint)
    audit = audit_gradient(model_of(target), target.gradient, task, settings, truth=truth)
    x = load_plain(str(folder / "x_recon.pth"))
    assert torch.equal(audit.attacked.outcome.final.x, x)
    assert audit.scores["verdict"] == result["metrics"]["verdict"]
    for name, control in result["metrics"]["controls"].items():
        assert audit.scores["controls"][name]["images"]["ssim"] == control["images"]["ssim"]
    assert audit.threat.rows[1:] == tuple(map(tuple, result["threat"]["rows"]))[1:]


def test_the_network_stays_as_it_was():
    net = own_network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    truth = own_truth(net)
    audit_gradient(net, own_gradient(net, truth), own_task(), truth=truth, steps=2)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_gradient_by_names_in_any_order_is_the_same_as_a_list():
    net = own_network()
    truth = own_truth(net)
    listed = own_gradient(net, truth).gradient
    names = [name for name, _ in net.named_parameters()]
    by_name = dict(reversed(list(zip(names, (g.numpy() for g in listed), strict=True))))
    one, other = (
        audit_gradient(net, g, own_task(), labels=[0, 2], steps=2) for g in (listed, by_name)
    )
    assert torch.equal(one.attacked.images, other.attacked.images)
    assert one.verdict == "not judged"
    assert one.scores is None


def test_images_stand_in_the_order_of_the_truth():
    net = own_network()
    truth = own_truth(net)
    audit = audit_gradient(
        net, own_gradient(net, truth), own_task(), truth=truth, steps=60, controls=False
    )
    order = [entry["reconstruction"] for entry in audit.scores["images"]]
    assert torch.equal(audit.images, audit.attacked.images[order])
    assert audit.verdict == "incomplete"  # without controls
    assert audit.scores["identification"]["ranks"] == [1, 1]


def test_labels_are_reconstructed_where_nobody_gives_them():
    net = own_network()
    truth = own_truth(net)
    sent = own_gradient(net, truth)
    for options in ({}, {"truth": truth, "without": ("labels",), "controls": False}):
        audit = audit_gradient(net, sent, own_task(), steps=1, **options)
        assert audit.case.labels is not None
        assert sorted(audit.case.y.tolist()) == [0, 2]
    assert audit.threat.rows[3][:2] == ("labels", "withheld")


def test_solving_works_on_a_network_of_ones_own():
    """A linear layer over one image gives it away exactly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 40), nn.Tanh(), nn.Linear(40, CLASSES))
    x, y = torch.rand(1, *SHAPE), torch.tensor([1])
    task = Task("own", 1, SHAPE, CLASSES, [0.0] * 3, [1.0] * 3, ClientLoss(False))
    sent = whole_batch_gradient(net, x, y, task.loss)
    audit = audit_gradient(net, sent, task, LAYERWISE, labels=[1])
    torch.testing.assert_close(audit.images, x, atol=1e-3, rtol=0)


def test_the_pool_gives_others_of_the_same_label_and_none_twice():
    net = own_network()
    pool = torch.arange(12.0).view(12, 1, 1, 1).expand(12, *SHAPE) / 255
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 1])
    seen = []

    def send(x, y):
        seen.append((x, y))
        return whole_batch_gradient(net, x, y, own_task().loss).gradient

    truth = ground_truth(net, own_task(), pool[:2], [0, 2], pool, labels, send=send)
    ((x, y),) = seen
    others = ((x * 0.2 + 0.4) * 255).round()[:, 0, 0, 0].long()
    decoys = truth.decoys[:, :, 0, 0, 0].long()
    assert y.tolist() == [0, 2]
    assert decoys.shape == (2, 3)  # as many as the scarcer label has left
    chosen = torch.cat([others[:, None], decoys], 1)
    assert labels[chosen].eq(y[:, None]).all()
    assert len(chosen.unique()) == chosen.numel()
    expected = whole_batch_gradient(net, x, y, own_task().loss)
    assert isinstance(truth.control, Update)
    assert all(map(torch.equal, truth.control.gradient, expected.gradient))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"without": ("colour",)}, "without colour: unknown; choose from bn, labels"),
        ({"without": ("labels",), "labels": [0, 2]}, "labels: are withheld"),
        ({"without": ("bn",)}, "holds no BatchNorm statistics"),
        ({"labels": [0, 5]}, "labels 0 to 5, but the classes are 0 to 2"),
        ({"labels": [0]}, "1 labels for a batch of 2"),
    ],
)
def test_refusals(options, says):
    net = own_network()
    sent = own_gradient(net, own_truth(net))
    with pytest.raises(InputError, match=says):
        audit_gradient(net, sent, own_task(), MATCHING, steps=1, **options)


def test_a_pool_that_is_too_small_is_refused():
    net, images = own_network(), torch.rand(2, *SHAPE)
    with pytest.raises(InputError, match="pool: 1 images of label 0 for 2 of the batch"):
        ground_truth(net, own_task(), images, [0, 0], images, [0, 1])


def test_a_network_that_cannot_take_the_images_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.Linear(5, CLASSES))
    sent = [torch.ones(CLASSES, 5), torch.ones(CLASSES)]
    with pytest.raises(InputError, match="model: own cannot process its images"):
        audit_gradient(net, sent, own_task(), labels=[0, 2], steps=1)
