"""The attack that the benchmarks measure: photographs, random weights, train mode."""

import torch

from inversion.objective import Objective
from inversion.settings import Weights
from models.build import build_model, init_head
from models.checkpoint import make_checkpoint
from models.target import target_from_checkpoint
from train.capture import capture
from train.datasets import DATASETS, normalise, photo_batch
from utils.shard import ALONE, Shard


def photo_objective(
    arch: str,
    size: int,
    batch_size: int,
    *,
    seed: int = 0,
    weights: Weights | None = None,
    train_mode: bool = True,
    bn_grad: str = "exact",
    device: torch.device | str = "cpu",
    shard: Shard = ALONE,
) -> Objective:
    """The objective for batch 1 of the photographs and random weights drawn from `seed`.

    Without `weights`: the gradient distance, TV and, where there is BatchNorm, the exact BN
    prior.
    """
    torch.manual_seed(seed)
    spec = DATASETS["photos"]
    shape = (3, size, size)
    model = build_model(arch, spec.num_classes, shape)
    init_head(model, "normal")
    x, y = photo_batch(batch_size, 1, size, seed=seed)
    sent = capture(model, normalise(x, spec), y, train_mode=train_mode, capture_bn=True)
    checkpoint = make_checkpoint(
        model,
        sent.gradient,
        arch=arch,
        batch_size=batch_size,
        image_shape=shape,
        num_classes=spec.num_classes,
        mean=spec.mean,
        std=spec.std,
        train_mode=train_mode,
        bn_mean=sent.bn_mean,
        bn_var=sent.bn_var,
    )
    if weights is None:
        weights = Weights(priors={"tv": 0.01, "bn": 0.01} if sent.bn_mean else {"tv": 0.01})
    return Objective(
        model.to(device),
        target_from_checkpoint(checkpoint),
        y,
        weights,
        bn_source="batch",
        bn_grad=bn_grad,
        batch_shard=shard,
    )
