"""Finite differences of the gradient in place of its derivative: first derivatives alone.

With v = ∂distance/∂g, the cotangent of the candidate's gradient g, the derivative by the images is

    ∂distance/∂x = vᵀ ∂g/∂x = d/ds ∇ₓ L(θ + s v; x) at s = 0,

where L is the client's loss, since v does not move. The quotient
[∇ₓ L(θ + ε v; x) − ∇ₓ L(θ; x)] / ε comes close to that where L is smooth along v. It takes one
forward and backward pass more than the gradient, which gives v and ∇ₓ L(θ; x) together, and no
second derivative of any operation.

It is no exact derivative. Of a smooth network the error falls with ε; where ReLU or max-pooling
switch between θ and θ + ε v, the quotient has another direction altogether, at any ε that float32
allows, and an attack with it is another attack. docs/results.md has what it buys.
"""

import torch
from torch import Tensor

from inversion.objective import Losses, Objective
from inversion.settings import DIFFERENCE_STEP
from models.comparing import joint_norm
from models.gradient import trainable_parameters
from utils.errors import InputError


def finite_differences(
    objective: Objective, x: Tensor, progress: float = 0.0, *, step: float = DIFFERENCE_STEP
) -> tuple[Losses[Tensor], Tensor]:
    """Return the quotient in place of ∂distance/∂x, with exact derivatives of the priors.

    step: c in ε = c ‖θ‖ / ‖v‖, by how much the weights move, relative to their norm. The model is
    left as it is. The losses are exact, at θ.

    Raises InputError for an update of several local steps that is compared with more than the
    gradient at one state, and for BatchNorm's truncated derivative, which is a second one.
    """
    _refuse(objective)
    parameters = trainable_parameters(objective.model)
    x = x.detach().requires_grad_()
    loss, terms = objective.loss_and_priors(x)
    prior = objective.weighted_sum(terms, progress)
    has_prior = isinstance(prior, Tensor) and prior.requires_grad
    *share, behind = torch.autograd.grad(
        loss,
        [*parameters.values(), x],
        retain_graph=has_prior,
        allow_unused=True,
        materialize_grads=True,
    )
    derivative = torch.autograd.grad(prior, x)[0] if has_prior else torch.zeros_like(x)
    gradient, values = objective.sum_over_processes(share, terms)
    del loss, prior, terms  # their graph is large
    distance, cotangents = objective.distance_with_cotangent(gradient)
    # Where v or θ is 0 the quotient is 0 as well: nothing moves, or there is nothing to move by.
    smallest = torch.finfo(distance.dtype).tiny
    weights = [parameter.detach() for parameter in parameters.values()]
    length = (step * joint_norm(weights)).clamp_min(smallest)
    norm = joint_norm(cotangents).clamp_min(smallest)
    size = length / norm
    moved = [torch.addcmul(w, v, size) for w, v in zip(weights, cotangents, strict=True)]
    loss = objective.loss_at(x, dict(zip(parameters, moved, strict=True)))
    (ahead,) = torch.autograd.grad(loss, x)
    scale = objective.weights.gradient / size
    total = objective.weights.gradient * distance + objective.weighted_sum(values, progress)
    return Losses(total, distance, values), derivative + scale * (ahead - behind)


def _refuse(objective: Objective) -> None:
    """Raise InputError where the quotient says nothing of what the objective asks for."""
    if not objective.compares_one_gradient:
        raise InputError(
            "finite differences: the gradient of several local steps is taken at other weights "
            "than the state before; take the update model mean, or the pixel gradient exact"
        )
    if objective.bn_grad == "detached":
        raise InputError(
            "finite differences: take no second derivative that bn_grad detached could truncate; "
            "take bn_grad exact"
        )
