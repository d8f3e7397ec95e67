"""The attacker: checkpoint → labels → reconstruction → tables and pictures.

    python run.py --checkpoint FILE --epochs 3000 --lr 0.05 --TV 1e-4 --grad-sign --metric

Reads what training.py wrote. Run with --help for all flags, --dry-run to check them.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from inversion.audit.flags import attribute_of, parser, prior_weight, tuned_flag, tuned_names
from inversion.audit.information import gradient_information_ratio
from inversion.audit.scoring import (
    OTHER_GRADIENT,
    information_table,
    label_table,
    score_reconstruction,
)
from inversion.audit.truth import (
    Finish,
    TruthCheck,
    arrival,
    check_truth_gradient,
    second_half_fall,
)
from inversion.audit.verdict import ALPHA
from inversion.combine import Combination, combination_method
from inversion.labels.counts import ScaledGradientError
from inversion.labels.reconstruct import LabelInputs, LabelResult, reconstruct_labels
from inversion.objective import Losses, Objective
from inversion.optimise import Outcome, lowest, reconstruct
from inversion.pixel_gradient import PIXEL_GRADIENTS, prior_only
from inversion.restarts import Restarts, initial_images, noise_generator
from inversion.search.trial import Problem
from inversion.search.tune import (
    Budget,
    Resources,
    SearchResult,
    SearchUnavailableError,
    available,
    search,
)
from inversion.settings import (
    AUTO,
    PRIORS,
    RANGES,
    AttackSettings,
    Loop,
    MLCOSchedule,
    Weights,
)
from inversion.strategies import STRATEGIES
from models import checkpoint as checkpoints
from models.batchnorm import batchnorm_layers
from models.binding import check_bound
from models.gradient import couples_samples, trainable_parameters
from models.target import (
    GroundTruth,
    Target,
    Update,
    check_fits,
    guarantee_lines,
    model_of,
    target_from_checkpoint,
    truth_from_checkpoint,
)
from utils import metrics
from utils.console import Progress, Reporter, Silent, duration, setting_lines, table
from utils.device import choose_device, device_name, peak_memory_mib
from utils.errors import FaultError, InputError, is_out_of_memory
from utils.files import claim_folder, null_if_nan, null_unless_finite, write_csv, write_json
from utils.image_files import load_auxiliary, public_photographs
from utils.images import denormalise, normalise
from utils.launch import group_from, launch
from utils.pictures import (
    save_choices,
    save_controls,
    save_decoys,
    save_losses,
    save_pairs,
    save_panels,
    save_trials,
)
from utils.script import (
    Interrupts,
    check_reachable,
    git_revision,
    run_script,
    versions,
    writable_folder,
)
from utils.shard import ALONE, Shard, is_lost_peer
from utils.tensor_files import save

LPIPS_HINT = (
    f"LPIPS n/a: needs the AlexNet weights {metrics.LPIPS_BACKBONE} of torchvision, by "
    "--lpips-weights FILE or in the torch hub cache"
)
#: Of result.json: raised by one whenever a reader of the number before could misread it.
RESULT_FORMAT = 1
RECORDED_STEPS = 2000
#: Controls run unasked where the attack takes less, in seconds.
CONTROL_SECONDS = 600
PUBLIC_IMAGES = 128
#: Root mean square difference of normalised images up to which they are the same image.
SAME_IMAGE = 1e-2
#: Ray: no usage reports, nothing written beside the search, trials saved as they report.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupted search is no finished one
}
#: Flags that may differ when a search is resumed; all others must be as at its start.
FREE_ON_RESUME = {
    "id", "root", "gpu", "print_freq", "dry_run", "checkpoint", "truth", "labels",
    "pseudo_label_init", "label_method", "label_aux", "label_prior", "n_seed", "strategy",
    "combine_memory", "offload_seeds", "metric", "one_to_one_similarity", "lpips_weights",
    "GInfoR", "controls", "target_gradient", "gradient_scale", "max_concurrent", "cpus_per_trial",
    "ngpus_per_trial", "ray_address", "ssim", "verdict_metric",
    "search_resume", "search_only", "verbose", "allow_target_as_simulation", "nproc",
    "multiprocessing_distributed", "world_size", "rank", "dist_url", "dist_backend", "shard",
}  # fmt: skip
#: What a cluster's machines need not get of this folder.
RAY_EXCLUDED = [".git", ".venv*", "results", "train/checkpoint", "Demo_images", "docs", "tests"]
MLCO_NOISE = 0.2
CONSENSUS = "consensus"


def strategy_of(args) -> str:
    """The name in STRATEGIES that the flags ask for."""
    return "mlco" if args.MinCombine else args.strategy


def term_names(args) -> list[str]:
    """The priors in use, in the order of their columns."""
    return [
        name
        for name, prior in PRIORS.items()
        if prior_weight(args, name) != 0
        and (strategy_of(args) == "mlco" or not prior.needs_consensus)
    ]


def weights_from(args) -> Weights:
    """The objective's weights."""
    ends = {} if args.TV_end is None else {"tv": args.TV_end}
    priors = {name: prior_weight(args, name) for name in term_names(args)}
    return Weights(args.grads_weight, priors, ends)


def schedule_from(args) -> MLCOSchedule:
    """The stages of MLCO."""
    return MLCOSchedule(args.T_init_rate, args.total_T_in_rate, args.T_in, args.T_end_rate)


def loop_from(args, target: Target) -> Loop:
    """The loop's settings."""
    noise = args.input_noise
    if noise is None:
        noise = MLCO_NOISE if strategy_of(args) == "mlco" and args.optim == "Adam" else 0.0
    return Loop(
        steps=args.epochs,
        lr=args.lr,
        optimiser=args.optim,
        signed=args.grad_sign,
        box=target.box if args.input_boxed else None,
        keep_best=args.min_grads_loss,
        noise=noise,
    )


# What goes in ------------------------------------------------------------------------------


