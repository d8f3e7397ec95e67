"""What an attack is asked to do: its choices by name, and its settings as plain values.

This file imports nothing heavy. Both scripts read their command line and refuse it by what stands
here, before they spend seconds on importing torch. The functions behind the names stand in
registries of the same keys beside their kind; tests/test_settings.py compares the two.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Range:
    """Says where a search looks for a value: its kind of distribution, from low to high."""

    #: "uniform", "loguniform" or "integer".
    kind: str
    low: float
    high: float


@dataclass(frozen=True)
class Prior:
    """Says how a prior's weight is set and what it needs; its function is in PRIOR_FUNCTIONS."""

    #: The flag of its weight.
    flag: str
    #: The help text of the flag.
    help: str
    #: Whether its weight may be negative.
    signed: bool = False
    #: Whether it reads the batch's moments at the BatchNorm layers.
    needs_moments: bool = False
    #: Whether it counts only while there is a consensus, whatever its weight.
    needs_consensus: bool = False
    #: Its weight where the flag is not given.
    default: float = 0.0
    #: Where a search looks for the weight; None if no search does.
    range: Range | None = None


#: name → Prior. The name is the column in losses.csv and the key in result.json; the function of
#: that name is in `inversion.priors.PRIOR_FUNCTIONS`.
PRIORS = {
    "tv": Prior("--TV", "Weight of total variation.", range=Range("loguniform", 1e-6, 0.1)),
    "bn": Prior(
        "--BN",
        "Weight of the BN-statistics prior.",
        needs_moments=True,
        range=Range("loguniform", 1e-6, 0.1),
    ),
    "group": Prior(
        "--Group",
        "Weight of group consistency in the rounds of --MinCombine.",
        needs_consensus=True,
        default=0.01,
    ),
    "norm": Prior(
        "--input-norm",
        "Weight of the images' l2 norm; it may be negative: --input-norm=-1e-6.",
        signed=True,
        range=Range("uniform", -1e-6, 0.0),
    ),
}


@dataclass(frozen=True)
class LabelMethod:
    """Says what a label method needs; its function is in `inversion.labels.reconstruct`."""

    #: Whether it needs labelled images of the attacker's own.
    needs_auxiliary: bool = False
    #: Whether it needs the BatchNorm statistics that the client sent.
    needs_uploaded_bn: bool = False
    #: Whether it needs the gradient of the head's bias.
    needs_bias_gradient: bool = False
    #: Whether it can use that labels are drawn evenly from all classes.
    takes_uniform_labels: bool = False


#: name → LabelMethod; `--label-method`.
LABEL_METHODS = {
    "e2egi": LabelMethod(),
    "idlg": LabelMethod(),
    "gradinversion": LabelMethod(),
    "llg": LabelMethod(),
    "bias-corrected": LabelMethod(),
    "ilrg": LabelMethod(),
    "counts": LabelMethod(takes_uniform_labels=True),
    "counts-aux": LabelMethod(needs_auxiliary=True, needs_bias_gradient=True),
    "counts-bn": LabelMethod(
        needs_auxiliary=True, needs_uploaded_bn=True, needs_bias_gradient=True
    ),
}
#: The label method that `choose_method` chooses by what is at hand.
AUTO = "auto"


@dataclass(frozen=True)
class Strategy:
    """Describes a strategy over several seeds; its function is in `inversion.strategies`."""

    #: Whether it forms a consensus of the seeds in stages (`MLCOSchedule`).
    forms_consensus: bool = False
    #: Whether its result is made of all seeds alike, whatever their losses.
    averages: bool = False
    #: Langevin noise where none is asked for, as a factor of the rate; with Adam alone.
    noise: float = 0.0


#: name → Strategy; `--strategy`.
STRATEGIES = {
    "best": Strategy(),
    "mean": Strategy(averages=True),
    "mlco": Strategy(forms_consensus=True, noise=0.2),
}

