"""Architectures, their heads, and weights from files."""

import pytest
import torch
import torchvision
from torch import nn

from models.build import (
    HEAD_INITS,
    SMALL_NETWORKS,
    architectures,
    build_model,
    find_head,
    init_head,
    input_convolution,
)
from models.pretrained import load_pretrained
from utils.errors import InputError

FIXED_SIZE = {"maxvit_t": 224, "inception_v3": 96}


def head_outputs(head):
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels


@pytest.mark.parametrize(
    "arch", [a for a in architectures() if not a.startswith("regnet")] + ["regnet_x_400mf"]
)
def test_the_head_is_found(arch):
    """On the meta device where the builder allows it: every family, no memory."""
    with torch.device("cpu" if arch.startswith("regnet") else "meta"):
        model = build_model(arch, 7, (3, 224, 224))
    name, head = find_head(model)
    assert head_outputs(head) == 7
    assert isinstance(head, nn.Conv2d) == arch.startswith("squeezenet")
    assert name in dict(model.named_modules())


@pytest.mark.parametrize("arch", ["convnet", "resnet18", "squeezenet1_1", "vgg11_bn"])
def test_head_inits(arch):
    for how in HEAD_INITS:
        torch.manual_seed(0)
        model = build_model(arch, 50, (3, 32, 32))
        _, head = find_head(model)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        init_head(model, how)
        if how == "keep":
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            continue
        name, _ = find_head(model)
        if how == "normal":
            assert (head.bias == 0).all()
            assert head.weight.std().item() == pytest.approx(0.01, rel=0.1)
        else:
            assert torch.equal(head.bias, before[f"{name}.bias"])
            bound = (6 / head.weight[0].numel()) ** 0.5
            assert head.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed <= {f"{name}.weight", f"{name}.bias"}


@pytest.mark.parametrize("arch", [*SMALL_NETWORKS, "resnet18", "vgg11", "densenet121"])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_take_grey_and_colour(arch, channels):
    model = build_model(
        arch, 5, (channels, 33, 47) if arch in SMALL_NETWORKS else (channels, 32, 32)
    )
    shape = (33, 47) if arch in SMALL_NETWORKS else (32, 32)
    assert model.eval()(torch.rand(2, channels, *shape)).shape == (2, 5)


def test_resnet18_cifar_is_resnet18_but_for_its_stem():
    torch.manual_seed(0)
    model = build_model("resnet18_cifar", 8, (3, 32, 32))
    plain = torchvision.models.resnet18(num_classes=8).state_dict()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes.pop("conv1.weight") == (64, 3, 3, 3)
    assert shapes == {name: v.shape for name, v in plain.items() if name != "conv1.weight"}
    # fan-out 64·3·3: a variance of 2/576 (kaiming normal, as torchvision draws its convolutions)
    assert model.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    sizes = []
    for name in ("layer1", "layer4"):
        getattr(model, name).register_forward_hook(lambda *a: sizes.append(a[2].shape[-1]))
    model.eval()(torch.rand(2, 3, 32, 32))
    assert sizes == [32, 4]


def test_unknown_architecture_lists_the_choices():
    with pytest.raises(InputError, match="^unknown; choose from lenet, convnet.*resnet50"):
        build_model("lenet5", 10, (3, 32, 32))
    with pytest.raises(InputError, match="^vit_b_16 cannot take images of 50 pixels"):
        build_model("vit_b_16", 10, (3, 50, 50))


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=8)


def loaded(content, path, num_classes=8, channels=3, arch="resnet18"):
    torch.save(content, path)
    torch.manual_seed(1)
    model = build_model(arch, num_classes, (channels, 32, 32))
    return model, load_pretrained(model, str(path))


def same(model, state, but=()):
    own = model.state_dict()
    return all(torch.equal(own[k], v) for k, v in state.items() if not k.startswith(tuple(but)))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
def test_state_dicts_with_and_without_wrapping(resnet, tmp_path, prefix, wrap):
    state = {prefix + k: v for k, v in resnet.state_dict().items()}
    content = state if wrap is None else {wrap: state, "epoch": 3, "arch": "resnet18"}
    model, result = loaded(content, tmp_path / "weights.pth")
    assert result.has_head
    assert same(model, resnet.state_dict())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "model.", "net.", "_orig_mod.module.", "a.b."])
