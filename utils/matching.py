"""Pairs reconstructed with true images, one to one."""

import numpy as np
from torch import Tensor


def assign(
    x: Tensor, x_true: Tensor, y: Tensor | None = None, y_true: Tensor | None = None
) -> list[int]:
    """Return, for every true image, the index of the reconstruction paired with it.

    The pairing minimises the summed squared error (Hungarian method, scipy). With the labels `y`
    of the reconstructions and `y_true` it first minimises the number of pairs with different
    labels, because an attack that assigns labels has said which class each image shows.

    x, x_true: (B, C, H, W). y, y_true: (B,), both or neither.
    """
    from scipy.optimize import linear_sum_assignment  # a second, which most attacks do not need

    a, b = x.double().flatten(1).cpu(), x_true.double().flatten(1).cpu()
    cost = (b.square().sum(1)[:, None] + a.square().sum(1)[None] - 2 * b @ a.T).numpy()
    if y is not None and y_true is not None:
        differ = (y_true.cpu()[:, None] != y.cpu()[None]).numpy()
        cost = cost + (np.ptp(cost) + 1) * len(cost) * differ
    rows, columns = linear_sum_assignment(cost)
    return columns[np.argsort(rows)].tolist()
