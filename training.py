"""The client of a federated-learning step: batch → gradient (+ BN statistics) → checkpoint.

    python training.py --data-name photos --arch lenet --batch-size 8 --outlayer-state keep

The checkpoint is what run.py attacks. Run with --help for all flags, --dry-run to check them.
"""

import os
import sys

import torch

from models.batchnorm import batchnorm_layers
from models.build import HEAD_INITS, architectures, build_model, find_head, init_head
from models.gradient import trainable_parameters
from models.pretrained import load_pretrained
from train.capture import capture
from train.datasets import DATASETS, Request, load_backup, load_batch
from train.privacy import protect_batch
from utils.checkpoint import free_stem, make_checkpoint, save, seal
from utils.cli import (
    InputError,
    Parser,
    choose_device,
    file_name,
    integer_from,
    is_out_of_memory,
    number,
    run_script,
    writable_folder,
)
from utils.distributed import Shard, add_flags, group_from, is_lost_peer, launch
from utils.images import denormalise, save_panels
from utils.report import Reporter, Silent, device_name, git_revision, setting_lines, versions

#: What is written, all with one stem.
ENDINGS = {
    "checkpoint": "-checkpoint.pth.tar",
    "truth": "-truth.pth.tar",
    "picture": "-target.png",
    "log": ".log",
}


