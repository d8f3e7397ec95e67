"""What training.py prints: the batch, the protection, the ranks."""

import math

import torch
from torch import nn

from models.choices import DP_MODES
from models.gradient import trainable_parameters
from models.target import Protection, guarantee_lines
from train.batches import Batch
from train.client import bare_network, without_batchnorm
from train.datasets import dataset_length, dataset_spec
from train.label_vectors import shown_labels
from train.origins import listing, summary
from train.privacy import Protected
from train.settings import BatchSettings, ClientSettings, ProtectionSettings
from utils.console import Reporter, table
from utils.device import device_name
from utils.errors import InputError


def say_batch(batch: Batch, model: nn.Module, device: torch.device, reporter: Reporter) -> None:
    """Report how many images, labels and parameters there are, the device, and which files."""
    kind = "distinct labels" if batch.y.dim() == 1 else "distinct label vectors"
    outputs = "" if batch.y.dim() == 1 else " outputs"
    parameters = sum(p.numel() for p in trainable_parameters(model).values())
    reporter.say(
        f"batch: {len(batch.x)} images {tuple(batch.x.shape[1:])}, "
        f"{len(batch.y.unique(dim=0))} {kind} of {batch.spec.num_classes}{outputs}; "
        f"{parameters:,} parameters; {device_name(device)}"
    )
    labels = shown_labels(batch.y)
    for line in (*summary(batch.origins, batch.notes), *listing(batch.origins, labels)):
        reporter.say(line)


def say_protection(
    settings: ClientSettings,
    protected: Protected,
    protection: Protection,
    model: nn.Module,
    reporter: Reporter,
) -> None:
    """Report norms before and after, the noise, and which privacy follows."""
    reporter.say(_norms(protected, protection))
    if protected.sample_norms is not None:
        clipped = int((protected.sample_norms > protection.clip).sum())
        reporter.say(f"  {clipped} of {len(protected.sample_norms)} samples clipped")
    for line in guarantee_lines(
        protection, model, train_mode=settings.train_mode, uploads_bn=settings.upload_bn
    ):
        reporter.say(f"  {line}")
    if protection.epsilon is not None:
        assert settings.protection is not None  # whose ε it is
        _say_doubts(settings.protection, settings.batch, reporter)


def _norms(protected: Protected, protection: Protection) -> str:
    """Return the title and the table of norms before and after."""
    if protection.mode not in DP_MODES:
        entries = sum(g.numel() for g in protected.gradient)
        sent = sum(int(g.count_nonzero()) for g in protected.gradient)
        rows = [["mean", protected.norm, protected.sent_norm]]
        return (
            f"defence: {protection.description}; {sent:,} of {entries:,} entries are not 0\n"
            f"{table(['gradient norm', 'before', 'sent'], rows)}"
        )
    rows = []
    if protected.sample_norms is not None:
        before = protected.sample_norms
        after = before.clamp(max=protection.clip)
        for name, of in (("lowest", torch.amin), ("median", torch.median), ("highest", torch.amax)):
            rows.append([f"one sample, {name}", *(of(v).item() for v in (before, after)), ""])
    rows.append(["mean", protected.norm, protected.clipped_norm, protected.sent_norm])
    header = ["gradient norm", "before", "clipped", "sent"]
    clipping = "no clipping" if protection.clip is None else f"clipping to {protection.clip:g}"
    return (
        f"protection ({protection.mode}): {clipping}, noise with standard deviation "
        f"{protection.sigma:g} per entry\n{table(header, rows)}"
    )


def _say_doubts(how: ProtectionSettings, batch: BatchSettings, reporter: Reporter) -> None:
    """Report what to bear in mind about an ε: the rate it is for, and the source of the noise."""
    rate, size = how.sample_rate, batch.size
    if rate != 1:
        length = _images_in(batch)
        if length is not None and not math.isclose(size / length, rate, rel_tol=0.01):
            reporter.say(
                f"  --sample-rate {rate:g}, but the batch is {size} of {length:,} images, "
                f"{size / length:.4g}: epsilon is that of the rate given"
            )
    known = how.noise_seed is not None
    reporter.say(
        "  the noise is drawn from an ordinary generator: sufficient for an audit, not for a "
        "release" + ("; whoever knows --noise-seed can redraw it" if known else "")
    )


def _images_in(batch: BatchSettings) -> int | None:
    """Count the images of the data set; None if unknown."""
    return None if batch.backup is not None else dataset_length(batch.data_name, batch.request)


def say_ranks(settings: ClientSettings, reporter: Reporter) -> None:
    """Report the rank analysis of the network, which needs no images.

    Raises InputError where the network cannot be analysed.
    """
    from models.rank_analysis import rank_analysis  # torch.fx, needed by --ra alone

    network, batch, mode = settings.network, settings.batch, settings.rank_mode
    assert mode is not None  # training.py has asked
    spec = dataset_spec(batch.data_name, batch.request)
    model = bare_network(network, spec.class_count, spec.shape)
    if network.replace_bn is not None:
        without_batchnorm(model, network)
    try:
        layers = rank_analysis(model, batch.size, spec.shape, mode)
    except ValueError as error:
        raise InputError(f"--ra: {network.arch} cannot be analysed: {error}") from error
    rows = [
        [r.name, r.kind, *map("{:,}".format, (r.inputs, r.outputs, r.weights, r.virtual, r.index))]
        for r in layers
    ]
    header = ["layer", "kind", "inputs", "outputs", "weights", "virtual constraints", "RA-i"]
    highest = max(layers, key=lambda layer: layer.index)
    verdict = (
        "more unknowns than equations there: not all of its input is determined"
        if highest.index > 0
        else "no layer has more unknowns than equations: counting does not rule recovery out"
    )
    reporter.say(
        f"rank analysis (R-GAP) of {network.arch}, {batch.size} images {spec.shape}, "
        f"{spec.class_count} classes; mode {mode}\n{table(header, rows)}\n"
        f"RA-i of the network: {highest.index:,} at {highest.name}; {verdict}"
    )
