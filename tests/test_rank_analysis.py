"""Rank analysis: every number worked out by hand, whole networks, refusals."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock, Bottleneck

from models.build import build_model
from models.choices import RANK_MODES
from models.rank_analysis import LayerRank, rank_analysis


def on_meta(arch, size=224, num_classes=10):
    """A network without memory; torchvision's RegNets do not take the meta device."""
    with torch.device("cpu" if arch.startswith("regnet") else "meta"):
        return build_model(arch, num_classes, (3, size, size))


def worst(layers):
    return max(layers, key=lambda layer: layer.index)


def indices(layers):
    return [layer.index for layer in layers]


# By hand: each row is name, kind, |x|, |z|, |w|, v.


def test_an_expanding_layer_leaves_virtual_constraints():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),  # its bias counts nowhere
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(4 * 3 * 3, 5),
    )
    # Three images of 2×6×6 → 4×6×6 → 4×3×3 → 5.
    layers = rank_analysis(model, 3, (2, 6, 6))
    assert layers == [
        LayerRank("0", "convolution", 3 * 2 * 36, 3 * 4 * 36, 4 * 2 * 9, 0),
        LayerRank("2", "convolution", 3 * 4 * 36, 3 * 4 * 9, 4 * 4 * 9, 432 - 216),
        LayerRank("6", "linear", 3 * 4 * 9, 3 * 5, 36 * 5, 216),
    ]
    assert indices(layers) == [
        216 - 72 - 432 - 0,  # -288
        432 - 144 - 108 - 216,  # -36; without v it would be 180
        108 - 180 - 15 - 216,  # -303
    ]


def test_a_contracting_network_is_not_determined():
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, stride=2, padding=1),
        nn.GroupNorm(1, 2),
        nn.Sigmoid(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * 2 * 2, 4),
    )
    # Two images of 3×8×8 → 2×4×4 → 2×2×2 → 4; no layer expands.
    layers = rank_analysis(model, 2, (3, 8, 8))
    assert layers == [
        LayerRank("0", "convolution", 2 * 3 * 64, 2 * 2 * 16, 2 * 3 * 9, 0),
        LayerRank("3", "pooling", 64, 2 * 2 * 4, 0, 0),
        LayerRank("5", "linear", 16, 2 * 4, 8 * 4, 0),
    ]
    assert indices(layers) == [384 - 54 - 64, 64 - 16, 16 - 32 - 8] == [266, 48, -24]
    model[0].weight.requires_grad_(False)  # no gradient of it, no constraints
    assert indices(rank_analysis(model, 2, (3, 8, 8))) == [384 - 64, 48, -24]


def test_basic_blocks():
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        BasicBlock(4, 4),
        BasicBlock(4, 8, stride=2, downsample=shortcut),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    # Two images of 3×6×6 → 4×6×6 → 4×6×6 → 8×3×3 → 8 → 5.
    # Inside a block the outputs of its convolutions are as many unknowns as equations.
    layers = rank_analysis(model, 2, (3, 6, 6))
    assert layers == [
        LayerRank("0", "convolution", 2 * 3 * 36, 2 * 4 * 36, 4 * 3 * 9, 0),
        LayerRank("1", "residual block", 288, 288, 2 * (4 * 4 * 9), 288 - 216),
        LayerRank("2", "residual block", 288, 2 * 8 * 9, 8 * 4 * 9 + 8 * 8 * 9 + 8 * 4, 72),
        LayerRank("3", "pooling", 144, 2 * 8, 0, 72),
        LayerRank("5", "linear", 16, 2 * 5, 8 * 5, 72),
    ]
    assert indices(layers) == [
        216 - 108 - 288 - 0,  # -180
        288 - 288 - 288 - 72,  # -360
        288 - 896 - 144 - 72,  # -824
        144 - 0 - 16 - 72,  # 56: the average of 3×3 cannot be undone
        16 - 40 - 10 - 72,  # -106
    ]