#: `--attack`: match the gradient by optimising images, solve it layer by layer, or try that first.
ATTACKS = ("matching", "layerwise", "auto")
#: `--update-model`: what an update of several local steps is compared with. The gradient at a place
#: between the two states that is learned (inversion/surrogate.py); the gradient at the state
#: before; the update of the candidate's own local steps.
UPDATE_MODELS = ("sme", "mean", "unroll")
#: `--gradient-loss-fun`; functions in `inversion.distances.GRADIENT_DISTANCES`.
GRADIENT_DISTANCES = ("sim", "L2")
#: `--pixel-gradient`; functions in `inversion.pixel_gradient.PIXEL_GRADIENTS`.
FINITE_DIFFERENCES = "finite-differences"
PIXEL_GRADIENTS = ("exact", "plain", FINITE_DIFFERENCES)
#: `--difference-step`: by how much finite differences move the weights, relative to their norm.
DIFFERENCE_STEP = 1e-3
#: The pixel gradient of the control that ignores the gradient of the client.
PRIOR_ONLY = "prior only"
#: `--optim`; functions in `inversion.optimise.OPTIMISERS`.
OPTIMISERS = ("Adam", "LBFGS")
#: `--bn-grad`: BatchNorm's whole second derivative, or the original's truncated one.
BN_GRADIENTS = ("exact", "detached")
#: `--bn-coupling`: BatchNorm by the candidate's own statistics, or by those that the client sent.
BN_COUPLINGS = ("exact", "forced")
#: `--precision`: number format of the network's passes; contexts in
#: `inversion.precision.PRECISION_CONTEXTS`.
PRECISIONS = ("float32", "tf32", "bf16")
#: `--shard`: what several processes share out, the images of a batch or whole seeds.
SHARDS = ("batch", "seeds")
#: `--verdict-metric`: metrics in which leakage is told.
VERDICT_METRICS = ("psnr", "ssim", "lpips")
#: `--ssim`; functions in `utils.metrics.SSIMS`.
SSIMS = ("gaussian", "original")
#: `--search-alg`; functions in `inversion.search.tune.ALGORITHMS`.
SEARCH_ALGORITHMS = ("bohb", "optuna", "random")
#: Parameter that a search can look for → range, for those that are no prior's weight.
LOOP_RANGES = {
    "epochs": Range("integer", 5000, 20000),
    "lr": Range("uniform", 0.1, 1.0),
    "grads_weight": Range("uniform", 0.01, 1.0),
}
#: Every parameter that a search can look for → range.
RANGES: dict[str, Range] = LOOP_RANGES | {
    name: prior.range for name, prior in PRIORS.items() if prior.range is not None
}


@dataclass(frozen=True)
class Weights:
    """Weights of the objective's terms.

    Raises ValueError for an unknown prior, and for a geometric course that is not positive.
    """

    #: Weight of the gradient distance, ≥ 0.
    gradient: float = 1.0
    #: Name in PRIORS → weight at the first iteration; one left out or 0 is not computed.
    priors: Mapping[str, float] = field(default_factory=dict)
    #: Name → weight at the last iteration, approached geometrically; both ends must be positive.
    #: A prior without an entry keeps its weight.
    priors_end: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name in (*self.priors, *self.priors_end):
            if name not in PRIORS:
                raise ValueError(f"no prior {name}; there are {', '.join(PRIORS)}")
        for name, end in self.priors_end.items():
            if end <= 0 or self.priors.get(name, 0) <= 0:
                raise ValueError(f"a geometric course of {name} needs two positive weights")

    def at(self, progress: float) -> dict[str, float]:
        """Return the weights of the priors in use at `progress` in [0, 1] of the run."""
        weights = {name: weight for name, weight in self.priors.items() if weight != 0}
        for name, end in self.priors_end.items():
            weights[name] *= (end / weights[name]) ** progress
        return weights


