"""A search of hyper-parameters: its problem, its folder, its report."""

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inversion.audit.flags import tuned_flag
from inversion.audit.inputs import bn_source, check_device, load_inputs, user_network_of
from inversion.audit.settings import SearchSettings, Settings, settings_from
from inversion.audit.truth import check_truth_gradient
from inversion.search.trial import Problem
from inversion.search.tune import (
    Budget,
    Resources,
    SearchResult,
    SearchUnavailableError,
    available,
    can_go_on,
    search,
)
from inversion.settings import AttackSettings
from models import checkpoint as checkpoints
from models.batchnorm import batchnorm_layers
from models.forced import forced_statistics
from models.reading import target_from_checkpoint, truth_from_checkpoint
from models.target import GroundTruth, Target, check_fits, model_of
from utils.console import Reporter, Silent, table
from utils.errors import FaultError, InputError, naming
from utils.files import claim_folder, null_unless_finite, printable, write_csv, write_json
from utils.flags import file_name
from utils.journal import FORGETFUL, Journal, reading
from utils.pictures import save_trials
from utils.script import check_reachable
from utils.shard import ALONE

#: Names under which a run's journal holds the name of its search's folder, and in the place of
#: that what the search found.
FOLDER, RECORD = "search-folder", "search"
ROOT = Path(__file__).resolve().parent.parent.parent
#: Root mean square difference of normalised images up to which they are the same image.
SAME_IMAGE = 1e-2
#: What a target and its simulation must have in common.
ALIKE = (
    "arch", "replace_bn", "num_classes", "image_shape", "train_mode", "label_smoothing",
    "loss_kind",
)  # fmt: skip
#: Ray: no usage reports, nothing written beside the search, trials saved as they report.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # an interrupted search is no finished one
}
#: What a cluster's machines need not get of this folder.
RAY_EXCLUDED = [".git", ".venv*", "results", "train/checkpoint", "Demo_images", "docs", "tests"]


@dataclass(frozen=True)
class Prepared:
    """Holds a search that can begin."""

    wanted: SearchSettings
    problem: Problem
    #: A name in `inversion.search.tune.ALGORITHMS`.
    algorithm: str
    #: Of each trial.
    gpus: float
    #: The folder of the search that --search-resume goes on with; None without it.
    former: Path | None


def prepare_search(settings: Settings, reporter: Reporter) -> Prepared:
    """Load all that a search needs, and say what it will do.

    Raises InputError, naming the flag, for what can be refused before the long work.
    """
    wanted = settings.search
    assert wanted is not None
    _refuse_machine(wanted, settings.inputs.gpu)
    gpus = wanted.gpus
    if gpus is None:
        gpus = 0.5 if torch.cuda.is_available() else 0.0
    problem = load_problem(settings, wanted, "cuda" if gpus else "cpu")
    load_inputs(settings, Silent(), ALONE, 0)  # refuse before the long work
    algorithm, why = available(wanted.algorithm)
    reporter.say(
        f"search: {algorithm} ({why}), {wanted.num_samples} trials of {wanted.first_report} to "
        f"{wanted.last_report} iterations over {', '.join(wanted.parameters)}; {wanted.cpus:g} "
        f"CPUs and {gpus:g} GPUs each"
    )
    former = _newest_folder(settings) if wanted.resume and not settings.dry_run else None
    return Prepared(wanted, problem, algorithm, gpus, former)


def run_search(
    settings: Settings, prepared: Prepared, reporter: Reporter, journal: Journal = FORGETFUL
) -> dict:
    """Search, report, write, and return the entry `search` of result.json.

    journal: of the run that the search belongs to. One that has ended is taken from there, and one
    that was killed goes on.
    """
    if (known := journal.recall(RECORD)) is not None:
        with reading("the search"):
            best = {str(name): float(value) for name, value in known["best"].items()}
        reporter.say(f"the search was done before: {_best_line(best)}")
        return known
    folder, resume = _folder_of(settings, prepared, journal)
    reporter.say(f"search kept in {folder}; go on with it by --search-resume")
    os.environ.update(RAY_ENVIRONMENT)
    if os.path.expanduser("~") == "~":  # no HOME and an unknown user: Ray asks for a home
        os.environ["HOME"] = str(folder)
    wanted = prepared.wanted
    try:
        found = search(
            prepared.problem,
            wanted.parameters,
            Budget(wanted.num_samples, wanted.first_report, wanted.last_report),
            _resources(wanted, prepared.gpus, settings.inputs.model),
            algorithm=prepared.algorithm,
            folder=str(folder),
            resume=resume,
            verbose=wanted.verbose,
        )
    except (SearchUnavailableError, ConnectionError) as error:
        text = " ".join(str(error).split())[:300]
        raise FaultError(f"the search in {folder} ended without a result: {text}") from error
    record = {
        "algorithm": found.algorithm,
        "best": found.best,
        "model_based_picks": found.model_based,
        "trials": null_unless_finite(found.trials),
    }
    header = list(found.trials[0])
    rows = [[trial[key] for key in header] for trial in found.trials]
    write_csv(header, rows, folder / "trials.csv")
    save_trials(found.trials, wanted.parameters, folder / "trials.png")
    write_json(record, folder / "search.json")
    journal.drop(FOLDER)
    journal.note(RECORD, lambda: record)
    journal.save()
    _say(found, reporter)
    return record


