"""What the client does, in types, and the refusals of flags that contradict one another.

No torch here: a wrong command line is refused before its import.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from models.choices import DP_MODES, PROTECTION_MODES
from train.defence_settings import check_company, parsed, with_defence
from train.flags import DEFAULT_ARCH
from train.request import Request, check_batch_size, check_name, check_openable, check_request
from train.update_settings import (
    ImportSettings,
    LocalSettings,
    import_settings,
    local_settings,
)
from utils.errors import InputError
from utils.script import writable_folder


@dataclass(frozen=True)
class NetworkSettings:
    """Which network the client trains, and from which weights."""

    #: A name that models/build.py knows.
    arch: str
    #: File of weights; None for random ones.
    pretrained: str | None
    #: How the classifier head starts, a name in HEAD_INITS.
    head_init: str
    #: What replaces every BatchNorm layer, a name in BATCHNORM_REPLACEMENTS, or None.
    replace_bn: str | None
    #: Seed of random weights and of the head.
    seed: int
    #: FILE.py:function that builds the network; `arch` is then only a name to show. None without.
    model: str | None = None

    @property
    def flag(self) -> str:
        """Return the flag that names the network, with its value, for messages."""
        return f"--arch {self.arch}" if self.model is None else f"--model {self.model}"


@dataclass(frozen=True)
class BatchSettings:
    """Which images the client trains on, and which others are stored for scoring."""

    #: Name of the data set.
    data_name: str
    #: What is asked of it.
    request: Request
    #: Folder of a backup that is used instead of the data set's files, or None.
    backup: str | None
    #: Images in the batch, B.
    size: int
    #: Number of the batch.
    index: int
    #: Whether a control and decoys are stored.
    with_control: bool
    #: Decoys per image; None for as many as fit.
    decoys: int | None


@dataclass(frozen=True)
class ProtectionSettings:
    """How the client protects its gradient before it sends it."""

    #: What is done to the gradient, a name in PROTECTION_MODES.
    mode: str
    #: Standard deviation of the noise per entry of the mean gradient, ≥ 0.
    sigma: float
    #: Largest norm that clipping leaves, > 0; None without clipping.
    clip: float | None
    #: Seed of the noise as the flag gives it, or None.
    noise_seed: int | None
    #: δ of (ε, δ), in (0, 1).
    delta: float
    #: Number of gradients that ε is for.
    steps: int
    #: Probability in (0, 1] that a sample is in a batch.
    sample_rate: float
    #: What stands behind the name of `--defence`, where that is neither dp-sgd nor batch.
    amounts: tuple[float, ...] = ()


@dataclass(frozen=True)
class ClientSettings:
    """One run of the client."""

    network: NetworkSettings
    batch: BatchSettings
    #: None where the gradient is sent as it is.
    protection: ProtectionSettings | None
    #: Whether BatchNorm normalises by the batch's statistics.
    train_mode: bool
    #: Share of every label that the loss moves to all classes, in [0, 1).
    label_smoothing: float
    #: Whether the batch's BatchNorm statistics are sent too.
    upload_bn: bool
    #: Mode of the rank analysis, which is then all that runs; None without.
    rank_mode: str | None
    #: Number of the GPU; None for the first, or the CPU.
    gpu: int | None
    #: Path that the files written begin with, where no file of another run has it.
    stem: str
    #: Whether the truth goes into a file of its own.
    seal: bool
    #: Whether to check everything and write nothing.
    dry_run: bool
    #: All flags as given, by name: the record in the checkpoint and in the log.
    record: Mapping
    #: The loss, a name in LOSS_KINDS (models/choices.py).
    loss: str = "cross-entropy"
    #: How the client steps; None where it sends the gradient of the whole batch.
    local: LocalSettings | None = None
    #: The update of a real client, which is then all that is read; None without.
    imported: ImportSettings | None = None


def settings_from(args) -> ClientSettings:
    """Turn the parsed flags of training.py into settings.

    Raises InputError for everything that can be refused without opening data or building the
    network.
    """
    if args.defence is not None:
        args = with_defence(args, args.defence)
    request = Request(
        root=args.data,
        size=args.image_size,
        channels=args.channels,
        bit_depth=args.bit_depth,
        distinct_labels=args.distinct_labels,
        seed=args.seed,
        workers=args.workers,
        loss=args.loss,
        labels_csv=args.labels_csv,
        mean=args.mean,
        std=args.std,
        num_classes=args.num_classes,
    )
    _check_company(args)
    _check_network(args)
    _check_loss(args)
    _check_protection(args)
    imported, local = import_settings(args), local_settings(args)
    writable_folder(args.results, "--results")
    _check_request(args, request)
    return ClientSettings(
        network=NetworkSettings(
            _network_name(args),
            args.pretrained,
            args.outlayer_state,
            args.replace_bn,
            args.seed,
            args.model,
        ),  # fmt: skip
        batch=BatchSettings(
            data_name=args.data_name,
            request=request,
            backup=args.data_backup,
            size=args.batch_size,
            index=args.target_idx,
            with_control=args.with_control,
            decoys=args.decoys,
        ),
        protection=_protection_from(args),
        train_mode=not args.model_eval,
        label_smoothing=args.label_smoothing,
        upload_bn=args.upload_bn,
        rank_mode=args.ra_mode if args.ra else None,
        gpu=args.gpu,
        stem=_stem(args),
        seal=args.seal,
        dry_run=args.dry_run,
        record=vars(args),
        loss=args.loss,
        local=local,
        imported=imported,
    )


def _network_name(args) -> str:
    """Name the network: --arch, or the function of --model after the base name of its file."""
    return args.arch if args.model is None else os.path.basename(args.model)


def _check_network(args) -> None:
    """Refuse two networks at once."""
    if args.model is not None and args.arch != DEFAULT_ARCH:
        raise InputError(f"--arch {args.arch}: --model {args.model} is the network; give one")


def _check_loss(args) -> None:
    """Refuse what concerns another loss, and half a normalisation."""
    if args.loss != "cross-entropy" and args.label_smoothing:
        raise InputError(
            f"--label-smoothing {args.label_smoothing:g}: moves a share of a class label to all "
            f"classes, and --loss {args.loss} has none; leave it out"
        )
    if (args.mean is None) != (args.std is None):
        given, missing = ("--mean", "--std") if args.std is None else ("--std", "--mean")
        raise InputError(f"{given}: a normalisation has both; give {missing} as well")
    if args.mean is not None and len(args.mean) != len(args.std):
        raise InputError(
            f"--std: {len(args.std)} numbers, --mean has {len(args.mean)}; give one per channel"
        )


def _check_company(args) -> None:
    """Refuse a missing file of weights, and flags that need others or exclude them."""
    if args.pretrained is not None and not os.path.isfile(args.pretrained):
        raise InputError(
            f"--pretrained {args.pretrained}: no such file; leave it out for random weights"
        )
    for flag in ("image_size", "channels", "bit_depth", "distinct_labels", "labels_csv"):
        if args.data_backup is not None and getattr(args, flag) is not None:
            raise InputError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)}: a --data-backup is taken as "
                "it is; leave it out"
            )
    if args.decoys is not None and not args.with_control:
        raise InputError(f"--decoys {args.decoys}: belongs to --with-control; give it as well")
    if args.ra and args.data_backup is not None:
        raise InputError("--data-backup: --ra needs no images; leave it out")
    if args.ra_mode != "all" and not args.ra:
        raise InputError(f"--ra-mode {args.ra_mode}: belongs to --ra; give it as well")


def _check_request(args, request: Request) -> None:
    """Refuse what the data set cannot give, as far as that shows without its files."""
    unknown_images = args.import_update is not None and not (
        args.data or args.data_name == "photos"
    )
    if args.data_backup is not None or unknown_images:
        check_name(args.data_name)
    elif args.ra and args.data_name != "folder":
        check_request(args.data_name, request)  # its shape and classes are known without files
    else:
        check_openable(args.data_name, request)
    if not args.ra:
        check_batch_size(request, args.batch_size)


def _check_protection(args) -> None:
    """Refuse flags of protection that do nothing or cannot be followed together."""
    if args.defence is not None:
        check_company(args, parsed(args.defence))
        return
    for flag, value in (
        ("--sigma", args.sigma),
        ("-C", args.max_per_sample_grad_norm),
        ("--noise-seed", args.noise_seed),
    ):
        if value is not None and not args.enable_dp:
            raise InputError(f"{flag} {value:g}: belongs to --enable-dp; give it as well")
    if args.enable_dp and args.sigma is None and args.max_per_sample_grad_norm is None:
        raise InputError("--enable-dp: does nothing by itself; give --sigma, -C or both")
    if args.dp_mode == "per-sample":
        if not args.enable_dp:
            raise InputError("--dp-mode per-sample: belongs to --enable-dp; give it as well")
        if args.max_per_sample_grad_norm is None:
            raise InputError("--dp-mode per-sample: clips every sample's gradient; give -C")
    elif args.dp_steps != 1 or args.sample_rate != 1:
        flag = "--dp-steps" if args.dp_steps != 1 else "--sample-rate"
        raise InputError(f"{flag}: is for epsilon, and there is none without --dp-mode per-sample")


def _protection_from(args) -> ProtectionSettings | None:
    if args.defence is not None:
        return _defence_from(args)
    if not args.enable_dp:
        return None
    return ProtectionSettings(
        mode=args.dp_mode,
        sigma=args.sigma or 0.0,
        clip=args.max_per_sample_grad_norm,
        noise_seed=args.noise_seed,
        delta=args.delta,
        steps=args.dp_steps,
        sample_rate=args.sample_rate,
    )


def _defence_from(args) -> ProtectionSettings | None:
    """Return the protection that `--defence` asks for; None where it is another flag, or none."""
    defence = parsed(args.defence)
    mode = {"dp-sgd": "per-sample"}.get(defence.name, defence.name)
    if mode not in PROTECTION_MODES:
        return None
    sigma, clip, amounts = 0.0, None, defence.amounts
    if mode in DP_MODES:
        clip, noise = amounts
        sigma = noise * clip / args.batch_size if mode == "per-sample" else noise
        amounts = ()
    return ProtectionSettings(
        mode, sigma, clip, args.noise_seed, args.delta, args.dp_steps, args.sample_rate, amounts
    )


def _stem(args) -> str:
    """Name the files by what they hold; a number is added where such files are there."""
    weights = "random" if args.pretrained is None else os.path.basename(args.pretrained)
    network = _network_name(args).replace(".py:", "-")
    name = f"id{args.id}_{network}_{weights}_{args.data_name}_b{args.batch_size}_i{args.target_idx}"
    return os.path.join(args.results, name)
