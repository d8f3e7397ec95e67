"""The network up to some of its tensors; images that match them; linear decoding of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import nn

from inversion.layerwise.decoder import augmented, decode, linear_decoder, mean_decoding
from inversion.layerwise.front import Front
from inversion.layerwise.matching import Matching, match_activations
from models.batchnorm import BATCHNORM_TYPES
from models.build import build_model
from models.graph import traced_tensors

LOW, HIGH = -torch.ones(3, 1, 1), torch.ones(3, 1, 1)
#: Network → tensors: module path by name in torch.fx.
TENSORS = {
    "lenet": {"_0": "0", "_3": "3"},
    "convnet": {"_1": "1", "_5": "5", "_8": "8"},
    "resnet18": {
        "maxpool": "maxpool",
        "layer1_1_bn2": "layer1.1.bn2",
        "layer2_0_relu_1": "layer2.0",
    },
    "resnet18_cifar": {"bn1": "bn1", "layer1_0_relu_1": "layer1.0"},
}


def network(arch, size=16):
    """A network whose BatchNorm layers have weights, biases and statistics of their own."""
    torch.manual_seed(0)
    model = build_model(arch, 5, (3, size, size))
    for layer in model.modules():
        if isinstance(layer, BATCHNORM_TYPES):
            for values in (layer.weight.data, layer.running_var):
                values.uniform_(0.5, 2)
            for values in (layer.bias.data, layer.running_mean):
                values.normal_()
    return model


def images(count=3, size=16, seed=1):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def hooked(model, x, paths, train_mode):
    """What the modules return in a run of the model, and the statistics of its batch."""
    model = copy.deepcopy(model).train(train_mode)
    found, statistics = {}, {}

    def keep(path):
        return lambda module, args, result: found.update({path: result.detach().clone()})

    def measure(path):
        def hook(module, args):
            var, mean = torch.var_mean(args[0].detach(), (0, 2, 3), correction=0)
            statistics[path] = (mean, var)

        return hook

    for path, module in model.named_modules():
        if path in paths:
            module.register_forward_hook(keep(path))
        if isinstance(module, BATCHNORM_TYPES):
            module.register_forward_pre_hook(measure(path))
    model(x)
    return found, statistics


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("arch", TENSORS)
def test_a_front_is_what_the_network_computes(arch, train_mode):
    model, x = network(arch).double(), images().double()
    before = copy.deepcopy(model.state_dict())
    found, statistics = hooked(model, x, TENSORS[arch].values(), train_mode)
    front = Front(model, list(TENSORS[arch]), statistics if train_mode else None)
    values = front(x)
    assert list(values) == list(TENSORS[arch])
    for name, path in TENSORS[arch].items():
        assert torch.allclose(values[name], found[path], rtol=1e-9, atol=1e-9)
        assert torch.allclose(front(x.float())[name].double(), found[path], rtol=1e-3, atol=1e-3)
        assert front(x.float())[name].dtype == torch.float32
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_names_are_those_of_the_traced_tensors():
    model = network("resnet18")
    nodes = traced_tensors(model, 2, (3, 16, 16))
    values = Front(model, [node.name for node in nodes])(images(2))
    assert {node.name: tuple(node.meta["value"].shape) for node in nodes} == {
        name: tuple(value.shape) for name, value in values.items()
    }
    assert torch.allclose(values["fc"], model.eval()(images(2)), atol=1e-5)


class Bomb(nn.Module):
    """Cannot be computed where it is called; torch.fx sees one call, not what is inside."""

    def forward(self, x):
        return _bomb(x)


def _bomb(x):
    raise AssertionError("computed")


torch.fx.wrap("_bomb")


def test_nothing_behind_the_tensors_is_computed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), Bomb(), nn.Flatten())
    front, x = Front(model, ["_0"]), images()
    assert torch.equal(front(x)["_0"], model[0](x))  # not what ReLU makes of it in place
    with pytest.raises(AssertionError, match="computed"):
        Front(model, ["_3"])(x)
    x.requires_grad_()
    front(x)["_0"].sum().backward()
    assert x.grad is not None
    assert model[0].weight.grad is None


def test_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 4, 3)).train()
    assert torch.equal(Front(model, ["_1"])(images())["_1"], model[1](images()))
    assert model[0].training


def test_refusals_of_a_front():
    model = network("convnet")
    with pytest.raises(ValueError, match="no tensor _99"):
        Front(model, ["_1", "_99"])
    with pytest.raises(ValueError, match="no tensor"):
        Front(model, [])
    with pytest.raises(ValueError, match="the statistics of 4 are missing"):
        Front(model, ["_4"], {"1": (torch.zeros(32), torch.ones(32))})
    Front(model, ["_1"], {"1": (torch.zeros(32), torch.ones(32))})  # 4 stands behind it
    bare = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="0 keeps no running statistics"):
        Front(bare, ["_0"])
    assert Front(bare, ["_0"], {"0": (torch.zeros(3), torch.ones(3))})(images())["_0"].shape[1] == 3

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"^torch\.fx cannot trace the network: "):
        Front(Branching(), ["x"])


# Matching.


def wide():
    """A network whose first activation determines the image."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(24, 12, 3, padding=1), nn.Sigmoid())


