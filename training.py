"""The client of a federated-learning step: batch → gradient (+ BN statistics) → checkpoint.

    python training.py --data-name photos --arch lenet --batch-size 8 --outlayer-state keep

The checkpoint is what run.py attacks. Run with --help for all flags, --dry-run to check them.
"""

import math
import os
import secrets
import sys
from dataclasses import asdict, replace

import torch

from models.batchnorm import batchnorm_layers, replace_batchnorm
from models.build import architectures, build_model, find_head, init_head
from models.checkpoint import make_checkpoint, seal
from models.gradient import couples_samples, trainable_parameters
from models.pretrained import load_pretrained
from models.rank_analysis import rank_analysis
from models.target import Protection, Update, guarantee_lines
from train.capture import capture
from train.datasets import (
    Request,
    dataset_length,
    dataset_spec,
    load_backup,
    load_backup_control,
    load_batch,
    load_control,
)
from train.flags import parser
from train.privacy import Protected, epsilon, protect_batch, protect_per_sample
from utils.console import Reporter, Silent, setting_lines, table
from utils.device import choose_device, device_name
from utils.errors import InputError, is_out_of_memory
from utils.files import claimed_stem, free_stem
from utils.images import denormalise
from utils.launch import group_from, launch
from utils.pictures import save_panels
from utils.script import git_revision, run_script, versions, writable_folder
from utils.shard import Shard, is_lost_peer
from utils.streams import stream
from utils.tensor_files import save

#: What is written, all with one stem.
ENDINGS = {
    "checkpoint": "-checkpoint.pth.tar",
    "truth": "-truth.pth.tar",
    "picture": "-target.png",
    "log": ".log",
}
#: Decoys per image, and the space that they may take without being asked for, in bytes.
DECOYS, DECOY_BYTES = 99, 2**29


def client_model(args, num_classes, image_shape, reporter):
    """The network the client trains: architecture, weights, head."""
    torch.manual_seed(args.seed)
    model = build_model(args.arch, num_classes, image_shape)
    head_name, head = find_head(model)
    if args.pretrained is None:
        reporter.say(f"model: {args.arch} with random weights (no --pretrained given)")
    else:
        loaded = load_pretrained(model, args.pretrained)
        reporter.say(f"model: {args.arch} with the weights of {args.pretrained}")
        for remark in loaded.remarks:
            reporter.say(f"  {remark}")
        if args.outlayer_state == "keep" and not loaded.has_head:
            raise InputError(
                f"--outlayer-state keep: {args.pretrained} has no head for {num_classes} classes; "
                "give normal or kaiming_uniform"
            )
        if args.outlayer_state != "keep" and loaded.has_head:
            reporter.say(
                f"  the file's head {head_name} is overwritten; --outlayer-state keep keeps it"
            )
    if args.replace_bn is not None:
        count = put_in_place_of_batchnorm(model, args)
        lost = " and the running statistics of the weights dropped" if args.pretrained else ""
        reporter.say(f"  {count} BatchNorm layers replaced by {args.replace_bn}{lost}")
    init_head(model, args.outlayer_state)
    reporter.say(f"  head {head_name} {tuple(head.weight.shape)}: {args.outlayer_state}")
    return model


def put_in_place_of_batchnorm(model, args) -> int:
    """Replace every BatchNorm layer as --replace-bn says; their number."""
    count = replace_batchnorm(model, args.replace_bn)
    if not count:
        raise InputError(f"--replace-bn: {args.arch} has no BatchNorm layer; leave it out")
    return count


def load_target(args):
    """The private batch: x (B, C, H, W) normalised, y (B,), and its data set's spec."""
    if args.data_backup is not None:
        return load_backup(args.data_backup, args.data_name, args.batch_size, args.target_idx)
    return load_batch(args.data_name, request_from(args), args.batch_size, args.target_idx)


