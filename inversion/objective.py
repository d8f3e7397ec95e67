"""Evaluates the attack's objective: a gradient distance plus weighted priors."""

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inversion import chunks
from inversion.candidate_gradient import CandidateGradient, Part, on_graph
from inversion.closed_form.layers import ClosedForm
from inversion.distances import GRADIENT_DISTANCES, Aim
from inversion.priors import PRIOR_FUNCTIONS, Candidate
from inversion.settings import BN_COUPLINGS, BN_GRADIENTS, PRIORS, UPDATE_MODELS, Weights
from inversion.surrogate import START, SurrogatePlace
from inversion.visible import View, view_of
from models.batchnorm import batch_statistics, recorded_moments, running_moments
from models.comparing import joint_norm
from models.forced import forced_normalisation, forced_statistics
from models.gradient import batch_gradient, couples_samples, gradient_mode, trainable_parameters
from models.local import local_gradient, replaced_parameters
from models.losses import mean_loss
from models.target import Target, check_gradient_fits
from utils.errors import InputError
from utils.shard import ALONE, Shard, differentiable_sum, sum_tensors

Value = TypeVar("Value", Tensor, float)


@dataclass(frozen=True)
class Losses(Generic[Value]):
    """Holds the values of one evaluation: scalar tensors, or floats after `floats()`."""

    #: Weighted sum of the gradient distance and the priors.
    total: Value
    #: The gradient distance, unweighted; None where nothing computes it (`prior_only`).
    gradient: Value | None
    #: Name of each prior in use → its value, unweighted.
    terms: Mapping[str, Value]
    #: Where between the two states of an update the gradient was taken, α in [0, 1]; None for one
    #: gradient, and where nothing learns it.
    alpha: Value | None = None

    @property
    def criterion(self) -> Value:
        """Images are compared by this value: the gradient distance, or the total without one."""
        return self.total if self.gradient is None else self.gradient

    def floats(self: "Losses[Tensor]") -> "Losses[float]":
        """Return the same values as floats, with one transfer from the device."""
        alpha = self.total if self.alpha is None else self.alpha
        values = [self.total, self.criterion, alpha, *self.terms.values()]
        total, criterion, place, *terms = torch.stack(values).detach().tolist()
        return Losses(
            total,
            None if self.gradient is None else criterion,
            dict(zip(self.terms, terms, strict=True)),
            None if self.alpha is None else place,
        )


#: The losses of images at which nothing finite was computed.
NO_LOSSES: Losses[float] = Losses(math.nan, math.nan, {})


