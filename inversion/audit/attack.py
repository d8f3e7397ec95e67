"""Running the attack: the plan before it, what is recorded on the way, and how it ended."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from inversion.audit.inputs import Case, public_images
from inversion.chunks import coupled
from inversion.combine import Combination
from inversion.layerwise.attack import Recovered, layerwise_attack
from inversion.layerwise.images import PUBLIC_IMAGES as LAYERWISE_PUBLIC_IMAGES
from inversion.layerwise.layer import Layer
from inversion.objective import Losses
from inversion.optimise import Outcome, Reconstruction, lowest
from inversion.pixel_gradient import pixel_gradient_of
from inversion.restarts import Restarts, noise_generator
from inversion.settings import AttackSettings
from inversion.step_graph import GraphError
from inversion.strategies import STRATEGIES
from models.gradient import kept_bytes
from utils.console import Progress, Reporter
from utils.device import peak_memory_mib
from utils.errors import InputError, StateError, telling_memory
from utils.journal import FORGETFUL, Journal, read_only, reading
from utils.memory import free_memory
from utils.script import Stop
from utils.shard import ALONE, Shard

#: Rows of losses.csv per seed at most.
RECORDED_STEPS = 2000
#: What stands in the place of a seed's number in the rows of the consensus.
CONSENSUS = "consensus"


@dataclass
class Recorder:
    """Follows the iterations: progress, rows for losses.csv, rounds, and the wish to stop."""

    settings: AttackSettings
    progress: Progress
    interrupts: Stop
    #: Called with the iterations done and the images of a new consensus, if at all.
    save_consensus: Callable[[int, Tensor], None] | None = None
    #: What stands before every line.
    title: str = ""
    #: Number of a seed, or CONSENSUS → its rows of losses.csv, in the order of `header`.
    rows_of: dict[str | int, list] = field(default_factory=dict)
    #: What every round of MLCO chose.
    rounds: list[dict] = field(default_factory=list)
    #: Where rows, rounds and the time are saved.
    journal: Journal = FORGETFUL

    def go_on(self) -> None:
        """Take rows, rounds and time from where a killed run had saved them, and save them on."""
        settings, saved = self.settings, self.journal.recall("progress")
        with reading("the progress"):
            for name in [*settings.seeds, CONSENSUS]:
                rows = self.journal.recall(f"rows-{name}") or []
                if rows:
                    self.rows_of[name] = [list(r) for r in rows if len(r) == len(self.header)]
            self.rounds += [dict(entry) for entry in self.journal.recall("rounds") or []]
            if saved is not None:
                self.progress.done = int(saved["done"])
                self.progress.start -= float(saved["seconds"])
        self.journal.note("progress", self._progress, always=True)

    def end(self) -> float:
        """Return the seconds that the attack took, those before a kill included."""
        now = self._progress()
        self.journal.note("progress", lambda: now)
        return now["seconds"]

    def _progress(self) -> dict:
        return {
            "done": self.progress.done, "seconds": time.perf_counter() - self.progress.start,
        }  # fmt: skip

    @property
    def rows(self) -> list:
        """The rows of losses.csv, seed by seed and the consensus last."""
        return in_order([row for rows in self.rows_of.values() for row in rows])

    @property
    def header(self) -> list[str]:
        """The columns of losses.csv."""
        return ["seed", "iteration", "rate", "total", "gradient", *self.settings.prior_names]

    def on_step(self, index: int | None, step: int, losses: Losses, rate: float) -> bool:
        """Record an iteration of seed number `index`, or of the consensus; true asks to stop."""
        settings, steps = self.settings, self.settings.loop.steps
        name: str | int = CONSENSUS if index is None else settings.first_seed + index
        gradient = {} if losses.gradient is None else {"gradient": losses.gradient}
        values = {"total": losses.total, **gradient, **losses.terms}
        self.progress.step(self.title + (CONSENSUS if index is None else f"seed {name}"), values)
        if step % max(1, steps // RECORDED_STEPS) == 0 or step == steps - 1:
            terms = [losses.terms.get(term, "") for term in settings.prior_names]
            row = [name, step, rate, losses.total, losses.gradient, *terms]
            rows = self.rows_of.setdefault(name, [])
            while rows and rows[-1][1] >= step:  # saved by a run that failed after its last moment
                rows.pop()
            rows.append(row)
            self.journal.note(f"rows-{name}", partial(list, rows), order=step + 1)
        return self.interrupts.should_stop

    def on_round(self, done: int, combination: Combination) -> None:
        """Record a consensus formed after `done` iterations of every seed."""
        if self.save_consensus is not None:
            self.save_consensus(done, combination.x)
        seeds = [self.settings.first_seed + index for index in combination.choice]
        best = combination.seed_losses[lowest(combination.seed_losses)]
        self.progress.reporter.say(
            f"{self.title}consensus after {done} iterations: gradient loss {combination.loss:.6g}, "
            f"of the best seed {best:.6g}; images "
            + ", ".join(f"{n} of seed {seed}" for seed, n in sorted(Counter(seeds).items()))
        )
        # one may have been saved by a run that failed before its consensus was
        self.rounds[:] = [entry for entry in self.rounds if entry["iteration"] < done]
        self.rounds.append(
            {
                "iteration": done,
                "seeds": seeds,
                "gradient_loss": combination.loss,
                "seed_gradient_losses": list(combination.seed_losses),
                "image_gradients": combination.image_gradients,
            }
        )
        rounds = list(self.rounds)
        self.journal.note("rounds", lambda: rounds, order=len(rounds))


def run_attack(settings: AttackSettings, case: Case, recorder: Recorder) -> Outcome:
    """Run the strategy over all seeds."""
    home = torch.device("cpu") if settings.offload_seeds else case.device
    objective = case.objective
    loop = settings.loop_in(case.target.box)
    if case.device.type != "cpu":  # a GPU would wait for whoever reads a loss
        loop = replace(loop, read_every=recorder.progress.every)
    restarts = Restarts(
        starts=[case.start(seed).to(home) for seed in settings.seeds],
        generators=[noise_generator(seed, case.device) for seed in settings.seeds],
        loop=loop,
        schedule=settings.schedule,
        combine_memory=settings.combine_memory,
        seed_shard=ALONE if settings.shared == "batch" else case.processes,
        on_step=recorder.on_step,
        on_round=recorder.on_round,
        should_stop=lambda: objective.batch_shard.any(recorder.interrupts.should_stop),
        journal=recorder.journal,
    )
    pixel_gradient = pixel_gradient_of(settings)
    with telling_memory(partial(_step_memory, settings, case)), refusing_graphs():
        return STRATEGIES[settings.strategy](objective, pixel_gradient, restarts)


@contextlib.contextmanager
def refusing_graphs() -> Iterator[None]:
    """Within this context, an iteration that cannot be recorded as a graph refuses --cuda-graph."""
    try:
        yield
    except GraphError as error:
        raise InputError(
            f"--cuda-graph: an iteration cannot be recorded: {error}; leave it out"
        ) from error


def _step_memory(settings: AttackSettings, case: Case) -> str:
    """Tell what an iteration takes at least, and how many images may fit."""
    target, device = case.target, case.device
    share = case.processes.size if settings.shared == "batch" else 1
    images = -(-target.batch_size // share)
    if case.objective.chunk_size is not None:
        images = min(images, case.objective.chunk_size)
    each = kept_bytes(case.objective.model, target.image_shape, target.train_mode) / 2
    there = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else free_memory()
    fit = images // 2 if not (each and there) else min(images // 2, int(there / each))
    fewer = "capture fewer" if coupled(case.objective) else f"give --chunk-size {fit}"
    return (
        f"an iteration with {images} images {target.image_shape} per process takes more than "
        f"{each * images / 2**20:,.1f} MiB; "
        + (f"at most {fit} may fit: {fewer}" if fit else "take smaller images")
        + ", or take a device with more memory"
    )


@dataclass(frozen=True)
class Attacked:
    """Holds an attack that has run, with what the recorder noted of it."""

    outcome: Outcome
    #: (B, C, H, W) reconstruction as colours in [0, 1], on the CPU.
    images: Tensor
    #: Rows of losses.csv of all processes, and their columns.
    rows: list
    header: list[str]
    rounds: list[dict]
    seconds: float
    peak_memory_mib: float
    #: Whether any process was asked to stop.
    interrupted: bool
    #: What a layerwise attack found; None for one that matched gradients.
    recovered: Recovered | None = None

    @property
    def failed(self) -> bool:
        """Whether no seed had a finite loss."""
        return math.isnan(self.outcome.final.losses.criterion)

    @property
    def failure(self) -> str:
        """Why it failed, where it did."""
        reasons = [run.reason for run in self.outcome.runs if run.reason is not None]
        return "no seed had a finite loss at its start: nothing was reconstructed" + "".join(
            f"; {reason}" for reason in reasons[:1]
        )

    @property
    def stopped(self) -> str | None:
        """Why it ended early, None where all iterations ran."""
        return "interrupted" if self.interrupted else self.outcome.final.stopped

    def gradient_losses(self, settings: AttackSettings) -> list[list[float]]:
        """Return the course of the gradient loss of the final run, or of all seeds of a mean."""
        curves: dict = {}
        for row in self.rows:
            curves.setdefault(row[0], []).append(row[4])
        chosen = self.outcome.chosen
        name = CONSENSUS if chosen is None else settings.first_seed + chosen
        return [curves[name]] if name in curves else list(curves.values())


def attack(
    settings: AttackSettings,
    case: Case,
    interrupts: Stop,
    reporter: Reporter,
    *,
    print_freq: int,
    title: str = "",
    save_consensus: Callable[[int, Tensor], None] | None = None,
    journal: Journal = FORGETFUL,
) -> Attacked:
    """Run an attack from its settings to its images, and report its progress.

    By the method "auto" the gradient is solved first, and matched where that does not determine
    the images; an interruption of solving leaves what was recovered until then.

    print_freq: iterations between two progress lines, each of which begins with `title`.
    save_consensus(iterations, x): called with every consensus. journal: where the attack is saved
    on its way and when it is interrupted, and from where a killed one goes on.
    """
    if settings.method != "matching":
        attacked, why = _solve(case, interrupts, reporter, title, settings.max_memory, journal)
        enough = settings.method == "layerwise" or not why
        if attacked is not None and (enough or attacked.interrupted):
            return attacked
        if settings.method == "layerwise":
            raise InputError(f"--attack layerwise: {why}; give --attack matching")
        reporter.say(f"{title}matching, since solving layer by layer does not do: {why}")
    if settings.shared == "batch" and not case.processes.is_main:
        journal = read_only(journal)  # all compute the same batch, and the first one saves it
    total = settings.total_iterations(own_seeds(settings, case.processes))
    progress = Progress(total, print_freq, reporter)
    recorder = Recorder(settings, progress, interrupts, save_consensus, title, journal=journal)
    recorder.go_on()
    case.processes.any(False)  # all have recalled it before one of them saves
    try:
        outcome = run_attack(settings, case, recorder)
    finally:
        progress.close()
    seconds = recorder.end()
    if asked_to_stop(case, interrupts):
        journal.save()
    rows = recorder.rows
    if settings.shared == "seeds":
        rows = _all_rows(rows, case.processes)
    return Attacked(
        outcome,
        case.images(outcome.final.x),
        rows,
        recorder.header,
        recorder.rounds,
        seconds,
        peak_memory_mib(case.device),
        interrupted=asked_to_stop(case, interrupts),
    )


def _solve(
    case: Case, interrupts: Stop, reporter: Reporter, title: str, max_memory: int, journal: Journal
) -> tuple[Attacked | None, str]:
    """Solve the gradient layer by layer; return what it gave, and why that is not enough, or "".

    Nothing is returned where the network or what was sent does not allow it.
    """
    target = case.target
    journal = journal.under("layerwise")
    if not case.processes.is_main:
        journal = read_only(journal)  # all compute the same, and the first one saves it

    def on_layer(layer: Layer) -> None:
        verdict = "certified" if layer.certified else "not certified"
        reporter.say(
            f"{title}{layer.name}: rank {layer.rank} of {layer.unknowns}, residual "
            f"{layer.residual:.1e}, {verdict}, {layer.seconds:.1f} s"
        )

    def on_recalled(layer: Layer) -> None:
        verdict = "certified" if layer.certified else "not certified"
        reporter.say(f"{title}{layer.name}: {verdict}, from the saved state")

    public = public_images(LAYERWISE_PUBLIC_IMAGES, target).to(case.device)
    try:
        found = layerwise_attack(
            case.objective.model, target, case.y, public, on_layer=on_layer,
            on_recalled=on_recalled, should_stop=lambda: interrupts.should_stop,
            max_memory=max_memory, journal=journal,
        )  # fmt: skip
    except StateError:
        raise
    except ValueError as error:
        return None, str(error)
    x = found.images.to(target.gradient[0].dtype)
    losses = case.objective.value(x, 1.0).floats()
    stopped = "interrupted" if interrupts.stopped else None
    reconstruction = Reconstruction(x, losses, len(found.layers), stopped)
    outcome = Outcome(reconstruction, (reconstruction,), 0, len(found.layers))
    attacked = Attacked(
        outcome, case.images(x), [], [], [], found.seconds,
        peak_memory_mib(case.device), interrupted=interrupts.stopped, recovered=found,
    )  # fmt: skip
    return attacked, found.shortfall


def asked_to_stop(case: Case, interrupts: Stop) -> bool:
    """Return whether any process was asked to stop; the answer is the same on all of them."""
    return case.processes.any(interrupts.stopped)


def own_seeds(settings: AttackSettings, processes: Shard) -> int:
    """Return the number of seeds that this process runs."""
    if settings.shared == "batch":
        return settings.num_seeds
    return sum(processes.owns(index) for index in range(settings.num_seeds))


def _all_rows(rows: list, processes: Shard) -> list:
    """Rows of losses.csv of all processes that ran whole seeds, the consensus only once."""
    parts = processes.objects(rows)
    return in_order(
        [row for rank, part in enumerate(parts) for row in part if row[0] != CONSENSUS or not rank]
    )


def in_order(rows: list) -> list:
    """Return rows of losses.csv seed by seed, those of the consensus last."""
    return sorted(rows, key=lambda row: math.inf if row[0] == CONSENSUS else row[0])


def outcome_lines(settings: AttackSettings, outcome: Outcome) -> list[str]:
    """Describe how every seed ended and which one was chosen, a line each."""
    lines = []
    first = settings.first_seed
    hint = "" if settings.detect_anomaly else ", and --detect-anomaly may name the operation"
    runs = [(f"seed {first + index}", run) for index, run in enumerate(outcome.runs)]
    if outcome.chosen is None:
        runs.append((CONSENSUS, outcome.final))
    for name, run in runs:
        if run.stopped == "interrupted":
            lines.append(
                f"{name}: interrupted after {run.steps} iterations; what there is will be saved"
            )
        elif run.stopped is not None:
            lines.append(
                f"{name}: {run.reason}, so it ended after {run.steps} iteration(s); its best "
                f"images are kept{hint}"
            )
    chosen = settings.strategy if outcome.chosen is None else f"seed {first + outcome.chosen}"
    losses = outcome.final.losses
    terms = "  ".join(f"{name} {value:.4g}" for name, value in losses.terms.items())
    if losses.alpha is not None:
        terms += f"  between the states at alpha {losses.alpha:.3f}"
    return [*lines, f"chosen: {chosen}  gradient loss {losses.gradient:.6g}  {terms}"]