@pytest.mark.parametrize("wrap", ["model_state_dict", "net", None])
def test_a_prefix_of_all_names_is_taken_off_and_said(resnet, tmp_path, prefix, wrap):
    state = {prefix + k: v for k, v in resnet.state_dict().items()}
    content = state if wrap is None else {wrap: state, "epoch": 3}
    model, result = loaded(content, tmp_path / "weights.pth")
    assert same(model, resnet.state_dict())
    assert f"'{prefix}' taken off the front of every name" in result.remarks
    assert wrap is None or f"state dict found under '{wrap}'" in result.remarks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to_sparse(), "layer4.1.conv2.weight is a sparse_coo tensor"),
        (lambda w: w.to("meta"), "is on the meta device"),
        (lambda w: torch.ones(1).expand(3 * 10**9), "but only 1 are stored"),
        (lambda w: w.long(), "of another kind layer4.1.conv2.weight torch.int64 instead of"),
        (lambda w: w * 1j, "is not floating-point numbers: its dtype is torch.complex64"),
        (lambda w: w / 0, "the weights layer4.1.conv2.weight are not finite"),
    ],
)
def test_weights_that_cannot_be_computed_with_are_refused(resnet, tmp_path, change, message):
    key = "layer4.1.conv2.weight"
    state = resnet.state_dict()
    with pytest.raises(InputError, match=message):
        loaded(state | {key: change(state[key])}, tmp_path / "weights.pth")


def test_parameters_with_gradients_are_weights(resnet, tmp_path):
    state = resnet.state_dict() | dict(resnet.named_parameters())
    model, _ = loaded(state, tmp_path / "weights.pth")
    assert same(model, resnet.state_dict())


def moco_file(resnet, path):
    """A MoCo v2 checkpoint: query and key encoders with projection heads, a queue."""
    state = {}
    for encoder in ("encoder_q", "encoder_k"):
        for key, value in resnet.state_dict().items():
            if not key.startswith("fc."):
                state[f"module.{encoder}.{key}"] = value
        for layer in (0, 2):
            state[f"module.{encoder}.fc.{layer}.weight"] = torch.zeros(4, 4)
            state[f"module.{encoder}.fc.{layer}.bias"] = torch.zeros(4)
    state["module.queue"] = torch.zeros(4, 16)
    state["module.queue_ptr"] = torch.zeros(1, dtype=torch.long)
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": state, "optimizer": {}}, path)
    return path


def test_moco(resnet, tmp_path):
    path = moco_file(resnet, tmp_path / "moco_v2_800ep_pretrain.pth.tar")
    model = build_model("resnet18", 1000, (3, 32, 32))
    head = model.fc.weight.clone()
    result = load_pretrained(model, str(path))
    assert not result.has_head
    assert same(model, resnet.state_dict(), but=["fc."])
    assert torch.equal(model.fc.weight, head)


def test_a_head_of_another_size_is_left_out(resnet, tmp_path):
    model, result = loaded(resnet.state_dict(), tmp_path / "w.pth", num_classes=5)
    assert not result.has_head
    assert any("head (8, 512)" in remark for remark in result.remarks)
    assert same(model, resnet.state_dict(), but=["fc."])


def test_grey_images_sum_the_first_convolution(resnet, tmp_path):
    model, _ = loaded(resnet.state_dict(), tmp_path / "w.pth", channels=1)
    grey = torch.rand(2, 1, 32, 32)
    out, expected = model.eval()(grey), resnet.eval()(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert input_convolution(model)[1].in_channels == 1


def test_auxiliary_heads_and_old_files(tmp_path):
    torch.manual_seed(0)
    state = torchvision.models.googlenet(num_classes=8, init_weights=False).state_dict()
    assert any(key.startswith("aux1.") for key in state)
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    model, result = loaded(state, tmp_path / "g.pth", arch="googlenet")
    assert any("auxiliary" in remark for remark in result.remarks)
    assert same(model, {k: v for k, v in state.items() if not k.startswith("aux")})


def test_unfit_files_say_which_keys(resnet, tmp_path):
    state = resnet.state_dict()
    state["extra.weight"] = torch.zeros(2)
    del state["layer1.0.conv1.weight"]
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    with pytest.raises(InputError) as error:
        loaded(state, tmp_path / "w.pth")
    text = str(error.value)
    assert "missing layer1.0.conv1.weight" in text
    assert "surplus extra.weight" in text
    assert "reshaped conv1.weight (64, 3, 3, 3) instead of (64, 3, 7, 7)" in text
    with pytest.raises(InputError, match="missing .* and .* more"):
        loaded(torchvision.models.alexnet().state_dict(), tmp_path / "a.pth")
    with pytest.raises(InputError, match="holds no state dict"):
        loaded([1, 2], tmp_path / "l.pth")
    with pytest.raises(InputError, match="hold no tensors"):
        loaded({"lr": 0.1}, tmp_path / "n.pth")
    with pytest.raises(InputError, match="no such file"):
        load_pretrained(resnet, str(tmp_path / "none.pth"))
