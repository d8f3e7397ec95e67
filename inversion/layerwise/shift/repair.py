"""Repairs routing masks: flips the entries that explain what they leave of the gradient."""

import torch
from torch import Tensor

from inversion.layerwise.shift.taps import (
    by_position,
    inputs_for,
    relative_norm,
    shifted_inputs,
    tap_slices,
)


def repair_masks(
    gradient: Tensor, routed: Tensor, masks: Tensor, rounds: int = 12
) -> tuple[Tensor, Tensor, float]:
    """Flip the entries of masks (B, O, h, w) that explain what is left of the gradient.

    With E = G − Σ (routed ∘ masks) ⊗ patches, the flip of an entry that adds c to its signal takes
    2 c ⟨E[o], patch⟩ − c² ‖patch‖² off ‖E‖² (matching pursuit). A round flips the best entry of
    every channel where that is at least a tenth of the largest, or else only the best of all, and
    solves the inputs anew. It stops after `rounds`, or when a round no longer lowers the residual.
    Returns the masks, the inputs (B, I, h, w) and the residual ‖E‖ / ‖G‖.
    """
    slices = tap_slices(gradient.double())
    batch, _, height, width = routed.shape
    shape = (height, width, batch)
    signal, current = by_position(routed.double()), by_position(masks)
    inputs, left = _solved(slices, signal * current, shape)
    for _ in range(rounds):
        taken = _flip_gains(left, inputs, signal, current, shape)
        best, places = taken.max(1)
        if best.max() <= 1e-3 * left.square().sum():
            break
        for chosen in (best >= 0.1 * best.max(), best >= best.max()):
            trial = current.clone()
            trial[chosen, places[chosen]] ^= True
            trial_inputs, trial_left = _solved(slices, signal * trial, shape)
            if trial_left.norm() < 0.999 * left.norm():
                break
        else:
            break
        current, inputs, left = trial, trial_inputs, trial_left
    images = inputs.reshape(height, width, batch, -1).permute(2, 3, 0, 1)
    repaired = current.reshape(-1, height, width, batch).permute(3, 0, 1, 2)
    return repaired, images, relative_norm(left, slices)


def _solved(slices: Tensor, outputs: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return the best inputs (N, I) for signals (O, N), and the rest of the gradient (9, O, I)."""
    q, r = torch.linalg.qr(outputs)
    inputs = inputs_for(q.mT @ slices, r, shape)
    return inputs, slices - outputs @ shifted_inputs(inputs, shape)


def _flip_gains(
    left: Tensor, inputs: Tensor, signal: Tensor, masks: Tensor, shape: tuple[int, int, int]
) -> Tensor:
    """Return what a flip of each entry (O, N) takes off ‖left‖², with the inputs as they are."""
    patches = shifted_inputs(inputs, shape)
    change = torch.where(masks, -signal, signal)
    along = torch.einsum("koi,kni->on", left, patches)
    return 2 * change * along - change.square() * patches.square().sum((0, 2))
