"""A network while it is walked through: derivatives, what is known, what cannot be inverted."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torchvision.models.resnet import BasicBlock

from inversion.layerwise.accuracy import Accuracy
from inversion.layerwise.kinds import StoppedError
from inversion.layerwise.peel import peel
from inversion.layerwise.trace import network_of
from models.batchnorm import BATCHNORM_TYPES
from models.build import build_model
from models.graph import operation_name

CLASSES = 8


def residual(width=16):
    """As resnet18_cifar, with two blocks."""
    down = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width))
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        BasicBlock(width, width), BasicBlock(width, 2 * width, 2, down),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES),
    )  # fmt: skip


def vgg(width=16, size=8):
    """Plain convolutions with biases, each followed by a max-pooling whose windows are apart."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * (size // 4) ** 2, CLASSES),
    )  # fmt: skip


def smooth(size=8):
    """Activations that lose nothing."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), nn.LeakyReLU(0.1), nn.Conv2d(12, 16, 3, padding=1), nn.Tanh(),
        nn.Dropout(), nn.Flatten(), nn.Linear(16 * (size // 2) ** 2, CLASSES),
    )  # fmt: skip


def deep(width=24):
    """Residual blocks down to maps of one position."""

    def down(channels):
        return nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, 2, bias=False), nn.BatchNorm2d(2 * channels)
        )

    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        BasicBlock(width, 2 * width, 2, down(width)),
        BasicBlock(2 * width, 4 * width, 2, down(2 * width)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES),
    )  # fmt: skip


NETWORKS = {
    "lenet": lambda: build_model("lenet", CLASSES, (3, 16, 16)),
    "convnet": lambda: build_model("convnet", CLASSES, (3, 16, 16)),
    "residual": residual,
    "deep": deep,
    "vgg": lambda: vgg(size=16),
    "smooth": lambda: smooth(size=16),
}


def made(name):
    """A network in float64 whose BatchNorm layers have weights and statistics of their own."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    for layer in model.modules():
        if isinstance(layer, BATCHNORM_TYPES):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0, 0.2)
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    return model


class Values(fx.Interpreter):
    """Runs a network and keeps every tensor."""

    def run_node(self, n):
        self.found = getattr(self, "found", {})
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and n.op != "output":
            self.found[n.name] = result
        return result


def true_tensors(model, x, y, *, train_mode):
    """Every tensor by name, ∂L/∂tensor, the gradient by name, and the batch's statistics."""
    model = copy.deepcopy(model).train(train_mode)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
        if isinstance(module, nn.Dropout):
            module.eval()
    statistics = []
    for layer in model.modules():
        if isinstance(layer, BATCHNORM_TYPES):
            layer.register_forward_pre_hook(
                lambda _, args: statistics.append(
                    torch.var_mean(args[0].detach(), (0, 2, 3), correction=0)[::-1]
                )
            )
    graph = fx.symbolic_trace(model)
    walk = Values(graph)
    logits = walk.run(x.clone().requires_grad_())
    loss = F.cross_entropy(logits, y)
    parameters = dict(graph.named_parameters())
    signals = torch.autograd.grad(loss, list(walk.found.values()), retain_graph=True)
    gradient = torch.autograd.grad(loss, list(parameters.values()))
    return (
        {name: t.detach() for name, t in walk.found.items()},
        dict(zip(walk.found, signals, strict=True)),
        dict(zip(parameters, gradient, strict=True)),
        statistics,
    )


def batch(count=3, size=16, seed=0):
    x = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()
    return 2 * x - 1, torch.tensor([5, 1, 3, 0, 7][:count])


def traced(name, *, train_mode=False, model=None, statistics=None):
    """A network to walk through, and what is true of it."""
    model = made(name) if model is None else model
    x, y = batch()
    values, signals, gradient, measured = true_tensors(model, x, y, train_mode=train_mode)
    network = network_of(
        model, 3, (3, 16, 16), gradient, train_mode=train_mode,
        statistics=statistics or measured,
        accuracy=dict.fromkeys(gradient, Accuracy(1e-10)),
    )  # fmt: skip
    return network, values, signals


CASES = [(name, False) for name in NETWORKS] + [("convnet", True), ("residual", True)]


@pytest.mark.parametrize(("name", "train_mode"), CASES)
def test_signals_are_the_derivatives_that_autograd_gives(name, train_mode):
    network, values, signals = traced(name, train_mode=train_mode)
    network.values = {node: values[node.name] for node in network.nodes}
    network.signals[network.nodes[-1]] = signals[network.nodes[-1].name]
    for node in network.nodes:
        torch.testing.assert_close(network.signal(node), signals[node.name], atol=1e-13, rtol=1e-8)


