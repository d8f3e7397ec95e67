"""The gradient of candidate images, and the tensors by which it depends on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

#: Tensors on the graph with their cotangents, for `torch.autograd.grad`.
Pairs = list[tuple[Tensor, Tensor]]
#: Part of a parameter, a slice per dimension; None for all of it.
Part = tuple[slice, ...] | None


@dataclass(frozen=True)
class CandidateGradient:
    """Holds the gradient of candidate images, in a form that can be differentiated by them."""

    #: One tensor per trainable parameter, in the model's order; a part of it where `parts` says so.
    values: tuple[Tensor, ...]
    #: A cotangent v per parameter, shaped like `values`, → pairs (tensor on the graph, its
    #: cotangent). Over all pairs, the inner products of tensor and cotangent sum to a number that
    #: has the derivative by the images that ⟨gradient, v⟩ has.
    pairs: Callable[[Sequence[Tensor]], Pairs]
    #: The part of every parameter that `values` has; outside it the gradient is 0. None for all.
    parts: tuple[Part, ...] | None = None
    #: Whether nothing else uses the memory of `values`, which may then be overwritten.
    disposable: bool = False
    #: Asked after the derivative by `pairs` was taken: whether it is whole.
    complete: Callable[[], bool] = lambda: True


def on_graph(gradient: Sequence[Tensor]) -> CandidateGradient:
    """Make the candidate's gradient of tensors that are on the graph themselves."""

    def pairs(cotangents: Sequence[Tensor]) -> Pairs:
        both = zip(gradient, cotangents, strict=True)
        return [(g, v) for g, v in both if g.requires_grad]

    return CandidateGradient(tuple(gradient), pairs)