def check(args, processes: int = 1) -> None:
    """Refuse what can be refused without opening any file."""
    if args.checkpoint is None:
        raise InputError("--checkpoint: missing; give a file that training.py wrote")
    check_search(args, processes)
    if not args.lr > 0 and "lr" not in tuned_names(args):
        raise InputError(f"--lr {args.lr:g}: must be above 0; give a step size such as 0.1")
    if args.epochs is None and "epochs" not in tuned_names(args) and not args.search_only:
        raise InputError(
            "--epochs: missing; give the number of iterations, such as 3000: a verdict is for a "
            "finished attack"
        )
    if args.pseudo_label_init == "from_grads" and args.labels is not None:
        raise InputError(
            f"--labels {args.labels[:80]}: --pseudo-label-init from_grads finds the labels; give "
            "one of them"
        )
    for flag, unused in (("method", AUTO), ("aux", None), ("prior", "none")):
        value = getattr(args, f"label_{flag}")
        if args.pseudo_label_init != "from_grads" and value != unused:
            raise InputError(
                f"--label-{flag} {value}: says how labels are reconstructed; give "
                "--pseudo-label-init from_grads as well"
            )
    if args.label_method in ("counts-aux", "counts-bn") and args.label_aux is None:
        raise InputError(
            f"--label-method {args.label_method}: needs labelled images; give their folder by "
            "--label-aux"
        )
    if args.label_prior == "uniform" and args.label_method not in (AUTO, "counts"):
        raise InputError(
            f"--label-prior uniform: concerns counts, not --label-method {args.label_method}; "
            "leave it out"
        )
    if args.TV_end is not None and args.TV == 0 and "tv" not in tuned_names(args):
        raise InputError(f"--TV-end {args.TV_end:g}: decays --TV, which is 0; give --TV as well")
    if args.optim == "LBFGS":
        for flag in ("grad_sign", "input_boxed", "input_noise"):
            if getattr(args, flag):
                raise InputError(
                    f"--{flag.replace('_', '-')}: L-BFGS learns the curvature from its own steps, "
                    "which this would change; leave it out, or give --optim Adam"
                )
        if processes > 1 and args.shard == "batch":
            raise InputError(
                "--optim LBFGS: its line search needs the whole batch in one process; give --shard "
                "seeds, or --optim Adam"
            )
    if args.grads_weight == 0 and not (term_names(args) or tuned_names(args)):
        raise InputError("--grads-weight 0: leaves no term in the objective; give a weight")
    if args.MinCombine and args.strategy not in ("best", "mlco"):
        raise InputError(f"--MinCombine: is --strategy mlco, not {args.strategy}; give one of them")
    shares = args.T_init_rate + args.total_T_in_rate + args.T_end_rate
    if strategy_of(args) == "mlco" and abs(shares - 1) > 1e-6:
        raise InputError(
            f"--T-init-rate {args.T_init_rate:g}: with --total-T-in-rate and --T-end-rate it sums "
            f"to {shares:g}; the three must sum to 1"
        )
    if args.lpips_weights is not None and not args.metric:
        raise InputError(f"--lpips-weights {args.lpips_weights}: scores only with --metric")
    if args.verdict_metric != "ssim" and not args.metric:
        raise InputError(
            f"--verdict-metric {args.verdict_metric}: is for --metric; give it as well"
        )
    if args.ssim != "gaussian" and not args.metric:
        raise InputError(f"--ssim {args.ssim}: scores only with --metric; give it as well")
    if args.controls and not args.metric:
        raise InputError("--controls: are scored by --metric; give it as well")
    if args.truth is not None and args.labels is not None and not (args.metric or args.GInfoR):
        raise InputError(
            f"--truth {args.truth}: is read only for --metric, --GInfoR and known labels; leave it "
            "out"
        )
    writable_folder(os.path.join(args.root, "results", "exp", args.id), "--root")


def check_search(args, processes: int) -> None:
    """Refuse a search that cannot be."""
    names = tuned_names(args)
    if not args.superparameters_search:
        flags = [f"{tuned_flag(name)}-tune" for name in names]
        given = ("simulation_checkpoint", "ray_address", "search_resume", "search_only")
        flags += [f"--{flag.replace('_', '-')}" for flag in given if getattr(args, flag)]
        if flags:
            raise InputError(
                f"{flags[0]}: belongs to a search; give --superparameters-search as well"
            )
        return
    if args.simulation_checkpoint is None:
        raise InputError(
            "--superparameters-search: needs a batch of the attacker's own; capture one with "
            "training.py and give it by --simulation-checkpoint"
        )
    if not names:
        raise InputError(
            "--superparameters-search: nothing to search; give "
            + ", ".join(f"{tuned_flag(name)}-tune" for name in RANGES)
        )
    shortest = RANGES["epochs"].low if "epochs" in names else args.HP_epochs
    if not args.min_t <= args.max_t <= shortest:
        raise InputError(
            f"--max-t {args.max_t}: must lie from --min-t {args.min_t} to the {shortest:g} "
            "iterations of a trial's schedule, --HP-epochs"
        )
    if args.gpu is not None and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        raise InputError(
            f"--gpu {args.gpu}: trials take every GPU; set CUDA_VISIBLE_DEVICES={args.gpu} instead"
        )
    cores = os.cpu_count() or 1
    if args.ray_address is None and args.cpus_per_trial > cores:
        raise InputError(
            f"--cpus-per-trial {args.cpus_per_trial:g}: this machine has {cores}, trials would "
            "wait for ever; give fewer"
        )
    if args.ngpus_per_trial and args.ngpus_per_trial > max(1, torch.cuda.device_count()):
        raise InputError(
            f"--ngpus-per-trial {args.ngpus_per_trial:g}: this machine has "
            f"{torch.cuda.device_count()}, trials would wait for ever; give less"
        )
    if args.ngpus_per_trial and not torch.cuda.is_available():
        raise InputError(
            f"--ngpus-per-trial {args.ngpus_per_trial:g}: no CUDA device here, trials would wait "
            "for ever; leave it out"
        )
    if processes > 1:
        raise InputError(
            f"--superparameters-search: Ray runs the trials, not {processes} processes of a group; "
            "search with --search-only first, in one process"
        )
    try:
        available(args.search_alg)
    except SearchUnavailableError as error:
        raise InputError(f"--search-alg {args.search_alg}: {error}") from error
    if args.ray_address is not None:
        check_reachable(args.ray_address, "--ray-address")


@dataclass(frozen=True)
class Inputs:
    """What the files hold: the attacker's view, and the truth only where the flags call for it.

    sent: the target before --target-gradient shuffled it. bound: ids and digests say that the
    truth belongs to the checkpoint. truth_source: the file of the truth, for messages.
    """

    target: Target
    sent: Target
    truth: GroundTruth | None = None
    bound: bool = False
    truth_source: str = ""


def load_inputs(args) -> Inputs:
    """Load the checkpoint, and the truth if scoring or known labels need it."""
    checkpoint = checkpoints.load(args.checkpoint)
    sent = target_from_checkpoint(checkpoint)
    check_fits(sent)  # before a truth is compared with it, which may be the sound one
    target = sent = sent.unscaled(args.gradient_scale)
    if args.target_gradient == "shuffled":
        target = shuffled(sent, args.seed)
    knows_labels = args.labels is not None or args.pseudo_label_init == "from_grads"
    if not (args.metric or args.GInfoR) and knows_labels:
        return Inputs(target, sent)
    flag, source = "--checkpoint", checkpoint
    if args.truth is not None:
        flag, source = "--truth", checkpoints.load_truth(args.truth)
    if source.get("x_true") is None or source.get("y_true") is None:
        needs = "--metric" if args.metric else "--GInfoR"
        needs = needs if knows_labels else "--pseudo-label-init known"
        remedy = "" if knows_labels else ", or the labels by --labels"
        raise InputError(
            f"{needs}: {args.checkpoint} holds no truth; give the sealed file by --truth{remedy}"
        )
    truth_source = f"{flag} {getattr(args, flag[2:])}"
    checkpoints.check_truth(source, checkpoint, truth_source)
    bound = check_bound(source, checkpoint, truth_source, f"--checkpoint {args.checkpoint}")
    truth = truth_from_checkpoint(source, checkpoint).unscaled(args.gradient_scale)
    if args.target_gradient == "shuffled" and truth.control is not None:
        truth = replace(truth, control=shuffled_update(truth.control, args.seed + 1))
    return Inputs(target, sent, truth, bound, truth_source)


