"""Counts labels with labelled images of the attacker's own, for trained heads.

The head's gradient is a sum of statistics of single samples. The auxiliary images give the mean
and covariance of these statistics in every class, and the counts that explain the observed sum
best follow from them.
"""

import numpy as np
import torch
from torch import Tensor

from inversion.labels.counts import (
    Estimate,
    clipping_remark,
    plausible_spread,
    prepared,
    round_counts,
)
from inversion.labels.evidence import Auxiliary, Evidence

#: Up to this many classes all statistics are used, with their covariances.
MANY_CLASSES = 200
#: Factor of the covariances between different statistics, whose estimates are noisy.
SHRINKAGE = 0.9
#: Prior variances of a count, in units of the mean count / 4; the likeliest is used.
PRIOR_VARIANCES = (0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
#: Passes, each of which takes the covariance at the counts of the pass before.
PASSES = 3
#: Auxiliary images per class from which on the uploaded BN statistics can be used well.
IMAGES_FOR_BN = 20


def auxiliary_counts(evidence: Evidence) -> Estimate:
    """Return the most probable counts given the sum of statistics that the gradient shows.

    Gaussian model: the sum has mean Eᵀn and covariance Σ_c n_c K_c, with E the class means and K_c
    the class covariances of the auxiliary images, both with the error of few images; a Gaussian
    prior around `plausible_spread` whose width maximises the evidence; Σ n = B and n ≥ the lower
    bounds. Uses the uploaded BatchNorm mean where the evidence holds one.

    Raises ValueError without auxiliary images or without a bias gradient, and when a class has no
    auxiliary image.
    """
    if evidence.auxiliary is None:
        raise ValueError("no auxiliary images were given")
    if evidence.bias_grad is None:  # a stand-in would not do
        raise ValueError("needs the gradient of the head's bias")
    e, bounds = prepared(evidence)
    sums = _Sums(e, evidence.auxiliary)
    start = plausible_spread(e, bounds)
    present = max(1, int((bounds > 0).sum()))
    width = max(e.batch_size / present, 1) / 4 * (start / start.max()).clamp(min=0.05)
    n = start
    for _ in range(PASSES):
        covariance = sums.covariance(n)
        tau = max(
            (scale * width for scale in PRIOR_VARIANCES),
            key=lambda variance: _log_evidence(sums, start, variance, covariance),
        )
        n = _most_probable(sums, start, tau, covariance, bounds, e.batch_size)
    return Estimate(round_counts(n, bounds, e.batch_size), "auxiliary", clipping_remark(e))


class _Sums:
    """Holds the observed sum of the statistics, their class means (C, D) and covariances."""

    def __init__(self, e: Evidence, aux: Auxiliary):
        count = e.num_classes
        h, labels = aux.features, aux.labels
        self.images = torch.bincount(labels, minlength=count)
        if (self.images == 0).any():
            k = int((self.images == 0).nonzero()[0])
            raise ValueError(f"class {k} has no auxiliary image")
        r = e.probabilities(h) - e.label_smoothing / count
        r[torch.arange(len(h)), labels] -= 1 - e.label_smoothing
        ones = torch.ones(count, dtype=torch.float64)
        g = e.known_bias_grad
        statistics, observed, noise = [r], [g], [ones]
        if count <= MANY_CLASSES:
            mean = h.mean(0)
            square = mean.square().sum().clamp(min=1e-12)
            centred = e.weight_grad - torch.outer(g, mean)
            statistics += [r * ((h - mean) @ e.weight.T), r * (h @ mean / square - 1)[:, None]]
            observed += [
                (centred * e.weight).sum(1),
                e.weight_grad @ mean / square - g,
            ]
            noise += [e.weight.square().sum(1) + (e.weight @ mean).square(), ones / square + ones]
        if aux.bn_mean is not None and aux.bn_inputs is not None:
            statistics.append(aux.bn_inputs)
            observed.append(aux.bn_mean)
            noise.append(torch.zeros_like(aux.bn_mean))
        phi = torch.cat(statistics, 1)
        self.observed = e.batch_size * torch.cat(observed)
        self.noise = (e.batch_size * e.sigma) ** 2 * torch.cat(noise)
        means = torch.zeros(count, phi.shape[1], dtype=torch.float64)
        self.means = means.index_add_(0, labels, phi) / self.images[:, None]
        self.residuals = phi - self.means[labels]
        self.labels = labels
        self.is_diagonal = count > MANY_CLASSES

    def covariance(self, n: Tensor) -> Tensor:
        """Return the covariance (D, D) of the sum for counts n (C,).

        It includes the error of the class means, which few images have.
        """
        weights = n + n.square() / self.images
        single = self.images < 2
        a_sample = torch.where(single, 0.0, weights / (self.images - 1).clamp(min=1))[self.labels]
        if single.any():  # one image shows no spread, so it gets that of all classes together
            spare = max(1, len(self.labels) - len(self.images))
            a_sample = a_sample + weights[single].sum() / spare
        if self.is_diagonal:
            return torch.diag(a_sample @ self.residuals.square() + self.noise + self._jitter())
        full = self.residuals.T @ (a_sample[:, None] * self.residuals)
        diagonal = full.diagonal() + self.noise + self._jitter()
        return SHRINKAGE * full + torch.diag(diagonal - SHRINKAGE * full.diagonal())

    def _jitter(self) -> float:
        return 1e-6 + 1e-9 * self.residuals.square().mean().item() * len(self.labels)


def _log_evidence(sums: _Sums, start: Tensor, variance: Tensor, covariance: Tensor) -> float:
    """Return log p(observed | prior variances) up to a constant."""
    total = covariance + (sums.means.T * variance) @ sums.means
    factor = torch.linalg.cholesky(total)
    error = (sums.observed - start @ sums.means)[:, None]
    square = (error * torch.cholesky_solve(error, factor)).sum()
    return -0.5 * square.item() - factor.diagonal().log().sum().item()


def _most_probable(
    sums: _Sums, start: Tensor, variance: Tensor, covariance: Tensor, bounds: Tensor, total: int
) -> Tensor:
    """Minimise the negative log posterior over n ≥ bounds with Σ n = total; returns n (C,).

    With n = bounds + z it is a non-negative least-squares problem, whose heavy last row holds the
    sum. If the bounds alone reach `total` they are returned.

    Raises ValueError where the solver finds no solution.
    """
    import scipy.optimize  # seconds, which no other method needs

    free = total - int(bounds.sum())
    if free <= 0:
        return bounds.double()
    factor = torch.linalg.cholesky(covariance)
    scaled = torch.linalg.solve_triangular(factor, sums.means.T, upper=False)  # (D, C)
    goal = torch.linalg.solve_triangular(factor, sums.observed[:, None], upper=False)[:, 0]
    # (Hessian by Cholesky first: the problem is then C × C whatever the number of statistics)
    hessian = scaled.T @ scaled + torch.diag(1 / variance)
    upper = torch.linalg.cholesky(hessian).T
    linear = scaled.T @ goal + start / variance - hessian @ bounds.double()
    right = torch.linalg.solve_triangular(upper.T, linear[:, None], upper=False)[:, 0]
    heavy = 1e3 * upper.diagonal().max()
    matrix = torch.cat([upper, heavy.expand(1, len(bounds))])
    vector = torch.cat([right, heavy[None] * free])
    try:
        z, _ = scipy.optimize.nnls(matrix.numpy(), vector.numpy(), maxiter=30 * len(bounds))
    except RuntimeError as error:
        raise ValueError(f"the auxiliary images give no solution: {error}") from error
    return bounds + torch.from_numpy(np.asarray(z))