@dataclass(frozen=True)
class Loop:
    """Settings of one optimisation.

    Raises ValueError where steps or lr are not positive, and where L-BFGS is combined with what
    would change the curvature that it learns.
    """

    #: Number of iterations, ≥ 1.
    steps: int
    #: First step size, > 0; it falls along a cosine to min(1e-3, lr).
    lr: float
    #: A name in OPTIMISERS.
    optimiser: str = "Adam"
    #: Step along the sign of the derivative.
    signed: bool = False
    #: (low, high), each (C, 1, 1), to which the images are clamped after every step.
    box: "tuple[Tensor, Tensor] | None" = None
    #: Return the iterate with the lowest gradient loss instead of the last one.
    keep_best: bool = False
    #: ≥ 0: after every step rate · noise · N(0, 1) is added (Langevin dynamics, Welling & Teh,
    #: 2011).
    noise: float = 0.0
    #: Iterations after which it ends early, in 1 … steps: as a run did that had to; None for none.
    until: int | None = None
    #: Iterations at most between two readings of the losses from the device. A GPU that is asked
    #: less often does not wait for the host; nothing else depends on it.
    read_every: int = 1
    #: Compute an iteration by a CUDA graph; with Adam, in one process, on a GPU.
    cuda_graph: bool = False

    def __post_init__(self):
        if self.steps < 1 or self.lr <= 0:
            raise ValueError(f"steps {self.steps} and lr {self.lr} must be positive")
        if not 1 <= self.length <= self.steps:
            raise ValueError(f"until {self.until} must be in 1 … {self.steps}")
        if self.optimiser == "LBFGS" and (self.signed or self.box is not None or self.noise):
            raise ValueError(
                "L-BFGS learns the curvature from its own steps: no signs, no box, no noise"
            )
        if self.read_every < 1:
            raise ValueError(f"read_every {self.read_every} must be positive")
        if self.cuda_graph and self.optimiser != "Adam":
            raise ValueError(f"{self.optimiser} decides by its losses: no cuda_graph")

    @property
    def length(self) -> int:
        """Number of iterations that it takes."""
        return self.steps if self.until is None else self.until

    def rate(self, step: int) -> float:
        """Return the step size at iteration `step` of 0 … steps − 1."""
        low = min(1e-3, self.lr)
        return low + (self.lr - low) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def progress(self, step: int) -> float:
        """Return the share of the run done at iteration `step`: 0 at the first, 1 at the last."""
        return step / max(1, self.steps - 1)


@dataclass(frozen=True)
class MLCOSchedule:
    """Divides the iterations into the three stages of MLCO; the shares sum to 1.

    Raises ValueError for shares that do not, and for rounds without an iteration.
    """

    #: Share of the first stage, in which every seed runs alone.
    initial: float = 0.3
    #: Share of the rounds, in which every seed is pulled towards the consensus.
    inner: float = 0.3
    #: Iterations per round; after each the consensus is formed anew.
    inner_steps: int = 1000
    #: Share of the last stage, in which the consensus alone is refined.
    final: float = 0.4

    def __post_init__(self):
        total = self.initial + self.inner + self.final
        if abs(total - 1) > 1e-6 or min(self.initial, self.inner, self.final) < 0:
            raise ValueError(f"the stages' shares must be at least 0 and sum to 1, not {total:g}")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps {self.inner_steps} must be positive")

    def spans(self, steps: int) -> tuple[range, list[range], range]:
        """Return the iterations of the initial stage, of each round and of the final stage.

        steps: the number of iterations in all.
        """
        first = round(self.initial * steps)
        last = round((self.initial + self.inner) * steps)
        rounds = [
            range(start, min(start + self.inner_steps, last))
            for start in range(first, last, self.inner_steps)
        ]
        return range(first), rounds, range(last, steps)

    def iterations(self, steps: int, num_seeds: int) -> int:
        """Return the number of iterations of all seeds and the consensus together."""
        _, _, final = self.spans(steps)
        return num_seeds * final.start + len(final)


