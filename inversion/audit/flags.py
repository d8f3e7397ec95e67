"""The command line of run.py."""

import argparse

from inversion.audit.withhold import withheld_parts
from inversion.settings import (
    ATTACKS,
    AUTO,
    BN_COUPLINGS,
    BN_GRADIENTS,
    DIFFERENCE_STEP,
    GRADIENT_DISTANCES,
    LABEL_METHODS,
    OPTIMISERS,
    PIXEL_GRADIENTS,
    PRECISIONS,
    PRIORS,
    RANGES,
    SEARCH_ALGORITHMS,
    SHARDS,
    SSIMS,
    STRATEGIES,
    UPDATE_MODELS,
    VERDICT_METRICS,
)
from models.choices import SWEEP_PARAMETERS
from utils.flags import (
    Parser,
    add_process_flags,
    duration_from,
    file_name,
    integer_from,
    mebibytes,
    number,
)


def parser() -> Parser:
    """Return the parser of all flags of the attacker."""
    parser = Parser(
        prog="run.py",
        description="The attacker: checkpoint → labels → reconstruction → tables and pictures.",
    )
    _add_run(parser.add_argument_group("run").add_argument)
    _add_target(parser.add_argument_group("target").add_argument)
    _add_knowledge(parser.add_argument_group("what the attacker lacks").add_argument)
    _add_attack(parser.add_argument_group("attack").add_argument)
    _add_labels(parser.add_argument_group("label reconstruction").add_argument)
    _add_objective(parser.add_argument_group("objective").add_argument)
    _add_updates(parser.add_argument_group("several local steps").add_argument)
    _add_optimisation(parser.add_argument_group("optimisation").add_argument)
    _add_seeds(parser.add_argument_group("several seeds").add_argument)
    _add_scoring(parser.add_argument_group("scoring").add_argument)
    _add_search(parser.add_argument_group("search of hyper-parameters").add_argument)
    _add_audit(parser.add_argument_group("a whole audit").add_argument)
    _add_sweep(parser.add_argument_group("sweep of defences").add_argument)
    add_process_flags(parser)(
        "--shard",
        choices=SHARDS,
        default="batch",
        help="What the processes share out: the images of a batch, or whole seeds.",
    )
    return parser


def _add_run(add) -> None:
    add(
        "--id",
        type=file_name,
        default="test",
        help="Name of the run; its results go to {root}/results/exp/{id}.",
    )
    add("--root", default="./", help="Folder of the results; it is created where it is missing.")
    add(
        "--seed",
        type=integer_from(0),
        default=0,
        help="Seed of the first initial images; restart i of seed s is restart 0 of seed s + i.",
    )
    add(
        "--gpu",
        type=int,
        help="Number of the GPU to compute on. Without it: the first GPU, else the CPU.",
    )
    add(
        "-p",
        "--print-freq",
        type=integer_from(1),
        default=500,
        help="Iterations between two progress lines, where no terminal shows a bar.",
    )
    add(
        "--dry-run",
        action="store_true",
        help="Check everything, measure two steps, print time and memory, and stop.",
    )
    add(
        "--save-every",
        type=duration_from(0.0, or_zero=True),
        default="5m",
        help="Time between two saves of the run, such as 30s or 5m, from which a killed run goes "
        "on; 0 saves nothing.",
    )
    add(
        "--resume",
        metavar="FOLDER",
        help="Go on with the killed run whose results are in this folder; give the run's own "
        "flags again.",
    )


def _add_target(add) -> None:
    add(
        "--checkpoint",
        nargs="+",
        action=_OneOrSeveral,
        help="File that training.py or the original project wrote; required. With --audit several.",
    )
    add(
        "--model",
        help="FILE.py:function that builds the network, if it came from such a file. The file is "
        "run.",
    )
    add(
        "--truth",
        nargs="+",
        action=_OneOrSeveral,
        help="Sealed truth file, for --metric, --GInfoR and known labels. With --audit several.",
    )
    add(
        "--labels",
        help="Labels by hand, such as 3,1,2, or a file of them; under "
        "binary cross-entropy a row of K numbers per image.",
    )
    add(
        "--pseudo-label-init",
        choices=("known", "from_grads"),
        default="known",
        help="Where labels come from: the truth or --labels, or the gradient.",
    )
    add(
        "--gradient-scale",
        type=number(above=0),
        default=1.0,
        help="Factor by which the client multiplied its loss, as mixed precision does. The "
        "gradient is divided by it. Recorded clipping and noise refer to the gradient without it.",
    )
    add(
        "--target-gradient",
        choices=("true", "shuffled"),
        default="true",
        help="shuffled: permute the entries of the gradient, to check that the verdict becomes "
        '"no leakage shown".',
    )