class Objective:
    """Evaluates the objective of candidate images, for one target and its labels.

    One evaluation, in order: the candidate `x` passes through the network as the client's batch
    did and gives its gradient, and with a BN prior also the batch's moments at every BatchNorm
    layer (`gradient_and_priors`); the priors in use are evaluated on `x`; with several processes
    the parts are summed (`sum_over_processes`); the gradient is compared with the target's
    (`distance`); the total is the weighted distance plus the weighted priors (`weighted_sum`).
    `__call__` does all of this on the graph, `value` without one, and inversion/pixel_gradient.py
    puts the steps together in a cheaper way.

    With several processes that share the batch, each has the whole target and labels and its own
    part of the images; all losses are those of the whole batch.
    """

    def __init__(
        self,
        model: nn.Module,
        target: Target,
        y: Tensor,
        weights: Weights,
        *,
        distance_name: str = "sim",
        bn_source: str = "running",
        bn_grad: str = "exact",
        bn_coupling: str = "exact",
        batch_shard: Shard = ALONE,
        update_model: str = "mean",
        chunk_size: int | None = None,
    ):
        """Prepare the target's gradient and moments on the model's device.

        model: the attacked network (`models.target.model_of`, or your own), which is left as it
        was. y: B labels, as `ClientLoss.kind` has them. distance_name: a name in
        GRADIENT_DISTANCES. bn_source: where the BN prior pulls to, the "running" statistics of the
        model or those of the "batch", which the client sent. bn_grad: "exact", or "detached" for
        the original's truncated second derivative of BatchNorm in train mode. bn_coupling: "exact",
        or "forced" for the client's statistics in place of the candidate's own (models/forced.py).
        batch_shard: this process's part of the batch. update_model: a name in
        UPDATE_MODELS; other than "mean" only for a target of several local steps. chunk_size:
        images whose graph is kept at the same time (inversion/chunks.py), on each process; None for
        all.

        Raises InputError when the gradient is zero or does not fit the model, when the client
        sent too little to force its statistics, or when images that interact cannot be taken in
        chunks; and ValueError for other than B labels, an unknown
        bn_grad or bn_coupling, the two of them together, or a BN prior that has nothing to pull to.
        """
        check_gradient_fits(model, target)
        if len(y) != target.batch_size:
            raise ValueError(f"{len(y)} labels for a batch of {target.batch_size}")
        if bn_grad not in BN_GRADIENTS or bn_coupling not in BN_COUPLINGS:
            raise ValueError(
                f"bn_grad {bn_grad}, bn_coupling {bn_coupling}: choose of "
                f"{', '.join(BN_GRADIENTS)} and of {', '.join(BN_COUPLINGS)}"
            )
        if (bn_grad, bn_coupling) == ("detached", "forced"):
            raise ValueError("bn_grad detached has no meaning where statistics are forced")
        like = next(model.parameters())
        self.model = model
        self.weights = weights
        self.loss = target.loss
        self.bn_grad = bn_grad
        self.batch_shard = batch_shard
        self.y = y.to(like.device)
        #: (B, C, H, W) images that group consistency pulls to, None outside MLCO's rounds.
        self.consensus: Tensor | None = None
        self.target_gradient = [g.to(like) for g in target.gradient]
        if not joint_norm(self.target_gradient) > 0:
            raise InputError("the target's gradient is zero: it says nothing about the images")
        self._view = view_of(target, like)
        _check_update_model(update_model, target, weights, bn_coupling, batch_shard)
        self._forced = forced_statistics(model, target) if bn_coupling == "forced" else None
        #: How the candidate's own local steps are taken, where they are unrolled.
        self._unrolled = target.local if update_model == "unroll" else None
        #: The surrogate's place between the two states; None without one.
        self.place: SurrogatePlace | None = None
        if update_model == "sme":
            self.place = SurrogatePlace([change.to(like) for change in target.weight_change])
        self._aim = Aim.at(self.target_gradient)
        #: The same for parts of the gradient, as they were asked for last.
        self._part_aims: dict[str, Any] = {}
        self._distance = GRADIENT_DISTANCES[distance_name]
        #: The distance from inner products; None where it is no function of them.
        self.distance_from_products = self._distance.from_products
        if self._view is not None and self._view.largest is not None:
            self.distance_from_products = None  # the cut of a sum is not the sum of cuts
        self._needs_moments = any(PRIORS[name].needs_moments for name in weights.at(0.0))
        self.target_moments: list[tuple[Tensor, Tensor]] = []
        if self._needs_moments:
            self.target_moments = _target_moments(model, target, bn_source)
        #: Set where this is a part of a batch (`part`): the number of images of the whole batch.
        self._images_of_all: int | None = None
        #: In a part, name of a prior on moments → what stands in its place.
        self._pulls: Mapping[str, chunks.InPlace] = {}
        #: Images whose graph is kept at the same time, on each process; None for all.
        self.chunk_size = chunk_size
        if chunk_size is not None:
            chunks.check_uncoupled(self)
        shared = batch_shard.size > 1
        self._closed = self._closed_form(shared=shared)
        #: The same for a part of the batch (`part`), which no process shares.
        self._closed_of_parts = self._closed_form(shared=False) if shared else self._closed

    def distance(self, gradient: Sequence[Tensor]) -> Tensor:
        """Return the distance of a candidate's gradient from the target's, differentiable.

        Of a sparse update only what was sent is compared, as the client would have sent it.
        """
        return self._distance.value(self.seen(gradient), self.target_gradient)

    def distance_with_cotangent(
        self,
        gradient: Sequence[Tensor],
        parts: tuple[Part, ...] | None = None,
        *,
        overwrite: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the same distance and its derivative by the gradient, without a graph.

        parts: what of every parameter `gradient` has (`CandidateGradient.parts`). overwrite: the
        derivative may take the gradient's memory.
        """
        aim, view = self._aim, self._view
        if parts is not None and any(part is not None for part in parts):
            aim, view = self._within(parts)
        with torch.no_grad():
            if view is None:
                return self._distance.with_cotangent(gradient, aim, overwrite=overwrite)
            value, v = self._distance.with_cotangent(view.of(gradient), aim)
            return value, view.cotangent(v, gradient)

    def _within(self, parts: tuple[Part, ...]) -> tuple[Aim, View | None]:
        """Return what parts of a gradient are compared with, which is kept for the next time."""
        if self._part_aims.get("parts") != parts:
            view = None if self._view is None else self._view.within(parts)
            self._part_aims.update(parts=parts, aim=self._aim.within(parts), view=view)
        return self._part_aims["aim"], self._part_aims["view"]

    def seen(self, gradient: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return of a whole gradient what the client would have sent: all of it, or less."""
        return gradient if self._view is None else self._view.of(gradient)

    def local_part(self, x: Tensor) -> Tensor:
        """Return this process's part of a whole batch `x` (B, ...)."""
        return self.batch_shard.split(x)

    @property
    def couples_images(self) -> bool:
        """Whether the gradient of the batch is other than the mean of its images' gradients.

        So it is where BatchNorm uses the candidate's own batch statistics.
        """
        return self._forced is None and couples_samples(self.model, self.loss.train_mode)

    @property
    def unrolls(self) -> bool:
        """Whether a candidate's own local steps are taken, which see several images at once."""
        return self._unrolled is not None

    def image_gradient(self, x: Tensor, index: int) -> tuple[Tensor, ...]:
        """Return the gradient of one image `x` (1, C, H, W) with label number `index`.

        It is B times what the image adds to the batch's gradient where no images are coupled
        (`couples_images`).
        """
        return self._batch_gradient(x, self.y[index : index + 1])

    def _batch_gradient(
        self, x: Tensor, y: Tensor, *, total: int | None = None, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        if self._unrolled is not None:
            return local_gradient(
                self.model, x, y, self.loss, self._unrolled, create_graph=create_graph
            )
        images = len(x) if total is None else total
        with self._surrogate(create_graph), self._normalisation(images) as added:
            return batch_gradient(
                self.model, x, y, self.loss, create_graph=create_graph, total=total, added=added
            )

    def _surrogate(self, on_graph: bool):
        """Make the context in which the model has the surrogate's weights, if there is one."""
        if self.place is None:
            return nullcontext()
        own = trainable_parameters(self.model)
        moved = self.place.moved(list(own.values()), on_graph=on_graph)
        return replaced_parameters(self.model, dict(zip(own, moved, strict=True)))

    def _normalisation(self, images: int):
        """Make the context for a forward pass of images, of `images` in all, or a part of them."""
        if self._forced is None:
            return nullcontext()
        return forced_normalisation(self.model, self._forced, images)

    def _statistics(self, *, needed: bool):
        if self._forced is not None:  # a process needs to know no other one's images
            moments = recorded_moments(self.model, self.batch_shard)
            return moments if needed else nullcontext()
        return batch_statistics(
            self.model,
            self.batch_shard,
            train_mode=self.loss.train_mode,
            needed=needed,
            truncated=self.bn_grad == "detached",
            images=len(self.y),
        )

    @property
    def _total(self) -> int | None:
        """The images of the whole batch, where these are a part of it; None for all of it."""
        if self._images_of_all is None and self.batch_shard.size > 1:
            return len(self.y)
        return self._images_of_all

    def _local_gradient(
        self, x: Tensor, *, create_graph: bool, with_moments: bool
    ) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, Tensor]]]:
        """Return what this process's images `x` add to the gradient, and the batch's moments."""
        with self._statistics(needed=with_moments) as moments:
            gradient = self._batch_gradient(
                x, self.local_part(self.y), create_graph=create_graph, total=self._total
            )
            return gradient, moments() if with_moments else []

    def gradient_and_priors(self, x: Tensor) -> tuple[CandidateGradient, dict[str, Tensor]]:
        """Return the gradient of the candidate `x` and its unweighted priors, on the graph.

        With several processes `x` is this one's part, and so are the results, which
        `sum_over_processes` makes whole.
        """
        closed = self._closed
        on_shapes = x.device.type == "meta"  # of which torch knows no autocast
        rounded = not on_shapes and torch.is_autocast_enabled(x.device.type)
        if closed is None or rounded or closed.loss != self.loss:
            own, moments = self._local_gradient(
                x, create_graph=True, with_moments=self._needs_moments
            )
            gradient = on_graph(own)
        else:
            gradient, moments = self._closed_gradient(closed, x)
        return gradient, self._terms(x, moments)

    @property
    def has_closed_form(self) -> bool:
        """Whether the layers' derivatives are taken in closed form."""
        return self._closed is not None

    def leave_to_torch(self) -> None:
        """Take all derivatives by torch from now on, as where a network allows no closed form."""
        self._closed = self._closed_of_parts = None

    def _closed_form(self, *, shared: bool) -> ClosedForm | None:
        """Return what computes the candidate's gradient with its layers in closed form.

        None where the weights are on a graph themselves. shared: by several processes. BatchNorm is
        left to torch where the processes normalise by, or record, the statistics of a batch that
        they share, and where its derivative is the original attack's.
        """
        if self.place is not None or self._unrolled is not None:
            return None
        shared = shared and (self._needs_moments or self.couples_images)
        batchnorm = (
            ClosedForm.replaces_batchnorm(self.model) and not shared and self.bn_grad == "exact"
        )
        return ClosedForm(
            self.model,
            self.loss,
            batchnorm=batchnorm,
            forced=self._forced if batchnorm else None,
            moments=self._needs_moments,
        )

    def _closed_gradient(
        self, closed: ClosedForm, x: Tensor
    ) -> tuple[CandidateGradient, list[tuple[Tensor, Tensor]]]:
        y, images, total = self.local_part(self.y), len(self.y), self._total
        if self._images_of_all is not None:
            images = self._images_of_all
        if closed.batchnorm:
            return closed.gradient(x, y, images=images, total=total)
        with self._statistics(needed=self._needs_moments) as moments:
            with self._normalisation(images) as added:
                gradient, _ = closed.gradient(x, y, images=images, total=total, added=added)
            return gradient, moments() if self._needs_moments else []

    def loss_and_priors(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the client's loss of the candidate `x` and its unweighted priors, on the graph.

        The derivative of the loss by the parameters is the gradient of `gradient_and_priors`, where
        one gradient is compared (`compares_one_gradient`). With several processes `x` is this one's
        part, and so are the results.
        """
        loss, moments = self._loss(x, {}, with_moments=self._needs_moments)
        return loss, self._terms(x, moments)

    def loss_at(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the same loss of the network with other weights, by name; on the graph of `x`."""
        return self._loss(x, weights, with_moments=False)[0]

    def _loss(
        self, x: Tensor, weights: Mapping[str, Tensor], *, with_moments: bool
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        total = len(self.y) if self.batch_shard.size > 1 else None
        with (
            self._statistics(needed=with_moments) as moments,
            self._normalisation(len(self.y)) as added,
            gradient_mode(self.model, self.loss.train_mode),
            torch.enable_grad(),
        ):
            logits = functional_call(self.model, dict(weights), (x,))
            loss = mean_loss(logits, self.local_part(self.y), self.loss, total)
            if added is not None:
                loss = loss + added()
            return loss, moments() if with_moments else []

    def priors_only(self, x: Tensor) -> dict[str, Tensor]:
        """Return the priors of `gradient_and_priors` alone, without computing a gradient."""
        with torch.enable_grad():
            return self._terms(x, self.moments(x))

    def moments(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the batch's (mean, variance) per BatchNorm layer; none where no prior needs them.

        They come from a forward pass of the candidate `x`, this process's part of it.
        """
        if not self._needs_moments:
            return []
        with self._statistics(needed=True) as recorded, self._normalisation(len(self.y)):
            with gradient_mode(self.model, self.loss.train_mode):
                self.model(x)
            return recorded()

    def gradient_and_moments(
        self, x: Tensor
    ) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, Tensor]]]:
        """Return the gradient of the candidate `x` and its moments as above, without a graph.

        With several processes `x` is this one's part, and so is the gradient.
        """
        gradient, moments = self._local_gradient(
            x, create_graph=False, with_moments=self._needs_moments
        )
        return gradient, [(mean.detach(), var.detach()) for mean, var in moments]

    def _terms(self, x: Tensor, moments: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        candidate = Candidate(x, moments, self.target_moments, self._local_consensus)
        return {name: self._local_prior(name, candidate) for name in self.prior_names}

    def image_priors(self, x: Tensor) -> dict[str, Tensor]:
        """Return the unweighted priors of `x` that are means over images."""
        names = [name for name in self.prior_names if not PRIORS[name].needs_moments]
        candidate = Candidate(x, consensus=self._local_consensus)
        return {name: self._local_prior(name, candidate) for name in names}

    @property
    def _local_consensus(self) -> Tensor | None:
        return None if self.consensus is None else self.local_part(self.consensus)

    @property
    def prior_names(self) -> list[str]:
        """The names of the priors in use, those on a consensus only where there is one."""
        return [
            name
            for name in self.weights.at(0.0)
            if self.consensus is not None or not PRIORS[name].needs_consensus
        ]

    def _local_prior(self, name: str, candidate: Candidate) -> Tensor:
        """Return what this process adds to a prior; those sum to the whole batch's prior.

        A prior of the moments is the same number on every process, each other one a mean over
        the process's images.
        """
        images = self._images_of_all
        if images is None and self.batch_shard.size == 1:
            return PRIOR_FUNCTIONS[name](candidate)
        if PRIORS[name].needs_moments:
            if images is not None:
                pull = self._pulls.get(name)
                share = len(candidate.x) / images
                return candidate.x.new_zeros(()) if pull is None else pull(candidate.moments, share)
            return PRIOR_FUNCTIONS[name](candidate) / self.batch_shard.size
        if not len(candidate.x):
            return candidate.x.sum()
        share = len(candidate.x) / (len(self.y) if images is None else images)
        return PRIOR_FUNCTIONS[name](candidate) * share

    def in_chunks(self, chunk_size: int | None) -> "Objective":
        """Return the objective that takes so many images at a time; None for all.

        Raises InputError where its images interact.
        """
        other = copy.copy(self)
        other.chunk_size = chunk_size
        if chunk_size is not None:
            chunks.check_uncoupled(other)
        return other

    def part(self, images: slice, pulls: Mapping[str, chunks.InPlace] | None = None) -> "Objective":
        """Return the objective of some images of the batch, by their place in it.

        Its gradient, and its priors, are what these images add to those of the batch. A prior on
        the batch's moments is no sum over images: `pulls` has what stands in its place, else it
        is 0.
        """
        other = copy.copy(self)
        other.y = self.y[images]
        other.consensus = None if self.consensus is None else self.consensus[images]
        other.batch_shard, other.chunk_size = ALONE, None
        other._images_of_all, other._pulls = len(self.y), pulls or {}
        other._closed = self._closed_of_parts
        return other

    def sum_over_processes(
        self, gradient: Sequence[Tensor], terms: Mapping[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Sum gradient and priors of all processes' parts; the sums carry no graph.

        Every process of `batch_shard` must call it. For one process the gradient is returned as
        it is, with its graph.
        """
        if self.batch_shard.size == 1 or not (gradient or terms):
            return tuple(gradient), {name: term.detach() for name, term in terms.items()}
        like = (*gradient, *terms.values())[0]
        values = [term.to(like).view(1) for term in terms.values()]
        summed = sum_tensors([*gradient, *values], self.batch_shard)
        scalars = (value[0] for value in summed[len(gradient) :])
        return summed[: len(gradient)], dict(zip(terms, scalars, strict=True))

    def afresh(self) -> "Objective":
        """Return the objective for a run of its own: the surrogate's place starts anew."""
        return self if self.place is None else self.at_place(START)

    def at_place(self, alpha: float | None) -> "Objective":
        """Return the objective with the surrogate at `alpha`; as it is without a surrogate."""
        if self.place is None or alpha is None:
            return self
        other = copy.copy(self)
        other.place = SurrogatePlace(self.place.change, alpha)
        return other

    @property
    def compares_one_gradient(self) -> bool:
        """Whether what was sent is compared with the gradient at the model's own weights."""
        return self._unrolled is None and self.place is None

    @property
    def alpha(self) -> Tensor | None:
        """Where the surrogate is, as `Losses.alpha` has it."""
        return None if self.place is None else self.place.alpha.detach().clone()

    def with_consensus(self, consensus: Tensor | None) -> "Objective":
        """Return the objective with group consistency to `consensus` (B, C, H, W), or without."""
        other = copy.copy(self)
        other.consensus = consensus
        return other

    def with_labels(self, y: Tensor) -> "Objective":
        """Return the objective for other labels `y` (B,)."""
        other = copy.copy(self)
        other.y = y.to(self.y)
        return other

    def gradient(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of the whole candidate `x` (B, C, H, W), without a graph."""
        if chunks.needed(self):
            return chunks.evaluate(self, self.local_part(x), priors=False).gradient
        gradient, _ = self._local_gradient(
            self.local_part(x), create_graph=False, with_moments=False
        )
        return sum_tensors(gradient, self.batch_shard)

    def gradient_distance(self, x: Tensor) -> float:
        """Return the gradient distance of the whole candidate `x`, without priors or graph."""
        return self.distance_with_cotangent(self.gradient(x))[0].item()

    def value(self, x: Tensor, progress: float = 0.0) -> Losses[Tensor]:
        """Return all losses of the whole candidate `x` (B, C, H, W), without a graph.

        progress: share of the run done, in [0, 1], by which the weights change.
        """
        part = self.local_part(x)
        if chunks.needed(self):
            whole = chunks.evaluate(self, part)
            gradient, terms = whole.gradient, whole.terms
        else:
            own, moments = self.gradient_and_moments(part)
            with torch.no_grad():
                gradient, terms = self.sum_over_processes(own, self._terms(part, moments))
        with torch.no_grad():
            distance, _ = self.distance_with_cotangent(gradient)
            total = self.weights.gradient * distance + self.weighted_sum(terms, progress)
        return Losses(total, distance, terms, self.alpha)

    def weighted_sum(self, terms: Mapping[str, Tensor], progress: float | Tensor) -> Tensor | float:
        """Return the weighted sum of the priors at `progress` of the run; 0 without priors.

        progress: a number, or a scalar tensor of type float64 whose value only the device knows.
        """
        weights = self.weights.at(progress)
        return sum(_as_factor(weights[name], term) * term for name, term in terms.items())

    def __call__(self, x: Tensor, progress: float = 0.0) -> Losses[Tensor]:
        """Return all losses of the candidate `x` (B, C, H, W), differentiable by `x`.

        With several processes `x` is this one's part and the losses are the whole batch's, but
        the derivative of the total holds only this process's share of what all compute alike.
        """
        gradient, moments = self._local_gradient(
            x, create_graph=True, with_moments=self._needs_moments
        )
        terms = self._terms(x, moments)
        count = self.batch_shard.size
        distance = self.distance([differentiable_sum(g, self.batch_shard) for g in gradient])
        total = self.weights.gradient * distance / count + self.weighted_sum(terms, progress)
        if count > 1:
            _, terms = self.sum_over_processes(gradient, terms)
            value = self.weights.gradient * distance + self.weighted_sum(terms, progress)
            total = total + (value - total).detach()
        return Losses(total, distance, terms, self.alpha)


def _as_factor(weight: float | Tensor, term: Tensor) -> float | Tensor:
    """Return a weight as it multiplies a term: in its type, where the weight is a tensor."""
    return weight.to(term.dtype) if isinstance(weight, Tensor) else weight


def _check_update_model(
    name: str, target: Target, weights: Weights, bn_coupling: str, batch_shard: Shard
) -> None:
    """Raise ValueError or InputError where an update cannot be modelled so."""
    if name not in UPDATE_MODELS:
        raise ValueError(f"update_model {name}: choose of {', '.join(UPDATE_MODELS)}")
    if target.local is not None and bn_coupling == "forced":
        raise InputError(
            "the statistics of several local steps cannot be forced: each has its own; leave it out"
        )
    if name == "mean":
        return
    if target.local is None:
        raise InputError(f"update model {name}: one gradient was sent, not several local steps")
    if batch_shard.size > 1:
        raise InputError(
            f"update model {name}: processes cannot share the images of local steps; give them "
            "whole seeds, or the update model mean"
        )
    if name == "unroll" and any(PRIORS[prior].needs_moments for prior in weights.at(0.0)):
        raise InputError(
            "update model unroll: a prior on BatchNorm's statistics needs one forward pass, not "
            "one per local step; leave the prior out"
        )


def _target_moments(
    model: nn.Module, target: Target, bn_source: str
) -> list[tuple[Tensor, Tensor]]:
    """Return (mean, variance) per BatchNorm layer that the BN prior pulls to."""
    like = next(model.parameters())
    if bn_source == "running":
        moments = running_moments(model)
    elif target.bn_mean is None or target.bn_var is None:
        raise ValueError("the target holds no BN statistics of the batch: bn_source 'running'")
    else:
        moments = list(zip(target.bn_mean, target.bn_var, strict=True))
    moments = [(mean.to(like), var.to(like)) for mean, var in moments]
    if not moments:
        raise ValueError("the BN prior has a weight, but the model has no BatchNorm layer")
    return moments