@dataclass(frozen=True)
class AttackSettings:
    """Says what the attack computes. No file, flag or printer is named here."""

    weights: Weights
    #: Without box and noise, which `loop_in` adds.
    loop: Loop
    #: A name in ATTACKS; all other settings but `max_memory` concern the matching.
    method: str = "matching"
    #: Bytes that a dense system may take while the gradient is solved layer by layer.
    max_memory: int = 8 * 2**30
    #: Images of each process whose graph is kept at the same time; AUTO for as many as fit, None
    #: for all.
    chunk_size: int | str | None = None
    #: Bytes that the matching may take, by which chunks are planned; None for no limit.
    matching_memory: int | None = None
    #: Langevin noise as in `Loop`; None for that of the strategy.
    noise: float | None = None
    #: Clamp the images to valid colours after every step.
    boxed: bool = False
    first_seed: int = 0
    num_seeds: int = 1
    #: A name in STRATEGIES.
    strategy: str = "best"
    schedule: MLCOSchedule = MLCOSchedule()
    #: Bytes that the per-sample gradients of a combination may take.
    combine_memory: int = 4 * 2**30
    #: Keep idle seeds in the CPU's memory.
    offload_seeds: bool = False
    #: A name in GRADIENT_DISTANCES.
    distance: str = "sim"
    #: A name in PIXEL_GRADIENTS, or PRIOR_ONLY.
    pixel_gradient: str = "exact"
    #: By how much `finite-differences` moves the weights, relative to their norm, > 0.
    difference_step: float = DIFFERENCE_STEP
    #: Pull the BN prior to the batch statistics that the client sent, where it sent them.
    exact_bn: bool = False
    #: A name in BN_GRADIENTS.
    bn_grad: str = "exact"
    #: A name in BN_COUPLINGS.
    bn_coupling: str = "exact"
    #: A name in PRECISIONS.
    precision: str = "float32"
    #: A name in SHARDS: what several processes share out.
    shared: str = "batch"
    #: A name in UPDATE_MODELS; None for "sme" where several local steps were sent, else "mean".
    update_model: str | None = None
    #: Let torch check every operation of the derivative, and end at the first that gives a NaN.
    detect_anomaly: bool = False

    @property
    def seeds(self) -> range:
        """The seeds of all restarts, by number."""
        return range(self.first_seed, self.first_seed + self.num_seeds)

    @property
    def forms_consensus(self) -> bool:
        """Whether the strategy forms a consensus of the seeds."""
        return STRATEGIES[self.strategy].forms_consensus

    @property
    def prior_names(self) -> list[str]:
        """The priors in use, in the order of their columns in losses.csv."""
        return [name for name, weight in self.weights.priors.items() if weight != 0]

    def total_iterations(self, num_seeds: int) -> int:
        """Return the number of iterations of all stages with `num_seeds` seeds."""
        if self.forms_consensus:
            return self.schedule.iterations(self.loop.steps, num_seeds)
        return num_seeds * self.loop.length

    def loop_in(self, box: "tuple[Tensor, Tensor]") -> Loop:
        """Return the settings of each optimisation; box: lowest and highest valid colours."""
        return replace(self.loop, box=box if self.boxed else None, noise=self._noise)

    @property
    def _noise(self) -> float:
        if self.noise is not None:
            return self.noise
        return STRATEGIES[self.strategy].noise if self.loop.optimiser == "Adam" else 0.0

    def _without_consensus(self, **changes: Any) -> "AttackSettings":
        priors = {n: w for n, w in self.weights.priors.items() if not PRIORS[n].needs_consensus}
        return replace(
            self, strategy="best", num_seeds=1, weights=replace(self.weights, priors=priors),
            **changes,
        )  # fmt: skip

    def for_trials(self, steps: int) -> "AttackSettings":
        """Return the settings of a search's trials: one seed, with rates for `steps` iterations.

        Two attacks with the same trials have equal settings here, whatever else they differ in.
        """
        default = AttackSettings(self.weights, self.loop)
        return self._without_consensus(
            loop=replace(self.loop, steps=steps, keep_best=False, cuda_graph=False),
            noise=self._noise,
            schedule=default.schedule,
            combine_memory=default.combine_memory,
            max_memory=default.max_memory,
            chunk_size=default.chunk_size,
            matching_memory=default.matching_memory,
            offload_seeds=default.offload_seeds,
            shared=default.shared,
        )

    def without_gradient(self) -> "AttackSettings":
        """Return the settings of the control that has priors only.

        Nothing can be chosen by a gradient distance, so one seed serves most strategies, to the
        end without consensus and so without the strategy's own Langevin noise; one that averages
        needs all seeds. BatchNorm's statistics are not the client's, neither as a goal nor forced.
        """
        changes: dict[str, Any] = {
            "pixel_gradient": PRIOR_ONLY, "exact_bn": False, "bn_coupling": "exact",
        }  # fmt: skip
        if STRATEGIES[self.strategy].averages:
            return replace(self, **changes)
        return self._without_consensus(**changes)

    def with_values(self, values: Mapping[str, float]) -> "AttackSettings":
        """Return the settings with searched parameters, names in RANGES, at these values."""
        priors = {**self.weights.priors, **{n: v for n, v in values.items() if n in PRIORS}}
        weights = replace(
            self.weights,
            gradient=values.get("grads_weight", self.weights.gradient),
            priors={name: priors[name] for name in PRIORS if name in priors},
        )
        loop = replace(
            self.loop,
            lr=values.get("lr", self.loop.lr),
            steps=int(values.get("epochs", self.loop.steps)),
        )
        return replace(self, weights=weights, loop=loop)
