"""Searches for hyper-parameters with Ray Tune, on a batch of the attacker's own.

Every trial is the attack itself with other weights and step sizes, on a simulated client whose
images the attacker knows; the error of the trial's images is its score. No other file imports ray,
and this one only when a search runs.
"""

import contextlib
import importlib
import importlib.util
import math
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from inversion.search.trial import Problem, run_trial
from inversion.settings import RANGES, Range
from models.user_network import UserNetwork

#: How often a trial reports between its first report and its end.
REPORTS = 10
#: Name of a trial's state inside a checkpoint of Tune.
STATE_FILE = "state.pth"
#: Name of the search inside its folder.
TUNE_FOLDER = "tune"


@dataclass(frozen=True)
class Budget:
    """Says how many trials a search runs, and how long each of them may take."""

    #: Number of trials.
    num_samples: int
    #: Iterations after which a trial reports first, and from which on it may be ended early.
    first: int
    #: Iterations after which a trial ends.
    last: int

    def reports(self) -> list[int]:
        """Return the numbers of iterations after which a trial reports."""
        every = max(1, math.ceil((self.last - self.first) / REPORTS))
        return [*range(self.first, self.last, every), self.last]


@dataclass(frozen=True)
class Resources:
    """Says what trials may use, and where they run."""

    #: CPU cores per trial.
    cpus: float = 1.0
    #: GPUs per trial; a share of one lets several trials share it.
    gpus: float = 0.0
    #: Number of trials that may run at once.
    max_concurrent: int = 16
    #: Address of a Ray cluster; None for this machine.
    address: str | None = None
    #: Ray's runtime environment, by which trials find this project.
    packages: Mapping | None = None


@dataclass(frozen=True)
class SearchResult:
    """Holds what a search found."""

    #: A name in ALGORITHMS.
    algorithm: str
    #: Searched parameter → its value in the trial with the least error.
    best: dict[str, float]
    #: One per trial, the least error first: its parameters, its last report, how it ended.
    trials: list[dict] = field(default_factory=list)
    #: Number of picks that BOHB's model made; None for other algorithms.
    model_based: int | None = None


class SearchUnavailableError(Exception):
    """Says what a search lacks: a package, a state to go on from, or a trial that succeeded."""


def available(algorithm: str) -> tuple[str, str]:
    """Return the algorithm that "auto", or a name in ALGORITHMS, comes to here, and why.

    Raises SearchUnavailableError, saying what to install.
    """

    def installed(*modules):
        return all(importlib.util.find_spec(module) for module in modules)

    if not installed("ray"):
        raise SearchUnavailableError("needs ray: pip install 'ray[tune]'")
    has_bohb, has_optuna = installed("hpbandster", "ConfigSpace"), installed("optuna")
    if algorithm == "bohb" and not has_bohb:
        raise SearchUnavailableError(
            "bohb needs hpbandster and ConfigSpace: pip install -r requirements-bohb.txt"
        )
    if algorithm == "optuna" and not has_optuna:
        raise SearchUnavailableError("optuna is not installed: pip install optuna")
    if algorithm != "auto":
        return algorithm, "asked for"
    if has_bohb:
        return "bohb", "hpbandster and ConfigSpace are installed"
    if has_optuna:
        return "optuna", "hpbandster is not installed (requirements-bohb.txt)"
    return "random", "neither hpbandster nor optuna is installed"


def _tune_trial(config: dict, problem: Problem, reports: Sequence[int]) -> None:
    """Do `run_trial` inside Ray Tune, with checkpoints where Tune keeps them."""
    from ray import tune

    state = None
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            state = torch.load(f"{folder}/{STATE_FILE}", map_location="cpu", weights_only=True)

    def report(figures, state):
        with tempfile.TemporaryDirectory() as folder:
            torch.save(state, f"{folder}/{STATE_FILE}")
            tune.report(figures, checkpoint=tune.Checkpoint.from_directory(folder))

    run_trial(config, problem, reports, report, state)