def matched(front, targets, start, *, adam=0, lbfgs=0, rate=0.1, **options):
    how = Matching(adam, rate, lbfgs)
    return match_activations(front, targets, LOW, HIGH, start, how, **options)


class Counting(Front):
    """A front that counts its evaluations, in float32 and in float64."""

    def __init__(self, *args):
        super().__init__(*args)
        self.calls = {torch.float32: 0, torch.float64: 0}

    def __call__(self, x):
        self.calls[x.dtype] += 1
        return super().__call__(x)


def test_matching_makes_exact_images_of_exact_activations():
    model, x = wide(), images(2, 8).double()
    front = Counting(model, ["_2", "_4"])
    targets = {"_2": front(x)["_2"]}
    found = matched(front, targets, torch.zeros(2, 3, 8, 8), adam=30, lbfgs=3000)
    assert (found.images - x).abs().max() < 1e-7
    assert found.images.dtype == torch.float64
    assert (found.residual < 1e-8).all()
    assert front.calls[torch.float32] == 30
    assert 30 < front.calls[torch.float64] < 1000  # L-BFGS ends early


def test_the_residual_is_that_of_each_image():
    front, x = Front(wide(), ["_2", "_4"]), images(3, 8).double()
    targets, start = front(x), images(3, 8, seed=2)
    found = matched(front, targets, start, adam=3)
    for i in range(3):
        values = front(found.images[i : i + 1])
        squares = 0.0
        for name, target in targets.items():
            gap = values[name][0] - target[i]
            squares += gap.square().sum() / target[i].square().sum()
        assert found.residual[i].item() == pytest.approx(squares.item() ** 0.5, rel=1e-9)


def test_images_are_independent():
    """Each is the one that it is alone: bit for bit by L-BFGS, up to rounding in Adam's batch.

    The two stages are looked at one by one: L-BFGS tells images apart that Adam's rounding leaves
    on two sides of a ReLU, however near they are, since their gradients differ by a finite amount.
    """
    front, x = Front(wide(), ["_4"]), images(3, 8).double()
    targets, start = front(x), images(3, 8, seed=2)
    for options, apart in (({"lbfgs": 10}, 0.0), ({"adam": 5}, 1e-4)):
        together = matched(front, targets, start, **options)
        for i in range(3):
            alone = matched(front, {"_4": targets["_4"][i : i + 1]}, start[i : i + 1], **options)
            assert (together.images[i] - alone.images[0]).abs().max() <= apart
            assert (alone.images[0] - start[i]).abs().max() > 0.1


