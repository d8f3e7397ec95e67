"""Searches for the probabilities of a confident network that its head's gradient calls for."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import least_squares
from torch import Tensor

#: Probability below which its logarithm is continued as a straight line.
LEAST_PROBABILITY = 1e-4
#: Evaluations of the logarithms' differences, and of the probabilities' afterwards, at most.
EVALUATIONS, POLISHING = 80, 30
#: Relative changes at which the search ends: those of float64.
ARRIVED = 1e-15


@dataclass(frozen=True)
class HeadGradient:
    """Holds a linear head, its gradient and the labels of the batch; float64."""

    #: (K, d).
    weight: Tensor
    #: (K,), zeros without a bias.
    bias: Tensor
    #: (K, d), ∂L/∂W.
    of_weight: Tensor
    #: (K,), ∂L/∂b; None without a bias.
    of_bias: Tensor | None
    #: (B, K) labels, smoothed where the client smooths them.
    labels: Tensor
    #: Whether every output is a probability of its own, as under binary cross-entropy.
    binary: bool = False

    def signal(self, probabilities: Tensor) -> Tensor:
        """Return the derivative of the loss by the logits, (B, K)."""
        count = self.labels.numel() if self.binary else len(self.labels)
        return (probabilities - self.labels) / count

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the classes' probabilities (B, K) at these features (B, d)."""
        logits = features @ self.weight.T + self.bias
        return torch.sigmoid(logits) if self.binary else torch.softmax(logits, 1)

    def residual(self, signal: Tensor, features: Tensor) -> float:
        """Return what is left of either gradient, relative to it, the larger one."""
        left = [(signal.T @ features - self.of_weight).norm() / self.of_weight.norm()]
        if self.of_bias is not None and bool(self.of_bias.any()):
            left.append((signal.sum(0) - self.of_bias).norm() / self.of_bias.norm())
        return max(part.item() for part in left)


@dataclass(frozen=True)
class HeadEquations:
    """Holds the equations for R (B, B), the numbers that a head's gradient leaves open.

    The columns of A = (P − Y)ᵀ / B lie in the column space of ∂L/∂W = A F. With L (K × B) a basis
    of it, A = L R, P = Y + B Aᵀ, and F = R⁻¹ Lᵀ ∂L/∂W. So R solves softmax(F Wᵀ + b) = P and
    L R 1 = ∂L/∂b. All functions take R's numbers (B²,), row by row.
    """

    given: HeadGradient
    #: (K, B), L.
    basis: Tensor
    #: (B, K), Lᵀ ∂L/∂W Wᵀ.
    logits: Tensor

    def sides(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log softmax(F Wᵀ + b), P, (B, K) each, and what is left of the bias's gradient."""
        given, mixing = self.given, numbers.reshape(len(self.logits), -1)
        found = torch.log_softmax(torch.linalg.solve(mixing, self.logits) + given.bias, 1)
        wanted = given.labels + len(mixing) * (self.basis @ mixing).T
        if given.of_bias is None:
            return found, wanted, numbers[:0]
        left = self.basis @ mixing.sum(1) - given.of_bias
        return found, wanted, self._bias_weight * left

    def slopes(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the derivatives of the three `sides` by the numbers: (B·K, B²) twice, (K, B²)."""
        count = len(self.logits)
        inverse = torch.linalg.inv(numbers.reshape(count, count))
        z = inverse @ self.logits
        p = torch.softmax(z + self.given.bias, 1)
        gap = z - torch.einsum("ic,kc->ik", p, z)[:, :, None]  # (image i, k, class c)
        found = -torch.einsum("ij,ikc->icjk", inverse, gap)
        one = torch.eye(count, dtype=z.dtype, device=z.device)
        wanted = count * torch.einsum("cj,ik->icjk", self.basis, one)
        bias = self.basis[:, :, None].expand(-1, -1, count)
        if self.given.of_bias is None:
            bias = bias[:0]
        parts = found.flatten(0, 1), wanted.flatten(0, 1), self._bias_weight * bias
        return tuple(part.flatten(1) for part in parts)

    @property
    def _bias_weight(self) -> Tensor | float:
        of_bias = self.given.of_bias
        return 0.0 if of_bias is None else len(of_bias) / of_bias.norm().clamp_min(1e-300)

    def by_logarithms(self, numbers: Tensor) -> Tensor:
        """Return the differences of log softmax(F Wᵀ + b) and log P, and the bias's part."""
        found, wanted, bias = self.sides(numbers)
        return torch.cat([(found - _logarithm(wanted)).flatten(), bias])

    def logarithm_slopes(self, numbers: Tensor) -> Tensor:
        """Return the derivative of `by_logarithms`."""
        found, wanted, bias = self.slopes(numbers)
        p = self.sides(numbers)[1].flatten().clamp_min(LEAST_PROBABILITY)
        return torch.cat([found - wanted / p[:, None], bias])

    def by_probabilities(self, numbers: Tensor) -> Tensor:
        """Return the differences of softmax(F Wᵀ + b) and P, and the bias's part."""
        found, wanted, bias = self.sides(numbers)
        return torch.cat([(found.exp() - wanted).flatten(), bias])

    def probability_slopes(self, numbers: Tensor) -> Tensor:
        """Return the derivative of `by_probabilities`."""
        found, wanted, bias = self.slopes(numbers)
        p = self.sides(numbers)[0].exp().flatten()
        return torch.cat([p[:, None] * found - wanted, bias])


def search(given: HeadGradient, start: Tensor) -> Tensor:
    """Search for the probabilities (B, K) that the gradient calls for, from `start` on.

    Nonlinear least squares for the numbers of `HeadEquations`, first between the logarithms of both
    sides, which are less flat where a network is sure, then between the sides themselves. Where
    the fixed point A → F → A runs away from its solution, this still arrives.
    """
    basis = torch.linalg.svd(given.of_weight, full_matrices=False)[0][:, : len(given.labels)]
    equations = HeadEquations(given, basis, basis.T @ given.of_weight @ given.weight.T)
    numbers = (basis.T @ given.signal(start).T).flatten()
    for left, slopes, evaluations in (
        (equations.by_logarithms, equations.logarithm_slopes, EVALUATIONS),
        (equations.by_probabilities, equations.probability_slopes, POLISHING),
    ):
        numbers = _least_squares(left, slopes, numbers, evaluations)
    try:
        return equations.sides(numbers)[0].exp()
    except torch.linalg.LinAlgError:  # a singular R
        return start


def _logarithm(p: Tensor) -> Tensor:
    """Return log p, continued by its tangent below LEAST_PROBABILITY."""
    least = torch.full_like(p, LEAST_PROBABILITY)
    tangent = least.log() + (p - least) / least
    return torch.where(p > least, torch.maximum(p, least).log(), tangent)


def _least_squares(
    left: Callable[[Tensor], Tensor],
    slopes: Callable[[Tensor], Tensor],
    start: Tensor,
    evaluations: int,
) -> Tensor:
    """Lessen ‖left(x)‖² from `start` on; return the start where that meets infinite numbers."""

    def on_cpu(function: Callable[[Tensor], Tensor]):
        return lambda x: function(torch.from_numpy(x).to(start)).cpu().numpy()

    try:
        found = least_squares(
            on_cpu(left), start.cpu().numpy(), on_cpu(slopes), x_scale="jac",
            ftol=ARRIVED, xtol=ARRIVED, gtol=ARRIVED, max_nfev=evaluations,
        )  # fmt: skip
    except (ValueError, torch.linalg.LinAlgError):  # not finite, or a singular R
        return start
    return torch.from_numpy(found.x).to(start)
