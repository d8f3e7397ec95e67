"""Takes a batch in chunks, so that memory depends on the chunk and not on the batch.

Where no layer makes images interact, the batch's gradient g is the sum of what its images add. So
a first pass adds up the chunks' gradients without a graph, which gives the distance d(g) and its
cotangent v = ∂d/∂g. By the chain rule the derivative by the images of a chunk is vᵀ ∂g_chunk/∂x:
a second pass takes it chunk by chunk, and only one chunk's graph is ever kept. It begins with the
chunk that the first one ended with, whose graph is there.

Priors that are means over images split likewise. The BatchNorm prior is a function of the batch's
moments, for n images of a chunk in a batch of B with the chunk's own mean μ_c and variance σ²_c

    μ = Σ n/B μ_c,  σ² = Σ n/B (σ²_c + (μ_c − μ)²)

(Chan et al., 1979). The first pass merges them. With a = ∂prior/∂μ and b = ∂prior/∂σ² the second
takes for every chunk the derivative of n/B (⟨a, μ_c⟩ + ⟨b, σ²_c + (μ_c − μ)²⟩), where a, b and the
μ inside the square are constant: the change of that μ cancels over all chunks. All of it is exact.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inversion.candidate_gradient import CandidateGradient, Part
from inversion.priors import PRIOR_FUNCTIONS, Candidate
from inversion.settings import PRIORS
from models.batchnorm import batchnorm_layers
from utils.errors import InputError
from utils.shard import Shard, sum_tensors

if TYPE_CHECKING:
    from inversion.objective import Objective

#: (mean, variance) per BatchNorm layer, (C,) each.
Moments = Sequence[tuple[Tensor, Tensor]]
#: What stands in a chunk in the place of a prior on the batch's moments: a function of the chunk's
#: moments and of its share of the images.
InPlace = Callable[[Moments, float], Tensor]


@dataclass(frozen=True)
class Pull:
    """Holds how the moments of a chunk change a prior on the batch's moments, to first order."""

    #: The batch's mean μ per BatchNorm layer, (C,).
    means: Sequence[Tensor]
    #: The prior's derivative by the batch's mean and by its variance, likewise.
    by_mean: Sequence[Tensor]
    by_var: Sequence[Tensor]

    def __call__(self, moments: Moments, share: float) -> Tensor:
        """Return a number with the derivative that the prior has by these moments of a chunk.

        share: n/B, the chunk's share of the images.
        """
        terms = [
            (a * mean).sum() + (b * (var + (mean - of_all).square())).sum()
            for (mean, var), of_all, a, b in zip(
                moments, self.means, self.by_mean, self.by_var, strict=True
            )
        ]
        return share * torch.stack(terms).sum()


@dataclass(frozen=True)
class Kept:
    """Holds the graph of one chunk between the two passes, which then need not make it twice."""

    #: The chunk's place in this process's part of the batch.
    own: slice
    #: Its images, on the graph.
    images: Tensor
    #: Their gradient, as `Objective.gradient_and_priors` returns it, where its values may be left
    #: out: they are in the sum.
    gradient: CandidateGradient
    #: Name of each prior in use → what the chunk adds; 0 for those on moments.
    terms: Mapping[str, Tensor]
    #: Its moments, on the graph, and its share of the batch's images.
    moments: Moments
    share: float

    def terms_by(self, pulls: Mapping[str, Pull]) -> dict[str, Tensor]:
        """Return the terms with what stands in the place of priors on moments."""
        return {**self.terms, **{n: pull(self.moments, self.share) for n, pull in pulls.items()}}


class _Recording:
    """Stands in the place of a Pull that is not known yet: it keeps the moments, on the graph."""

    def __init__(self):
        self.moments: Moments = ()

    def __call__(self, moments: Moments, share: float) -> Tensor:
        self.moments = moments
        return torch.zeros_like(moments[0][0][0]).detach()


@dataclass(frozen=True)
class Whole:
    """Holds what the first pass finds of the whole batch, of all processes, without a graph."""

    #: One tensor per trainable parameter.
    gradient: tuple[Tensor, ...]
    #: Name of each prior in use → its value, unweighted.
    terms: Mapping[str, Tensor]
    #: Of the whole batch; empty where no prior needs them.
    moments: Moments
    #: The last chunk of this process with its graph; None where that was not asked for.
    kept: Kept | None = None