def load_other_images(args, y, image_shape, reporter):
    """Other images under the labels `y` of the batch: (B, C, H, W), normalised, and decoys.

    Decoys are (B, n, C, H, W) of uint8, or None where a class has too few images.
    """
    count = args.decoys
    fitting = max(1, DECOY_BYTES // (len(y) * math.prod(image_shape)))
    if count is None:
        count = min(DECOYS, fitting)
    if args.data_backup is not None:
        x, decoys = load_backup_control(args.data_backup, args.data_name, args.target_idx, y, count)
    else:
        x, decoys = load_control(args.data_name, request_from(args), args.target_idx, y, count)
    if decoys is None:
        reporter.say(
            "note: a class has too few images outside the batch for decoys; without them run.py "
            "cannot test whether the gradient shows in the images"
        )
    else:
        size = decoys.numel() / 2**20
        fewer = ""
        if decoys.shape[1] < count:
            fewer = "; the classes hold no more images"
        elif args.decoys is None and count < DECOYS:
            fewer = f" (as many as fit into {DECOY_BYTES // 2**20} MiB; --decoys asks for more)"
        reporter.say(f"decoys: {decoys.shape[1]} per image, {size:.1f} MiB, for scoring{fewer}")
    return x, decoys


def request_from(args) -> Request:
    """What the flags ask of the data set."""
    return Request(
        root=args.data,
        size=args.image_size,
        channels=args.channels,
        distinct_labels=args.distinct_labels,
        seed=args.seed,
        workers=args.workers,
    )


def checkpoint_stem(args) -> str:
    """Where the files would go if none were there; the name says what they hold."""
    weights = "random" if args.pretrained is None else os.path.basename(args.pretrained)
    name = (
        f"id{args.id}_{args.arch}_{weights}_{args.data_name}_b{args.batch_size}_i{args.target_idx}"
    )
    return os.path.join(args.results, name)


def check(args) -> None:
    """Refuse what can be refused without opening any data."""
    if args.arch not in architectures():
        build_model(args.arch, 1, (3, 1, 1))  # raises with the list of choices
    if args.pretrained is not None and not os.path.isfile(args.pretrained):
        raise InputError(
            f"--pretrained {args.pretrained}: no such file; leave it out for random weights"
        )
    for flag in ("image_size", "channels", "distinct_labels"):
        if args.data_backup is not None and getattr(args, flag) is not None:
            raise InputError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)}: a --data-backup is taken as "
                "it is; leave it out"
            )
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
    if args.decoys is not None and not args.with_control:
        raise InputError(f"--decoys {args.decoys}: belongs to --with-control; give it as well")
    if args.ra_mode != "all" and not args.ra:
        raise InputError(f"--ra-mode {args.ra_mode}: belongs to --ra; give it as well")
    if args.ra and args.data_backup is not None:
        raise InputError("--data-backup: --ra needs no images; leave it out")
    writable_folder(args.results, "--results")


def main(argv: list[str]) -> int:
    """Capture one batch as the flags say, in one process or several; return the exit code."""
    args = parser().parse_args(argv)
    check(args)
    if args.ra:
        return report_ranks(args, Reporter())
    return launch(work, argv, group_from(args))


def report_ranks(args, reporter: Reporter) -> int:
    """Print the rank analysis of the network, which needs no images; return the exit code."""
    spec = dataset_spec(args.data_name, request_from(args))
    model = build_model(args.arch, spec.num_classes, spec.shape)
    if args.replace_bn is not None:
        put_in_place_of_batchnorm(model, args)
    try:
        layers = rank_analysis(model, args.batch_size, spec.shape, args.ra_mode)
    except ValueError as error:
        raise InputError(f"--ra: {args.arch} cannot be analysed: {error}") from error
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
        f"rank analysis (R-GAP) of {args.arch}, {args.batch_size} images {spec.shape}, "
        f"{spec.num_classes} classes; mode {args.ra_mode}\n{table(header, rows)}\n"
        f"RA-i of the network: {highest.index:,} at {highest.name}; {verdict}"
    )
    return 0