@pytest.mark.parametrize(("name", "train_mode"), CASES)
def test_what_follows_from_the_inputs_of_convolutions_is_true(name, train_mode):
    """The values that a walk solves for say others: all of some tensors, parts of others."""
    network, values, _ = traced(name, train_mode=train_mode)
    weighted = {"conv2d", "linear"}
    solved = [
        node
        for node in network.nodes[1:]
        if any(operation_name(user) in weighted for user in network.users(node))
    ]
    for given in [solved[-1:], solved]:
        network.values = {node: values[node.name] for node in given}
        shares = []
        for node in network.nodes:
            known, value = network.known(node)
            on = known > 0
            torch.testing.assert_close(value[on], values[node.name][on], atol=1e-11, rtol=1e-9)
            shares.append(on.double().mean().item())
            whole = network.value(node)
            assert whole is None or on.all()
    partly = any(0 < share < 1 for share in shares)
    assert partly == (name in ("convnet", "residual", "deep"))  # a ReLU hides what is negative


class Function(nn.Module):
    """A function of tensors as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def behind(*layers, channels=8):
    """A convolution, these layers, and a head."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, *head).double()


#: What cannot be walked through → layers, and what is said.
STOPS = {
    "unknown": ([nn.GELU()], "1: GELU cannot be inverted"),
    "group normalisation": ([nn.GroupNorm(2, 8)], "1: GroupNorm cannot be inverted"),
    "multiplied": ([Function(lambda x: x * 2)], "mul cannot be inverted"),
    "added to itself": ([Function(lambda x: x + x)], "adds other than two tensors of one shape"),
    "added with a factor": (
        [Function(lambda x: torch.add(x, x.relu(), alpha=2))],
        "adds other than two tensors of one shape",
    ),
    "broadcast": (
        [Function(lambda x: x + F.adaptive_avg_pool2d(x, 1))],
        "adds other than two tensors of one shape",
    ),
    "overlapping windows": ([nn.ReLU(), nn.MaxPool2d(3, 2, 1)], "where its maxima lie is not"),
}


@pytest.mark.parametrize("case", STOPS)
def test_what_cannot_be_walked_through_is_named(case):
    layers, says = STOPS[case]
    network, values, signals = traced(None, model=behind(*layers))
    *nodes, output = network.nodes
    network.signals[output] = signals[output.name]
    with pytest.raises(StoppedError, match=says):
        [network.signal(node) for node in reversed(nodes)]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_other_convolutions_are_not_solved(layer):
    network, values, signals = traced(None, model=behind(layer))
    conv = network.nodes[2]
    network.signals[conv] = signals[conv.name]
    with pytest.raises(StoppedError, match="^1: grouped, dilated and unusually padded"):
        network.uses(network.nodes[1])
    with pytest.raises(StoppedError, match="^1: grouped, dilated and unusually padded"):
        network.signal(network.nodes[1])


def test_layers_without_a_gradient_are_not_solved():
    network, values, signals = traced("convnet", train_mode=True)
    network.values = {node: values[node.name] for node in network.nodes}
    network.signals[network.nodes[-1]] = signals[network.nodes[-1].name]
    image = network.nodes[0]
    zero = {name: 0 * g for name, g in network.gradient.items()}
    for missing, says in (
        ("0.weight", "^0: the gradient of its weights was not sent"),
        ("1.weight", "^1: the gradient of its scale and shift was not sent"),
    ):
        kept = {name: g for name, g in network.gradient.items() if name != missing}
        with pytest.raises(StoppedError, match=says):
            replace(network, gradient=kept).uses(image)
    with pytest.raises(StoppedError, match="^0: the gradient of its weights is zero"):
        replace(network, gradient=network.gradient | {"0.weight": zero["0.weight"]}).uses(image)


def test_a_plain_batchnorm_is_walked_through_in_eval_mode_alone():
    model = behind(nn.BatchNorm2d(8, affine=False), nn.ReLU())
    model[1].running_mean.normal_()
    for train_mode in (False, True):
        network, values, signals = traced(None, model=model, train_mode=train_mode)
        network.values = {node: values[node.name] for node in network.nodes}
        relu = network.nodes[3]
        network.signals[relu] = signals[relu.name]
        if train_mode:
            with pytest.raises(StoppedError, match="^1: the gradient of its scale and shift"):
                network.signal(network.nodes[1])
        else:
            torch.testing.assert_close(network.signal(network.nodes[1]), signals["_0"])


