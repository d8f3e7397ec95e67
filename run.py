"""The attacker: checkpoint → labels → reconstruction → tables and pictures.

    python run.py --checkpoint FILE --epochs 3000 --lr 0.05 --TV 1e-4 --grad-sign --metric

Reads what training.py wrote. Run with --help for all flags, --dry-run to check them.
"""

import math
import os
import sys
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Generator, Tensor, nn

from inversion.distances import GRADIENT_DISTANCES
from inversion.objective import Losses, Objective, Weights
from inversion.optimise import OPTIMISERS, Loop
from inversion.pixel_gradient import PIXEL_GRADIENTS
from inversion.priors import PRIORS
from inversion.restarts import STRATEGIES, Restarts, initial_images
from models.batchnorm import batchnorm_layers
from models.gradient import trainable_parameters
from models.target import (
    GroundTruth,
    Target,
    model_of,
    target_from_checkpoint,
    truth_from_checkpoint,
)
from utils import checkpoint as checkpoints
from utils import metrics
from utils.cli import (
    FaultError,
    InputError,
    Interrupts,
    Parser,
    choose_device,
    integer_from,
    number,
    run_script,
    writable_folder,
)
from utils.images import denormalise, save_curves, save_images, save_panels
from utils.report import (
    Progress,
    Reporter,
    claim_folder,
    device_name,
    duration,
    git_revision,
    peak_memory_mib,
    setting_lines,
    versions,
    write_csv,
    write_json,
)
from utils.scoring import score_reconstruction

LPIPS_HINT = (
    f"LPIPS n/a: needs the AlexNet weights {metrics.LPIPS_BACKBONE} of torchvision, by "
    "--lpips-weights FILE or in the torch hub cache"
)
RECORDED_STEPS = 2000


def parser() -> Parser:
    """All flags of the attacker."""
    parser = Parser(prog="run.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument_group("run").add_argument
    add("--id", default="test", help="results go to {root}/results/exp/{id}")
    add("--root", default="./", help="folder of the results")
    add("--seed", type=integer_from(0), default=0, help="seed of the first initial images")
    add("--gpu", type=int, help="number of the GPU; default: the first, else the CPU")
    add("-p", "--print-freq", type=integer_from(1), default=500, help="iterations a report")
    add("--dry-run", action="store_true", help="check everything, measure two steps, stop")

    add = parser.add_argument_group("target").add_argument
    add("--checkpoint", help="file that training.py wrote")
    add("--truth", help="sealed truth file, for --metric and known labels")
    add("--labels", help="labels by hand: 3,1,… or a file of them")
    add("--pseudo-label-init", choices=("known", "from_grads"), default="known",
        help="where labels come from")  # fmt: skip

    add = parser.add_argument_group("objective").add_argument
    add("--gradient-loss-fun", choices=GRADIENT_DISTANCES, default="sim",
        help="cosine distance or squared L2")  # fmt: skip
    add("--grads-weight", type=number(low=0), default=1.0, help="weight of the gradient distance")
    for prior in PRIORS.values():
        kind = number() if prior.signed else number(low=0)
        add(prior.flag, type=kind, default=0.0, help=prior.help)
    add("--TV-end", type=number(above=0), help="weight of total variation at the end")
    add("--exact-bn", action="store_true", help="BN prior to the captured batch statistics")
    add("--bn-grad", choices=("exact", "detached"), default="exact",
        help="second derivative of BatchNorm; detached: as the original")  # fmt: skip
    add("--pixel-gradient", choices=PIXEL_GRADIENTS, default="exact", help="how it is computed")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=integer_from(1), default=1, help="iterations")
    add("--lr", type=float, default=0.0, help="first step size; must be given")
    add("--optim", choices=OPTIMISERS, default="Adam", help="optimiser")
    add("--n-seed", type=integer_from(1), default=1, help="restarts")
    add("--grad-sign", action="store_true", help="step along the derivative's sign")
    add("--input-boxed", action="store_true", help="clamp to valid colours")
    add("--min-grads-loss", action="store_true", help="keep the best iterate, not the last")
    add("--input-noise", type=number(low=0), help="Langevin noise; default: none")

    add = parser.add_argument_group("scoring").add_argument
    add("--metric", action="store_true", help="score against the truth")
    add("--one-to-one-similarity", action="store_true", help="pair by index, not by assignment")
    add("--lpips-weights", help=f"backbone of LPIPS, {metrics.LPIPS_BACKBONE}")
    add("--GInfoR", action="store_true", help="gradient information ratio (not computed yet)")
    return parser


