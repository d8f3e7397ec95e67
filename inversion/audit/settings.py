"""The command line of run.py as typed settings, built and refused in one place.

This file imports nothing heavy: whatever can be refused without a file, a device or an installed
package is refused before torch is imported.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from inversion.audit.flags import (
    attribute_of,
    matching_flags,
    prior_weight,
    tuned_flag,
    tuned_names,
)
from inversion.audit.sweep.settings import SweepSettings, sweep_from
from inversion.audit.withhold import refuse_contradictions
from inversion.settings import (
    AUTO,
    DIFFERENCE_STEP,
    FINITE_DIFFERENCES,
    LABEL_METHODS,
    PRIORS,
    RANGES,
    STRATEGIES,
    AttackSettings,
    Loop,
    MLCOSchedule,
    Weights,
)
from utils.errors import InputError
from utils.script import writable_folder

#: Rounds of MLCO at most: each forms a consensus, and is a line of the plan.
MOST_ROUNDS = 100_000


@dataclass(frozen=True)
class InputSettings:
    """Says which files the attacker reads, and how to understand them."""

    checkpoint: str
    #: The sealed truth file, None if the checkpoint holds the truth or none is needed.
    truth: str | None
    #: Labels by hand, or a file of them.
    labels: str | None
    #: Whether the labels are reconstructed from the gradient.
    labels_from_gradient: bool
    #: A name in LABEL_METHODS, or AUTO.
    label_method: str
    #: Folder of labelled images of the attacker's own.
    label_images: str | None
    #: Bits per grey value in those of more than 8 bits that do not say it; None for 16.
    bit_depth: int | None
    #: Whether labels are known to be drawn evenly from all classes.
    uniform_labels: bool
    #: Factor by which the client multiplied its loss.
    gradient_scale: float
    #: Whether the numbers of what was sent are put into a random order, as a test of the controls.
    shuffled: bool
    #: Number of the GPU to compute on; None for the first one, else the CPU.
    gpu: int | None
    #: FILE.py:function that builds the network; None for one by the checkpoint's name.
    model: str | None = None
    #: Parts that the attacker is not given, names in WITHHELD.
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class ScoringSettings:
    """Says how to score the reconstruction; only the auditor has what this needs."""

    #: Whether to score at all.
    metric: bool
    #: Pair images by index, not by the best assignment.
    by_index: bool
    #: The metric that decides the verdict, a name in VERDICT_METRICS.
    verdict_metric: str
    #: The window of SSIM, a name in SSIMS.
    ssim: str
    lpips_weights: str | None
    #: Whether to compute the gradient information ratio.
    information: bool
    #: Whether to run the controls; None to run them after a short attack.
    controls: bool | None

    @property
    def needs_truth(self) -> bool:
        """Whether scoring reads the private batch."""
        return self.metric or self.information


@dataclass(frozen=True)
class SearchSettings:
    """Says what a search tries, and by what means."""

    #: Checkpoint with truth, of the attacker's own images.
    simulation: str
    #: Names in RANGES, of the parameters to search.
    parameters: tuple[str, ...]
    #: A name in SEARCH_ALGORITHMS, or "auto".
    algorithm: str
    num_samples: int
    #: Iterations that each trial's rate schedule is made for.
    steps: int
    #: Iterations of a trial's first and last report.
    first_report: int
    last_report: int
    max_concurrent: int
    cpus: float
    #: Share of a GPU per trial; None for half of one with CUDA, else none.
    gpus: float | None
    #: HOST:PORT of a Ray cluster; None for this machine alone.
    address: str | None
    resume: bool
    #: Stop after the search.
    only: bool
    #: Let the search read the target's own truth.
    allow_target: bool
    verbose: int


@dataclass(frozen=True)
class Settings:
    """Holds all that one command line of run.py asks for."""

    attack: AttackSettings
    inputs: InputSettings
    scoring: ScoringSettings
    #: None without a search. With one, a searched parameter of `attack` stands at the low end of
    #: its range until `with_values` puts in what the search found.
    search: SearchSettings | None
    #: Name of the run; its results go to {root}/results/exp/{id}.
    id: str
    root: str
    #: Iterations between two progress lines.
    print_freq: int
    #: Check everything, measure two steps, and stop.
    dry_run: bool
    #: Every flag with its value: the record in result.json, read by nobody here.
    record: Mapping[str, object]
    #: None where one checkpoint is attacked as it is.
    sweep: SweepSettings | None = None

    @property
    def folder(self) -> Path:
        """Where the results go, if nothing is there yet."""
        return Path(self.root, "results", "exp", self.id)

    def with_values(self, values: Mapping[str, float]) -> "Settings":
        """Return the settings with what a search found, parameter → value."""
        flags = {attribute_of(tuned_flag(name)): value for name, value in values.items()}
        return replace(
            self, attack=self.attack.with_values(values), record={**self.record, **flags}
        )


def settings_from(args: argparse.Namespace) -> Settings:
    """Build the settings from the parsed command line.

    Raises InputError, naming the flag, for what can be refused without opening a file or looking
    at the device.
    """
    if args.checkpoint is None:
        raise InputError("--checkpoint: missing; give a file that training.py wrote")
    _refuse_audit_flags(args)
    search = _search_from(args)
    if args.attack == "layerwise":
        _refuse_matching(args)
    else:
        _refuse_attack(args)
    refuse_contradictions(args)
    _refuse_inputs(args)
    _refuse_derivative(args)
    _refuse_optimiser(args)
    _refuse_strategy(args)
    _refuse_scoring(args)
    settings = Settings(
        attack=_attack_from(args),
        inputs=InputSettings(
            checkpoint=args.checkpoint,
            truth=args.truth,
            labels=args.labels,
            labels_from_gradient=_reconstructs_labels(args),
            label_method=args.label_method,
            label_images=args.label_aux,
            bit_depth=args.bit_depth,
            uniform_labels=args.label_prior == "uniform",
            gradient_scale=args.gradient_scale,
            shuffled=args.target_gradient == "shuffled",
            gpu=args.gpu,
            model=args.model,
            without=args.without or (),
        ),
        scoring=ScoringSettings(
            metric=args.metric,
            by_index=args.one_to_one_similarity,
            verdict_metric=args.verdict_metric,
            ssim=args.ssim,
            lpips_weights=args.lpips_weights,
            information=args.GInfoR,
            controls=args.controls,
        ),
        search=search,
        id=args.id,
        root=args.root,
        print_freq=args.print_freq,
        dry_run=args.dry_run,
        record=vars(args),
        sweep=sweep_from(args),
    )
    writable_folder(str(settings.folder), "--root")
    return settings


def _refuse_audit_flags(args) -> None:
    """Refuse what concerns a whole audit where one attack is asked for."""
    if args.budget is not None:
        raise InputError(f"--budget {args.budget:g}s: belongs to --audit; give it as well")
    if args.no_images and not args.audit:
        raise InputError("--no-images: belongs to --audit; give it as well")
    for flag in ("checkpoint", "truth"):
        if isinstance(getattr(args, flag), list):
            raise InputError(f"--{flag}: several files are for --audit; give one")


def refuse_processes(settings: Settings, count: int) -> None:
    """Raise InputError for settings that `count` processes cannot share."""
    if count == 1:
        return
    if settings.attack.method != "matching":
        raise InputError(
            f"--attack {settings.attack.method}: solves the gradient in one process, not {count}; "
            "leave --nproc out"
        )
    if settings.search is not None:
        raise InputError(
            f"--superparameters-search: Ray runs the trials, not {count} processes of a group; "
            "search with --search-only first, in one process"
        )
    if settings.attack.loop.cuda_graph and settings.attack.shared == "batch":
        raise InputError(
            f"--cuda-graph: {count} processes that share a batch wait for one another; give "
            "--shard seeds, or leave it out"
        )
    if settings.attack.loop.optimiser == "LBFGS" and settings.attack.shared == "batch":
        raise InputError(
            "--optim LBFGS: its line search needs the whole batch in one process; give --shard "
            "seeds, or --optim Adam"
        )


def _strategy_from(args) -> str:
    return "mlco" if args.MinCombine else args.strategy


def _attack_from(args) -> AttackSettings:
    searched = {name: RANGES[name].low for name in tuned_names(args)}
    # --search-only and --attack layerwise need neither
    epochs = args.HP_epochs if args.epochs is None else args.epochs
    lr = searched.get("lr", args.lr) or 1.0
    limit = None if args.max_memory is None else int(args.max_memory * 2**20)
    return AttackSettings(
        weights=Weights(
            searched.get("grads_weight", args.grads_weight),
            _priors_from(args),
            {} if args.TV_end is None else {"tv": args.TV_end},
        ),
        loop=Loop(
            steps=int(searched.get("epochs", epochs)),
            lr=lr,
            optimiser=args.optim,
            signed=args.grad_sign,
            keep_best=args.min_grads_loss,
            cuda_graph=args.cuda_graph,
        ),
        method=args.attack,
        max_memory=AttackSettings.max_memory if limit is None else limit,
        chunk_size=args.chunk_size,
        matching_memory=limit,
        noise=args.input_noise,
        boxed=args.input_boxed,
        first_seed=args.seed,
        num_seeds=args.n_seed,
        strategy=_strategy_from(args),
        schedule=_schedule_from(args),
        combine_memory=int(args.combine_memory * 2**20),
        offload_seeds=args.offload_seeds,
        distance=args.gradient_loss_fun,
        pixel_gradient=args.pixel_gradient,
        difference_step=args.difference_step,
        exact_bn=args.exact_bn,
        bn_grad=args.bn_grad,
        bn_coupling=args.bn_coupling,
        precision=args.precision,
        shared=args.shard,
        update_model=args.update_model,
        detect_anomaly=args.detect_anomaly,
    )


def _priors_from(args) -> dict[str, float]:
    """Return the weights of the priors in use; a searched one has the low end of its range."""
    forms_consensus = STRATEGIES[_strategy_from(args)].forms_consensus
    searched = tuned_names(args)
    weights = {
        name: RANGES[name].low if name in searched else prior_weight(args, name)
        for name, prior in PRIORS.items()
        if forms_consensus or not prior.needs_consensus
    }
    return {name: weight for name, weight in weights.items() if weight != 0}


def _schedule_from(args) -> MLCOSchedule:
    """Return the stages of MLCO; another strategy gets the defaults, which nothing reads."""
    if not STRATEGIES[_strategy_from(args)].forms_consensus:
        return MLCOSchedule()
    return MLCOSchedule(args.T_init_rate, args.total_T_in_rate, args.T_in, args.T_end_rate)


def _refuse_matching(args) -> None:
    """Refuse what concerns the matching of gradients where the gradient is solved instead."""
    if args.superparameters_search:
        raise InputError(
            "--superparameters-search: looks for settings of --attack matching; leave one of "
            "both out"
        )
    for flag, default in matching_flags().items():
        value = getattr(args, attribute_of(flag))
        if value != default:
            shown = flag if value is True else f"{flag} {value}"
            raise InputError(f"{shown}: concerns --attack matching, not layerwise; leave it out")


def _refuse_attack(args) -> None:
    names = tuned_names(args)
    if not args.lr > 0 and "lr" not in names:
        raise InputError(f"--lr {args.lr:g}: must be above 0; give a step size such as 0.1")
    if args.epochs is None and "epochs" not in names and not args.search_only:
        raise InputError(
            "--epochs: missing; give the number of iterations, such as 3000: a verdict is for a "
            "finished attack"
        )
    if args.chunk_size is not None and args.pixel_gradient != "exact":
        raise InputError(
            f"--chunk-size {args.chunk_size}: --pixel-gradient {args.pixel_gradient} keeps the "
            "graph of the whole batch; give one of them"
        )
    for flag in ("chunk_size", "max_memory"):
        if args.superparameters_search and getattr(args, flag) is not None:
            raise InputError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)}: the trials of a search take "
                "their whole batch at once; search first, and attack without the search"
            )
    if args.bn_coupling == "forced" and args.bn_grad == "detached":
        raise InputError(
            "--bn-coupling forced: leaves no batch statistics whose derivative --bn-grad detached "
            "would truncate; give one of them"
        )


def _refuse_derivative(args) -> None:
    """Refuse what the way to the derivative leaves without effect, or cannot do."""
    if args.pixel_gradient != FINITE_DIFFERENCES:
        if args.difference_step != DIFFERENCE_STEP:
            raise InputError(
                f"--difference-step {args.difference_step:g}: concerns --pixel-gradient "
                f"{FINITE_DIFFERENCES}, not {args.pixel_gradient}; leave it out"
            )
        return
    if args.bn_grad == "detached":
        raise InputError(
            f"--bn-grad detached: truncates a second derivative, and --pixel-gradient "
            f"{FINITE_DIFFERENCES} takes none; give one of them"
        )


def _reconstructs_labels(args) -> bool:
    return args.pseudo_label_init == "from_grads" or "labels" in (args.without or ())


def _refuse_inputs(args) -> None:
    if args.pseudo_label_init == "from_grads" and args.labels is not None:
        raise InputError(
            f"--labels {args.labels[:80]}: --pseudo-label-init from_grads finds the labels; give "
            "one of them"
        )
    for flag, unused in (("method", AUTO), ("aux", None), ("prior", "none")):
        value = getattr(args, f"label_{flag}")
        if not _reconstructs_labels(args) and value != unused:
            raise InputError(
                f"--label-{flag} {value}: says how labels are reconstructed; give "
                "--pseudo-label-init from_grads as well"
            )
    if args.bit_depth is not None and args.label_aux is None:
        raise InputError(
            f"--bit-depth {args.bit_depth}: is for the files of --label-aux; give it as well"
        )
    if args.label_method == AUTO:
        return
    method = LABEL_METHODS[args.label_method]
    if method.needs_auxiliary and args.label_aux is None:
        raise InputError(
            f"--label-method {args.label_method}: needs labelled images; give their folder by "
            "--label-aux"
        )
    if args.label_prior == "uniform" and not method.takes_uniform_labels:
        raise InputError(
            f"--label-prior uniform: concerns counts, not --label-method {args.label_method}; "
            "leave it out"
        )


def _refuse_optimiser(args) -> None:
    if args.TV_end is not None and args.TV == 0 and "tv" not in tuned_names(args):
        raise InputError(f"--TV-end {args.TV_end:g}: decays --TV, which is 0; give --TV as well")
    if args.cuda_graph:
        _refuse_graph(args)
    if args.precision != "float32" and args.pixel_gradient == FINITE_DIFFERENCES:
        raise InputError(
            f"--precision {args.precision}: rounds two derivatives by more than --pixel-gradient "
            f"{FINITE_DIFFERENCES} makes them differ; leave one of both out"
        )
    if args.optim == "LBFGS":
        for flag in ("grad_sign", "input_boxed", "input_noise"):
            if getattr(args, flag):
                raise InputError(
                    f"--{flag.replace('_', '-')}: L-BFGS learns the curvature from its own steps, "
                    "which this would change; leave it out, or give --optim Adam"
                )


def _refuse_graph(args) -> None:
    """Refuse what decides by numbers of the device where the device runs on its own."""
    if args.optim == "LBFGS":
        raise InputError(
            "--cuda-graph: the line search of --optim LBFGS decides by every loss; leave one of "
            "both out"
        )
    if args.detect_anomaly:
        raise InputError(
            "--cuda-graph: --detect-anomaly looks at every operation as it is computed; leave one "
            "of both out"
        )
    if args.search_only:
        raise InputError(
            "--cuda-graph: concerns the attack, which --search-only leaves out; leave one of both "
            "out"
        )


def _refuse_strategy(args) -> None:
    used = STRATEGIES[_strategy_from(args)]
    if args.grads_weight == 0 and not (_priors_from(args) or tuned_names(args)):
        raise InputError("--grads-weight 0: leaves no term in the objective; give a weight")
    if args.MinCombine and args.strategy not in ("best", "mlco"):
        raise InputError(f"--MinCombine: is --strategy mlco, not {args.strategy}; give one of them")
    shares = args.T_init_rate + args.total_T_in_rate + args.T_end_rate
    if used.forms_consensus and abs(shares - 1) > 1e-6:
        raise InputError(
            f"--T-init-rate {args.T_init_rate:g}: with --total-T-in-rate and --T-end-rate it sums "
            f"to {shares:g}; the three must sum to 1"
        )
    rounds = args.total_T_in_rate * (args.epochs or 0) / args.T_in
    if used.forms_consensus and rounds > MOST_ROUNDS:
        raise InputError(
            f"--T-in {args.T_in}: makes {rounds:,.0f} rounds, more than {MOST_ROUNDS:,}; give more "
            "iterations per round"
        )


def _refuse_scoring(args) -> None:
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


def _search_from(args) -> SearchSettings | None:
    """Return the search that the flags ask for; raise InputError for one that cannot run."""
    names = tuned_names(args)
    if args.superparameters_search and args.update_model in ("sme", "unroll"):
        raise InputError(
            f"--update-model {args.update_model}: a search tries the gradient at the state before; "
            "give --update-model mean"
        )
    if not args.superparameters_search:
        flags = [f"{tuned_flag(name)}-tune" for name in names]
        given = ("simulation_checkpoint", "ray_address", "search_resume", "search_only")
        flags += [f"--{flag.replace('_', '-')}" for flag in given if getattr(args, flag)]
        if flags:
            raise InputError(
                f"{flags[0]}: belongs to a search; give --superparameters-search as well"
            )
        return None
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
    cores = os.cpu_count() or 1
    if args.ray_address is None and args.cpus_per_trial > cores:
        raise InputError(
            f"--cpus-per-trial {args.cpus_per_trial:g}: this machine has {cores}, trials would "
            "wait for ever; give fewer"
        )
    return SearchSettings(
        simulation=args.simulation_checkpoint,
        parameters=tuple(names),
        algorithm=args.search_alg,
        num_samples=args.num_samples,
        steps=args.HP_epochs,
        first_report=args.min_t,
        last_report=args.max_t,
        max_concurrent=args.max_concurrent,
        cpus=args.cpus_per_trial,
        gpus=args.ngpus_per_trial,
        address=args.ray_address,
        resume=args.search_resume,
        only=args.search_only,
        allow_target=args.allow_target_as_simulation,
        verbose=args.verbose,
    )