def work(argv: list[str], shard: Shard, local_rank: int) -> int:
    """What each process does; the first one reports and writes."""
    args = parser().parse_args(argv)
    reporter = Reporter() if shard.is_main else Silent()
    device = choose_device(args.gpu, local_rank)
    check(args)

    x, y, spec = load_target(args)
    if spec.num_classes == 1:
        raise InputError(
            f"--data {args.data}: one class only: the cross-entropy of one class is 0 whatever the "
            "images; give a folder of two classes or more"
        )
    x_other, decoys = None, None
    if args.with_control:
        x_other, decoys = load_other_images(args, y, spec.shape, reporter)
    model = client_model(args, spec.num_classes, spec.shape, reporter)
    layers = len(batchnorm_layers(model))
    if args.upload_bn and not layers:
        raise InputError(f"--upload-bn: {args.arch} has no BatchNorm layer; leave it out")
    if args.dp_mode == "per-sample" and couples_samples(model, not args.model_eval):
        also = "" if couples_samples(model, False) else ", or --model-eval"
        raise InputError(
            "--dp-mode per-sample: BatchNorm by batch statistics mixes the samples of the batch, "
            f"so none of {args.arch} has a gradient of its own to clip; give --replace-bn "
            f"groupnorm{also}"
        )
    parameters = sum(p.numel() for p in trainable_parameters(model).values())
    reporter.say(
        f"batch: {len(x)} images {tuple(x.shape[1:])}, {len(y.unique())} distinct labels of "
        f"{spec.num_classes}; {parameters:,} parameters; {device_name(device)}"
    )
    if shard.size > 1:
        reporter.say(f"{shard.size} processes share the batch")
    model.to(device)
    noise = noise_generator(args)
    protection = protection_from(args) if args.enable_dp else None
    try:
        sent, protected = update(args, model, x.to(device), y.to(device), noise, shard)
        other = None
        if x_other is not None:
            other, changed = update(args, model, x_other.to(device), y.to(device), noise, shard)
            if changed is not None:
                other = replace(other, gradient=changed.gradient)
    except (RuntimeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error) or is_lost_peer(error):
            raise
        raise InputError(refusal(args, spec.shape, error)) from error
    for gradient, images in ((sent.gradient, "this batch"), (other and other.gradient, "control")):
        if not all(torch.isfinite(g).all() for g in gradient or ()):
            raise InputError(
                f"--arch {args.arch}: the gradient of {images} is not finite; check the weights "
                "and the images"
            )
        if gradient is not None and not any(g.any() for g in gradient):
            raise InputError(
                f"--arch {args.arch}: the gradient of {images} is zero: the network is already "
                "certain of every label; give other weights"
            )
    reporter.say("settings\n" + setting_lines(vars(args)))  # a refusal would be lost below them
    if not shard.is_main:
        return 0
    gradient, norms = sent.gradient, None
    if protected is not None:
        gradient = protected.gradient
        norms = {
            "mean": protected.norm,
            "clipped": protected.clipped_norm,
            "sent": protected.sent_norm,
            "samples": protected.sample_norms,
        }
        say_protection(args, protected, protection, model, reporter)
    if x_other is not None:
        reporter.say("control: the same of other images with the same labels, for scoring alone")
    stem = checkpoint_stem(args)
    if args.dry_run:
        stem = free_stem(stem, ENDINGS.values())
        reporter.say(f"dry run: would write {stem}{ENDINGS['checkpoint']}")
        return 0
    checkpoint = make_checkpoint(
        model,
        gradient,
        arch=args.arch,
        batch_size=args.batch_size,
        image_shape=spec.shape,
        num_classes=spec.num_classes,
        mean=spec.mean,
        std=spec.std,
        train_mode=not args.model_eval,
        bn_mean=sent.bn_mean,
        bn_var=sent.bn_var,
        label_smoothing=args.label_smoothing,
        protection=None if protection is None else asdict(protection),
        protection_norms=norms,
        replace_bn=args.replace_bn,
        control=None if other is None else vars(other),
        truth=(x, y),
        decoys=decoys,
        settings={**vars(args), "versions": versions(), "git": git_revision()},
    )
    with claimed_stem(stem, tuple(ENDINGS.values())) as stem:
        write(args, stem, checkpoint, denormalise(x, *spec.normalisation), reporter)
    return 0


def noise_generator(args) -> torch.Generator:
    """The source of the noise, on the CPU; another stream than that of the weights, and than any
    that an attacker with the same seed draws from.

    For an ε the noise must be unknown and another every time, so that it is drawn from chance
    unless --noise-seed asks for a run that can be repeated. The control goes on with the stream.
    """
    seed = args.noise_seed
    if seed is None:
        seed = secrets.randbits(31) if args.dp_mode == "per-sample" else args.seed
    return stream("noise of the protection", seed)


def update(args, model, x, y, noise, shard: Shard) -> tuple[Update, Protected | None]:
    """What the client computes for a batch, and its gradient as protected under --enable-dp."""
    options = {"train_mode": not args.model_eval, "label_smoothing": args.label_smoothing}
    sent = capture(model, x, y, capture_bn=args.upload_bn, shard=shard, **options)
    if not args.enable_dp:
        return sent, None
    how = (sent.gradient, args.sigma or 0.0, args.max_per_sample_grad_norm, noise)
    if args.dp_mode == "batch":
        return sent, protect_batch(*how)
    return sent, protect_per_sample(*how, model=model, x=x, y=y, shard=shard, **options)