def test_bottleneck():
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))
    model = nn.Sequential(Bottleneck(4, 2, downsample=shortcut), nn.Flatten(), nn.Linear(72, 3))
    # Five images of 4×3×3 → 8×3×3 → 3; in the block 4 → 2 → 2 → 8 channels, beside it 4 → 8.
    layers = rank_analysis(model, 5, (4, 3, 3))
    inside = 4 * 2 + 2 * 2 * 9 + 2 * 8 + 4 * 8
    assert layers == [
        LayerRank("0", "residual block", 5 * 4 * 9, 5 * 8 * 9, inside, 0),
        LayerRank("2", "linear", 360, 5 * 3, 72 * 3, 180),
    ]
    assert indices(layers) == [180 - 92 - 360, 360 - 216 - 15 - 180] == [-272, -51]


class Functional(nn.Module):
    """What modules do not show: sizes, functions, methods, sums within branches."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.outer = nn.Conv2d(2, 2, 3, padding=1)
        self.inner = nn.Conv2d(2, 2, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        batch, channels, height, width = x.shape
        torch._assert(height == width, "not square")
        x = F.relu(self.first(x), inplace=True)
        branch = self.outer(F.dropout(x, training=self.training))
        branch = branch + F.avg_pool2d(self.inner(branch).relu(), 3, 1, 1)
        branch += 1
        x = torch.add(x, branch)
        x = F.max_pool2d(x / 2, 2)
        return self.head(x.view(batch, channels * (height // 2) * x.size(3)))


def test_functions_sizes_and_nested_sums():
    layers = rank_analysis(Functional(), 3, (2, 4, 4))
    assert layers == [
        LayerRank("first", "convolution", 96, 96, 2 * 2 * 9, 0),
        LayerRank("add_2", "residual block", 96, 96, 2 * 2 * 9 + 2 * 2, 0),
        LayerRank("max_pool2d", "pooling", 96, 24, 0, 0),
        LayerRank("head", "linear", 24, 15, 8 * 5, 0),
    ]
    assert indices(layers) == [-36, -40, 72, 24 - 40 - 15]


def resnet_rows(block, batch):
    """Rows of a ResNet with one block a stage, 10 classes, 32 px: name, |x|, |z|, |w| by mode."""
    if block is BasicBlock:  # 64×8×8 → 64×8×8 → 128×4×4 → 256×2×2 → 512×1×1
        blocks = [
            ("layer1.0", 64 * 64, 64 * 64, 2 * 64 * 64 * 9, 64 * 64 * 9),
            ("layer2.0", 64 * 64, 128 * 16, 73_728 + 147_456 + 8_192, 147_456 + 8_192),
            ("layer3.0", 128 * 16, 256 * 4, 294_912 + 589_824 + 32_768, 589_824 + 32_768),
            ("layer4.0", 256 * 4, 512, 1_179_648 + 2_359_296 + 131_072, 2_359_296 + 131_072),
        ]
        features = 512
    else:  # 64×8×8 → 256×8×8 → 512×4×4 → 1024×2×2 → 2048×1×1
        blocks = [  # |w|: conv1, conv2, conv3, downsample
            ("layer1.0", 4096, 256 * 64, 4_096 + 36_864 + 16_384 + 16_384, 36_864 + 16_384),
            ("layer2.0", 16384, 512 * 16, 32_768 + 147_456 + 65_536 + 131_072, 278_528),
            ("layer3.0", 8192, 1024 * 4, 131_072 + 589_824 + 262_144 + 524_288, 1_114_112),
            ("layer4.0", 4096, 2048, 524_288 + 2_359_296 + 1_048_576 + 2_097_152, 4_456_448),
        ]
        features = 2048
    rows = [
        ("conv1", 3 * 1024, 64 * 256, 64 * 3 * 49, 64 * 3 * 49),
        ("maxpool", 64 * 256, 64 * 64, 0, 0),
        *blocks,
        ("avgpool", features, features, 0, 0),
        ("fc", features, 10, features * 10, features * 10 + 10),  # the bias in mode original
    ]
    return [(name, batch * x, batch * z, *weights) for name, x, z, *weights in rows]


@pytest.mark.parametrize("mode", RANK_MODES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_small_resnets_in_both_modes(block, batch, mode):
    with torch.device("meta"):
        model = ResNet(block, [1, 1, 1, 1], num_classes=10)
    layers = rank_analysis(model, batch, (3, 32, 32), mode)
    found = [(layer.name, layer.inputs, layer.outputs, layer.weights) for layer in layers]
    rows = resnet_rows(block, batch)
    assert found == [(name, x, z, w[RANK_MODES.index(mode)]) for name, x, z, *w in rows]
    # conv1 expands 3·32·32 to 64·16·16; with bottlenecks layer1.0 64·8·8 to 256·8·8.
    conv1, layer1 = batch * (16_384 - 3_072), batch * (16_384 - 4_096)
    later = conv1 if block is BasicBlock else conv1 + layer1
    assert [layer.virtual for layer in layers] == [0, conv1, conv1, *5 * [later]]
    assert worst(layers).name == "maxpool"
    assert worst(layers).index == batch * (16_384 - 4_096 - 13_312) == -1_024 * batch


# Whole networks.


def test_resnet18():
    layers = rank_analysis(on_meta("resnet18"), 8, (3, 224, 224))
    assert len(layers) == 1 + 1 + 8 + 1 + 1
    assert worst(layers).name == "maxpool"
    # 64·112² − 64·56² − (64·112² − 3·224²) an image
    assert worst(layers).index == 8 * (3 * 224**2 - 64 * 56**2) == -401_408


def test_original_counts_a_resnet_with_another_stem():
    layers = rank_analysis(on_meta("resnet18_cifar", 32), 2, (3, 32, 32), "original")
    assert [layer.name for layer in layers[:2]] == ["conv1", "layer1.0"]  # no pooling between
    assert len(layers) == 1 + 8 + 1 + 1
    assert layers[0].weights == 64 * 3 * 9


def test_resnet50():
    layers = rank_analysis(on_meta("resnet50"), 8, (3, 224, 224))
    assert len(layers) == 1 + 1 + (3 + 4 + 6 + 3) + 1 + 1
    assert (worst(layers).name, worst(layers).index) == ("maxpool", -401_408)


def test_vgg11():
    layers = rank_analysis(on_meta("vgg11"), 8, (3, 224, 224))
    assert len(layers) == 8 + 5 + 1 + 3
    assert worst(layers).name == "features.2"  # the first pooling
    # 64·224² − 64·112² − (64·224² − 3·224²) an image
    assert worst(layers).index == 8 * (3 * 224**2 - 64 * 112**2) == -5_218_304


def test_mobilenet_v2():
    layers = rank_analysis(on_meta("mobilenet_v2"), 8, (3, 224, 224))
    # Of 17 inverted residuals 10 have a sum; of the others one is 2 convolutions, six are 3.
    assert len(layers) == 1 + 10 + (2 + 6 * 3) + 1 + 1 + 1
    assert sum(layer.kind == "residual block" for layer in layers) == 10
    assert worst(layers).name == "features.1.conv.1"  # 1×1, 32 to 16 channels
    # x 32·112², z 16·112², v 32·112² − 3·224² = 20·112²
    assert worst(layers).index == 8 * (32 - 16 - 20) * 112**2 - 32 * 16 == -401_920


SUPPORTED = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg11 vgg11_bn alexnet mobilenet_v2 "
    "mnasnet1_0 regnet_x_400mf lenet convnet resnet18_cifar"
)


@pytest.mark.parametrize("arch", SUPPORTED.split())
def test_supported_networks(arch):
    model = on_meta(arch)
    layers = rank_analysis(model, 8, (3, 224, 224))
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum(layer.weights for layer in layers) == sum(m.weight.numel() for m in weighted)
    sizes = [8 * 3 * 224 * 224, *(layer.outputs for layer in layers)]
    assert [*(layer.inputs for layer in layers), 8 * 10] == sizes
    virtual = 0
    for layer in layers:  # the whole recursion, as the docstring has it
        x, z, w = layer.inputs, layer.outputs, layer.weights
        assert layer.virtual == virtual
        assert layer.index == x - w - z - virtual
        virtual += max(max(z - x, 0) - max(x - w - z, 0), 0)
    names = dict(model.named_modules())
    assert all(layer.name in names for layer in layers if layer.kind != "pooling")


# Refusals.


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("densenet121", "features.denseblock1 merges paths by cat;"),
        ("googlenet", "inception3a merges paths by cat;"),
        ("inception_v3", "Mixed_5b merges paths by cat;"),
        ("efficientnet_b0", "features.1.0.block.1 merges paths by mul;"),
        ("shufflenet_v2_x1_0", "stage2.0 merges paths by cat;"),
        ("squeezenet1_0", "features.3 merges paths by cat;"),
        ("vit_b_16", "class_token is used outside of a convolution or linear layer"),
        ("swin_t", "features.1.0.attn.relative_position_bias_table is used outside"),
    ],
)
def test_networks_that_cannot_be_counted(arch, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}") as refusal:
        rank_analysis(on_meta(arch), 2, (3, 224, 224))
    assert "\n" not in str(refusal.value)


class Net(nn.Module):
    """A convolution, and `body(net, x)` for its forward."""

    def __init__(self, body):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.body = body

    def forward(self, x):
        return self.body(self, x)


def unused(net, x):
    x = net.conv(x)
    net.relu(x)  # works by its side effect, which the graph does not show
    return x


def branching(net, x):
    return net.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda net, x: net.conv(net.conv(x)), "conv uses the weights of an earlier layer again"),
        (
            lambda net, x: x + net.conv(net.conv(x)),
            "conv uses the weights of an earlier layer again",
        ),
        (lambda net, x: x * net.conv(x), "mul merges paths by mul; only additions"),
        (lambda net, x: x - net.conv(x), "sub merges paths by sub; only additions"),
        (lambda net, x: net.norm(net.conv(x)).permute(0, 2, 3, 1), "permute: permute cannot be"),
        (lambda net, x: net.conv(x).chunk(2, 2)[0], "chunk: chunk cannot be counted"),
        (lambda net, x: net.conv(x)[:, 0], "getitem: getitem cannot be counted"),
        (lambda net, x: net.conv(x) + net.conv.bias[0], "conv.bias is used outside"),
        (lambda net, x: net.conv(x) + torch.ones(1, device="meta"), "_tensor_constant0 is used"),
        (lambda net, x: net.conv(x) + torch.ones_like(x.shape[0]), "ones_like fails: "),
        (lambda net, x: (net.conv(x), x), "the network returns several values"),
        (lambda net, x: F.max_pool2d(net.conv(x), 2, return_indices=True)[0], "max_pool2d"),
        (lambda net, x: F.avg_pool2d(net.conv(x), 9), "avg_pool2d fails: "),
        (unused, "relu computes a value that the output does not use"),
        (branching, "torch.fx cannot trace the network: symbolically traced variables"),
    ],
)
def test_operations_that_cannot_be_counted(body, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}") as refusal:
        rank_analysis(Net(body), 2, (3, 4, 4))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(3, 3, 1), nn.LayerNorm([3, 4, 4]), nn.Softmax(1), nn.Upsample(2)]
)
def test_modules_that_cannot_be_counted(layer):
    with pytest.raises(ValueError, match=rf"^0: {type(layer).__name__} cannot be counted$"):
        rank_analysis(nn.Sequential(layer), 2, (3, 4, 4))


def test_tied_weights_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="^1 uses the weights of an earlier layer again$"):
        rank_analysis(model, 2, (3, 4, 4))


def test_modes_are_checked():
    with pytest.raises(ValueError, match="ResNets only, not a VGG; choose all$"):
        rank_analysis(on_meta("vgg11"), 2, (3, 224, 224), "original")
    with pytest.raises(ValueError, match="^mode 'both' is unknown; choose from all, original$"):
        rank_analysis(on_meta("resnet18"), 2, (3, 224, 224), "both")


# The caller's model.


def test_the_model_is_left_alone():
    model = build_model("resnet18", 10, (3, 32, 32)).double()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    parameters = dict(model.named_parameters())
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    trained = [p.requires_grad for p in parameters.values()]
    generator = torch.get_rng_state()
    layers = rank_analysis(model, 2, (3, 32, 32))
    assert layers[0].weights == 0
    assert dict(model.named_parameters()) == parameters  # the same objects
    assert all(torch.equal(v, state[k]) and v.is_cpu for k, v in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in parameters.values()] == trained
    assert (model.fc.weight.grad == 1).all()
    assert torch.equal(torch.get_rng_state(), generator)
