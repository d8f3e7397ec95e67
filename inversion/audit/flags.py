"""The command line of run.py."""

import argparse

from inversion.settings import (
    AUTO,
    BN_GRADIENTS,
    GRADIENT_DISTANCES,
    LABEL_METHODS,
    OPTIMISERS,
    PIXEL_GRADIENTS,
    PRIORS,
    RANGES,
    SEARCH_ALGORITHMS,
    SHARDS,
    SSIMS,
    STRATEGIES,
    VERDICT_METRICS,
)
from utils.flags import Parser, add_process_flags, file_name, integer_from, number


def parser() -> Parser:
    """All flags of the attacker."""
    parser = Parser(
        prog="run.py",
        description="The attacker: checkpoint → labels → reconstruction → tables and pictures.",
    )
    add = parser.add_argument_group("run").add_argument
    add("--id", type=file_name, default="test", help="results go to {root}/results/exp/{id}")
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
    add("--gradient-scale", type=number(above=0), default=1.0,
        help="factor of the client's loss, divided out; recorded clipping and noise are of the "
        "gradient without it")  # fmt: skip
    add("--target-gradient", choices=("true", "shuffled"), default="true",
        help="shuffled: a test of the controls, with nothing to find in it")  # fmt: skip

    add = parser.add_argument_group("label reconstruction").add_argument
    add("--label-method", choices=(AUTO, *LABEL_METHODS), default=AUTO,
        help="how from_grads finds labels")  # fmt: skip
    add("--label-aux", help="folder of labelled images of the attacker's own, a subfolder a class")
    add("--label-prior", choices=("none", "uniform"), default="none",
        help="uniform: labels are known to be drawn evenly from all classes")  # fmt: skip

    add = parser.add_argument_group("objective").add_argument
    add("--gradient-loss-fun", choices=GRADIENT_DISTANCES, default="sim",
        help="cosine distance or squared L2")  # fmt: skip
    add("--grads-weight", type=number(low=0), default=1.0, help="weight of the gradient distance")
    for prior in PRIORS.values():
        kind = number() if prior.signed else number(low=0)
        add(prior.flag, type=kind, default=prior.default, help=prior.help)
    add("--TV-end", type=number(above=0), help="weight of total variation at the end")
    add("--exact-bn", action="store_true", help="BN prior to the captured batch statistics")
    add("--bn-grad", choices=BN_GRADIENTS, default="exact",
        help="second derivative of BatchNorm; detached: as the original")  # fmt: skip
    add("--pixel-gradient", choices=PIXEL_GRADIENTS, default="exact", help="how it is computed")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=integer_from(1), help="iterations; must be given")
    add("--lr", type=number(), default=0.0, help="first step size; must be given")
    add("--optim", choices=OPTIMISERS, default="Adam", help="optimiser")
    add("--n-seed", type=integer_from(1), default=1, help="restarts")
    add("--grad-sign", action="store_true", help="step along the derivative's sign")
    add("--input-boxed", action="store_true", help="clamp to valid colours")
    add("--min-grads-loss", action="store_true", help="keep the best iterate, not the last")
    add("--input-noise", type=number(low=0),
        help="Langevin noise; default: 0.2 under --MinCombine, else none")  # fmt: skip

    add = parser.add_argument_group("several seeds").add_argument
    add("--strategy", choices=STRATEGIES, default="best", help="how seeds become one result")
    add("--MinCombine", action="store_true", help="the same as --strategy mlco")
    add("--T-init-rate", type=number(0, 1), default=0.3, help="MLCO: share of the first stage")
    add("--total-T-in-rate", type=number(0, 1), default=0.3, help="MLCO: share of the rounds")
    add("--T-in", type=integer_from(1), default=1000, help="MLCO: iterations a round")
    add("--T-end-rate", type=number(0, 1), default=0.4, help="MLCO: share of the last stage")
    add("--combine-memory", type=number(above=0), default=4096.0,
        help="MLCO: MiB that per-sample gradients may take")  # fmt: skip
    add("--offload-seeds", action="store_true", help="keep idle seeds in the CPU's memory")

    add = parser.add_argument_group("scoring").add_argument
    add("--metric", action="store_true", help="score against the truth")
    add("--one-to-one-similarity", action="store_true", help="pair by index, not by assignment")
    add("--verdict-metric", choices=VERDICT_METRICS, default="ssim",
        help="the metric that decides the verdict")  # fmt: skip
    add("--ssim", choices=SSIMS, default="gaussian",
        help="window of SSIM: Wang et al.'s, or the original's, on 8-bit images")  # fmt: skip
    add("--lpips-weights", help="backbone of LPIPS, alexnet-owt-7be5be79.pth")
    add("--GInfoR", action="store_true", help="gradient information ratio of every image")
    add("--controls", action=argparse.BooleanOptionalAction,
        help="attack without the gradient too; default: after up to 10 minutes")  # fmt: skip
    add = parser.add_argument_group("search of hyper-parameters").add_argument
    add("--superparameters-search", action="store_true",
        help="search on --simulation-checkpoint, then attack with what was found")  # fmt: skip
    add("--simulation-checkpoint", help="checkpoint with truth, of the attacker's own images")
    add(
        "--search-alg",
        choices=("auto", *SEARCH_ALGORITHMS),
        default="auto",
        help="search algorithm",
    )
    add("--num-samples", type=integer_from(1), default=64, help="trials")
    add("--HP-epochs", type=integer_from(1), default=5000,
        help="iterations that a trial's rate schedule is made for")  # fmt: skip
    add("--min-t", type=integer_from(1), default=2000, help="iteration of a trial's first report")
    add("--max-t", type=integer_from(1), default=3000, help="iteration at which a trial ends")
    for name in RANGES:
        add(f"{tuned_flag(name)}-tune", action="store_true", help=f"search {name}")
    add("--max-concurrent", type=integer_from(1), default=16, help="trials at once")
    add("--cpus-per-trial", type=number(above=0), default=1.0, help="CPUs a trial")
    add("--ngpus-per-trial", type=number(low=0),
        help="share of a GPU a trial; default: 0.5 with CUDA, else 0")  # fmt: skip
    add("--ray-address", help="join the Ray cluster at HOST:PORT; default: this machine alone")
    add("--search-resume", action="store_true", help="go on with the interrupted search of --id")
    add("--search-only", action="store_true", help="stop after the search")
    add("--allow-target-as-simulation", action="store_true",
        help="let the search read the target's own truth")  # fmt: skip
    add("--verbose", type=integer_from(0, 3), default=3, help="how much Ray Tune prints")
    add_process_flags(parser)
    parser.add_argument_group("several processes").add_argument(
        "--shard", choices=SHARDS, default="batch", help="what the processes share out"
    )
    return parser


def prior_weight(args, name: str) -> float:
    """The weight that the prior's own flag was given."""
    return getattr(args, attribute_of(PRIORS[name].flag))


def tuned_flag(name: str) -> str:
    """The flag of a parameter that can be searched, a name in RANGES."""
    return PRIORS[name].flag if name in PRIORS else f"--{name.replace('_', '-')}"


def attribute_of(flag: str) -> str:
    """Where argparse keeps a flag's value."""
    return flag.lstrip("-").replace("-", "_")


def tuned_names(args) -> list[str]:
    """The parameters that are searched."""
    return [name for name in RANGES if getattr(args, attribute_of(f"{tuned_flag(name)}-tune"))]