def protection_from(args) -> Protection:
    """The record of what the flags do to the gradient, with the ε that follows."""
    sigma, clip = args.sigma or 0.0, args.max_per_sample_grad_norm
    if args.dp_mode == "batch":
        return Protection("batch", sigma, clip)
    multiplier = sigma * args.batch_size / clip
    bound = epsilon(multiplier, args.sample_rate, args.dp_steps, args.delta)
    bound = None if math.isinf(bound) else bound
    return Protection(
        "per-sample", sigma, clip, multiplier, bound, args.delta, args.dp_steps, args.sample_rate
    )


def batch_share(args) -> tuple[int, float] | None:
    """Size N of the data set and B / N, the rate at which its images are drawn; None if unknown."""
    if args.data_backup is not None:
        return None
    length = dataset_length(args.data_name, request_from(args))
    return None if length is None else (length, args.batch_size / length)


def say_protection(args, protected: Protected, protection: Protection, model, reporter) -> None:
    """Report norms before and after, noise, and what privacy that gives."""
    rows = []
    if protected.sample_norms is not None:
        before = protected.sample_norms
        after = before.clamp(max=protection.clip)
        for name, of in (("lowest", torch.amin), ("median", torch.median), ("highest", torch.amax)):
            rows.append([f"one sample, {name}", *(of(v).item() for v in (before, after)), ""])
    rows.append(["mean", protected.norm, protected.clipped_norm, protected.sent_norm])
    header = ["gradient norm", "before", "clipped", "sent"]
    clipping = "no clipping" if protection.clip is None else f"clipping to {protection.clip:g}"
    reporter.say(
        f"protection ({protection.mode}): {clipping}, noise of {protection.sigma:g} a number\n"
        f"{table(header, rows)}"
    )
    if protected.sample_norms is not None:
        clipped = int((protected.sample_norms > protection.clip).sum())
        reporter.say(f"  {clipped} of {len(protected.sample_norms)} samples clipped")
    uploads, train_mode = args.upload_bn, not args.model_eval
    for line in guarantee_lines(protection, model, train_mode=train_mode, uploads_bn=uploads):
        reporter.say(f"  {line}")
    if protection.epsilon is not None and args.sample_rate != 1:
        length, share = batch_share(args) or (None, args.sample_rate)
        if not math.isclose(share, args.sample_rate, rel_tol=0.01):
            reporter.say(
                f"  --sample-rate {args.sample_rate:g}, but the batch is {args.batch_size} of "
                f"{length:,} images, {share:.4g}: epsilon is that of the rate given"
            )
    if protection.epsilon is not None:
        reporter.say(
            "  for an audit: the noise comes of a plain generator"
            + ("" if args.noise_seed is None else ", and whoever knows --noise-seed can redraw it")
        )


def refusal(args, image_shape, error: Exception) -> str:
    """What to say when the network cannot process the batch."""
    text = " ".join(str(error).split())
    if args.batch_size == 1 and "more than 1 value per channel" in text:
        return (
            "--batch-size 1: BatchNorm has no batch statistics of one value; give --model-eval, "
            "a larger batch or a larger --image-size"
        )
    return f"--arch {args.arch}: cannot process images {image_shape}: {text[:160]}"


def write(args, stem, checkpoint, images, reporter) -> None:
    """Write checkpoint, truth file when sealed, picture of the batch, log."""
    paths = {kind: stem + ending for kind, ending in ENDINGS.items()}
    if args.seal:
        checkpoint, truth = seal(checkpoint)
        save(truth, paths["truth"])
    save(checkpoint, paths["checkpoint"])
    save_panels([("target", images)], paths["picture"])
    norm = sum(float(g.double().square().sum()) for g in checkpoint["target_gradient"]) ** 0.5
    reporter.say(f"gradient: {len(checkpoint['target_gradient'])} tensors, norm {norm:.6g}")
    if checkpoint["bn_mean_list"] is not None:
        reporter.say(f"BatchNorm statistics of {len(checkpoint['bn_mean_list'])} layers")
    if args.seal:
        reporter.say(f"truth sealed in {paths['truth']}")
    reporter.say(f"checkpoint written: {paths['checkpoint']}")
    reporter.log_to(paths["log"])


if __name__ == "__main__":
    sys.exit(run_script(main))