def prior_weight(args, name: str) -> float:
    """The weight that the prior's own flag was given."""
    return getattr(args, PRIORS[name].flag.lstrip("-").replace("-", "_"))


def term_names(args) -> list[str]:
    """The priors in use, in the order of their columns."""
    return [name for name in PRIORS if prior_weight(args, name) != 0]


def weights_from(args) -> Weights:
    """The objective's weights."""
    ends = {} if args.TV_end is None else {"tv": args.TV_end}
    return Weights(args.grads_weight, {name: prior_weight(args, name) for name in PRIORS}, ends)


def loop_from(args, target: Target) -> Loop:
    """The loop's settings."""
    return Loop(
        steps=args.epochs,
        lr=args.lr,
        optimiser=args.optim,
        signed=args.grad_sign,
        box=target.box if args.input_boxed else None,
        keep_best=args.min_grads_loss,
        noise=args.input_noise or 0.0,
    )


# What goes in ------------------------------------------------------------------------------


def check(args) -> None:
    """Refuse what can be refused without opening any file."""
    if args.checkpoint is None:
        raise InputError("--checkpoint: missing; give a file that training.py wrote")
    if not (math.isfinite(args.lr) and args.lr > 0):
        raise InputError(f"--lr {args.lr:g}: must be above 0; give a step size such as 0.1")
    if args.pseudo_label_init == "from_grads":
        raise InputError(
            "--pseudo-label-init from_grads: label reconstruction is not available yet; give "
            "known, or --labels"
        )
    if args.TV_end is not None and args.TV == 0:
        raise InputError(f"--TV-end {args.TV_end:g}: decays --TV, which is 0; give --TV as well")
    if args.optim == "LBFGS" and args.grad_sign:
        raise InputError("--grad-sign: L-BFGS needs the derivative itself; leave one of them out")
    if args.lpips_weights is not None and not args.metric:
        raise InputError(f"--lpips-weights {args.lpips_weights}: scores only with --metric")
    if os.sep in args.id or args.id in ("", ".", ".."):
        raise InputError(f"--id {args.id}: names one folder; leave {os.sep} out")
    writable_folder(os.path.join(args.root, "results", "exp", args.id), "--root")


def load_inputs(args) -> tuple[Target, GroundTruth | None]:
    """The attacker's view of the checkpoint, and the truth only where the flags call for it."""
    checkpoint = checkpoints.load(args.checkpoint)
    target = target_from_checkpoint(checkpoint)
    knows_labels = args.labels is not None
    if not args.metric and knows_labels:
        return target, None
    flag, source = "--checkpoint", checkpoint
    if args.truth is not None:
        flag, source = "--truth", checkpoints.load_truth(args.truth)
    truth = truth_from_checkpoint(source)
    if truth is None:
        needs = "--metric" if knows_labels else "--pseudo-label-init known"
        remedy = "" if knows_labels else ", or the labels by --labels"
        raise InputError(
            f"{needs}: {args.checkpoint} holds no truth; give the sealed file by --truth{remedy}"
        )
    if truth.x.shape != (target.batch_size, *target.image_shape):
        raise InputError(
            f"{flag} {getattr(args, flag[2:])}: truth of shape {tuple(truth.x.shape)} for a batch "
            f"of {(target.batch_size, *target.image_shape)}; give the truth of this checkpoint"
        )
    check_labels(truth.y, target, f"{flag} {getattr(args, flag[2:])}")
    return target, truth


def check_labels(y: Tensor, target: Target, source: str) -> None:
    """Refuse labels that are not B class indices."""
    if y.shape != (target.batch_size,):
        raise InputError(f"{source}: {y.numel()} labels for a batch of {target.batch_size}")
    if int(y.min()) < 0 or int(y.max()) >= target.num_classes:
        raise InputError(
            f"{source}: labels {int(y.min())} to {int(y.max())}, but the classes are 0 to "
            f"{target.num_classes - 1}"
        )


def labels_from(args, target: Target, truth: GroundTruth | None) -> tuple[Tensor, str]:
    """The labels that the attack goes on with, and where they come from."""
    if args.labels is None:
        return truth.y, "known"
    text = args.labels
    if os.path.isfile(text):
        with open(text, errors="replace") as file:
            text = file.read()
    try:
        y = torch.tensor([int(word) for word in text.replace(",", " ").split()])
    except ValueError as error:
        raise InputError(
            f"--labels {args.labels}: neither a file nor integers like 3,1,2"
        ) from error
    check_labels(y, target, f"--labels {args.labels}")
    return y, "given"