def needed(objective: "Objective") -> bool:
    """Tell whether the batch is taken in chunks: whether one process has more than one chunk.

    The answer is the same on all processes, whatever number of images each has.
    """
    if objective.chunk_size is None:
        return False
    largest = objective.batch_shard.block(len(objective.y), rank=0)
    return largest.stop > objective.chunk_size


def coupled(objective: "Objective") -> str | None:
    """Return why images of this objective cannot be taken in chunks; None where they can."""
    if objective.unrolls:
        return "the candidate's own local steps take images together"
    if not objective.couples_images:
        return None
    layers = len(batchnorm_layers(objective.model))
    return (
        f"{layers} BatchNorm layers normalise by the whole batch, and each one's statistics need "
        "all layers before it"
    )


def check_uncoupled(objective: "Objective") -> None:
    """Raise InputError where the objective's images cannot be taken in chunks."""
    why = coupled(objective)
    if why is not None:
        raise InputError(
            f"images cannot be taken in chunks: {why}; force statistics that the client uploaded, "
            "share the images out to several processes, or capture in eval mode or with GroupNorm"
        )


def places(objective: "Objective") -> Iterator[tuple[slice, slice]]:
    """Go through this process's chunks: their place in its part of the batch, and in the batch."""
    assert objective.chunk_size is not None
    block = objective.batch_shard.block(len(objective.y))
    for start in range(block.start, block.stop, objective.chunk_size):
        stop = min(start + objective.chunk_size, block.stop)
        yield slice(start - block.start, stop - block.start), slice(start, stop)


def evaluate(
    objective: "Objective", x: Tensor, *, priors: bool = True, keep: bool = False
) -> Whole:
    """Return gradient, priors and moments of the whole batch: the first pass.

    x: this process's part of the candidate. priors: whether priors and moments are wanted too.
    keep: whether the last chunk keeps its graph, for the second pass to begin with.
    Every process of the objective's must call it.
    """
    gradient = [torch.zeros_like(g) for g in objective.target_gradient]
    terms = _of_images(objective, x) if priors else {}
    moments = _Merged(objective.target_moments if priors else ())
    kept, every = None, list(places(objective))
    for own, of_all in every:
        part, images = objective.part(of_all), of_all.stop - of_all.start
        if keep and own == every[-1][0]:
            kept = _kept(objective, x, own, of_all)
            _add(gradient, kept.gradient.values, kept.gradient.parts)
            kept = replace(kept, gradient=replace(kept.gradient, values=()))
            moments.add([(mean.detach(), var.detach()) for mean, var in kept.moments], images)
        else:
            moments.add(_added(gradient, part, x[own]), images)
    summed, terms = objective.sum_over_processes(gradient, terms)
    return replace(_whole(objective, x, summed, terms, moments), kept=kept)


def _added(total: list[Tensor], part: "Objective", x: Tensor) -> Moments:
    """Add a chunk's gradient to `total`; return its moments. Nothing else of it is kept."""
    gradient, moments = part.gradient_and_moments(x)
    _add(total, gradient, None)
    return moments


def _add(total: list[Tensor], gradient: Sequence[Tensor], parts: tuple[Part, ...] | None) -> None:
    with torch.no_grad():
        for number, g in enumerate(gradient):
            part = None if parts is None else parts[number]
            own = total[number] if part is None else total[number][part]
            own += g.detach()


def within(cotangents: Sequence[Tensor], parts: tuple[Part, ...] | None) -> Sequence[Tensor]:
    """Cut cotangents of the whole gradient to the parts that a chunk's gradient has."""
    if parts is None:
        return cotangents
    return [v if part is None else v[part] for v, part in zip(cotangents, parts, strict=True)]


def _kept(objective: "Objective", x: Tensor, own: slice, of_all: slice) -> Kept:
    """Return a chunk with its graph."""
    recording = {n: _Recording() for n in objective.prior_names if PRIORS[n].needs_moments}
    images = x[own].detach().requires_grad_()
    gradient, terms = objective.part(of_all, recording).gradient_and_priors(images)
    moments = next((r.moments for r in recording.values()), ())
    return Kept(own, images, gradient, terms, moments, len(images) / len(objective.y))