def _random(seed, reports):
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    return BasicVariantGenerator(random_state=seed), ASHAScheduler(max_t=reports)


def _optuna(seed, reports):
    import optuna
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(sampler=optuna.samplers.TPESampler(seed=seed)), ASHAScheduler(max_t=reports)


def _bohb(seed, reports):
    from hpbandster.optimizers.config_generators.bohb import BOHB
    from ray.tune.schedulers import HyperBandForBOHB
    from ray.tune.search.bohb import TuneBOHB

    np.random.seed(seed)  # what hpbandster draws from

    class Generator(BOHB):
        """Counts the picks that come from its model rather than at random."""

        model_based = 0

        def get_config(self, budget):
            config, info = super().get_config(budget)
            self.model_based += bool(info.get("model_based_pick"))
            return config, info

    class Search(TuneBOHB):
        """TuneBOHB that survives a restart, after which it knows no trial's parameters."""

        def _setup_bohb(self):
            super()._setup_bohb()
            self.bohber = Generator(self._space, **(self._bohb_config or {}))

        def on_trial_result(self, trial_id, result):
            known = {k[7:]: v for k, v in result.items() if k.startswith("config/")}
            self.trial_to_params.setdefault(trial_id, known)
            super().on_trial_result(trial_id, result)

        def on_trial_complete(self, trial_id, result=None, error=False):
            self.trial_to_params.setdefault(trial_id, {})
            super().on_trial_complete(trial_id, result, error)

    return Search(seed=seed), HyperBandForBOHB(max_t=reports, reduction_factor=3)


#: name in `inversion.settings.SEARCH_ALGORITHMS` → function(seed, number of reports per trial) →
#: searcher and scheduler of Ray Tune. BOHB (Falkner et al., 2018), as the original; TPE (Bergstra
#: et al., 2011) by optuna with ASHA (Li et al., 2020); random search with ASHA.
ALGORITHMS = {"bohb": _bohb, "optuna": _optuna, "random": _random}


def search(
    problem: Problem,
    parameters: Sequence[str],
    budget: Budget,
    resources: Resources,
    *,
    algorithm: str,
    folder: str,
    resume: bool = False,
    verbose: int = 1,
) -> SearchResult:
    """Find the values of `parameters` (names in RANGES) with the least error of images.

    algorithm: a name in ALGORITHMS. folder: absolute path, in which Tune keeps the search as
    TUNE_FOLDER; with `resume` the one that lies there goes on, unfinished trials from their last
    report. verbose: 0 is silent, 1 Tune's own reports, 2 also what trials print. A failed trial is
    tried once more. Ray runs on this machine without dashboard, or on the cluster at
    `resources.address`.

    Raises SearchUnavailableError when nothing can be restored or no trial succeeded.
    """
    import ray

    carry_user_network(problem)
    options: dict[str, Any] = {
        "address": resources.address or "local",
        "runtime_env": resources.packages,
        "logging_level": "ERROR",
    }
    if resources.address is None:
        options["include_dashboard"] = False
    ray.init(log_to_driver=verbose > 1, **options)
    try:
        # also when resuming, since it seeds what the searcher draws from
        searched = _searched(problem, parameters, budget, resources, algorithm)
        trainable = _trainable(problem, budget, resources)
        if resume:
            tuner = _restored(trainable, folder)
        else:
            tuner = _new_tuner(trainable, searched, folder, verbose)
        with _ended_by_sigterm():
            results = tuner.fit()
        trials = [_row(results[index], parameters) for index in range(len(results))]
        # Tune has no public way to the searcher that really ran, nor any on a Ray client
        local = getattr(tuner, "_local_tuner", None)
        live = None if local is None else local._tune_config.search_alg
        return _summary(algorithm, trials, parameters, live)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within this context SIGTERM ends the search as Ctrl-C does; Ray would abort the process.

    SystemExit with the documented code leaves the context then.
    """
    came = []

    def end(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        if came:
            raise SystemExit(128 + came[0]) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def carry_user_network(problem: Problem) -> None:
    """Let the code of a user's network travel with the problem: no worker can import its module."""
    from ray import cloudpickle

    builder = problem.target.builder
    if isinstance(builder, UserNetwork):
        cloudpickle.register_pickle_by_value(importlib.import_module(builder.module))