def parser() -> Parser:
    """All flags of the client."""
    parser = Parser(prog="training.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument_group("run").add_argument
    add("--id", type=file_name, default="test", help="name of the run, part of the file names")
    add("--seed", type=integer_from(0), default=0, help="seed of all randomness")
    add("--results", default="./train/checkpoint", help="output folder")
    add("--gpu", type=int, help="number of the GPU; default: the first, else the CPU")
    add("--dry-run", action="store_true", help="check everything, print the plan, write nothing")

    add = parser.add_argument_group("data").add_argument
    add("--data-name", default="imagenet", help=f"one of {', '.join(DATASETS)}")
    add("--data", help="folder of the data set")
    add("--data-backup", help="folder with x_true.pth.bk and y_true.pth.bk, used instead")
    add("--target-idx", type=integer_from(0), default=0, help="number of the batch")
    add("-b", "--batch-size", type=integer_from(1), default=256, help="images in the batch")
    add("--image-size", type=integer_from(1), help="side in pixels; default: the data set's")
    add("--channels", type=int, choices=(1, 3), help="for folder; default: as the files are")
    add("--distinct-labels", type=int, help="for photos: number of distinct labels")
    add("-j", "--workers", type=integer_from(0), default=4, help="threads that decode images")

    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", default="resnet50", help="lenet, convnet or a torchvision classifier")
    add("--pretrained", help="weights: .pth, .tar or MoCo v2; default: random")
    add("--outlayer-state", choices=HEAD_INITS, default="normal", help="classifier head")
    add("--model-eval", action="store_true", help="BatchNorm in eval mode")

    add = parser.add_argument_group("what is sent").add_argument
    add("--upload-bn", action="store_true", help="store the batch's BatchNorm statistics")
    add("--seal", action="store_true", help="write the truth to a file of its own")
    add("--label-smoothing", type=number(0, below=1), default=0.0,
        help="share of every label that the loss moves to all classes")  # fmt: skip

    add = parser.add_argument_group("protection").add_argument
    add("--enable-dp", action="store_true", help="clip the gradient and add noise, as the original")
    add("--sigma", type=number(low=0), help="standard deviation of the noise")
    add("-C", "--max-per-sample-grad-norm", type=number(above=0), help="clip to this norm")
    add_flags(parser)
    return parser


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
    init_head(model, args.outlayer_state)
    reporter.say(f"  head {head_name} {tuple(head.weight.shape)}: {args.outlayer_state}")
    return model


def load_target(args):
    """The private batch: x (B, C, H, W) normalised, y (B,), and its data set's spec."""
    if args.data_backup is not None:
        return load_backup(args.data_backup, args.data_name, args.batch_size, args.target_idx)
    request = Request(
        root=args.data,
        size=args.image_size,
        channels=args.channels,
        distinct_labels=args.distinct_labels,
        seed=args.seed,
        workers=args.workers,
    )
    return load_batch(args.data_name, request, args.batch_size, args.target_idx)


def checkpoint_stem(args) -> str:
    """Where the files go; the name says what they hold, a number avoids overwriting."""
    weights = "random" if args.pretrained is None else os.path.basename(args.pretrained)
    name = (
        f"id{args.id}_{args.arch}_{weights}_{args.data_name}_b{args.batch_size}_i{args.target_idx}"
    )
    return free_stem(os.path.join(args.results, name), ENDINGS.values())


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
    for flag, value in (("--sigma", args.sigma), ("-C", args.max_per_sample_grad_norm)):
        if value is not None and not args.enable_dp:
            raise InputError(f"{flag} {value:g}: belongs to --enable-dp; give it as well")
    if args.enable_dp and args.sigma is None and args.max_per_sample_grad_norm is None:
        raise InputError("--enable-dp: does nothing by itself; give --sigma, -C or both")
    writable_folder(args.results, "--results")


def main(argv: list[str]) -> int:
    """Capture one batch as the flags say, in one process or several; return the exit code."""
    args = parser().parse_args(argv)
    check(args)
    return launch(work, argv, group_from(args))


def work(argv: list[str], shard: Shard, local_rank: int) -> int:
    """What each process does; the first one reports and writes."""
    args = parser().parse_args(argv)
    reporter = Reporter() if shard.is_main else Silent()
    device = choose_device(args.gpu, local_rank)
    check(args)
    reporter.say("settings\n" + setting_lines(vars(args)))

    x, y, spec = load_target(args)
    model = client_model(args, spec.num_classes, spec.shape, reporter)
    layers = len(batchnorm_layers(model))
    if args.upload_bn and not layers:
        raise InputError(f"--upload-bn: {args.arch} has no BatchNorm layer; leave it out")
    parameters = sum(p.numel() for p in trainable_parameters(model).values())
    reporter.say(
        f"batch: {len(x)} images {tuple(x.shape[1:])}, {len(y.unique())} distinct labels of "
        f"{spec.num_classes}; {parameters:,} parameters; {device_name(device)}"
    )
    if shard.size > 1:
        reporter.say(f"{shard.size} processes share the batch")
    model.to(device)
    try:
        sent = capture(
            model,
            x.to(device),
            y.to(device),
            train_mode=not args.model_eval,
            label_smoothing=args.label_smoothing,
            capture_bn=args.upload_bn,
            shard=shard,
        )
    except (RuntimeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error) or is_lost_peer(error):
            raise
        raise InputError(refusal(args, spec.shape, error)) from error
    if not all(torch.isfinite(g).all() for g in sent.gradient):
        raise InputError(
            f"--arch {args.arch}: the gradient of this batch is not finite; check the weights "
            "and the images"
        )
    if not shard.is_main:
        return 0
    gradient, protection = sent.gradient, None
    if args.enable_dp:
        gradient, protection = protect(args, sent.gradient, reporter)
    stem = checkpoint_stem(args)
    if args.dry_run:
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
        protection=protection,
        truth=(x, y),
        settings={**vars(args), "versions": versions(), "git": git_revision()},
    )
    write(args, stem, checkpoint, denormalise(x, *spec.normalisation), reporter)
    return 0


def protect(args, gradient, reporter):
    """The gradient as it is sent under --enable-dp, and the record of what was done to it."""
    sigma, clip = args.sigma or 0.0, args.max_per_sample_grad_norm
    generator = torch.Generator().manual_seed(args.seed + 2**31)  # not that of the weights
    sent = protect_batch(gradient, sigma, clip, generator)
    reporter.say(
        f"protection of the batch's mean gradient: norm {sent.norm:.6g}, clipped "
        f"{sent.clipped_norm:.6g}, sent {sent.sent_norm:.6g} with noise of {sigma:g} a number"
    )
    reporter.say(
        "  this carries no differential-privacy guarantee: the batch is clipped, not each image"
    )
    if args.upload_bn:
        reporter.say("  the BatchNorm statistics beside it are sent without any protection")
    return sent.gradient, {"mode": "batch", "sigma": sigma, "clip": clip}


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