def shuffled(target: Target, seed: int) -> Target:
    """The target with the numbers of every tensor that was sent in a random order."""
    sent = Update(target.gradient, target.bn_mean, target.bn_var)
    return replace(target, **vars(shuffled_update(sent, seed)))


def shuffled_update(sent: Update, seed: int) -> Update:
    """What a client sent, with the numbers of every tensor in a random order."""
    draw = torch.Generator().manual_seed(seed)

    def mixed(tensors):
        return tensors and tuple(
            t.flatten()[torch.randperm(t.numel(), generator=draw)].view(t.shape) for t in tensors
        )

    return Update(mixed(sent.gradient), mixed(sent.bn_mean), mixed(sent.bn_var))


def given_labels(args, target: Target) -> Tensor:
    """The labels of `--labels`, (B,)."""
    text = args.labels
    try:
        if os.path.isfile(text):
            with open(text, errors="replace") as file:
                text = file.read()
        y = torch.tensor([int(word) for word in text.replace(",", " ").split()])
    except (ValueError, OSError) as error:
        raise InputError(
            f"--labels {args.labels[:80]}: neither a readable file nor integers like 3,1,2"
        ) from error
    checkpoints.check_labels(
        y, target.batch_size, target.num_classes, f"--labels {args.labels[:80]}"
    )
    return y


def found_labels(args, target: Target, model: nn.Module) -> LabelResult:
    """The labels that the gradient gives away, by `--label-method`."""
    shape = target.image_shape
    public = normalise(public_photographs(PUBLIC_IMAGES, shape), target.mean, target.std)
    auxiliary = None
    if args.label_aux is not None:
        x, y = load_auxiliary(args.label_aux, target.num_classes, shape, "--label-aux")
        auxiliary = normalise(x, target.mean, target.std), y
    inputs = LabelInputs(model, public, auxiliary, args.label_prior == "uniform")
    try:
        return reconstruct_labels(target, inputs, args.label_method)
    except ScaledGradientError as error:
        scale = "its factor by --gradient-scale"
        if error.scale is not None:
            scale = f"--gradient-scale {error.scale:.10g}"
        raise InputError(f"--checkpoint {args.checkpoint}: {error}; give {scale}") from error
    except ValueError as error:
        raise InputError(
            f"--pseudo-label-init from_grads: {error}; give the labels by --labels"
        ) from error


def say_labels(found: LabelResult, truth: GroundTruth | None, reporter: Reporter) -> None:
    """Print the reconstructed labels, with the true ones where scoring may see them."""
    text = label_table(
        found.labels,
        found.lower_bounds,
        certain=found.certain,
        y_true=None if truth is None else truth.y,
    )
    regime = f", {found.regime} regime" if found.regime else ""
    reporter.say(
        f"labels from the gradient: {found.method} ({found.reason}){regime}, "
        f"{found.seconds:.2f} s\n{text}"
    )


def bn_source_from(args, target: Target, model: nn.Module, reporter: Reporter) -> str | None:
    """Where the BN prior pulls to: "batch", "running", or None without the prior."""
    layers = batchnorm_layers(model)
    if args.bn_grad == "detached" and not couples_samples(model, target.train_mode):
        raise InputError(
            "--bn-grad detached: concerns BatchNorm by batch statistics, which this checkpoint's "
            "network does not use; leave it out"
        )
    if not args.BN:
        if args.exact_bn:
            reporter.say("note: --exact-bn says where the BN prior pulls to; --BN is 0")
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


@dataclass(frozen=True)
class Setting:
    """Everything the attack starts from, loaded and checked."""

    target: Target
    truth: GroundTruth | None
    y: Tensor
    labels: LabelResult | None
    objective: Objective
    bn_source: str | None
    lpips_score: Callable[[Tensor, Tensor], Tensor] | None
    device: torch.device
    shard: Shard = ALONE
    search: SearchResult | None = None
    truth_check: TruthCheck | None = None
    bound: bool = False

    def start(self, seed: int) -> Tensor:
        """The initial images of a seed, on the CPU."""
        target = self.target
        return initial_images(seed, target.batch_size, target.image_shape, target.gradient[0].dtype)

    def true_images(self) -> Tensor:
        """The truth's images, normalised, where and as the attack computes."""
        return self.truth.x.to(self.device, self.target.gradient[0].dtype)

    def images(self, x: Tensor) -> Tensor:
        """Normalised images as [0, 1] on the CPU."""
        return denormalise(x, self.target.mean, self.target.std)


def load_setting(args, reporter: Reporter, shard: Shard, local_rank: int) -> Setting:
    """Load every file that the flags name, and refuse what cannot be attacked or scored."""
    device = choose_device(args.gpu, local_rank)
    check(args, shard.size)
    inputs = load_inputs(args)
    target, truth = inputs.target, inputs.truth
    model = model_of(target).to(device)
    found = None
    if args.pseudo_label_init == "from_grads":
        if shard.is_main:  # rounding may differ between machines, labels may not
            found = found_labels(args, target, model)
        found = shard.objects(found)[0]
        y = found.labels
    else:
        y = given_labels(args, target) if args.labels is not None else truth.y
    bn_source = bn_source_from(args, target, model, reporter)
    objective = objective_from(args, model, target, y, bn_source, shard)
    lpips_score = metrics.load_lpips(args.lpips_weights) if args.metric else None
    if args.verdict_metric == "lpips" and lpips_score is None:
        raise InputError(f"--verdict-metric lpips: {LPIPS_HINT}")
    setting = Setting(target, truth, y, found, objective, bn_source, lpips_score, device, shard)
    first_evaluation(args, setting)
    return replace(setting, truth_check=check_truth(args, inputs, setting), bound=inputs.bound)