def _add_knowledge(add) -> None:
    add(
        "--without",
        type=withheld_parts,
        help="Withhold parts from the attacker, such as bn,labels, to see what they buy: bn (the "
        "uploaded BatchNorm statistics), labels, normalisation (0.5 is assumed), protection (the "
        "report of clipping and noise).",
    )


def _add_attack(add) -> None:
    add(
        "--attack",
        choices=ATTACKS,
        default="matching",
        help="matching: optimise images until their gradient is the client's; layerwise: solve the "
        "gradient for the network's tensors, from the head to the image, as far as it goes; auto: "
        "layerwise where that determines the images, else matching.",
    )
    add(
        "--max-memory",
        type=mebibytes,
        help="Memory that the attack may take, such as 20GiB, 512MiB or a number of MiB. Matching "
        "takes as many images at a time as fit, or is refused; --attack layerwise ends at a layer "
        "whose equations need more. Without it: 8GiB for layerwise, no limit for matching.",
    )


def _add_labels(add) -> None:
    add(
        "--label-method",
        choices=(AUTO, *LABEL_METHODS),
        default=AUTO,
        help="How from_grads finds labels; auto chooses a method and says why.",
    )
    add(
        "--label-aux",
        help="Folder of labelled images of the attacker's own, one subfolder per class, sorted "
        "as the classes are.",
    )
    add(
        "--bit-depth",
        type=integer_from(8, 16),
        help="For --label-aux: bits per grey value in image files of more than 8 bits that do not "
        "say it. Without it: 16.",
    )
    add(
        "--label-prior",
        choices=("none", "uniform"),
        default="none",
        help="uniform: the attacker knows that labels are drawn evenly from all classes.",
    )


def _add_objective(add) -> None:
    add(
        "--gradient-loss-fun",
        choices=GRADIENT_DISTANCES,
        default="sim",
        help="sim: cosine distance over all parameters; L2: squared distance.",
    )
    add("--grads-weight", type=number(low=0), default=1.0, help="Weight of the gradient distance.")
    for prior in PRIORS.values():
        kind = number() if prior.signed else number(low=0)
        add(prior.flag, type=kind, default=prior.default, help=prior.help)
    add(
        "--TV-end",
        type=number(above=0),
        help="Weight of total variation at the last iteration, approached geometrically.",
    )
    add(
        "--exact-bn",
        action="store_true",
        help="Pull the BN prior to the batch statistics that the client sent, not to the running "
        "ones.",
    )
    add(
        "--bn-grad",
        choices=BN_GRADIENTS,
        default="exact",
        help="Second derivative of BatchNorm; detached is the original's truncated one.",
    )
    add(
        "--bn-coupling",
        choices=BN_COUPLINGS,
        default="exact",
        help="forced: BatchNorm by the uploaded statistics and their gradients, held constant.",
    )
    add(
        "--pixel-gradient",
        choices=PIXEL_GRADIENTS,
        default="exact",
        help="How the derivative of the pixels is computed; plain is the slow twin of exact. "
        "finite-differences takes no second derivative and less time, but is not exact: with ReLU "
        "it has another direction, so the attack is another one.",
    )
    add(
        "--difference-step",
        type=number(low=0, high=1, above=0),
        default=DIFFERENCE_STEP,
        help="--pixel-gradient finite-differences: by how much the weights move, relative to their "
        "norm.",
    )


def _add_updates(add) -> None:
    add(
        "--update-model",
        choices=UPDATE_MODELS,
        help="What an update of several local steps is compared with. sme: the gradient at a "
        "place between the two states, which is learned; mean: the gradient at the state before; "
        "unroll: the candidate's own local steps. Without it: sme.",
    )


