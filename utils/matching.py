"""Pairs images one to one in the best way."""

import numpy as np
from torch import Tensor


def assign(
    x: Tensor, x_true: Tensor, y: Tensor | None = None, y_true: Tensor | None = None
) -> list[int]:
    """Return for true image i the index of its reconstruction in the optimal pairing.

    x, x_true: (B, ...) images. The pairing minimises the summed MSE (Hungarian method). With
    labels `y` of the reconstructions and `y_true`, (B,) each, it minimises the number of pairs
    whose labels differ first: an attack that knew the labels said which of its images is which.
    """
    from scipy.optimize import linear_sum_assignment  # a second, which most attacks do not need

    a, b = x.double().flatten(1).cpu(), x_true.double().flatten(1).cpu()
    cost = (b.square().sum(1)[:, None] + a.square().sum(1)[None] - 2 * b @ a.T).numpy()
    if y is not None:
        differ = (y_true.cpu()[:, None] != y.cpu()[None]).numpy()
        cost = cost + (np.ptp(cost) + 1) * len(cost) * differ
    rows, columns = linear_sum_assignment(cost)
    return columns[np.argsort(rows)].tolist()