def check_truth(args, inputs: Inputs, setting: Setting) -> TruthCheck | None:
    """Compare the truth's gradient with what was sent, where anything depends on it.

    Raises InputError where no id binds the truth to the checkpoint and its gradient is another.
    """
    if inputs.truth is None or (inputs.bound and not args.metric):
        return None
    objective = setting.objective
    x, y = setting.true_images(), inputs.truth.y.to(setting.device)
    check = check_truth_gradient(objective.model, inputs.sent, x, y, objective.batch_shard)
    if not (inputs.bound or check.fits):
        raise InputError(
            f"{inputs.truth_source}: no id binds its truth to --checkpoint {args.checkpoint}, and "
            f"{check.finding}; give the truth of this checkpoint"
        )
    return check


def objective_from(args, model, target, y, bn_source: str | None, shard: Shard) -> Objective:
    """What the flags minimise, for that target."""
    return Objective(
        model,
        target,
        y,
        weights_from(args),
        distance_name=args.gradient_loss_fun,
        bn_source=bn_source or "running",
        bn_grad=args.bn_grad,
        batch_shard=shard if args.shard == "batch" else ALONE,
    )


# The search --------------------------------------------------------------------------------


def untuned(args) -> argparse.Namespace:
    """The flags with some value for every searched parameter, to check all the others by."""
    stand_in = argparse.Namespace(**vars(args))
    stand_in.epochs = args.epochs or args.HP_epochs  # --search-only needs none
    for name in tuned_names(args):
        setattr(stand_in, attribute_of(tuned_flag(name)), RANGES[name].low)
    return stand_in


def load_problem(args, device: str) -> Problem:
    """The attack on the simulated client, which trials run."""
    flag = "--simulation-checkpoint"
    simulation = checkpoints.load(args.simulation_checkpoint, flag)
    source = f"{flag} {args.simulation_checkpoint}"
    checkpoint = checkpoints.load(args.checkpoint)
    target = target_from_checkpoint(checkpoint)
    check_fits(target)
    if simulation.get("x_true") is None or simulation.get("y_true") is None:
        raise InputError(f"{source}: holds no truth to score trials by; capture it without --seal")
    simulated = target_from_checkpoint(simulation)
    if args.exact_bn and target.bn_mean is not None and simulated.bn_mean is None:
        raise InputError(f"{source}: holds no BN statistics, which the target has; --upload-bn")
    for what in (
        "arch",
        "replace_bn",
        "num_classes",
        "image_shape",
        "train_mode",
        "label_smoothing",
    ):
        ours, theirs = getattr(simulated, what), getattr(target, what)
        if ours != theirs:
            raise InputError(
                f"{source}: its {what} is {ours}, the target's {theirs}; capture it as the target"
            )
    check_fits(simulated, source)
    checkpoints.check_truth(simulation, simulation, source)
    truth = truth_from_checkpoint(simulation)
    model = model_of(simulated)
    if not args.allow_target_as_simulation and shares_images(
        args, checkpoint, truth, target, model
    ):
        raise InputError(
            f"{source}: is the target itself, or holds images of it, and the search reads its "
            "truth; capture other images of your own, or give --allow-target-as-simulation"
        )
    if "bn" in tuned_names(args) and not batchnorm_layers(model):
        raise InputError(f"--BN-tune: {simulated.arch} has no BatchNorm layer; leave it out")
    stand_in = untuned(args)  # every trial has values of its own
    return Problem(
        model=model,
        target=simulated,
        truth=truth,
        y=truth.y,
        settings=AttackSettings(
            weights_from(stand_in),
            replace(loop_from(stand_in, simulated), steps=args.HP_epochs),
            noise=args.input_noise,
            boxed=args.input_boxed,
            first_seed=args.seed,
            strategy=strategy_of(args),
            distance=args.gradient_loss_fun,
            pixel_gradient=args.pixel_gradient,
            bn_grad=args.bn_grad,
        ),
        bn_source="batch" if args.exact_bn and simulated.bn_mean is not None else "running",
        device=device,
    )


def shares_images(
    args, checkpoint: dict, truth: GroundTruth, target: Target, model: nn.Module
) -> bool:
    """Whether the simulation's images are the target's, all of them or some.

    By the target's truth where a file of this command holds it, so that noise and clipping do not
    hide it; also by the gradient of the simulation's images.
    """
    source, name = checkpoint, f"--checkpoint {args.checkpoint}"
    if args.truth is not None:
        source, name = checkpoints.load_truth(args.truth), f"--truth {args.truth}"
    x_true = source.get("x_true")
    if x_true is not None and source.get("y_true") is not None:
        checkpoints.check_truth(source, checkpoint, name)
        near = torch.cdist(truth.x.double().flatten(1), x_true.double().flatten(1))
        if bool((near < SAME_IMAGE * truth.x[0].numel() ** 0.5).any()):
            return True
    if target.batch_size != len(truth.x):
        return False
    x = truth.x.to(target.gradient[0].dtype)
    return check_truth_gradient(model, target, x, truth.y).kind in ("same", "scaled")


def search_folder(args) -> Path:
    """Where the search is kept: a new folder, or with --search-resume the newest of this --id."""
    path = Path(args.root).resolve() / "results" / "search" / args.id
    flags = {key: value for key, value in vars(args).items() if key not in FREE_ON_RESUME}
    if not args.search_resume:
        folder = claim_folder(path)
        write_json({"id": args.id, **flags}, folder / "flags.json")
        return folder
    found = {}
    for file in path.parent.glob("*/flags.json"):
        content = json.loads(file.read_text())
        if content.pop("id") == args.id:
            found[file] = content
    if not found:
        raise InputError(f"--search-resume: {path} holds no search to go on with; leave it out")
    newest = max(found, key=lambda file: file.stat().st_mtime_ns)
    for key, value in flags.items():
        if found[newest].get(key) != value:
            raise InputError(
                f"--search-resume: {newest.parent} was begun with {key} {found[newest].get(key)}, "
                f"not {value}; give the flags it was begun with"
            )
    return newest.parent