def evaluate_priors(objective: "Objective", x: Tensor) -> Whole:
    """Return the priors and moments of the whole batch alone, without its gradient."""
    terms, moments = _of_images(objective, x), _Merged(objective.target_moments)
    with torch.no_grad():
        if objective.target_moments:
            for own, of_all in places(objective):
                moments.add(objective.part(of_all).moments(x[own]), of_all.stop - of_all.start)
    _, terms = objective.sum_over_processes((), terms)
    return _whole(objective, x, (), terms, moments)


def _of_images(objective: "Objective", x: Tensor) -> dict[str, Tensor]:
    """Return what this process's images add to the priors that are means over images."""
    names = [name for name in objective.prior_names if not PRIORS[name].needs_moments]
    terms = {name: x.new_zeros(()) for name in names}
    with torch.no_grad():
        for own, of_all in places(objective):
            part = objective.part(of_all)
            for name, value in part.image_priors(x[own]).items():
                terms[name] += value
    return terms


def _whole(
    objective: "Objective",
    x: Tensor,
    gradient: tuple[Tensor, ...],
    terms: Mapping[str, Tensor],
    moments: "_Merged",
) -> Whole:
    merged = moments.of_all(objective.batch_shard)
    values = {}
    for name in objective.prior_names:
        if name in terms:
            values[name] = terms[name]
        elif merged:
            candidate = Candidate(x, merged, objective.target_moments)
            with torch.no_grad():
                values[name] = PRIOR_FUNCTIONS[name](candidate)
    return Whole(gradient, values, merged)


def pulls_of(objective: "Objective", whole: Whole, x: Tensor) -> dict[str, Pull]:
    """Return for every prior on moments how a chunk's moments change it."""
    pulls = {}
    for name in objective.prior_names:
        if not PRIORS[name].needs_moments:
            continue
        with torch.enable_grad():
            means = [mean.detach().requires_grad_() for mean, _ in whole.moments]
            variances = [var.detach().requires_grad_() for _, var in whole.moments]
            moments = list(zip(means, variances, strict=True))
            value = PRIOR_FUNCTIONS[name](Candidate(x, moments, objective.target_moments))
            slopes = torch.autograd.grad(value, [*means, *variances])
        count = len(means)
        pulls[name] = Pull([mean.detach() for mean in means], slopes[:count], slopes[count:])
    return pulls


class _Merged:
    """Merges the moments of chunks, and of processes, into those of the batch."""

    def __init__(self, like: Moments):
        """Begin with no images. like: moments of the same layers; none where none are wanted."""
        self.counts = 0
        self.sizes = [len(mean) for mean, _ in like]
        #: Mean, and sum over images of the variance about it, of all layers behind one another.
        self.mean = torch.cat([mean for mean, _ in like]).zero_() if like else None
        self.squares = torch.zeros_like(self.mean) if self.mean is not None else None

    def add(self, moments: Moments, images: int) -> None:
        """Add the moments of a chunk of `images` images."""
        if self.mean is None or self.squares is None:
            return
        mean, var = (torch.cat([pair[i] for pair in moments]) for i in (0, 1))
        total = self.counts + images
        gap = mean - self.mean
        self.squares += images * (var + gap.square() * (self.counts / total))
        self.mean += gap * (images / total)
        self.counts = total

    def of_all(self, shard: Shard) -> list[tuple[Tensor, Tensor]]:
        """Return (mean, variance) per layer of all processes' chunks; each must call it."""
        if self.mean is None or self.squares is None:
            return []
        rows = self.mean.new_zeros(shard.size, 2 * len(self.mean) + 1)
        count = self.mean.new_full((1,), float(self.counts))
        rows[shard.rank] = torch.cat([self.mean, self.squares, count])
        (rows,) = sum_tensors([rows], shard)
        means, squares, counts = rows.split([len(self.mean), len(self.mean), 1], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (squares + counts * (means - mean).square()).sum(0) / total
        return list(zip(mean.split(self.sizes), var.split(self.sizes), strict=True))