def _add_optimisation(add) -> None:
    add(
        "--epochs",
        type=integer_from(1),
        help="Number of iterations; required unless a search finds it.",
    )
    add(
        "--lr",
        type=number(low=-1e30, high=1e30),
        default=0.0,
        help="First step size, required; it falls along a cosine to min(1e-3, lr).",
    )
    add(
        "--optim",
        choices=OPTIMISERS,
        default="Adam",
        help="Optimiser. LBFGS allows no signs, no box and no noise; try it with --lr 1.",
    )
    add(
        "--detect-anomaly",
        action="store_true",
        help="Let torch check every operation of the derivative, and end at the first that gives "
        "a NaN, with its name; slow.",
    )
    add(
        "--chunk-size",
        type=chunk_size,
        metavar="N",
        help="Images of each process that are taken at a time, so that memory does not grow with "
        "the batch; auto takes as many as fit into --max-memory, or else into what is free. "
        "Without it: all.",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="Number format of the network's passes. tf32: TensorFloat-32, on NVIDIA GPUs; bf16: "
        "automatic mixed precision with bfloat16. Scores and reported distances of other images "
        "stay float32.",
    )
    add(
        "--cuda-graph",
        action="store_true",
        help="Launch every iteration on the GPU as one CUDA graph; with Adam, in one process.",
    )
    add("--n-seed", type=integer_from(1), default=1, help="Number of restarts.")
    add("--grad-sign", action="store_true", help="Step along the sign of the derivative.")
    add("--input-boxed", action="store_true", help="Clamp to valid colours after every step.")
    add(
        "--min-grads-loss",
        action="store_true",
        help="Keep the iterate with the lowest gradient loss, not the last one.",
    )
    add(
        "--input-noise",
        type=number(low=0),
        help="Langevin noise as a factor of the step size. Without it: 0.2 under --MinCombine, "
        "up to the final stage, and none elsewhere.",
    )


def _add_seeds(add) -> None:
    add(
        "--strategy",
        choices=STRATEGIES,
        default="best",
        help="best: the seed with the lowest gradient loss; mean: the mean of all seeds' images; "
        "mlco: Minimum Loss Combinatorial Optimisation.",
    )
    add("--MinCombine", action="store_true", help="The same as --strategy mlco.")
    add(
        "--T-init-rate",
        type=number(0, 1),
        default=0.3,
        help="MLCO: share of the iterations in which every seed runs alone.",
    )
    add(
        "--total-T-in-rate",
        type=number(0, 1),
        default=0.3,
        help="MLCO: share of the rounds, in which the consensus pulls every seed.",
    )
    add("--T-in", type=integer_from(1), default=1000, help="MLCO: iterations per round.")
    add(
        "--T-end-rate",
        type=number(0, 1),
        default=0.4,
        help="MLCO: share of the final stage, in which the consensus alone is refined; the three "
        "shares sum to 1.",
    )
    add(
        "--combine-memory",
        type=number(low=0, high=1e12, above=0),
        default=4096.0,
        help="MLCO: MiB that per-sample gradients may take; beyond it the combination is greedy.",
    )
    add(
        "--offload-seeds",
        action="store_true",
        help="Keep seeds that are not being optimised in the CPU's memory.",
    )


def _add_scoring(add) -> None:
    add("--metric", action="store_true", help="Score the reconstruction against the truth.")
    add(
        "--one-to-one-similarity",
        action="store_true",
        help="Pair images by index, not by the best one-to-one assignment.",
    )
    add(
        "--verdict-metric",
        choices=VERDICT_METRICS,
        default="ssim",
        help="Metric that decides the verdict; PSNR where SSIM has no value, under 11 pixels.",
    )
    add(
        "--ssim",
        choices=SSIMS,
        default="gaussian",
        help="Window of SSIM: Wang et al.'s, or the original's, uniform on 8-bit images.",
    )
    add(
        "--lpips-weights",
        help="Backbone of LPIPS, alexnet-owt-7be5be79.pth. Without it: that of the torch hub "
        "cache, else LPIPS is n/a.",
    )
    add(
        "--GInfoR",
        action="store_true",
        help="Compute the gradient information ratio of every image; it needs the truth.",
    )
    add(
        "--controls",
        action=argparse.BooleanOptionalAction,
        help="Attack without the client's gradient too, to score beside it. Without either flag: "
        "if the attack took at most ten minutes.",
    )


