"""training.py --import-update: from the files of a real client to a checkpoint."""

import math
from dataclasses import replace

import torch
from torch import nn

from models.checkpoint import Task, make_checkpoint
from models.target import GroundTruth
from models.user_network import load_user_network
from train import client, output, report
from train.batches import Batch, client_batch
from train.datasets import DatasetSpec, named_spec, requested_normalisation
from train.named_images import compared
from train.settings import ClientSettings
from train.update_files import UpdateFile, read_update_file
from train.update_settings import ImportSettings, LocalSettings
from train.updates import ImportedUpdate, gradient_from_update
from utils.console import Reporter
from utils.errors import InputError, naming
from utils.script import git_revision, versions
from utils.shard import ALONE


def import_update(settings: ClientSettings, files: ImportSettings, reporter: Reporter) -> None:
    """Make a checkpoint of a real client's update, and write it.

    Where the flags name the images that the client trained on, they are the truth for scoring, and
    a control is what such a client would have sent for other images: its steps are then simulated.

    Raises InputError for files, images and steps that do not fit one another.
    """
    batch = client_batch(settings.batch, reporter.say) if files.knows_images else None
    spec = _spec(settings, files) if batch is None else batch.spec
    model = client.bare_network(settings.network, spec.class_count, spec.shape)
    if settings.network.replace_bn is not None:
        client.without_batchnorm(model, settings.network)
    before, after = _read(files, settings.local, reporter)
    how = _steps(settings, after)
    with naming("--import-update"):
        found = gradient_from_update(
            model, before.values, after.values, how,
            batch_size=settings.batch.size, image_shape=spec.shape,
            train_mode=settings.train_mode, difference=_is_difference(files, after),
            bn_momentum=files.bn_momentum,
        )  # fmt: skip
    for line in _lines(settings, files, spec, found):
        reporter.say(line)
    if batch is not None:
        report.say_batch(batch, model, torch.device("cpu"), reporter)
        client.check_processes(settings, model, batch.x.to(_kind(model)), spec.class_count)
        reporter.say(compared(settings, model, batch, found))
    checkpoint = _checkpoint(settings, model, spec, batch, found)
    if settings.dry_run:
        reporter.say(f"dry run: would write {output.planned_file(settings)}")
        return
    output.write(settings, checkpoint, batch, reporter)


def _spec(settings: ClientSettings, files: ImportSettings) -> DatasetSpec:
    """Describe images that nobody knows: size, channels and classes by the flags."""
    spec = named_spec(settings.batch.data_name)
    channels, height, width = spec.shape
    request = settings.batch.request
    if request.sides is not None:
        height, width = request.sides
    wanted = files.channels or channels
    if wanted != channels:
        mean, std = sum(spec.mean) / channels, sum(spec.std) / channels
        spec = replace(spec, mean=(mean,) * wanted, std=(std,) * wanted)
    classes = files.num_classes or spec.num_classes
    if classes is None:
        raise InputError(
            f"--data-name {settings.batch.data_name}: its classes are not known without its files; "
            "give --num-classes"
        )
    spec = replace(spec, shape=(wanted, height, width), num_classes=classes)
    return requested_normalisation(spec, request)


def _read(
    files: ImportSettings, local: LocalSettings | None, reporter: Reporter
) -> tuple[UpdateFile, UpdateFile]:
    """Read BEFORE and AFTER, and report what they are."""
    found = []
    for path in (files.before, files.after):
        with naming(f"--import-update {path}"):
            found.append(read_update_file(path))
        reporter.say(f"{path}: {found[-1].kind}")
    before, after = found
    if before.difference:
        raise InputError(
            f"--import-update {files.before}: holds a difference; the weights that the client was "
            "sent come first"
        )
    return before, after


def _is_difference(files: ImportSettings, after: UpdateFile) -> bool:
    if files.difference and after.difference is False:
        raise InputError(f"--update-difference: {files.after} says that it holds weights")
    return files.difference or bool(after.difference)


def _steps(settings: ClientSettings, after: UpdateFile) -> LocalSettings:
    """Return how the client stepped; a number of steps that the file alone says must be given."""
    how, given = settings.local, settings.record
    assert how is not None  # train/update_settings.py reads it with every import
    if after.steps not in (None, how.steps) and given["local_steps"] is None:
        raise InputError(
            f"--import-update: AFTER counts {after.steps} steps of this round, which some clients "
            f"set to images or to one epoch, and the flags say {how.steps}; give --local-steps"
        )
    return how


def _lines(
    settings: ClientSettings, files: ImportSettings, spec: DatasetSpec, found: ImportedUpdate
) -> list[str]:
    """Say what was found in the update, and what was taken for granted."""
    trained = sum(math.prod(g.shape) for g in found.update.gradient)
    lines = [
        f"update: {trained:,} parameters of {settings.network.arch} in {len(found.trainable)} "
        f"tensors were trained; {settings.batch.size} images {spec.shape}",
        *found.remarks,
    ]
    if found.local is None:
        lines.append(
            f"one step: the gradient, with a relative rounding error of {found.resolution:.1e} "
            "from the weights' own"
        )
    if not files.knows_images:
        mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (spec.mean, spec.std))
        lines.append(
            f"the images are not known: the attack cannot be scored; normalisation taken: mean "
            f"{mean}, deviation {std}"
        )
    return lines


def _checkpoint(
    settings: ClientSettings,
    model: nn.Module,
    spec: DatasetSpec,
    batch: Batch | None,
    found: ImportedUpdate,
) -> dict:
    """Make the checkpoint, with the truth and a control where the images are known."""
    network, truth = settings.network, None
    if batch is not None:
        control = None
        if batch.other is not None:
            simulated = replace(settings, upload_bn=found.update.bn_mean is not None)
            control = client.update(
                simulated, model, batch.other.to(_kind(model)), batch.y, None, ALONE, "control"
            ).update
        truth = GroundTruth(batch.x, batch.y, control, batch.decoys)
    task = Task(
        network.arch, settings.batch.size, spec.shape, spec.class_count, spec.mean, spec.std,
        client.settings_loss(settings), network.replace_bn,
        None if network.model is None else load_user_network(network.model).sha256,
    )  # fmt: skip
    return make_checkpoint(
        model, found.update, task, truth=truth, local=found.local, resolution=found.resolution,
        settings={**settings.record, "versions": versions(), "git": git_revision()},
    )  # fmt: skip


def _kind(model: nn.Module) -> torch.dtype:
    """Return the type of the weights, which the images are given."""
    return next(model.parameters()).dtype
