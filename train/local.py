"""The simulated client of several local steps: what it sends for a batch."""

from torch import Tensor, nn

from models.gradient import ClientLoss, Update, whole_batch_gradient
from models.local import LocalSteps, local_gradient
from train.settings import ClientSettings
from train.update_settings import LocalSettings
from utils.errors import InputError
from utils.shard import Shard


def local_steps(settings: LocalSettings | None) -> LocalSteps | None:
    """Return how the client steps, as a checkpoint records it; None for one gradient."""
    if settings is None or settings.steps == 1:
        return None
    return LocalSteps(settings.steps, settings.lr, settings.batch, settings.epochs)


def sent_update(
    settings: ClientSettings,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: ClientLoss,
    shard: Shard,
) -> Update:
    """Compute what a client sends for a batch before any protection.

    x: (B, C, H, W) normalised, y: (B,), on the model's device, the whole batch on every process.
    Without local steps it is the gradient of the whole batch, else the mean of the gradients along
    the steps (`local_gradient`).

    Raises InputError where several processes would share local steps.
    """
    local = local_steps(settings.local)
    if local is None:
        return whole_batch_gradient(model, x, y, loss, shard, moments=settings.upload_bn)
    if shard.size > 1:
        raise InputError(
            f"--local-steps {local.steps}: one process takes them, not {shard.size}; leave --nproc "
            "out"
        )
    return Update(local_gradient(model, x, y, loss, local))