def run_search(args, reporter: Reporter) -> SearchResult | None:
    """Search, report, write, and put what was found into `args`; None under --dry-run."""
    gpus = args.ngpus_per_trial
    if gpus is None:
        gpus = 0.5 if torch.cuda.is_available() else 0.0
    problem, names = load_problem(args, "cuda" if gpus else "cpu"), tuned_names(args)
    load_setting(untuned(args), Silent(), ALONE, 0)  # refuse before the long work
    algorithm, why = available(args.search_alg)
    budget = Budget(args.num_samples, args.min_t, args.max_t)
    reporter.say(
        f"search: {algorithm} ({why}), {args.num_samples} trials of {args.min_t} to {args.max_t} "
        f"iterations over {', '.join(names)}; {args.cpus_per_trial:g} CPUs and {gpus:g} GPUs each"
    )
    if args.dry_run:
        return None
    folder = search_folder(args)
    reporter.say(f"search kept in {folder}; go on with it by --search-resume")
    os.environ.update(RAY_ENVIRONMENT)
    root = str(Path(__file__).resolve().parent)
    packages = {"working_dir": root, "excludes": RAY_EXCLUDED}
    if args.ray_address is None:
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        packages = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    resources = Resources(
        args.cpus_per_trial, gpus, args.max_concurrent, args.ray_address, packages
    )
    try:
        found = search(
            problem, names, budget, resources, algorithm=algorithm, folder=str(folder),
            resume=args.search_resume, verbose=args.verbose,
        )  # fmt: skip
    except (SearchUnavailableError, ConnectionError) as error:
        text = " ".join(str(error).split())[:300]
        raise FaultError(f"the search in {folder} ended without a result: {text}") from error
    header = list(found.trials[0])
    rows = [[trial[key] for key in header] for trial in found.trials]
    write_csv(header, rows, folder / "trials.csv")
    save_trials(found.trials, names, folder / "trials.png")
    write_json(search_record(found), folder / "search.json")
    shown = [key for key in header if key != "error"]
    reporter.say(table(shown, [[trial[key] for key in shown] for trial in found.trials]))
    if found.model_based is not None:
        reporter.say(f"picks from BOHB's model: {found.model_based}")
    failed = [trial for trial in found.trials if trial["status"] == "failed"]
    for trial in failed:
        reporter.say(f"trial {trial['trial']} failed twice: {trial['error']}")
    best = "  ".join(f"{tuned_flag(name)} {value:.6g}" for name, value in found.best.items())
    reporter.say(f"best settings: {best}")
    for name, value in found.best.items():
        setattr(args, attribute_of(tuned_flag(name)), value)
    return found


def search_record(found: SearchResult) -> dict:
    """The entry `search` of result.json."""
    return {
        "algorithm": found.algorithm,
        "best": found.best,
        "model_based_picks": found.model_based,
        "trials": null_unless_finite(found.trials),
    }


# The attack --------------------------------------------------------------------------------


