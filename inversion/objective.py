"""The attack's objective: a gradient distance plus weighted priors."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inversion.distances import GRADIENT_DISTANCES, joint_norm
from inversion.priors import PRIOR_FUNCTIONS, Candidate
from inversion.settings import PRIORS, Weights
from models.batchnorm import batch_statistics, running_moments
from models.gradient import batch_gradient, gradient_mode
from models.target import Target, check_gradient_fits
from utils.errors import InputError
from utils.shard import ALONE, Shard, differentiable_sum, sum_tensors


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
    BatchNorm in train mode. shard: this process's part of the batch where several share the work;
    every one has the whole `target` and `y`, and all losses are those of the whole batch.

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
        shard: Shard = ALONE,
    ):
        check_gradient_fits(model, target)
        if len(y) != target.batch_size:
            raise ValueError(f"{len(y)} labels for a batch of {target.batch_size}")
        if bn_grad not in ("exact", "detached"):
            raise ValueError(f"bn_grad {bn_grad}: choose exact or detached")
        like = next(model.parameters())
        self.model = model
        self.weights = weights
        self.loss = target.loss
        self.bn_grad = bn_grad
        self.shard = shard
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

    def own(self, x: Tensor) -> Tensor:
        """This process's part of a whole batch `x` (B, C, H, W)."""
        return self.shard.split(x)

    def image_gradient(self, x: Tensor, index: int) -> tuple[Tensor, ...]:
        """Gradient of the image `x` (1, C, H, W) alone with label number `index`, eval mode."""
        return self._batch_gradient(x, self.y[index : index + 1])

    def _batch_gradient(self, x, y, **options) -> tuple[Tensor, ...]:
        return batch_gradient(self.model, x, y, self.loss, **options)

    def _statistics(self, *, needed: bool):
        return batch_statistics(
            self.model,
            self.shard,
            train_mode=self.loss.train_mode,
            needed=needed,
            truncated=self.bn_grad == "detached",
            images=len(self.y),
        )

    def _share(self, x: Tensor, *, create_graph: bool, with_moments: bool):
        """This process's share of the gradient of its images `x`, and BN moments of the batch."""
        total = len(self.y) if self.shard.size > 1 else None
        with self._statistics(needed=with_moments) as moments:
            gradient = self._batch_gradient(
                x, self.own(self.y), create_graph=create_graph, total=total
            )
            return gradient, moments() if with_moments else []

    def evaluate(self, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Gradient of the candidate batch `x` and its unweighted priors, both on the graph.

        With several processes `x` is this one's part, and so are the results: their sums over
        processes (`whole`) are the gradient and the priors.
        """
        gradient, moments = self._share(x, create_graph=True, with_moments=self._needs_moments)
        return gradient, self._terms(x, moments)

    def priors(self, x: Tensor) -> dict[str, Tensor]:
        """The unweighted priors of `evaluate` alone, on the graph; no gradient is computed."""
        moments = []
        if self._needs_moments:
            with self._statistics(needed=True) as recorded:
                with gradient_mode(self.model, self.loss.train_mode), torch.enable_grad():
                    self.model(x)
                moments = recorded()
        return self._terms(x, moments)

    def _terms(self, x: Tensor, moments: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        consensus = None if self.consensus is None else self.own(self.consensus)
        candidate = Candidate(x, moments, self.target_moments, consensus)
        names = [
            name
            for name in self.weights.at(0.0)
            if self.consensus is not None or not PRIORS[name].needs_consensus
        ]
        return {name: self._prior_share(name, candidate) for name in names}

    def _prior_share(self, name: str, candidate: Candidate) -> Tensor:
        """Priors are means over images, but for those of the whole batch's moments."""
        if self.shard.size == 1:
            return PRIOR_FUNCTIONS[name](candidate)
        if PRIORS[name].needs_moments:
            return PRIOR_FUNCTIONS[name](candidate) / self.shard.size
        if not len(candidate.x):
            return candidate.x.sum()
        return PRIOR_FUNCTIONS[name](candidate) * (len(candidate.x) / len(self.y))

    def whole(
        self, gradient: Sequence[Tensor], terms: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Gradient and priors of the whole batch from all processes' shares, without a graph."""
        if self.shard.size == 1 or not (gradient or terms):
            return tuple(gradient), {name: term.detach() for name, term in terms.items()}
        like = (*gradient, *terms.values())[0]
        values = [term.to(like).view(1) for term in terms.values()]
        summed = sum_tensors([*gradient, *values], self.shard)
        scalars = (value[0] for value in summed[len(gradient) :])
        return summed[: len(gradient)], dict(zip(terms, scalars, strict=True))

    def toward(self, consensus: Tensor | None) -> "Objective":
        """The same objective with group consistency to `consensus` (B, C, H, W), or without."""
        other = copy.copy(self)
        other.consensus = consensus
        return other

    def with_labels(self, y: Tensor) -> "Objective":
        """The same objective for other labels `y` (B,)."""
        other = copy.copy(self)
        other.y = y.to(self.y)
        return other

    def gradient(self, x: Tensor) -> tuple[Tensor, ...]:
        """Gradient of the whole candidate batch `x` (B, C, H, W), without a graph."""
        gradient, _ = self._share(self.own(x), create_graph=False, with_moments=False)
        return sum_tensors(gradient, self.shard)

    def gradient_distance(self, x: Tensor) -> float:
        """The gradient distance of the whole candidate batch `x` alone: no priors, no graph."""
        return self.distance_with_cotangent(self.gradient(x))[0].item()

    def value(self, x: Tensor, progress: float = 0.0) -> Losses:
        """All terms for the whole candidate batch `x`, without a graph: `__call__`'s values."""
        gradient, moments = self._share(
            self.own(x), create_graph=False, with_moments=self._needs_moments
        )
        with torch.no_grad():
            gradient, terms = self.whole(gradient, self._terms(self.own(x), moments))
            distance, _ = self.distance_with_cotangent(gradient)
            total = self.weights.gradient * distance + self.prior_sum(terms, progress)
        return Losses(total, distance, terms)

    def prior_sum(self, terms: Mapping[str, Tensor], progress: float) -> Tensor | float:
        """Weighted sum of the prior terms at `progress` of the run; 0 without priors."""
        weights = self.weights.at(progress)
        return sum(weights[name] * term for name, term in terms.items())

    def __call__(self, x: Tensor, progress: float = 0.0) -> Losses:
        """All terms for the candidate `x` (B, C, H, W), differentiable with respect to it.

        With several processes `x` is this one's part and the losses are the whole batch's, but
        the derivative of the total holds this process's share of what all compute alike.
        """
        gradient, terms = self.evaluate(x)
        count = self.shard.size
        distance = self.distance([differentiable_sum(g, self.shard) for g in gradient])
        total = self.weights.gradient * distance / count + self.prior_sum(terms, progress)
        if count > 1:
            _, terms = self.whole(gradient, terms)
            value = self.weights.gradient * distance + self.prior_sum(terms, progress)
            total = total + (value - total).detach()
        return Losses(total, distance, terms)


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
