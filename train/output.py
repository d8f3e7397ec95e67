"""What training.py writes: checkpoint, sealed truth, picture and list of the batch, log."""

from torch import nn

from models.checkpoint import Task, make_checkpoint, save, seal
from models.comparing import float64_norm
from models.target import GroundTruth, Protection
from models.user_network import load_user_network
from train.batches import Batch
from train.client import Sent, settings_loss
from train.label_vectors import shown_labels
from train.local import local_steps
from train.origins import COLUMNS, rows
from train.settings import ClientSettings
from utils.console import Reporter
from utils.files import claimed_stem, free_stem, write_csv
from utils.images import denormalise
from utils.pictures import save_panels
from utils.script import git_revision, versions

#: Ends of the files' names; all files of a run begin with one stem.
ENDINGS = {
    "checkpoint": "-checkpoint.pth.tar",
    "truth": "-truth.pth.tar",
    "picture": "-target.png",
    "images": "-images.csv",
    "log": ".log",
}


def checkpoint_of(
    settings: ClientSettings,
    batch: Batch,
    model: nn.Module,
    sent: Sent,
    control: Sent | None,
    protection: Protection | None,
) -> dict:
    """Make the checkpoint of what the client sent for a batch, with the truth for scoring."""
    model_file = settings.network.model
    task = Task(
        arch=settings.network.arch,
        batch_size=settings.batch.size,
        image_shape=batch.spec.shape,
        num_classes=batch.spec.class_count,
        mean=batch.spec.mean,
        std=batch.spec.std,
        loss=settings_loss(settings),
        replace_bn=settings.network.replace_bn,
        model_sha256=None if model_file is None else load_user_network(model_file).sha256,
    )
    return make_checkpoint(
        model,
        sent.update,
        task,
        protection=protection,
        protection_norms=None if sent.protected is None else sent.protected.record(),
        truth=GroundTruth(
            batch.x, batch.y, None if control is None else control.update, batch.decoys
        ),
        settings={**settings.record, "versions": versions(), "git": git_revision()},
        local=local_steps(settings.local),
    )


def planned_file(settings: ClientSettings) -> str:
    """Name the checkpoint that a run without --dry-run would write."""
    return free_stem(settings.stem, tuple(ENDINGS.values())) + ENDINGS["checkpoint"]


def write(
    settings: ClientSettings, checkpoint: dict, batch: Batch | None, reporter: Reporter
) -> None:
    """Write all files of the run, or none where one cannot be written, and report them.

    batch: the client's images; None where they are not known, of which then is no picture.
    """
    with claimed_stem(settings.stem, tuple(ENDINGS.values())) as stem:
        paths = {kind: stem + ending for kind, ending in ENDINGS.items()}
        if settings.seal:
            checkpoint, truth = seal(checkpoint)
            save(truth, paths["truth"])
        save(checkpoint, paths["checkpoint"])
        if batch is not None:
            images = denormalise(batch.x, *batch.spec.normalisation)
            save_panels([("target", images)], paths["picture"])
            write_csv(COLUMNS, rows(batch.origins, shown_labels(batch.y)), paths["images"])
        gradient = checkpoint["target_gradient"]
        reporter.say(f"gradient: {len(gradient)} tensors, norm {float64_norm(gradient):.6g}")
        if checkpoint["local_steps"] is not None:
            reporter.say(local_line(checkpoint))
        if checkpoint["bn_mean_list"] is not None:
            reporter.say(f"BatchNorm statistics of {len(checkpoint['bn_mean_list'])} layers")
        if settings.seal:
            reporter.say(f"truth sealed in {paths['truth']}")
        if batch is not None:
            reporter.say(f"which image is which, as private as the truth: {paths['images']}")
        reporter.say(f"checkpoint written: {paths['checkpoint']}")
        reporter.log_to(paths["log"])


def local_line(checkpoint: dict) -> str:
    """Say what the gradient of an update of several local steps is."""
    steps, lr, batch = (checkpoint[f"local_{key}"] for key in ("steps", "lr", "batch"))
    each = "the whole batch" if batch is None else f"{batch} images in turn"
    return (
        f"update of {steps} local steps of plain SGD with step size {lr:g}, each on {each}: the "
        "gradient is the mean one, (before - after) / (step size x steps)"
    )
