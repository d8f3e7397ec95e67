"""The gradient of candidate images, and the tensors by which it depends on them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CandidateGradient:
    """Holds the gradient of candidate images, in a form that can be differentiated by them."""

    #: One tensor per trainable parameter, in the model's order.
    values: tuple[Tensor, ...]

    def pairs(self, cotangents: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return tensors of the graph with their cotangents, for `torch.autograd.grad`.

        cotangents: v, shaped like `values`. The sum of the inner products of all pairs has the
        derivative by the images that ⟨gradient, v⟩ has.
        """
        both = zip(self.values, cotangents, strict=True)
        return [(value, v) for value, v in both if value.requires_grad]