def _add_search(add) -> None:
    add(
        "--superparameters-search",
        action="store_true",
        help="Search on the simulation first, then attack with the best settings.",
    )
    add("--simulation-checkpoint", help="Checkpoint with truth, of images of the attacker's own.")
    add(
        "--search-alg",
        choices=("auto", *SEARCH_ALGORITHMS),
        default="auto",
        help="Search algorithm; auto takes the first one that is installed.",
    )
    add("--num-samples", type=integer_from(1), default=64, help="Number of trials.")
    add(
        "--HP-epochs",
        type=integer_from(1),
        default=5000,
        help="Iterations that each trial's rate schedule is made for.",
    )
    add("--min-t", type=integer_from(1), default=2000, help="Iteration of a trial's first report.")
    add("--max-t", type=integer_from(1), default=3000, help="Iteration at which a trial ends.")
    for name, found in RANGES.items():
        scale = {"loguniform": " on a log scale", "uniform": ", evenly", "integer": ""}[found.kind]
        add(
            f"{tuned_flag(name)}-tune",
            action="store_true",
            help=f"Search {tuned_flag(name)} from {found.low:g} to {found.high:g}{scale}.",
        )
    add("--max-concurrent", type=integer_from(1), default=16, help="Trials that run at once.")
    add("--cpus-per-trial", type=number(above=0), default=1.0, help="CPUs per trial.")
    add(
        "--ngpus-per-trial",
        type=number(low=0),
        help="Share of a GPU per trial. Without it: 0.5 with CUDA, else 0.",
    )
    add("--ray-address", help="Join the Ray cluster at HOST:PORT. Without it: this machine alone.")
    add(
        "--search-resume",
        action="store_true",
        help="Go on with the interrupted search of this --id.",
    )
    add("--search-only", action="store_true", help="Stop after the search.")
    add(
        "--allow-target-as-simulation",
        action="store_true",
        help="Let the search read the target's own truth.",
    )
    add(
        "--verbose",
        type=integer_from(0, 3),
        default=3,
        help="How much Ray Tune prints, from 0 to 3.",
    )


def _add_audit(add) -> None:
    add(
        "--audit",
        action="store_true",
        help="Run the whole suite on one or several checkpoints: labels, every attack with its "
        "controls and its test, the positive control; it sets every --attack flag itself.",
    )
    add(
        "--budget",
        type=duration_from(1.0),
        help="Time of the whole audit, such as 90s, 5m or 1h. Without it: 5m.",
    )
    add(
        "--no-images",
        action="store_true",
        help="Keep the client's images, and reconstructions of them, out of all files of --audit.",
    )


def chunk_size(text: str) -> int | str:
    """Return a number of images, or AUTO (a flag type)."""
    return AUTO if text == AUTO else integer_from(1)(text)


class _OneOrSeveral(argparse.Action):
    """Keeps one value as itself, and several as a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values[0] if len(values) == 1 else values)


def suite_flags() -> dict[str, object]:
    """Return the flags that --audit sets itself, with their defaults."""
    found = _defaults_of(
        _add_attack, _add_objective, _add_updates, _add_optimisation, _add_seeds, _add_search,
        _add_sweep,
    )  # fmt: skip
    del found["--max-memory"]
    return found


def _add_sweep(add) -> None:
    add(
        "--sweep",
        action="append",
        metavar="PARAM=V1,V2",
        help="Simulate the client of --checkpoint once per value, attack each, and compare: "
        f"{', '.join(SWEEP_PARAMETERS)}.",
    )
    add(
        "--repeats",
        type=integer_from(1),
        default=1,
        help="--sweep: batches per value, from that of the checkpoint on.",
    )
    add(
        "--sweep-workers",
        type=integer_from(1),
        default=1,
        help="--sweep: attacks that run at the same time, in a process and a thread each.",
    )
    add(
        "--sweep-TV",
        metavar="V1,V2",
        help="--sweep: attack each client with each of these weights of --TV, and tell the "
        "strongest attack, with its p corrected for their number.",
    )
    add(
        "--keep-checkpoints",
        action="store_true",
        help="--sweep: keep the checkpoints of the simulated clients, with their truth.",
    )


def matching_flags() -> dict[str, object]:
    """Return the flags that concern the matching of gradients alone, with their defaults."""
    return _defaults_of(_add_objective, _add_updates, _add_optimisation, _add_seeds)


def _defaults_of(*groups) -> dict[str, object]:
    """Return the flags that these functions add, with their defaults."""
    found: dict[str, object] = {}

    def note(flag: str, *_, default: object = None, action: str = "", **__) -> None:
        found[flag] = False if action == "store_true" else default

    for add_flags in groups:
        add_flags(note)
    return found


def prior_weight(args, name: str) -> float:
    """Return the weight that the prior's own flag was given."""
    return getattr(args, attribute_of(PRIORS[name].flag))


def tuned_flag(name: str) -> str:
    """Return the flag of a parameter that can be searched, a name in RANGES."""
    return PRIORS[name].flag if name in PRIORS else f"--{name.replace('_', '-')}"


def attribute_of(flag: str) -> str:
    """Return the attribute in which argparse keeps a flag's value."""
    return flag.lstrip("-").replace("-", "_")


def tuned_names(args) -> list[str]:
    """Return the names in RANGES of the parameters to search."""
    return [name for name in RANGES if getattr(args, attribute_of(f"{tuned_flag(name)}-tune"))]