def _refuse_machine(wanted: SearchSettings, gpu: int | None) -> None:
    """Raise InputError for a search that this machine or its packages cannot run."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is not None and gpus > 1:
        raise InputError(
            f"--gpu {gpu}: trials take every GPU; set CUDA_VISIBLE_DEVICES={gpu} instead"
        )
    if wanted.gpus and wanted.gpus > max(1, gpus):
        raise InputError(
            f"--ngpus-per-trial {wanted.gpus:g}: this machine has {gpus}, trials would wait for "
            "ever; give less"
        )
    if wanted.gpus and not gpus:
        raise InputError(
            f"--ngpus-per-trial {wanted.gpus:g}: no CUDA device here, trials would wait for ever; "
            "leave it out"
        )
    try:
        available(wanted.algorithm)
    except SearchUnavailableError as error:
        raise InputError(f"--search-alg {wanted.algorithm}: {error}") from error
    if wanted.address is not None:
        check_reachable(wanted.address, "--ray-address")


def _resources(wanted: SearchSettings, gpus: float, model: str | None) -> Resources:
    """Say what trials take. model: FILE.py:function, whose folder trials on this machine see."""
    packages: Mapping = {"working_dir": str(ROOT), "excludes": RAY_EXCLUDED}
    if wanted.address is None:
        beside = None if model is None else os.path.dirname(os.path.abspath(model))
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH"), beside])]
        packages = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    return Resources(wanted.cpus, gpus, wanted.max_concurrent, wanted.address, packages)


# The problem -------------------------------------------------------------------------------


def load_problem(settings: Settings, wanted: SearchSettings, device: str) -> Problem:
    """Load the attack on the simulated client, which trials run.

    Raises InputError where the simulation is unlike the target, or is the target itself.
    """
    source = f"--simulation-checkpoint {wanted.simulation}"
    with naming(source):
        simulation = checkpoints.load(wanted.simulation)
    with naming(f"--checkpoint {settings.inputs.checkpoint}"):
        checkpoint = checkpoints.load(settings.inputs.checkpoint)
    builder = user_network_of(settings.inputs, checkpoint)
    with naming(f"--checkpoint {settings.inputs.checkpoint}"):
        target = target_from_checkpoint(checkpoint, builder)
        check_fits(target)
    if simulation.get("x_true") is None or simulation.get("y_true") is None:
        raise InputError(f"{source}: holds no truth to score trials by; capture it without --seal")
    simulated = target_from_checkpoint(simulation, builder)
    _refuse_unlike(settings.attack, target, simulated, source)
    with naming(source):
        check_fits(simulated)
        checkpoints.check_truth(simulation, simulation)
    truth = truth_from_checkpoint(simulation, builder=builder)
    assert truth is not None  # its entries are there
    model = model_of(simulated)
    if not wanted.allow_target and _shares_images(settings, checkpoint, truth, target, model):
        raise InputError(
            f"{source}: is the target itself, or holds images of it, and the search reads its "
            "truth; capture other images of your own, or give --allow-target-as-simulation"
        )
    if "bn" in wanted.parameters and not batchnorm_layers(model):
        raise InputError(f"--BN-tune: {simulated.arch} has no BatchNorm layer; leave it out")
    trial = settings.attack.for_trials(wanted.steps)
    check_device(trial, torch.device(device))
    if trial.bn_coupling == "forced":
        with naming(f"{source}, under --bn-coupling forced"):
            forced_statistics(model, simulated)
    return Problem(
        model=model,
        target=simulated,
        truth=truth,
        y=truth.y,
        settings=trial,
        bn_source=bn_source(trial, simulated) or "running",
        device=device,
    )


def _refuse_unlike(
    settings: AttackSettings, target: Target, simulated: Target, source: str
) -> None:
    if settings.exact_bn and target.bn_mean is not None and simulated.bn_mean is None:
        raise InputError(f"{source}: holds no BN statistics, which the target has; --upload-bn")
    for what in ALIKE:
        ours, theirs = getattr(simulated, what), getattr(target, what)
        if ours != theirs:
            raise InputError(
                f"{source}: its {what} is {ours}, the target's {theirs}; capture it as the target"
            )


def _shares_images(
    settings: Settings, checkpoint: dict, truth: GroundTruth, target: Target, model: nn.Module
) -> bool:
    """Tell whether the simulation holds images of the target.

    By the target's truth where a file of this command holds it, so that noise and clipping do not
    hide it; also by the gradient of the simulation's images.
    """
    inputs = settings.inputs
    source, name = checkpoint, f"--checkpoint {inputs.checkpoint}"
    if inputs.truth is not None:
        name = f"--truth {inputs.truth}"
        with naming(name):
            source = checkpoints.load_truth(inputs.truth)
    x_true = source.get("x_true")
    if x_true is not None and source.get("y_true") is not None:
        with naming(name):
            checkpoints.check_truth(source, checkpoint)
        near = torch.cdist(truth.x.double().flatten(1), x_true.double().flatten(1))
        if bool((near < SAME_IMAGE * truth.x[0].numel() ** 0.5).any()):
            return True
    if target.batch_size != len(truth.x):
        return False
    x = truth.x.to(target.gradient[0].dtype)
    return check_truth_gradient(model, target, x, truth.y).kind in ("same", "scaled")


# The folder --------------------------------------------------------------------------------


def _searches(settings: Settings) -> Path:
    """Return the folder in which searches lie."""
    return Path(settings.root).resolve() / "results" / "search"


def _folder_of(settings: Settings, prepared: Prepared, journal: Journal) -> tuple[Path, bool]:
    """Return the folder of the search, and whether it goes on with what lies there.

    The journal holds the folder's name, which is looked for where searches lie.
    """
    if (name := journal.recall(FOLDER)) is not None:
        with reading("the search"):
            folder = _searches(settings) / file_name(name)
        if not folder.is_dir():
            raise InputError(
                f"--resume: the search of this run lay in {printable(str(folder))}, which is gone; "
                "start the run anew"
            )
        return folder, can_go_on(str(folder))
    former = prepared.former
    folder = claim_folder(_searches(settings) / settings.id) if former is None else former
    if former is None:
        write_json(settings.record, folder / "flags.json")
    journal.note(FOLDER, lambda: folder.name)
    journal.save()
    return folder, former is not None


def _newest_folder(settings: Settings) -> Path:
    """Return the folder of the newest search of this --id; raise InputError for other flags."""
    path = _searches(settings) / settings.id
    found = {file: json.loads(file.read_text()) for file in path.parent.glob("*/flags.json")}
    found = {file: flags for file, flags in found.items() if flags.get("id") == settings.id}
    if not found:
        raise InputError(f"--search-resume: {path} holds no search to go on with; leave it out")
    newest = max(found, key=lambda file: file.stat().st_mtime_ns)
    for key, value in settings.record.items():
        before = found[newest].get(key)
        if before != value and not _same_trials(settings, key, before):
            raise InputError(
                f"--search-resume: {newest.parent} was begun with {key} {before}, not {value}; "
                "give the flags it was begun with"
            )
    return newest.parent


def _same_trials(settings: Settings, key: str, value: object) -> bool:
    """Tell whether trials are the same with this other value of a flag."""
    try:
        other = settings_from(argparse.Namespace(**{**settings.record, key: value}))
    except InputError:
        return False
    return _trials_of(other) == _trials_of(settings)


def _trials_of(settings: Settings) -> tuple:
    """Return all that a search's trials depend on."""
    wanted = settings.search
    if wanted is None:
        return ()
    free: dict[str, Any] = {
        "max_concurrent": 0, "cpus": 0.0, "gpus": None, "address": None, "resume": False,
        "only": False, "allow_target": False, "verbose": 0,
    }  # fmt: skip
    return settings.attack.for_trials(wanted.steps), replace(wanted, **free)


def _say(found: SearchResult, reporter: Reporter) -> None:
    shown = [key for key in found.trials[0] if key != "error"]
    reporter.say(table(shown, [[trial[key] for key in shown] for trial in found.trials]))
    if found.model_based is not None:
        reporter.say(f"picks from BOHB's model: {found.model_based}")
    for trial in found.trials:
        if trial["status"] == "failed":
            reporter.say(f"trial {trial['trial']} failed twice: {trial['error']}")
    reporter.say(_best_line(found.best))


def _best_line(best: Mapping[str, float]) -> str:
    """Name the settings of least error, as flags."""
    shown = "  ".join(f"{tuned_flag(name)} {value:.6g}" for name, value in best.items())
    return f"best settings: {shown}"
