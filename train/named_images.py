"""Whether the images that the flags name are those of an imported update."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from train.batches import Batch
from train.client import settings_loss
from train.local import sent_update
from train.settings import ClientSettings
from train.updates import ImportedUpdate
from utils.shard import ALONE

#: Cosine distance up to which two updates can be those of one batch, the share of a flat batch's
#: distance that it must stay below, and the distance that is only rounding: of the computation, and
#: of the weights, in squares of their relative rounding error.
SAME_BATCH, SHARE_OF_FLAT, ROUNDING, ROUNDED_BY = 1e-3, 0.1, 1e-10, 0.1


def compared(
    settings: ClientSettings, model: nn.Module, batch: Batch, found: ImportedUpdate
) -> str:
    """Return a line that says whether the named images give the imported update.

    model: with the weights of BEFORE; its trainable parameters are those of the update. The
    client's gradient, or its local steps, are computed for `batch`, in the mode that the settings
    give. How near the gradients of different images lie depends on the network, so the distance
    must also be far below that of flat images of the same labels and mean colours.
    """
    kind = next(model.parameters()).dtype
    settings = replace(settings, upload_bn=False)

    def distance(images: Tensor) -> float:
        sent = sent_update(
            settings, model, images.to(kind), batch.y, settings_loss(settings), ALONE
        )
        return cosine_distance(sent.gradient, found.update.gradient)

    of_batch = distance(batch.x)
    of_flat = distance(batch.x.mean((-2, -1), keepdim=True).expand_as(batch.x))
    rounding = max(ROUNDING, ROUNDED_BY * found.resolution**2)
    if of_batch <= min(SAME_BATCH, max(rounding, SHARE_OF_FLAT * of_flat)):
        return f"the images named give this update: cosine distance {of_batch:.2g}"
    return (
        f"warning: the images named do not give this update: cosine distance {of_batch:.2g}; they "
        "are not the client's images, or are in another order, or their labels, normalisation or "
        "the client's mode are others. No score against them counts. Give --data-backup with the "
        "client's images first, in its order, and other images of the same kind after them for "
        "control and decoys (docs/updates.md)"
    )


def cosine_distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return 1 − cos of the angle between two gradients, in [0, 2]; 1 where one of them is 0.

    It is half the squared distance of the unit vectors, which keeps its digits near 0.
    """
    a, b = (torch.cat([g.double().flatten() for g in gradient]) for gradient in (first, second))
    if not (a.any() and b.any()):
        return 1.0
    return 0.5 * (a / a.norm() - b / b.norm()).square().sum().item()
