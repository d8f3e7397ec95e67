"""The attack's objective: a gradient distance plus weighted priors."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inversion.distances import GRADIENT_DISTANCES, joint_norm
from inversion.priors import PRIORS, Candidate
from models.batchnorm import recorded_moments, running_moments, truncated_derivative
from models.gradient import batch_gradient
from models.target import Target, check_gradient_fits
from utils.cli import InputError


@dataclass(frozen=True)
class Weights:
    """Weights of the objective's terms.

    gradient ≥ 0. priors: name in PRIORS → weight at the first iteration; one left out or 0 is
    not computed. priors_end: name → weight at the last iteration, approached geometrically;
    both ends must then be positive. Names without an entry keep their weight.
    """

    gradient: float = 1.0
    priors: Mapping[str, float] = field(default_factory=dict)
    priors_end: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name in (*self.priors, *self.priors_end):
            if name not in PRIORS:
                raise ValueError(f"no prior {name}; there are {', '.join(PRIORS)}")
        for name, end in self.priors_end.items():
            if end <= 0 or self.priors.get(name, 0) <= 0:
                raise ValueError(f"a geometric course of {name} needs two positive weights")

    def at(self, progress: float) -> dict[str, float]:
        """Weights of the priors in use at `progress` in [0, 1] of the run."""
        weights = {name: weight for name, weight in self.priors.items() if weight != 0}
        for name, end in self.priors_end.items():
            weights[name] *= (end / weights[name]) ** progress
        return weights


@dataclass(frozen=True)
class Losses:
    """Values of one evaluation: scalars as tensors, or as floats after `floats()`.

    total is weighted; gradient (the distance) and terms (prior name → value) are not.
    """

    total: Tensor | float
    gradient: Tensor | float
    terms: Mapping[str, Tensor | float]

    def floats(self) -> "Losses":
        """The same as Python floats, with one transfer from the device."""
        stacked = torch.stack([self.total, self.gradient, *self.terms.values()]).detach()
        total, gradient, *terms = stacked.tolist()
        return Losses(total, gradient, dict(zip(self.terms, terms, strict=True)))


class Objective:
    """The objective as a function of the candidate images, for one target and its labels.

    model: the attacked network (`models.target.model_of`, or your own); left as it was.
    y: (B,) labels. distance: a name in GRADIENT_DISTANCES. bn_source: where the BN prior pulls
    to, "running" statistics of the model or the "batch" statistics that the client sent.
    bn_grad: "exact", or "detached" for the original's truncated second derivative of
    BatchNorm in train mode.

    Raises InputError when the gradient is zero or does not fit the model, and ValueError when B
    labels are not given or the BN prior has nothing to pull to.
    """

    def __init__(
        self,
        model: nn.Module,
        target: Target,
        y: Tensor,
        weights: Weights,
        *,
        distance: str = "sim",
        bn_source: str = "running",
        bn_grad: str = "exact",
    ):
        check_gradient_fits(model, target)
        if len(y) != target.batch_size:
            raise ValueError(f"{len(y)} labels for a batch of {target.batch_size}")
        if bn_grad not in ("exact", "detached"):
            raise ValueError(f"bn_grad {bn_grad}: choose exact or detached")
        like = next(model.parameters())
        self.model = model
        self.weights = weights
        self.train_mode = target.train_mode
        self.label_smoothing = target.label_smoothing
        self.bn_grad = bn_grad
        self.y = y.to(like.device)
        self.consensus: Tensor | None = None
        self.target_gradient = [g.to(like) for g in target.gradient]
        if not joint_norm(self.target_gradient) > 0:
            raise InputError("the target's gradient is zero: it says nothing about the images")
        self._distance = GRADIENT_DISTANCES[distance]
        self.distance_from_products = self._distance.from_products
        self._needs_moments = any(PRIORS[name].needs_moments for name in weights.at(0.0))
        self.target_moments = []
        if self._needs_moments:
            self.target_moments = _target_moments(model, target, bn_source)

    def distance(self, gradient: tuple[Tensor, ...]) -> Tensor:
        """Distance of a candidate's gradient from the target's, differentiable."""
        return self._distance.value(gradient, self.target_gradient)

    def distance_with_cotangent(self, gradient: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        """The same distance and its derivative by the gradient, without a graph."""
        with torch.no_grad():
            return self._distance.with_cotangent(gradient, self.target_gradient)

    def gradient(
        self, x: Tensor, y: Tensor | None = None, *, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Gradient that a client with images `x` and labels `y` (all the target's) would send."""
        return batch_gradient(
            self.model,
            x,
            self.y if y is None else y,
            train_mode=self.train_mode,
            label_smoothing=self.label_smoothing,
            create_graph=create_graph,
        )

    def evaluate(self, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Gradient of the candidate batch `x` and its unweighted priors, both on the graph."""
        truncated = truncated_derivative if self.bn_grad == "detached" else nullcontext
        recorded = recorded_moments if self._needs_moments else _nothing_recorded
        with truncated(self.model), recorded(self.model) as moments:
            gradient = self.gradient(x, create_graph=True)
            candidate = Candidate(x, moments(), self.target_moments, self.consensus)
        names = [
            name
            for name in self.weights.at(0.0)
            if self.consensus is not None or not PRIORS[name].needs_consensus
        ]
        return gradient, {name: PRIORS[name].function(candidate) for name in names}

    def toward(self, consensus: Tensor | None) -> "Objective":
        """The same objective with group consistency to `consensus` (B, C, H, W), or without."""
        other = copy.copy(self)
        other.consensus = consensus
        return other

    def gradient_distance(self, x: Tensor) -> float:
        """The gradient distance of the candidate `x` alone: no priors, no graph."""
        return self.distance_with_cotangent(self.gradient(x))[0].item()

    def prior_sum(self, terms: Mapping[str, Tensor], progress: float) -> Tensor | float:
        """Weighted sum of the prior terms at `progress` of the run; 0 without priors."""
        weights = self.weights.at(progress)
        return sum(weights[name] * term for name, term in terms.items())

    def __call__(self, x: Tensor, progress: float = 0.0) -> Losses:
        """All terms for the candidate `x` (B, C, H, W), differentiable with respect to it."""
        gradient, terms = self.evaluate(x)
        distance = self.distance(gradient)
        total = self.weights.gradient * distance + self.prior_sum(terms, progress)
        return Losses(total, distance, terms)


def _nothing_recorded(model: nn.Module):
    return nullcontext(list)


def _target_moments(model, target, bn_source):
    like = next(model.parameters())
    if bn_source == "running":
        moments = running_moments(model)
    elif target.bn_mean is None:
        raise ValueError("the target holds no BN statistics of the batch: bn_source 'running'")
    else:
        moments = zip(target.bn_mean, target.bn_var, strict=True)
    moments = [(mean.to(like), var.to(like)) for mean, var in moments]
    if not moments:
        raise ValueError("the BN prior has a weight, but the model has no BatchNorm layer")
    return moments