def test_the_images_stay_in_the_box_and_never_get_worse():
    front = Front(wide(), ["_2"])
    target = front(5 * images(1, 8).double())  # of an image outside of the box
    start = images(1, 8, seed=2)
    none = matched(front, target, start)
    assert torch.equal(none.images, start.double())
    found = matched(front, target, start, lbfgs=20)
    assert found.images.abs().max() <= 1
    assert found.residual < none.residual


def test_an_interruption_ends_matching_with_the_best_so_far():
    front, x = Counting(wide(), ["_2"]), images(2, 8).double()
    targets, start = front(x), 0.9 * x.float()
    options = {"adam": 20, "lbfgs": 100}
    begun = matched(front, targets, start)
    whole = matched(front, targets, start, **options)
    front.calls[torch.float32] = 0
    at_once = matched(front, targets, start, should_stop=lambda: True, **options)
    assert torch.equal(at_once.images, begun.images)
    assert front.calls[torch.float32] == 0
    # in Adam, whose first steps of this size lead away from so good a start
    after_five = matched(
        front, targets, start, rate=0.5, **options,
        should_stop=lambda: front.calls[torch.float32] >= 5,
    )  # fmt: skip
    assert front.calls[torch.float32] == 5
    astray = matched(front, targets, start, adam=5, rate=0.5)
    assert (astray.residual > begun.residual).all()
    assert torch.equal(after_five.images, begun.images)
    # in L-BFGS, at work on the first image
    before, done = front.calls[torch.float64], []

    def in_the_second_stage():
        done.append(front.calls[torch.float64] > before + 8)
        return done[-1]

    half = matched(front, targets, start, lbfgs=100, should_stop=in_the_second_stage)
    assert half.residual[0] < 0.1 * begun.residual[0]
    assert torch.equal(half.images[1], begun.images[1])
    assert done.count(True) < 4
    assert (whole.residual < 1e-8).all()


def test_a_target_that_the_front_lacks_is_refused():
    front = Front(wide(), ["_2"])
    for targets in ({"_4": torch.zeros(1, 12, 8, 8)}, {}):
        with pytest.raises(ValueError, match="does not compute"):
            matched(front, targets, images(1, 8), adam=1)


# Decoding.


def seeded():
    return torch.Generator().manual_seed(3)


def pairs_by_hand(front, name, public, neighbourhood, patch):
    """Features and patches of all positions, by loops."""
    maps = front(public)[name]
    half = neighbourhood // 2
    padded = F.pad(maps, (half,) * 4)
    rows, patches = [], []
    for image, around in zip(public, padded, strict=True):
        for i in range(maps.shape[-2]):
            for j in range(maps.shape[-1]):
                rows.append(around[:, i : i + neighbourhood, j : j + neighbourhood].flatten())
                top, left = i * patch, j * patch
                patches.append(image[:, top : top + patch, left : left + patch].flatten())
    return torch.stack(rows).detach().numpy(), torch.stack(patches).detach().numpy()


@pytest.mark.parametrize("count", [2, 40])  # fewer rows than features, more
def test_the_decoder_is_ridge_regression(count):
    front = Front(network("convnet"), ["_5"])  # 8×8 positions for 16×16 pixels
    public, secret = images(count).double(), images(2, seed=5).double()
    decoder = linear_decoder(front, "_5", LOW, HIGH, public, ridge=1e-2, generator=seeded())
    x, y = pairs_by_hand(front, "_5", augmented(public, LOW, HIGH, seeded()), 3, 2)
    assert (len(x) < x.shape[1]) == (count == 2)
    penalty = 1e-2 * ((x - x.mean(0)) ** 2).sum() / x.shape[1]
    model = Ridge(alpha=penalty, solver="cholesky").fit(x, y)
    features, _ = pairs_by_hand(front, "_5", secret, 3, 2)
    expected = torch.from_numpy(model.predict(features)).view(2, 8, 8, 3, 2, 2)
    expected = expected.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16).clamp(-1, 1)
    found = decode(decoder, front(secret)["_5"])
    assert torch.allclose(found, expected, atol=1e-7)
    assert not torch.allclose(found, mean_decoding(decoder, 2))