@dataclass
class Recorder:
    """Follows the iterations: progress, rows for losses.csv, rounds, and the wish to stop."""

    args: object
    progress: Progress
    interrupts: Interrupts
    save_consensus: Callable[[int, Tensor], None]
    title: str = ""
    rows: list = field(default_factory=list)
    rounds: list[dict] = field(default_factory=list)

    def on_step(self, index: int | None, step: int, losses: Losses, rate: float) -> bool:
        """Take note of an iteration of seed number `index` or the consensus; true asks to stop."""
        name = CONSENSUS if index is None else self.args.seed + index
        gradient = {} if losses.gradient is None else {"gradient": losses.gradient}
        values = {"total": losses.total, **gradient, **losses.terms}
        self.progress.step(self.title + (name if index is None else f"seed {name}"), values)
        if step % max(1, self.args.epochs // RECORDED_STEPS) == 0 or step == self.args.epochs - 1:
            terms = [losses.terms.get(term, "") for term in term_names(self.args)]
            self.rows.append([name, step, rate, losses.total, losses.gradient, *terms])
        return self.interrupts.signal is not None

    def on_round(self, done: int, combination: Combination) -> None:
        """Take note of a consensus formed after `done` iterations of every seed."""
        self.save_consensus(done, combination.x)
        seeds = [self.args.seed + index for index in combination.choice]
        best = combination.seed_losses[lowest(combination.seed_losses)]
        self.progress.reporter.say(
            f"{self.title}consensus after {done} iterations: gradient loss {combination.loss:.6g}, "
            f"of the best seed {best:.6g}; images "
            + ", ".join(f"{n} of seed {seed}" for seed, n in sorted(Counter(seeds).items()))
        )
        self.rounds.append(
            {
                "iteration": done,
                "seeds": seeds,
                "gradient_loss": combination.loss,
                "seed_gradient_losses": list(combination.seed_losses),
                "image_gradients": combination.image_gradients,
            }
        )


def attack(args, setting: Setting, recorder: Recorder, method: Callable | None = None) -> Outcome:
    """Run the strategy over all seeds; `method` instead of the pixel gradient of the flags."""
    seeds = range(args.seed, args.seed + args.n_seed)
    home = torch.device("cpu") if args.offload_seeds else setting.device
    options = {"schedule": schedule_from(args)} if strategy_of(args) == "mlco" else {}
    restarts = Restarts(
        starts=[setting.start(seed).to(home) for seed in seeds],
        generators=[noise_generator(seed, setting.device) for seed in seeds],
        loop=loop_from(args, setting.target),
        on_step=recorder.on_step,
        combine_memory=combine_memory(args),
        seed_shard=ALONE if args.shard == "batch" else setting.shard,
        on_round=recorder.on_round,
        should_stop=lambda: setting.objective.batch_shard.any(
            recorder.interrupts.signal is not None
        ),
        **options,
    )
    return STRATEGIES[strategy_of(args)](
        setting.objective, method or PIXEL_GRADIENTS[args.pixel_gradient], restarts
    )


def combine_memory(args) -> int:
    """`--combine-memory` in bytes."""
    return int(args.combine_memory * 2**20)


def total_iterations(args, num_seeds: int) -> int:
    """Iterations of all stages with that many seeds."""
    if strategy_of(args) == "mlco":
        return schedule_from(args).iterations(args.epochs, num_seeds)
    return num_seeds * args.epochs


def own_seeds(args, shard: Shard) -> int:
    """Number of seeds that this process runs."""
    if args.shard == "batch":
        return args.n_seed
    return sum(shard.owns(index) for index in range(args.n_seed))


def all_rows(rows: list, shard: Shard) -> list:
    """Rows of losses.csv of all processes that ran whole seeds, the consensus only once."""
    parts = shard.objects(rows)
    return [
        row for rank, part in enumerate(parts) for row in part if row[0] != CONSENSUS or rank == 0
    ]


def plan(args, setting: Setting) -> str:
    """What will be done, in words."""
    target = setting.target
    parameters = sum(p.numel() for p in trainable_parameters(setting.objective.model).values())
    stages, lines = f"{args.n_seed} seed(s) x {args.epochs:,}", []
    if strategy_of(args) == "mlco":
        initial, rounds, final = schedule_from(args).spans(args.epochs)
        lengths = " + ".join(f"{len(r):,}" for r in rounds) or "none"
        method, why = combination_method(setting.objective, args.n_seed, combine_memory(args))
        stages = (
            f"{args.n_seed} seed(s) x ({len(initial):,} initial + "
            f"{final.start - len(initial):,} in {len(rounds)} rounds) + {len(final):,} final"
        )
        lines += [f"rounds: {lengths}", f"combination: {method} ({why})"]
    lines.insert(
        0,
        f"plan: {stages} = {total_iterations(args, args.n_seed):,} iterations, "
        f"{target.batch_size} images {target.image_shape}, {target.network} with {parameters:,} "
        f"parameters in {'train' if target.train_mode else 'eval'} mode, "
        f"{device_name(setting.device)}",
    )
    lines.append(
        f"{args.gradient_loss_fun} gradient distance, priors: "
        f"{', '.join(term_names(args)) or 'none'}; BN statistics: {setting.bn_source or 'not used'}"
    )
    protection = target.protection
    if protection is not None:
        clip = "no clipping" if protection.clip is None else f"clipped to {protection.clip:g}"
        guarantee = guarantee_of(setting)
        lines.append(
            f"the client's protection: {protection.mode}, {clip}, noise of {protection.sigma:g} a "
            f"number; {guarantee[0]}"
        )
        lines += guarantee[1:]
    if args.target_gradient == "shuffled":
        lines.append("what was sent is shuffled: there is nothing to find in it")
    if setting.shard.size > 1:
        lines.append(f"{setting.shard.size} processes, each with a part of the {args.shard}")
    if args.n_seed > 1:
        numbers = args.n_seed * target.batch_size * math.prod(target.image_shape)
        size = numbers * target.gradient[0].element_size() / 2**20
        home = "cpu, by --offload-seeds" if args.offload_seeds else setting.device.type
        lines.append(f"images of all seeds: {size:,.1f} MiB, kept on {home}")
    return "\n      ".join(lines)


def guarantee_of(setting: Setting) -> list[str]:
    """What follows of the client's protection, and what it does not cover."""
    target = setting.target
    return guarantee_lines(
        target.protection,
        setting.objective.model,
        train_mode=target.train_mode,
        uploads_bn=target.bn_mean is not None,
    )


def first_evaluation(args, setting: Setting) -> None:
    """Evaluate the objective once, so that what cannot be computed is refused at once.

    Raises InputError when the network cannot process the images.
    """
    x = setting.start(args.seed).to(setting.device)
    try:
        PIXEL_GRADIENTS[args.pixel_gradient](
            setting.objective, setting.objective.local_part(x), 0.0
        )
    except (RuntimeError, ValueError, AssertionError) as error:
        if is_out_of_memory(error) or is_lost_peer(error):
            raise
        raise InputError(
            f"--checkpoint {args.checkpoint}: {setting.target.arch} cannot process its images "
            f"{setting.target.image_shape}: {' '.join(str(error).split())[:160]}"
        ) from error


def measure(args, setting: Setting) -> str:
    """Time and memory that the plan will take, from two steps of the loop."""
    times = [time.perf_counter()]
    reconstruct(
        partial(PIXEL_GRADIENTS[args.pixel_gradient], setting.objective),
        setting.start(args.seed).to(setting.device),
        replace(loop_from(args, setting.target), steps=max(2, args.epochs)),
        generator=noise_generator(args.seed, setting.device),
        on_step=lambda *_: times.append(time.perf_counter()),
        span=range(2),
        batch_shard=setting.objective.batch_shard,
    )
    if len(times) < 3:
        raise FaultError("a loss of the first two steps is not finite; see --lr and the weights")
    seconds = times[2] - times[1]  # the first step warms up
    total = seconds * total_iterations(args, own_seeds(args, setting.shard))
    left_out = ["combinations"] if strategy_of(args) == "mlco" else []
    left_out += ["controls"] if args.metric and args.controls is not False else []
    left_out += ["--GInfoR"] if args.GInfoR else []
    combining = f", {' and '.join(left_out)} not counted" if left_out else ""
    return (
        f"estimate: {seconds * 1e3:.1f} ms an iteration, {duration(total)} in all{combining}, "
        f"peak memory {peak_memory_mib(setting.device):.0f} MiB"
    )


# Beside the attack -------------------------------------------------------------------------


def information_of(args, setting: Setting, reporter: Reporter) -> dict:
    """Compute and print the gradient information ratio; the entry `information` of result.json."""
    start = time.perf_counter()
    truth, target = setting.truth, setting.target
    found = gradient_information_ratio(
        setting.objective.model,
        setting.true_images(),
        truth.y.to(setting.device),
        train_mode=target.train_mode,
        label_smoothing=target.label_smoothing,
        shard=setting.objective.batch_shard,
    )
    columns = {"label": truth.y.tolist()} | {
        name: value.tolist() for name, value in vars(found).items() if isinstance(value, Tensor)
    }
    seconds = time.perf_counter() - start
    reporter.say(
        information_table(
            columns,
            found.batch_norm,
            independent=found.independent,
            protected=target.protection is not None,
        )
        + f"\ncomputed in {duration(seconds)}"
    )
    figures = {"batch_norm": found.batch_norm, "independent": found.independent}
    return {**columns, **figures, "seconds": seconds}


@dataclass(frozen=True)
class Control:
    """What an attack without the client's gradient made: images (B, C, H, W) in [0, 1].

    iterations and seconds are 0 where there was nothing to run.
    """

    images: Tensor
    iterations: int = 0
    seconds: float = 0.0


def controls_wanted(args, seconds: float, shard: Shard, reporter: Reporter) -> bool:
    """Whether to run controls after an attack of so many seconds. All processes agree."""
    if not args.metric or args.controls is not None:
        return bool(args.controls)
    if shard.objects(seconds)[0] > CONTROL_SECONDS:
        reporter.say(
            f"controls: left out, since the attack took over {duration(CONTROL_SECONDS)}; give "
            "--controls to have them"
        )
        return False
    return True


def without_gradient(args) -> argparse.Namespace:
    """The flags of the control that has priors only.

    Nothing can be chosen by a gradient distance, so one seed serves `best` and `mlco`, to the end
    without consensus and so without Langevin noise; `mean` needs all.
    """
    stand_in = argparse.Namespace(**vars(args))
    if strategy_of(args) != "mean":
        if strategy_of(args) == "mlco" and args.input_noise is None:
            stand_in.input_noise = 0.0
        stand_in.MinCombine, stand_in.strategy, stand_in.n_seed = False, "best", 1
    return stand_in


def run_controls(
    args, setting: Setting, interrupts: Interrupts, reporter: Reporter
) -> tuple[dict[str, Control], list[str]]:
    """The same attack without the client's gradient: name → what comes out, and what is missing.

    "prior only": no gradient, the priors alone, BN to running statistics, since those of the batch
    are the client's too. "other gradient": everything as in the attack, on the gradient (and BN
    statistics) of other images with the same labels. "mean image": of the public photographs. The
    labels are those of the attack. A control that fails or is interrupted is left out, and
    missing: in words, for the verdict.
    """
    target, model = setting.target, setting.objective.model
    mean = public_photographs(PUBLIC_IMAGES, target.image_shape).mean(0)
    found = {"mean image": Control(mean.expand(target.batch_size, -1, -1, -1))}
    missing = []
    source = None if setting.bn_source is None else "running"
    plans = [("prior only", without_gradient(args), target, source, prior_only)]
    other = setting.truth.control
    if other is not None:
        theirs = replace(
            target, gradient=other.gradient, bn_mean=other.bn_mean, bn_var=other.bn_var
        )
        plans.append((OTHER_GRADIENT, args, theirs, setting.bn_source, None))
    else:
        reporter.say(
            "controls: the checkpoint holds no gradient of other images; capture with training.py "
            "--with-control to compare with one"
        )
    for name, flags, theirs, source, method in plans:
        if missing and interrupts_asked(setting, interrupts):
            missing.append(f"control {name} was not run")
            continue
        start = time.perf_counter()
        try:
            objective = objective_from(flags, model, theirs, setting.y, source, setting.shard)
        except InputError as error:
            reporter.say(f"control, {name}: left out: {error}")
            missing.append(f"control {name} could not be run")
            continue
        total = total_iterations(flags, own_seeds(flags, setting.shard))
        progress = Progress(total, args.print_freq, reporter)
        recorder = Recorder(flags, progress, interrupts, lambda *_: None, f"control, {name}: ")
        try:
            outcome = attack(flags, replace(setting, objective=objective), recorder, method)
        finally:
            progress.close()
        if interrupts_asked(setting, interrupts):
            reporter.say(f"control, {name}: interrupted, left out")
            missing.append(f"control {name} was interrupted")
            continue
        images = setting.images(outcome.final.x)
        seconds = time.perf_counter() - start
        found[name] = Control(images, outcome.iterations, seconds)
        stopped = ", ended by a loss that was not finite" if outcome.final.stopped else ""
        reporter.say(
            f"control, {name}: {outcome.iterations} iterations in {duration(seconds)}{stopped}"
        )
    return found, missing


def interrupts_asked(setting: Setting, interrupts: Interrupts) -> bool:
    """Whether any process was asked to stop. All processes agree."""
    return setting.shard.any(interrupts.signal is not None)


# What comes out ----------------------------------------------------------------------------


def loss_header(args) -> list[str]:
    """The columns of losses.csv."""
    return ["seed", "iteration", "rate", "total", "gradient", *term_names(args)]


def say_outcome(args, outcome: Outcome, reporter: Reporter) -> None:
    """Say how every seed ended and what was chosen."""
    runs = [(f"seed {args.seed + index}", run) for index, run in enumerate(outcome.runs)]
    if outcome.chosen is None:
        runs.append((CONSENSUS, outcome.final))
    for name, run in runs:
        if run.stopped == "interrupted":
            reporter.say(
                f"{name}: interrupted after {run.steps} iterations; what there is will be saved"
            )
        elif run.stopped is not None:
            reporter.say(
                f"{name}: a loss was not finite after {run.steps} iterations; its best images "
                "are kept"
            )
    chosen = strategy_of(args) if outcome.chosen is None else f"seed {args.seed + outcome.chosen}"
    losses = outcome.final.losses
    terms = "  ".join(f"{name} {value:.4g}" for name, value in losses.terms.items())
    reporter.say(f"chosen: {chosen}  gradient loss {losses.gradient:.6g}  {terms}")


def label_record(args, setting: Setting) -> dict:
    """The entry `labels` of result.json."""
    found, true = setting.labels, setting.truth.y if args.metric else None
    record = {
        "method": "known" if args.labels is None else "given",
        "reconstructed": setting.y,
        "true": true,
        "accuracy": None if true is None else metrics.label_accuracy(setting.y, true),
    }
    if found is None:
        return record
    if true is not None:
        record["existence_accuracy"] = metrics.existence_accuracy(
            setting.y, true, setting.target.num_classes
        )
    bounds = found.lower_bounds
    return record | {
        "method": found.method,
        "reason": found.reason,
        "regime": found.regime,
        "lower_bounds": {int(k): int(bounds[k]) for k in bounds.nonzero().flatten()},
        "certain": found.certain,
        "seconds": found.seconds,
    }


def finish_of(args, setting: Setting, outcome: Outcome, recorder: Recorder) -> Finish:
    """Follow the chosen run to its end, and evaluate the objective at the truth."""
    curves: dict = {}
    for row in recorder.rows:
        curves.setdefault(row[0], []).append(row[4])
    name = CONSENSUS if outcome.chosen is None else args.seed + outcome.chosen
    ends = [curves[name]] if name in curves else curves.values()  # of a mean, all seeds
    falls = [second_half_fall(losses) for losses in ends]
    fall = max((fall for fall in falls if fall is not None), default=None)
    found = outcome.final.x.to(setting.device)
    at = arrival(setting.objective, found, setting.true_images(), setting.truth.y)
    return Finish(fall, at, outcome.final.stopped)


def score(
    args,
    setting: Setting,
    outcome: Outcome,
    finish: Finish | None,
    controls: dict[str, Control] | None,
    missing: Sequence[str],
):
    """The entry `metrics` of result.json and its table; None and nothing without --metric."""
    if not args.metric:
        return None, ""
    truth, protection = setting.truth, setting.target.protection
    check, doubt = setting.truth_check, finish.doubt
    if check.kind == "protected" and not setting.bound:
        doubt = "nothing binds the truth to what was attacked, which was protected"
    if not check.fits:
        doubt = "what was attacked is not the truth's gradient, so that nothing follows"
    scores, text = score_reconstruction(
        setting.images(outcome.final.x),
        setting.images(truth.x),
        setting.y,
        truth.y,
        by_index=args.one_to_one_similarity,
        ssim=metrics.SSIMS[args.ssim],
        lpips_score=setting.lpips_score,
        controls=controls and {name: control.images for name, control in controls.items()},
        decoys=truth.decoys,
        verdict_metric=args.verdict_metric,
        missing=missing,
        doubt=doubt,
        arrived=finish.arrival.arrived,
    )
    reason = finish.arrival.reason
    figures = {
        "loss_fall": finish.fall,
        "arrived": finish.arrival.arrived,
        "reason": reason,
        "objective": finish.arrival.reconstruction.total,
        "objective_at_truth": finish.arrival.truth.total,
        "gradient_loss_at_truth": finish.arrival.truth.gradient,
    }
    scores["attack"] = null_unless_finite(figures)
    scores["truth_gradient"] = asdict(check) | {"fits": check.fits, "bound": setting.bound}
    p = scores["verdict"]["p"]
    if p is not None and p > ALPHA:
        text += f"\nwhy it found no more: {reason}"
    if protection is not None:
        text += f"\nthe client's protection ({protection.mode}): {'; '.join(guarantee_of(setting))}"
    return scores, text


def write_result(args, setting: Setting, outcome: Outcome, folder: Path, **entries) -> None:
    """Write result.json; entries: what only the caller knows."""
    target, losses = setting.target, outcome.final.losses
    result = {
        "format": RESULT_FORMAT,
        "settings": vars(args),
        "target": {
            "arch": target.arch,
            "batch_size": target.batch_size,
            "image_shape": target.image_shape,
            "num_classes": target.num_classes,
            "train_mode": target.train_mode,
            "bn_statistics": target.bn_mean is not None,
            "replace_bn": target.replace_bn,
            "protection": None if target.protection is None else asdict(target.protection),
        },
        "versions": versions(),
        "git": git_revision(),
        "device": device_name(setting.device),
        "processes": setting.shard.size,
        "iterations": outcome.iterations,
        "bn_source": setting.bn_source,
        "losses": null_unless_finite(
            {"gradient": losses.gradient, "total": losses.total, **losses.terms}
        ),
        "labels": label_record(args, setting),
        "seeds": [
            {
                "seed": args.seed + index,
                "gradient_loss": null_unless_finite(run.losses.gradient),
                "iterations": run.steps,
                "stopped": run.stopped,
            }
            for index, run in enumerate(outcome.runs)
        ],
        "search": None if setting.search is None else search_record(setting.search),
    }
    write_json(result | entries, folder / "result.json")


def write(
    args,
    setting: Setting,
    outcome: Outcome,
    recorder: Recorder,
    folder: Path,
    entries: dict,
    finish: Finish | None = None,
    controls: dict[str, Control] | None = None,
    missing: Sequence[str] = ("the controls were not run",),
) -> str:
    """Score and write everything, figures before pictures; return the table to print.

    With controls, once more what they add to. entries: of result.json, which only the caller knows.
    missing: what is missing of the controls, in words.
    """
    scores, text = score(args, setting, outcome, finish, controls, missing)
    costs = controls and {
        name: {"iterations": control.iterations, "seconds": control.seconds}
        for name, control in controls.items()
    }
    found = setting.images(outcome.final.x)
    true = setting.images(setting.truth.x) if args.metric else None
    if not controls:
        save(outcome.final.x.cpu(), str(folder / "x_recon.pth"))
        save(setting.y, str(folder / "y_recon.pth"))
        write_csv(loss_header(args), recorder.rows, folder / "losses.csv")
    write_result(
        args, setting, outcome, folder, metrics=null_if_nan(scores), controls=costs, **entries
    )
    if args.metric and setting.truth.decoys is not None:
        save_decoys(found, true, setting.truth.decoys, scores, folder / "decoys.png")
    if controls:
        images = {name: control.images for name, control in controls.items()}
        save_controls(found, true, images, scores, folder / "controls.png")
        return text
    save_pairs(found, true, scores, folder)
    if recorder.rows:
        save_losses(loss_header(args), recorder.rows, recorder.rounds, folder / "losses.png")
    if recorder.rounds:
        save_choices(recorder.rounds, folder / "choices.png")
    return text


def main(argv: list[str]) -> int:
    """Attack one checkpoint as the flags say, in one process or several; return the exit code."""
    args = parser().parse_args(argv)
    group = group_from(args)
    check(args, group.size)
    return launch(work, argv, group)


def work(argv: list[str], shard: Shard, local_rank: int) -> int:
    """What each process does; the first one reports and writes."""
    args = parser().parse_args(argv)
    reporter = Reporter() if shard.is_main else Silent()
    found = None
    if args.superparameters_search:
        found = run_search(args, reporter)
        if found is None or args.search_only:
            return 0
    setting = replace(load_setting(args, reporter, shard, local_rank), search=found)
    reporter.say("settings\n" + setting_lines(vars(args)))  # a refusal would be lost below them
    if setting.labels is not None:
        say_labels(setting.labels, setting.truth if args.metric else None, reporter)
        if args.one_to_one_similarity and args.metric:
            reporter.say(
                "note: reconstructed labels are in ascending order, so pairing by index compares "
                "images of different labels unless the true ones are sorted too"
            )
    reporter.say(plan(args, setting))
    if args.metric:
        mark = "" if setting.truth_check.fits else "warning: "
        reporter.say(f"{mark}{setting.truth_check.finding}")
    if args.metric and setting.lpips_score is None:
        reporter.say(LPIPS_HINT)
    if args.one_to_one_similarity and not args.metric:
        reporter.say("note: --one-to-one-similarity says how --metric pairs; it is not given")
    if args.dry_run:
        reporter.say(measure(args, setting))
        return 0

    folder = None
    if shard.is_main:
        folder = claim_folder(os.path.join(args.root, "results", "exp", args.id))
        reporter.log_to(folder / "log.txt")
        reporter.say(f"results: {folder}")

    information = information_of(args, setting, reporter) if args.GInfoR else None

    def save_consensus(done: int, x: Tensor) -> None:
        if folder is None:
            return
        save_panels(
            [(f"iteration {done}", setting.images(x))], folder / "consensus" / f"{done:06d}.png"
        )

    with Interrupts() as interrupts:
        start = time.perf_counter()
        total = total_iterations(args, own_seeds(args, shard))
        progress = Progress(total, args.print_freq, reporter)
        recorder = Recorder(args, progress, interrupts, save_consensus)
        try:
            outcome = attack(args, setting, recorder)
        finally:
            progress.close()
        seconds = time.perf_counter() - start
        if args.shard == "seeds":
            recorder.rows = all_rows(recorder.rows, shard)
        say_outcome(args, outcome, reporter)
        interrupted = interrupts_asked(setting, interrupts)
        failed = math.isnan(outcome.final.losses.gradient)
        entries = {
            "seconds": seconds,
            "iterations_per_second": outcome.iterations / seconds,
            "peak_memory_mib": peak_memory_mib(setting.device),
            "stopped": "interrupted" if interrupted else outcome.final.stopped,
            "information": null_unless_finite(information),
            "rounds": null_unless_finite(recorder.rounds),
        }
        text, controls, finish = "", None, None
        if args.metric:
            finish = finish_of(args, setting, outcome, recorder)
        if shard.is_main:  # before anything more is done
            text = write(args, setting, outcome, recorder, folder, entries, finish)
        if not (interrupted or failed) and controls_wanted(args, seconds, shard, reporter):
            controls, missing = run_controls(args, setting, interrupts, reporter)
            if shard.is_main:
                text = write(
                    args, setting, outcome, recorder, folder, entries, finish, controls, missing
                )
        if text:
            reporter.say("\n".join([*finish.lines, text]))
        reporter.say(f"{outcome.iterations} iterations in {duration(seconds)}; written to {folder}")
        if controls:
            extra = sum(control.seconds for control in controls.values())
            reporter.say(f"controls: {duration(extra)} beside that; --no-controls leaves them out")
    if failed:
        raise FaultError("no seed had a finite loss at its start: nothing was reconstructed")
    return 128 + interrupts.signal if interrupts.signal is not None else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
