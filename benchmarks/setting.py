"""Builds the attack that the benchmarks measure: photographs, random weights, train mode."""

from collections.abc import Mapping

import torch
from torch import Tensor

from inversion.objective import Objective
from inversion.settings import Weights
from models.build import build_model, find_head, init_head, load_weights
from models.checkpoint import Task, make_checkpoint
from models.gradient import ClientLoss, whole_batch_gradient
from models.reading import target_from_checkpoint
from train.datasets import DATASETS, normalise
from train.photos import photo_batch
from utils.shard import ALONE, Shard


def photo_objective(
    arch: str,
    size: int,
    batch_size: int,
    *,
    seed: int = 0,
    index: int = 1,
    weights: Weights | None = None,
    train_mode: bool = True,
    bn_grad: str = "exact",
    bn_coupling: str = "exact",
    body: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    shard: Shard = ALONE,
) -> Objective:
    """Return the objective for a batch of the photographs, with random weights drawn from `seed`.

    arch: the network's name. size: the images' side in pixels. index: which batch. weights:
    those of the objective; without them it has the gradient distance, TV and, if the network has
    BatchNorm, the exact BN prior. body: weights by name for all but the classifier head; random
    ones without it.
    train_mode, bn_grad, bn_coupling, shard: as in `Objective`. dtype: in which the attacker
    computes; the client computes in float32.
    """
    torch.manual_seed(seed)
    spec = DATASETS["photos"]
    shape = (3, size, size)
    model = build_model(arch, spec.class_count, shape)
    if body is not None:
        head, _ = find_head(model)
        load_weights(
            model,
            {
                name: w if name.startswith(head) else body[name]
                for name, w in model.state_dict().items()
            },
        )
    init_head(model, "normal")
    x, y = photo_batch(batch_size, index, size, seed=seed)
    loss = ClientLoss(train_mode)
    x, model = normalise(x, spec).to(device), model.to(device)
    sent = whole_batch_gradient(model, x, y.to(device), loss, moments=True)
    task = Task(arch, batch_size, shape, spec.class_count, spec.mean, spec.std, loss)
    checkpoint = make_checkpoint(model, sent, task)
    if weights is None:
        weights = Weights(priors={"tv": 0.01, "bn": 0.01} if sent.bn_mean else {"tv": 0.01})
    return Objective(
        model.to(dtype),
        target_from_checkpoint(checkpoint),
        y,
        weights,
        bn_source="batch",
        bn_grad=bn_grad,
        bn_coupling=bn_coupling,
        batch_shard=shard,
    )