def _trainable(problem: Problem, budget: Budget, resources: Resources):
    """Return what Tune runs as a trial."""
    from ray import tune

    return tune.with_resources(
        tune.with_parameters(_tune_trial, problem=problem, reports=budget.reports()),
        {"cpu": resources.cpus, "gpu": resources.gpus},
    )


def can_go_on(folder: str) -> bool:
    """Tell whether a search that can go on lies in `folder`."""
    from ray import tune

    return tune.Tuner.can_restore(f"{folder}/{TUNE_FOLDER}")


def _restored(trainable, folder: str):
    """Return the tuner of the search that lies in `folder`."""
    from ray import tune

    path = f"{folder}/{TUNE_FOLDER}"
    if not can_go_on(folder):
        raise SearchUnavailableError(f"{path} holds no search that can go on")
    return tune.Tuner.restore(path, trainable=trainable, restart_errored=False)


def _searched(
    problem: Problem,
    parameters: Sequence[str],
    budget: Budget,
    resources: Resources,
    algorithm: str,
) -> dict:
    """Return what is searched and how, as arguments of a tuner."""
    from ray import tune

    seed = problem.settings.first_seed
    searcher, scheduler = ALGORITHMS[algorithm](seed, len(budget.reports()))
    return {
        "param_space": {name: _domain(tune, RANGES[name]) for name in parameters},
        "tune_config": tune.TuneConfig(
            metric="mse",
            mode="min",
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=budget.num_samples,
            max_concurrent_trials=resources.max_concurrent,
        ),
    }


def _new_tuner(trainable, searched: dict, folder: str, verbose: int):
    """Return the tuner of a new search in `folder`."""
    from ray import tune

    run_config = tune.RunConfig(
        name=TUNE_FOLDER,
        storage_path=folder,
        verbose=min(verbose, 1),
        failure_config=tune.FailureConfig(max_failures=1),
    )
    return tune.Tuner(trainable, run_config=run_config, **searched)


def _domain(tune, range_: Range):
    if range_.kind == "integer":
        return tune.randint(int(range_.low), int(range_.high) + 1)
    return getattr(tune, range_.kind)(range_.low, range_.high)


def _row(result, parameters: Sequence[str]) -> dict:
    """Return a trial as a row: its parameters, its last report, and how it ended."""
    figures = result.metrics or {}
    row: dict[str, Any] = {"trial": str(figures.get("trial_id", ""))}
    row |= {name: (result.config or {}).get(name) for name in parameters}
    for key in ("mse", "gradient_loss", "iterations", "begun_at"):
        row[key] = figures.get(key)
    error = "" if result.error is None else " ".join(str(result.error).split())[-200:]
    return row | {"status": "failed" if error else "done", "error": error}


def _summary(
    algorithm: str, trials: list[dict], parameters: Sequence[str], searcher: Any
) -> SearchResult:
    """Choose the best trial, and ask the searcher for its model's picks where there is one."""
    good = [row for row in trials if row["status"] == "done" and row["mse"] is not None]
    if not good:
        errors = sorted({row["error"] for row in trials})
        raise SearchUnavailableError(f"no trial succeeded: {'; '.join(errors)[:300]}")
    best = min(good, key=lambda row: row["mse"])
    unknown = [name for name in parameters if best[name] is None]
    if unknown:
        raise SearchUnavailableError(
            f"this search was not over {', '.join(unknown)}; resume it with the flags it began with"
        )
    while hasattr(searcher, "searcher"):  # a limiter of concurrency around it
        searcher = searcher.searcher
    generator = getattr(searcher, "bohber", None)
    return SearchResult(
        algorithm,
        {name: best[name] for name in parameters},
        sorted(trials, key=lambda row: math.inf if row["mse"] is None else row["mse"]),
        None if generator is None else generator.model_based,
    )