def test_a_channel_that_batchnorm_scales_by_zero_is_not_known():
    model = behind(nn.BatchNorm2d(8), nn.ReLU())
    model[1].weight.data[3] = 0
    model[1].bias.data.fill_(0.5)
    network, values, _ = traced(None, model=model)
    network.values = {network.nodes[3]: values["_2"]}
    known, value = network.known(network.nodes[1])
    assert not known[:, 3].any()
    assert torch.isfinite(value).all()
    torch.testing.assert_close(value[known > 0], values["_0"][known > 0])


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_networks_that_cannot_be_attacked_are_refused():
    def refused(model, says, **options):
        names = [name for name, _ in model.named_parameters()]
        options = {"train_mode": True, "statistics": None, "accuracy": {}} | options
        with pytest.raises(ValueError, match=says):
            network_of(model, 2, (3, 16, 16), dict.fromkeys(names, torch.ones(1)), **options)

    refused(behind(Branching()), "torch.fx cannot trace the network")
    refused(made("convnet"), "needs the batch's BatchNorm statistics")
    untracked = behind(nn.BatchNorm2d(8, track_running_stats=False))
    refused(untracked, "keeps no running statistics", train_mode=False)


# The whole walk ----------------------------------------------------------------------------------


def small(name, size=8):
    """A network of 12 channels for images of 8×8 in float64, with weights of its own."""
    torch.manual_seed(0)
    built = {"residual": lambda: residual(12), "deep": lambda: deep(12),
             "vgg": lambda: vgg(12, size), "smooth": lambda: smooth(size)}[name]()  # fmt: skip
    return built.double()


@pytest.mark.parametrize(
    ("noise", "certainty", "least"), [(0.0, 1.0, 20), (1e-6, 10.0, 20), (1e-3, 1.0, 10)]
)
def test_certified_tensors_are_as_exact_as_is_expected(noise, certainty, least):
    """Of networks and batches most of which are at the limit of what can be solved."""
    certified, generator = 0, torch.Generator().manual_seed(7)
    cases = [(name, count, False) for name in ("residual", "deep", "vgg", "smooth")
             for count in (1, 2, 3)]  # fmt: skip
    cases += [(name, count, True) for name in ("residual", "deep") for count in (2, 3)]
    for name, count, train_mode in cases:
        model = small(name)
        [m for m in model.modules() if isinstance(m, nn.Linear)][-1].weight.data *= certainty
        x, y = batch(count, 8)
        values, _, gradient, measured = true_tensors(model, x, y, train_mode=train_mode)
        gradient = {
            key: g + noise * g.square().mean().sqrt()
            * torch.randn(g.shape, generator=generator).to(g)
            for key, g in gradient.items()
        }  # fmt: skip
        found = peel(
            network_of(
                model, count, (3, 8, 8), gradient, train_mode=train_mode, statistics=measured,
                accuracy=dict.fromkeys(gradient, Accuracy(1e-10)),
            ),
            y,
        )  # fmt: skip
        tensors = found.tensors()
        for layer in found.layers:
            if layer.certified and layer.name in tensors:
                true = values.get(layer.name, x)
                error = ((tensors[layer.name] - true).norm() / true.norm()).item()
                assert error <= max(10 * layer.expected_error, 1e-6), (name, count, layer)
                certified += 1
    assert certified >= least


def test_a_common_part_counts_if_the_tensor_before_bears_its_zeros_out():
    """Three images leave a part open that 24 means do not say alone, and is found now and then."""
    found = {True: 0, False: 0}
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, CLASSES),
        ).double()  # fmt: skip
        x, y = batch(3, 4)
        values, _, gradient, measured = true_tensors(model, x, y, train_mode=True)
        network = network_of(
            model, 3, (3, 4, 4), gradient, train_mode=True, statistics=measured,
            accuracy=dict.fromkeys(gradient, Accuracy(1e-10)),
        )  # fmt: skip
        peeled = peel(network, y)
        layer = next(layer for layer in peeled.layers if layer.name == "_2")
        assert layer.rests_on_zeros
        assert layer.rank == layer.unknowns == 288
        off = (peeled.tensors()["_2"] - values["_2"]).norm() / values["_2"].norm()
        right = off.item() < 1e-9
        assert layer.certified == right
        assert ("_2, whose zeros nothing bears out" in peeled.stopped) != right
        assert [node.name for node in peeled.frontier()] == (["input_1"] if right else ["_7"])
        found[right] += 1
    assert found[True] > 0
    assert found[False] > 0
