"""Whether the images that the flags name are those of an imported update."""

from dataclasses import replace

from torch import Tensor, nn

from models.comparing import cosine_distance, same_batch_limit
from train.batches import Batch
from train.client import settings_loss
from train.local import sent_update
from train.settings import ClientSettings
from train.updates import ImportedUpdate
from utils.shard import ALONE


def compared(
    settings: ClientSettings, model: nn.Module, batch: Batch, found: ImportedUpdate
) -> str:
    """Return a line that says whether the named images give the imported update.

    model: with the weights of BEFORE; its trainable parameters are those of the update. The
    client's gradient, or its local steps, are computed for `batch`, in the mode that the settings
    give. `same_batch_limit` says how near they must be.
    """
    kind = next(model.parameters()).dtype
    settings = replace(settings, upload_bn=False)

    def distance(images: Tensor) -> float:
        sent = sent_update(
            settings, model, images.to(kind), batch.y, settings_loss(settings), ALONE
        )
        pair = ([g.double() for g in of] for of in (sent.gradient, found.update.gradient))
        return cosine_distance(*pair).item()

    of_batch = distance(batch.x)
    of_flat = distance(batch.x.mean((-2, -1), keepdim=True).expand_as(batch.x))
    if of_batch <= same_batch_limit(of_flat, found.resolution):
        return f"the images named give this update: cosine distance {of_batch:.2g}"
    return (
        f"warning: the images named do not give this update: cosine distance {of_batch:.2g}; they "
        "are not the client's images, or are in another order, or their labels, normalisation or "
        "the client's mode are others. No score against them counts. Give --data-backup with the "
        "client's images first, in its order, and other images of the same kind after them for "
        "control and decoys (docs/updates.md)"
    )
