"""Writes a 3×3 convolution's weight gradient as nine products of matrices, one per tap.

With stride 1 and zero padding 1 the gradient's slice of tap k is G_k = D S_k X. D (O, N) holds the
signals at the output and X (N, I) the inputs, N = h·w·B, positions in raster order and all images
of a position together. (S_k X)[p] is X[p + δ_k] with δ_k ∈ {−1, 0, 1}², or 0 where p + δ_k lies
outside the map. A `shape` is (h, w, B).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

#: Offsets δ_k of the nine taps, in the order of a kernel's entries.
TAPS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))


def tap_slices(gradient: Tensor) -> Tensor:
    """Return the slices G_k (9, O, I) of a gradient (O, I, 3, 3) in float64."""
    return gradient.double().permute(2, 3, 0, 1).reshape(9, *gradient.shape[:2])


def by_position(images: Tensor) -> Tensor:
    """Put (B, C, h, w) into the order of the factors: (C, h·w·B)."""
    return images.permute(1, 2, 3, 0).reshape(images.shape[1], -1)


def relative_norm(left: Tensor, whole: Tensor) -> float:
    """Return ‖left‖ / ‖whole‖."""
    tiny = torch.finfo(whole.dtype).tiny
    return float(torch.linalg.vector_norm(left) / torch.linalg.vector_norm(whole).clamp_min(tiny))


def least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """Return the X (n, k) that minimises ‖matrix X − target‖, for (m, n) and (m, k).

    By QR factors, with a ridge of 1e-13 of the largest column, so that a matrix of too small a
    rank gives a finite answer on every device.
    """
    ridge = (1e-13 * torch.linalg.vector_norm(matrix, dim=0).max()).clamp_min(1e-150)
    n = matrix.shape[1]
    padded = torch.cat([matrix, ridge * torch.eye(n, dtype=matrix.dtype, device=matrix.device)])
    q, r = torch.linalg.qr(padded)
    return torch.linalg.solve_triangular(r, q[: len(matrix)].mT @ target, upper=True)


def shifted_inputs(inputs: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return S_k X (9, N, I) for inputs X (N, I)."""
    height, width, batch = shape
    padded = F.pad(inputs.reshape(height, width, batch, -1), (0, 0, 0, 0, 1, 1, 1, 1))
    parts = [padded[1 + r : 1 + r + height, 1 + c : 1 + c + width] for r, c in TAPS]
    return torch.stack(parts).reshape(9, *inputs.shape)


def shifted_outputs(outputs: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return D S_k (9, O, N) for signals D (O, N)."""
    moved = shifted_inputs(outputs.mT, shape)  # the transpose of S_k is the shift by −δ_k
    return moved.flip(0).mT


def inputs_for(slices: Tensor, outputs: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the X (N, I) that minimises Σ_k ‖G_k − D S_k X‖² for signals D (O, N)."""
    return least_squares(shifted_outputs(outputs, shape).flatten(0, 1), slices.flatten(0, 1))


def outputs_for(slices: Tensor, inputs: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the D (O, N) that minimises Σ_k ‖G_k − D S_k X‖² for inputs X (N, I)."""
    patches = shifted_inputs(inputs, shape).transpose(1, 2).flatten(0, 1)
    return least_squares(patches, slices.transpose(1, 2).flatten(0, 1)).mT