def bn_source_from(args, target: Target, model: nn.Module, reporter: Reporter) -> str | None:
    """Where the BN prior pulls to: "batch", "running", or None without the prior."""
    layers = batchnorm_layers(model)
    if args.bn_grad == "detached" and not (layers and target.train_mode):
        raise InputError(
            "--bn-grad detached: concerns BatchNorm in train mode, which this checkpoint's "
            "network does not use; leave it out"
        )
    if not args.BN:
        return None
    if not layers:
        raise InputError(f"--BN {args.BN:g}: {target.arch} has no BatchNorm layer; leave it out")
    if not args.exact_bn:
        return "running"
    if target.bn_mean is None:
        reporter.say(
            "warning: --exact-bn, but the checkpoint holds no batch statistics: running ones are "
            "used; capture with training.py --upload-bn to have them"
        )
        return "running"
    return "batch"


# The attack --------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Follows the iterations: progress, loss rows for losses.csv, and the wish to stop."""

    args: object
    progress: Progress
    interrupts: Interrupts
    rows: list = field(default_factory=list)

    def on_step(self, index: int, step: int, losses: Losses, rate: float) -> bool:
        """Take note of one iteration of seed number `index`; true asks to stop."""
        seed = self.args.seed + index
        self.progress.step(
            f"seed {seed}", {"total": losses.total, "gradient": losses.gradient, **losses.terms}
        )
        if step % max(1, self.args.epochs // RECORDED_STEPS) == 0 or step == self.args.epochs - 1:
            self.rows.append(
                [seed, step, rate, losses.total, losses.gradient, *losses.terms.values()]
            )
        return self.interrupts.signal is not None


def attack(args, target, objective, device, recorder) -> Restarts:
    """Run the strategy over all seeds."""
    dtype = target.gradient[0].dtype
    seeds = range(args.seed, args.seed + args.n_seed)
    starts = [
        initial_images(seed, target.batch_size, target.image_shape, dtype).to(device)
        for seed in seeds
    ]
    return STRATEGIES["best"](
        partial(PIXEL_GRADIENTS[args.pixel_gradient], objective),
        starts,
        loop_from(args, target),
        generators=[Generator(device).manual_seed(seed) for seed in seeds],
        on_step=recorder.on_step,
    )


def plan(args, target: Target, model: nn.Module, device, bn_source) -> str:
    """What will be done, in words."""
    parameters = sum(p.numel() for p in trainable_parameters(model).values())
    return (
        f"plan: {args.n_seed} seed(s) x {args.epochs} = {args.n_seed * args.epochs} iterations, "
        f"{target.batch_size} images {target.image_shape}, {target.arch} with {parameters:,} "
        f"parameters in {'train' if target.train_mode else 'eval'} mode, {device_name(device)}\n"
        f"      {args.gradient_loss_fun} gradient distance, priors: "
        f"{', '.join(term_names(args)) or 'none'}; "
        f"BN statistics: {bn_source or 'not used'}"
    )


def measure(args, target, objective, device) -> str:
    """Time and memory that the plan will take, from two steps."""
    x = initial_images(args.seed, target.batch_size, target.image_shape, target.gradient[0].dtype)
    x = x.to(device)
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        start = time.perf_counter()
        losses, _ = PIXEL_GRADIENTS[args.pixel_gradient](objective, x, 0.0)
        losses.floats()  # waits for the device
        seconds = time.perf_counter() - start
    total = seconds * args.n_seed * args.epochs
    return (
        f"estimate: {seconds * 1e3:.1f} ms an iteration, {duration(total)} in all, peak memory "
        f"{peak_memory_mib(device):.0f} MiB"
    )


# What comes out ----------------------------------------------------------------------------


def write_pictures(folder, target, x_recon, truth, scores) -> None:
    """pairs.png and images/: reconstructions, above them the truth where scores are known."""
    found = denormalise(x_recon, target.mean, target.std)
    if scores is None:
        save_panels([("reconstruction", found)], folder / "pairs.png")
        save_images(found, folder / "images", "reconstruction")
        return
    true = denormalise(truth.x, target.mean, target.std)
    paired = found[[image["reconstruction"] for image in scores["images"]]]
    captions = [f"{image['psnr']:.1f} dB" for image in scores["images"]]
    save_panels([("truth", true), ("reconstruction", paired)], folder / "pairs.png", captions)
    save_images(true, folder / "images", "truth")
    save_images(paired, folder / "images", "reconstruction")


def write_losses(folder, rows, terms: list[str]) -> None:
    """losses.csv and losses.png: a row and a point a recorded iteration."""
    header = ["seed", "iteration", "rate", "total", "gradient", *terms]
    write_csv(header, rows, folder / "losses.csv")
    curves = {}
    for column, name in enumerate(header[3:], start=3):
        curves[name] = {}
        for row in rows:
            steps, values = curves[name].setdefault(f"seed {row[0]}", ([], []))
            steps.append(row[1])
            values.append(row[column])
    if rows:
        save_curves(curves, folder / "losses.png")


def say_outcome(args, outcome: Restarts, reporter: Reporter) -> None:
    """Say how every seed ended and which was chosen."""
    for index, run in enumerate(outcome.runs):
        if run.stopped is None:
            continue
        if run.stopped == "interrupted":
            end = f"interrupted after {run.steps} iterations; what there is will be saved"
        else:
            end = f"a loss was not finite after {run.steps} iterations; its best images are kept"
        reporter.say(f"seed {args.seed + index}: {end}")
    terms = "  ".join(f"{name} {value:.4g}" for name, value in outcome.best.losses.terms.items())
    reporter.say(
        f"chosen: seed {args.seed + outcome.chosen}  gradient loss "
        f"{outcome.best.losses.gradient:.6g}  {terms}"
    )


def main(argv: list[str]) -> int:
    """Attack one checkpoint as the flags say; return the exit code."""
    args = parser().parse_args(argv)
    reporter = Reporter()
    device = choose_device(args.gpu)
    check(args)
    target, truth = load_inputs(args)
    y, label_method = labels_from(args, target, truth)
    model = model_of(target).to(device)
    bn_source = bn_source_from(args, target, model, reporter)
    lpips_score = metrics.load_lpips(args.lpips_weights) if args.metric else None
    objective = Objective(
        model,
        target,
        y,
        weights_from(args),
        distance=args.gradient_loss_fun,
        bn_source=bn_source or "running",
        bn_grad=args.bn_grad,
    )
    reporter.say("settings\n" + setting_lines(vars(args)))
    reporter.say(plan(args, target, model, device, bn_source))
    if args.GInfoR:
        reporter.say("--GInfoR: the gradient information ratio is not computed yet")
    if args.metric and lpips_score is None:
        reporter.say(LPIPS_HINT)
    if args.dry_run:
        reporter.say(measure(args, target, objective, device))
        return 0

    folder = claim_folder(os.path.join(args.root, "results", "exp", args.id))
    reporter.log_to(folder / "log.txt")
    reporter.say(f"results: {folder}")
    with Interrupts() as interrupts:
        start = time.perf_counter()
        progress = Progress(args.n_seed * args.epochs, args.print_freq, reporter)
        recorder = Recorder(args, progress, interrupts)
        try:
            outcome = attack(args, target, objective, device, recorder)
        finally:
            progress.close()
        seconds = time.perf_counter() - start
    say_outcome(args, outcome, reporter)

    x_recon = outcome.best.x.cpu()
    torch.save(x_recon, folder / "x_recon.pth")
    torch.save(y, folder / "y_recon.pth")
    scores = None
    if args.metric:
        scores, text = score_reconstruction(
            denormalise(x_recon, target.mean, target.std),
            denormalise(truth.x, target.mean, target.std),
            y,
            truth.y,
            by_index=args.one_to_one_similarity,
            lpips_score=lpips_score,
        )
        reporter.say(text)
    write_pictures(folder, target, x_recon, truth, scores)
    write_losses(folder, recorder.rows, term_names(args))
    iterations = sum(run.steps for run in outcome.runs)
    result = {
        "settings": vars(args),
        "versions": versions(),
        "git": git_revision(),
        "device": device_name(device),
        "processes": 1,
        "seconds": seconds,
        "iterations": iterations,
        "iterations_per_second": iterations / seconds,
        "peak_memory_mib": peak_memory_mib(device),
        "bn_source": bn_source,
        "stopped": outcome.best.stopped,
        "losses": {
            "gradient": outcome.best.losses.gradient,
            "total": outcome.best.losses.total,
            **outcome.best.losses.terms,
        },
        "labels": {
            "method": label_method,
            "reconstructed": y,
            "true": truth.y if args.metric else None,
            "accuracy": metrics.label_accuracy(y, truth.y) if args.metric else None,
        },
        "metrics": scores,
        "seeds": [
            {
                "seed": args.seed + index,
                "gradient_loss": run.losses.gradient,
                "iterations": run.steps,
                "stopped": run.stopped,
            }
            for index, run in enumerate(outcome.runs)
        ],
        "search": None,
    }
    write_json(result, folder / "result.json")
    reporter.say(f"{iterations} iterations in {duration(seconds)}; written to {folder}")
    if math.isnan(outcome.best.losses.gradient):
        raise FaultError("no seed had a finite loss at its start: nothing was reconstructed")
    return 128 + interrupts.signal if interrupts.signal is not None else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
