"""Ways to ∂objective/∂x, the direction in which the candidate images are improved.

Each takes the objective, the candidate `x` (B, C, H, W) and the progress of the run in [0, 1],
and returns the losses (detached) and the derivative, shaped like `x`. With several processes `x`
is this one's part of the batch, and the losses are those of the whole.
"""

import torch
from torch import Tensor

from inversion.objective import Losses, Objective
from inversion.settings import PRIOR_ONLY


def exact(objective: Objective, x: Tensor, progress: float = 0.0) -> tuple[Losses, Tensor]:
    """Exact derivative as one vector-Jacobian product of the gradient.

    By the chain rule ∂distance(g(x))/∂x = vᵀ ∂g/∂x with v = ∂distance/∂g. The cotangent v has a
    closed form, so no graph of the distance is kept over all parameters, and nothing is
    accumulated for the parameters themselves.
    """
    x = x.detach().requires_grad_()
    gradient, terms = objective.evaluate(x)
    whole, values = objective.whole(gradient, terms)
    distance, cotangents = objective.distance_with_cotangent(whole)
    if objective.weights.gradient != 1:
        cotangents = [objective.weights.gradient * v for v in cotangents]
    prior = objective.prior_sum(terms, progress)
    outputs = [(g, v) for g, v in zip(gradient, cotangents, strict=True) if g.requires_grad]
    if isinstance(prior, Tensor) and prior.requires_grad:
        outputs.append((prior, torch.ones_like(prior)))
    (derivative,) = torch.autograd.grad(
        [output for output, _ in outputs],
        x,
        [cotangent for _, cotangent in outputs],
        allow_unused=True,
        materialize_grads=True,
    )
    total = objective.weights.gradient * distance + objective.prior_sum(values, progress)
    return Losses(total, distance, values), derivative


def plain(objective: Objective, x: Tensor, progress: float = 0.0) -> tuple[Losses, Tensor]:
    """The same by plain double backward through everything: the slow, obvious twin.

    Keeps the whole graph and, as `backward()` does, accumulates derivatives for the parameters
    too, which are dropped.
    """
    x = x.detach().requires_grad_()
    losses = objective(x, progress)
    losses.total.backward()
    for parameter in objective.model.parameters():
        parameter.grad = None
    terms = {name: term.detach() for name, term in losses.terms.items()}
    return Losses(losses.total.detach(), losses.gradient.detach(), terms), x.grad


def prior_only(objective: Objective, x: Tensor, progress: float = 0.0) -> tuple[Losses, Tensor]:
    """The same without the gradient distance, which is not even computed: a control.

    What the priors alone make of the start. The total stands in the place of the gradient
    distance, so that what chooses by it chooses by what is minimised.
    """
    x = x.detach().requires_grad_()
    terms = objective.priors(x)
    share = objective.prior_sum(terms, progress) + 0 * x.sum()  # there may be no prior
    (derivative,) = torch.autograd.grad(share, x)
    _, values = objective.whole((), terms)
    total = objective.prior_sum(values, progress) + x.new_zeros(())
    return Losses(total, total, values), derivative


#: name in `inversion.settings`, PIXEL_GRADIENTS or PRIOR_ONLY → function(objective, x, progress).
PIXEL_GRADIENTS = {"exact": exact, "plain": plain, PRIOR_ONLY: prior_only}