def test_features_without_a_map_are_decoded_at_once():
    front = Front(nn.Sequential(nn.Flatten(), nn.Linear(48, 60)), ["_1"])
    public, secret = images(100, 4), images(2, 4, seed=5)
    decoder = linear_decoder(front, "_1", LOW, HIGH, public, ridge=1e-9, generator=seeded())
    assert (decode(decoder, front(secret)["_1"]) - secret).abs().max() < 1e-4
    mean = front(augmented(public, LOW, HIGH, seeded()))["_1"].mean(0)
    control = mean_decoding(decoder, 3)
    assert control.shape == (3, 3, 4, 4)
    assert torch.allclose(control[2:], decode(decoder, mean[None]), atol=1e-5)


@pytest.mark.parametrize("positions", [(8, 8), (5, 3), (16, 7), (20, 16), (1, 16)])
def test_sides_that_do_not_divide(positions):
    """Of ramps the mean around a position tells the pixels there, up to its distance to them."""
    front = Front(nn.Sequential(nn.AdaptiveAvgPool2d(positions)), ["_0"])
    draw = torch.Generator().manual_seed(0)
    slopes = torch.randn(2, 100, 3, 1, 1, generator=draw)
    steps = torch.arange(16.0) - 7.5
    ramps = slopes[0] * steps[:, None] + slopes[1] * steps
    wide_box = 1000 * LOW, 1000 * HIGH
    decoder = linear_decoder(front, "_0", *wide_box, ramps[2:], ridge=1e-9, generator=seeded())
    found = decode(decoder, front(ramps[:2])["_0"])
    reach = [1 + 0.5 * -(-16 // side) for side in positions]  # half a patch, one of rounding
    bound = reach[0] * slopes[0, :2].abs() + reach[1] * slopes[1, :2].abs()
    assert found.shape == (2, 3, 16, 16)
    assert ((found - ramps[:2]).abs() < 1.1 * bound + 0.5).all()


def test_fewer_positions_where_the_work_is_bounded(monkeypatch):
    front = Front(network("convnet"), ["_2"])
    public, secret = images(60), images(2, seed=5)
    full, thinned = [], []
    for work, errors in ((4e10, full), (288**2 * 900, thinned)):  # 15 of 256 positions
        monkeypatch.setattr("inversion.layerwise.decoder._WORK", work)
        decoder = linear_decoder(front, "_2", LOW, HIGH, public, ridge=1e-6, generator=seeded())
        errors.append((decode(decoder, front(secret)["_2"]) - secret).abs().mean().item())
    assert full != thinned
    assert thinned[0] < 0.2 > full[0]


def test_augmentation():
    x = images(200, 4)
    assert torch.equal(augmented(x, LOW, HIGH, seeded()), augmented(x, LOW, HIGH, seeded()))
    wide_box = 100 * LOW, 100 * HIGH
    changed = augmented(x, *wide_box, seeded())
    fits = []
    for mirrored in (False, True):  # undo contrast and brightness: an affine map per channel
        own = x.flip(-1) if mirrored else x
        a, b = (v - v.mean((2, 3), keepdim=True) for v in (own, changed))
        slope = (a * b).sum((1, 2, 3)) / a.square().sum((1, 2, 3))
        rest = (b - slope[:, None, None, None] * a).flatten(1).norm(dim=1)
        fits.append(rest < 1e-4)
        assert ((slope[fits[-1]] > 0.299) & (slope[fits[-1]] < 1.501)).all()
    assert (fits[0] ^ fits[1]).all()
    assert 70 < fits[1].sum() < 130
    boxed = augmented(x, LOW, HIGH, seeded())
    assert torch.equal(boxed, changed.clamp(-1, 1))
