"""What the flags of local steps and of imported updates mean, and their refusals. No torch here."""

import math
from dataclasses import dataclass

from utils.errors import InputError

#: `--local-optimiser`: what an imported update was made by; train/updates.py undoes it.
LOCAL_OPTIMISERS = ("sgd", "momentum", "nesterov", "adam")
#: Step size of a simulated client that is given none.
LOCAL_LR = 0.01


@dataclass(frozen=True)
class LocalSettings:
    """Says how a client steps, or stepped, from the weights that it was sent."""

    #: Number of steps T, ≥ 1.
    steps: int
    #: Step size, > 0.
    lr: float
    #: Images per step; None for the whole batch.
    batch: int | None = None
    #: Passes over the batch that the steps make up; None where only the steps were counted.
    epochs: int | None = None
    #: A name in LOCAL_OPTIMISERS.
    optimiser: str = "sgd"
    #: Momentum μ in [0, 1); None where it was not given.
    momentum: float | None = None
    #: Weight decay λ, ≥ 0, which the optimiser adds to the gradient.
    weight_decay: float = 0.0


@dataclass(frozen=True)
class ImportSettings:
    """Says which update of a real client is read, and what is known of its images."""

    #: File of the weights that the client was sent.
    before: str
    #: File of what it sent back.
    after: str
    #: Whether AFTER holds the difference, after minus before.
    difference: bool
    #: Momentum of BatchNorm's running statistics; 0 for their cumulative average.
    bn_momentum: float
    #: Whether the flags name the images that the client trained on.
    knows_images: bool
    #: Classes of the network; None for those of the data set.
    num_classes: int | None
    #: Channels of the images; None for those of the data set.
    channels: int | None


def local_settings(args) -> LocalSettings | None:
    """Read the flags of local steps; None for the ordinary gradient of the whole batch.

    Raises InputError for flags that contradict one another or do nothing.
    """
    _check_local(args)
    imports, size = args.import_update is not None, args.batch_size
    batch = None if args.local_batch in (None, size) else args.local_batch
    steps = args.local_steps or 1
    if args.local_epochs is not None:
        steps = args.local_epochs * math.ceil(size / (batch or size))
    if not imports and steps == 1 and batch is None:
        return None
    if batch is not None and steps * batch < size:
        raise InputError(
            f"--local-batch {batch}: {steps} step(s) see {steps * batch} of the {size} images; "
            "give a smaller --batch-size or more steps"
        )
    how = LocalSettings(
        steps, args.local_lr or LOCAL_LR, batch, args.local_epochs, args.local_optimiser,
        args.local_momentum, args.local_weight_decay,
    )  # fmt: skip
    check_optimiser(how)
    return how


def _check_local(args) -> None:
    """Refuse flags of local steps that contradict one another or belong to another."""
    several = args.local_steps is not None or args.local_epochs is not None
    imports = args.import_update is not None
    if args.local_steps is not None and args.local_epochs is not None:
        raise InputError(
            f"--local-epochs {args.local_epochs}: --local-steps says the number of steps; give one "
            "of them"
        )
    for flag, value in (("--local-lr", args.local_lr), ("--local-batch", args.local_batch)):
        if value is not None and not (several or imports):
            raise InputError(f"{flag} {value:g}: belongs to --local-steps; give it as well")
    if args.local_batch is not None and args.local_batch > args.batch_size:
        raise InputError(
            f"--local-batch {args.local_batch}: more than the {args.batch_size} images of the batch"
        )
    for flag, value, default in (
        ("--local-optimiser", args.local_optimiser, "sgd"),
        ("--local-momentum", args.local_momentum, None),
        ("--local-weight-decay", args.local_weight_decay, 0.0),
        ("--update-difference", args.update_difference, False),
        ("--bn-momentum", args.bn_momentum, 0.1),
        ("--num-classes", args.num_classes, None),
    ):
        if value != default and not imports:
            shown = flag if value is True else f"{flag} {value}"
            raise InputError(
                f"{shown}: belongs to --import-update; a simulated client takes plain SGD"
            )
    by_flag = "--defence dp-sgd" if _defence_of(args) == "dp-sgd" else None
    if args.enable_dp and args.dp_mode == "per-sample":
        by_flag = "--dp-mode per-sample"
    if several and not imports and by_flag is not None:
        raise InputError(
            f"{by_flag}: clips every sample's gradient at one state of the weights, and local "
            "steps have several; clip the batch instead"
        )
    if several and not imports and args.upload_bn:
        raise InputError(
            "--upload-bn: each local step has batch statistics of its own; leave one of both out"
        )


def _defence_of(args) -> str | None:
    """Return the name of the defence asked for; None without."""
    return None if args.defence is None else args.defence.partition(":")[0]


def check_optimiser(how: LocalSettings) -> None:
    """Refuse an optimiser whose steps cannot be undone."""
    if how.optimiser == "adam":
        raise InputError(
            "--local-optimiser adam: its first step is the sign of the gradient times the step "
            "size, and later ones mix gradients by their squares: no gradient follows; audit the "
            "gradient itself, or a client with SGD"
        )
    if how.optimiser == "nesterov" and how.momentum is None:
        raise InputError("--local-optimiser nesterov: the step is (1 + momentum) gradients; give "
                         "--local-momentum")  # fmt: skip
    if how.steps == 1:
        return
    if how.optimiser != "sgd":
        raise InputError(
            f"--local-optimiser {how.optimiser}: {how.steps} steps of momentum weigh early "
            "gradients more than late ones; only one step can be undone"
        )
    if how.weight_decay:
        raise InputError(
            f"--local-weight-decay {how.weight_decay:g}: over {how.steps} steps it acts on weights "
            "in between that were not sent; only one step can be undone"
        )


def import_settings(args) -> ImportSettings | None:
    """Read the flags of an imported update; None without one.

    Raises InputError for what is missing, and for flags that an import does not read.
    """
    if args.import_update is None:
        return None
    before, after = args.import_update
    knows = args.data_name == "photos" or bool(args.data or args.data_backup)
    if args.local_lr is None:
        raise InputError("--import-update: needs the client's step size; give --local-lr")
    for flag, given, why in (
        ("--pretrained", args.pretrained, "the weights are those of BEFORE"),
        ("--enable-dp", args.enable_dp, "an imported update is as the client sent it"),
        ("--defence", args.defence, "an imported update is as the client sent it"),
        ("--upload-bn", args.upload_bn, "statistics come from the buffers of BEFORE and AFTER"),
        ("--ra", args.ra, "needs no update"),
        ("--nproc", args.nproc, "one process reads the files"),
        ("--multiprocessing-distributed", args.multiprocessing_distributed, "one process does it"),
    ):
        if given:
            raise InputError(f"{flag}: {why}; leave it or --import-update out")
    if not knows:
        for flag, given in (("--with-control", args.with_control), ("--seal", args.seal)):
            if given:
                raise InputError(
                    f"{flag}: needs the client's images; name them by --data-name and --data, or "
                    "--data-backup"
                )
    return ImportSettings(
        before, after, args.update_difference, args.bn_momentum, knows,
        args.num_classes, args.channels,
    )  # fmt: skip
