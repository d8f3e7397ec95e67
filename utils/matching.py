"""Pairs reconstructed with true images, one to one."""

import numpy as np
import torch
from torch import Tensor


def label_numbers(y: Tensor, y_true: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels as integers (B,) each: classes as they are, label vectors (B, K) numbered.

    Equal vectors of either batch have the same number.
    """
    if y.dim() == 1:
        return y, y_true
    both = torch.cat([y.cpu(), y_true.cpu().to(y.dtype)])
    numbers = both.unique(dim=0, return_inverse=True)[1]
    return numbers[: len(y)], numbers[len(y) :]


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
