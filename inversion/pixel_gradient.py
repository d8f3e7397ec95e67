"""Ways to ∂objective/∂x, the direction in which the candidate images are improved.

Each takes the objective, the candidate `x` (B, C, H, W) and the progress of the run in [0, 1],
and returns the losses (detached) and the derivative, shaped like `x`. With several processes `x`
is this one's part of the batch, and the losses are those of the whole.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from inversion import chunks
from inversion.candidate_gradient import CandidateGradient, Pairs
from inversion.first_order import finite_differences
from inversion.objective import Losses, Objective
from inversion.precision import in_precision
from inversion.settings import FINITE_DIFFERENCES, PRIOR_ONLY, AttackSettings
from inversion.surrogate import SurrogatePlace
from utils.errors import FaultError, is_out_of_memory

#: A function of this file: (objective, x, progress) → losses and derivative.
PixelGradient = Callable[[Objective, Tensor, float], tuple[Losses[Tensor], Tensor]]


def exact(objective: Objective, x: Tensor, progress: float = 0.0) -> tuple[Losses[Tensor], Tensor]:
    """Return the exact derivative, as one vector-Jacobian product of the gradient.

    By the chain rule ∂distance(g(x))/∂x = vᵀ ∂g/∂x with v = ∂distance/∂g. The cotangent v has a
    closed form, so no graph of the distance is kept over all parameters, and nothing is
    accumulated for the parameters themselves. Where a surrogate of several local steps is learned,
    the same product gives the derivative by its place α, which then moves.

    With `Objective.chunk_size` it is computed chunk by chunk (inversion/chunks.py). Layers are
    taken in closed form (inversion/closed_form/); a network that does not allow it is left to torch
    from then on, which takes longer and gives the same.
    """
    function = exact_in_chunks if chunks.needed(objective) else _exact
    try:
        return function(objective, x, progress)
    except _IncompleteError:
        pass
    except (RuntimeError, ValueError) as error:
        alone = objective.batch_shard.size == 1  # several processes must not part
        if not (alone and objective.has_closed_form) or is_out_of_memory(error):
            raise
    objective.leave_to_torch()
    return function(objective, x, progress)


class _IncompleteError(Exception):
    """Says that an operation of the network cut the graph on which closed forms are added."""


def _exact(objective: Objective, x: Tensor, progress: float) -> tuple[Losses[Tensor], Tensor]:
    x = x.detach().requires_grad_()
    gradient, terms = objective.gradient_and_priors(x)
    summed, values = objective.sum_over_processes(gradient.values, terms)
    distance, cotangents = objective.distance_with_cotangent(
        summed, gradient.parts, overwrite=gradient.disposable
    )
    if objective.weights.gradient != 1:
        cotangents = [objective.weights.gradient * v for v in cotangents]
    prior = objective.weighted_sum(terms, progress)
    place = objective.place
    outputs = _outputs(gradient, cotangents, prior)
    derivative, *slope = _pulled_back(outputs, x, place, gradient.complete)
    total = objective.weights.gradient * distance + objective.weighted_sum(values, progress)
    losses = Losses(total, distance, values, objective.alpha)
    if place is not None:
        place.learn(slope[0], progress)
    return losses, derivative


def _outputs(
    gradient: CandidateGradient, cotangents: Sequence[Tensor], prior: Tensor | float
) -> Pairs:
    """Return what gradient and weighted priors pull back, as tensors with their cotangents."""
    outputs = gradient.pairs(cotangents)
    if isinstance(prior, Tensor) and prior.requires_grad:
        outputs.append((prior, torch.ones_like(prior)))
    return outputs


def _pulled_back(
    outputs: Pairs, x: Tensor, place: SurrogatePlace | None, complete: Callable[[], bool]
) -> tuple[Tensor, ...]:
    """Return the derivative by the images `x`, and that by the surrogate's α where there is one.

    Raises _IncompleteError where closed forms could not add all that belongs to it.
    """
    found = torch.autograd.grad(
        [output for output, _ in outputs],
        [x] if place is None else [x, place.alpha],
        [cotangent for _, cotangent in outputs],
        allow_unused=True,
        materialize_grads=True,
    )
    if not complete():
        raise _IncompleteError
    return found


def exact_in_chunks(
    objective: Objective, x: Tensor, progress: float
) -> tuple[Losses[Tensor], Tensor]:
    """Return what `exact` does, with the graph of one chunk of images at a time."""
    x = x.detach()
    whole = chunks.evaluate(objective, x, keep=True)
    distance, cotangents = objective.distance_with_cotangent(whole.gradient, overwrite=True)
    if objective.weights.gradient != 1:
        cotangents = [objective.weights.gradient * v for v in cotangents]
    pulls = chunks.pulls_of(objective, whole, x)
    total = objective.weights.gradient * distance
    total = total + objective.weighted_sum(whole.terms, progress)
    losses = Losses(total, distance, whole.terms, objective.alpha)
    derivative, place, slope = torch.empty_like(x), objective.place, x.new_zeros(())
    kept = whole.kept
    del whole  # its gradient takes as much as the weights
    for own, of_all in reversed(list(chunks.places(objective))):
        if kept is not None:
            images, gradient, terms = kept.images, kept.gradient, kept.terms_by(pulls)
            kept = None
        else:
            images = x[own].detach().requires_grad_()
            gradient, terms = objective.part(of_all, pulls).gradient_and_priors(images)
        prior = objective.weighted_sum(terms, progress)
        outputs = _outputs(gradient, chunks.within(cotangents, gradient.parts), prior)
        complete = gradient.complete
        del gradient, terms, prior
        derivative[own], *slopes = _pulled_back(outputs, images, place, complete)
        slope = slope + sum(slopes)
        del outputs, images, complete
    if place is not None:
        place.learn(slope, progress)
    return losses, derivative


def plain(objective: Objective, x: Tensor, progress: float = 0.0) -> tuple[Losses[Tensor], Tensor]:
    """Return the same by plain double backward through everything: the slow, obvious twin.

    Keeps the whole graph and, as `backward()` does, accumulates derivatives for the parameters
    too, which are dropped.
    """
    x = x.detach().requires_grad_()
    losses = objective(x, progress)
    losses.total.backward()
    assert x.grad is not None
    for parameter in objective.model.parameters():
        parameter.grad = None
    terms = {name: term.detach() for name, term in losses.terms.items()}
    if objective.place is not None:
        slope = objective.place.alpha.grad
        assert slope is not None
        objective.place.learn(slope, progress)
    return Losses(losses.total.detach(), losses.criterion.detach(), terms, losses.alpha), x.grad


def prior_only(
    objective: Objective, x: Tensor, progress: float = 0.0
) -> tuple[Losses[Tensor], Tensor]:
    """Return the derivative of the weighted priors alone, for the control without a gradient.

    It shows what the priors alone make of the initial images. The gradient distance is not
    computed: `Losses.gradient` is None, and runs are compared by the total (`Losses.criterion`).
    """
    if chunks.needed(objective):
        return prior_only_in_chunks(objective, x.detach(), progress)
    x = x.detach().requires_grad_()
    terms = objective.priors_only(x)
    share = objective.weighted_sum(terms, progress) + 0 * x.sum()  # there may be no prior
    (derivative,) = torch.autograd.grad(share, x)
    _, values = objective.sum_over_processes((), terms)
    total = objective.weighted_sum(values, progress) + x.new_zeros(())
    return Losses(total, None, values), derivative


def prior_only_in_chunks(
    objective: Objective, x: Tensor, progress: float
) -> tuple[Losses[Tensor], Tensor]:
    """Return what `prior_only` does, with the graph of one chunk of images at a time."""
    whole = chunks.evaluate_priors(objective, x)
    pulls = chunks.pulls_of(objective, whole, x)
    derivative = torch.empty_like(x)
    for own, of_all in chunks.places(objective):
        part, images = objective.part(of_all, pulls), x[own].detach().requires_grad_()
        share = part.weighted_sum(part.priors_only(images), progress) + 0 * images.sum()
        (derivative[own],) = torch.autograd.grad(share, images)
    total = objective.weighted_sum(whole.terms, progress) + x.new_zeros(())
    return Losses(total, None, whole.terms), derivative


#: name in `inversion.settings`, PIXEL_GRADIENTS or PRIOR_ONLY → function(objective, x, progress).
PIXEL_GRADIENTS: dict[str, PixelGradient] = {
    "exact": exact,
    "plain": plain,
    FINITE_DIFFERENCES: finite_differences,
    PRIOR_ONLY: prior_only,
}


def pixel_gradient_of(settings: AttackSettings) -> PixelGradient:
    """Return the function that the settings name, with its step, precision and checks."""
    function = PIXEL_GRADIENTS[settings.pixel_gradient]
    if settings.pixel_gradient == FINITE_DIFFERENCES:
        function = partial(finite_differences, step=settings.difference_step)
    function = in_precision(function, settings.precision)
    return partial(_checked, function) if settings.detect_anomaly else function


#: How torch's warning begins that says where the operation was called.
_WHERE = "Error detected in"


def _checked(
    function: PixelGradient, objective: Objective, x: Tensor, progress: float = 0.0
) -> tuple[Losses[Tensor], Tensor]:
    """Call `function` while torch looks for NaN after every operation of a derivative.

    Raises FaultError with the operation, and where it was called, at the first NaN.
    """
    calls: list[str] = []
    show = warnings.showwarning

    def note(message, *rest, **options):
        if str(message).startswith(_WHERE):
            calls.append(str(message))
        else:
            show(message, *rest, **options)

    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.filterwarnings("always", message=_WHERE)
        warnings.showwarning = note
        try:
            return function(objective, x, progress)
        except RuntimeError as error:
            found = re.search(r"Function '(\w+)' returned nan values", str(error))
            if found is None:
                raise
            raise FaultError(
                f"the derivative has a NaN, {progress:.0%} of the way through the iterations: "
                f"{found[1]} made it" + _called_at(calls)
            ) from error


def _called_at(calls: Sequence[str]) -> str:
    """Tell the file and line outside torch from which torch's warnings say that it was called."""
    frames = re.findall(r'File "(.+?)", line (\d+), in (\S+)', "".join(calls))
    own = [frame for frame in frames if not frame[0].startswith(torch.__path__[0])]
    if not own:
        return ""
    path, line, name = own[-1]
    return f", called in {name}, {path.rpartition('/')[2]}, line {line}"
