"""Updates of several local steps: which model of them the attack takes, and what is told of it."""

from inversion.settings import FINITE_DIFFERENCES, AttackSettings
from models.target import Target
from utils.errors import InputError


def update_model_of(settings: AttackSettings, target: Target) -> str:
    """Return the model of the update that the settings come to, a name in UPDATE_MODELS.

    Without one in the settings: the surrogate for several local steps, else the gradient itself.

    Raises InputError for a model that the target or the other settings do not allow.
    """
    asked = settings.update_model
    if target.local is None:
        if asked in (None, "mean"):
            return "mean"
        raise InputError(
            f"--update-model {asked}: the checkpoint holds one gradient, not an update of several "
            "local steps; leave it out"
        )
    name = asked or "sme"
    if name != "mean" and settings.strategy != "best":
        raise InputError(
            f"--update-model {name}: --strategy {settings.strategy} mixes images of several seeds, "
            "each of which goes by local steps of its own; give --update-model mean"
        )
    if name != "mean" and settings.pixel_gradient == FINITE_DIFFERENCES:
        raise InputError(
            f"--pixel-gradient {FINITE_DIFFERENCES}: takes the gradient at one state, not by the "
            f"update model {name}; give --update-model mean, or --pixel-gradient exact"
        )
    if name == "sme" and settings.loop.optimiser == "LBFGS":
        raise InputError(
            "--update-model sme: its place moves between two evaluations, which the line search of "
            "--optim LBFGS does not allow; give --optim Adam"
        )
    return name


def update_lines(name: str, target: Target) -> list[str]:
    """Say what was sent and what it is compared with; nothing for a gradient."""
    local = target.local
    if local is None:
        return []
    models = {
        "sme": "the gradient at a place between the states before and after, which is learned",
        "mean": "the gradient at the state before",
        "unroll": "the candidate's own local steps",
    }
    each = "" if local.batch is None else f" of {local.batch} images each, in the batch's order"
    return [
        f"what was sent is an update of {local.steps} local steps{each}, step size {local.lr:g}; "
        f"it is compared with {models[name]} (--update-model {name})"
    ]


def update_entry(name: str, target: Target, alpha: float | None) -> dict | None:
    """Make the entry `update` of result.json; None for one gradient."""
    local = target.local
    if local is None:
        return None
    return {
        "model": name, "alpha": alpha, "steps": local.steps, "lr": local.lr,
        "batch": local.batch, "epochs": local.epochs,
    }  # fmt: skip
