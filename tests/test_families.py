"""Every architecture family of torchvision, from capture to result."""

import pytest
from torchvision import models

from models.build import SMALL_NETWORKS, architectures
from tests.support import attack, capture_photos

FAMILIES = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32,
    "googlenet": 32, "inception_v3": 80, "maxvit_t": 224, "mnasnet0_5": 32,
    "mobilenet_v2": 32, "mobilenet_v3_small": 32, "regnet_x_400mf": 32, "resnet18": 32,
    "resnext50_32x4d": 32, "shufflenet_v2_x0_5": 32, "squeezenet1_1": 32, "swin_v2_t": 32,
    "vgg11_bn": 32, "vit_b_32": 32,
}  # fmt: skip
WITH_BN = (
    "densenet", "efficientnet", "googlenet", "inception", "maxvit", "mnasnet", "mobilenet",
    "regnet", "resne", "shufflenet", "_bn",
)  # fmt: skip


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_from_capture_to_result(arch, tmp_path):
    """Four photographs, one iteration, train mode with the exact BN prior where there is BN."""
    batch_size = "1" if arch == "maxvit_t" else "4"  # it takes images of 224 pixels only
    flags = ["-a", arch, "-b", batch_size, "--image-size", str(FAMILIES[arch])]
    prior = []
    if any(part in arch for part in WITH_BN):
        flags, prior = [*flags, "--upload-bn"], ["--BN", 1e-3, "--exact-bn"]
    path = capture_photos(tmp_path, *flags)
    result, _ = attack(
        tmp_path, path, "--epochs", 1, "--grad-sign", "--metric", "--no-controls", "--TV", 1e-3,
        *prior,
    )  # fmt: skip
    assert result["bn_source"] == ("batch" if prior else None)
    assert result["iterations"] == 1
    assert result["metrics"]["truth_gradient"]["fits"]
    assert result["stopped"] is None
    assert result["losses"]["gradient"] > 0
    path.unlink()  # half a gigabyte for some


def test_every_family_of_torchvision_is_covered():
    modules = {models.get_model_builder(arch).__module__ for arch in FAMILIES}
    every = {models.get_model_builder(a).__module__ for a in architectures()[len(SMALL_NETWORKS) :]}
    assert modules == every
