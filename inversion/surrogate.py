"""The surrogate model of an update: a place between the two states, learned with the images.

An update w₁ − w₀ of several local steps is no gradient at w₀. It is nearly parallel to a gradient
of all images at some place between the two states, (1 − α) w₀ + α w₁ (Zhu, Yao & Blaschko,
"Surrogate model extension (SME): a fast and accurate weight update attack on federated learning",
ICML 2023). α is learned in [0, 1] with the images, by its own steps of Adam.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Where the place starts, halfway as in the paper.
START = 0.5
#: First step size of α; it falls along a cosine to 0 at the end of the run.
RATE = 0.01
#: Places at which the objective is evaluated where the best one is looked for.
PLACES = tuple(step / 20 for step in range(21))


class SurrogatePlace:
    """Holds α, and learns it: one step of Adam per evaluation of the objective."""

    def __init__(self, change: Sequence[Tensor], start: float = START):
        """Begin at `start` in [0, 1]. change: w₁ − w₀, one tensor per trainable parameter."""
        self.change = tuple(change)
        self.alpha = self.change[0].new_tensor(start).requires_grad_()
        self._optimiser = torch.optim.Adam([self.alpha], lr=RATE)

    def state(self) -> dict:
        """Return what decides where the place goes next, as plain values and tensors."""
        return {"alpha": self.alpha.detach().clone(), "optimiser": self._optimiser.state_dict()}

    def go_on(self, state: dict) -> None:
        """Take the place of the one that `state` was taken of."""
        with torch.no_grad():
            self.alpha.copy_(state["alpha"])
        self._optimiser.load_state_dict(state["optimiser"])

    def moved(self, weights: Sequence[Tensor], *, on_graph: bool) -> list[Tensor]:
        """Return w₀ + α (w₁ − w₀) for weights w₀, on the graph of α or detached."""
        alpha = self.alpha if on_graph else self.alpha.detach()
        places = [
            w.detach() + alpha * change for w, change in zip(weights, self.change, strict=True)
        ]
        return places if on_graph else [place.requires_grad_() for place in places]

    def learn(self, slope: Tensor, progress: float) -> None:
        """Take one step against `slope`, ∂objective/∂α; one that is not finite is left out.

        progress: share of the run done, in [0, 1], by which the step size falls.
        """
        if not slope.isfinite():
            self.alpha.grad = None  # where it is one that `backward` adds to
            return
        self._optimiser.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * progress)) / 2
        self.alpha.grad = slope.detach()
        self._optimiser.step()
        self.alpha.grad = None
        with torch.no_grad():
            self.alpha.clamp_(0, 1)
