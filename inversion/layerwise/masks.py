"""Repairs ReLU masks: which entries are on, and which channels of a gradient contradict that."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from inversion.layerwise.convolution import Geometry
from inversion.layerwise.least_squares import least_norm

#: An entry is off below this multiple of the deepest negative value, and below this share of the
#: largest one: the true values are 0 there, and what is negative shows how far they scatter.
DEPTH, FLOOR = 1.6, 3e-8
#: Times its threshold from which a ReLU's output is beyond doubt.
CLEAR = 8.0


@dataclass(frozen=True)
class Rectified:
    """Holds the output of a ReLU, estimated with an error."""

    #: As it was solved for, with an error.
    raw: Tensor
    #: With exact zeros where it counts as off.
    value: Tensor
    #: Below it an entry counts as off.
    threshold: float

    @property
    def mask(self) -> Tensor:
        """Return 1 where the ReLU is on, else 0."""
        return (self.value > 0).to(self.raw)


def rectify(raw: Tensor, floor: float = FLOOR) -> Rectified:
    """Set to zero what is a ReLU's zero but for the error.

    raw: estimate of a ReLU's output; its true values are 0 or positive. floor: share of the largest
    entry below which it is off whatever the negative ones say.
    """
    threshold = max(DEPTH * -raw.min().item(), floor * raw.max().item())
    return Rectified(raw, torch.where(raw > threshold, raw, torch.zeros_like(raw)), threshold)


#: A channel is doubted if it leaves this many times the median; at most this share of them is.
DOUBTED, MOST_DOUBTED = 4.0, 0.25
#: Distance of an estimated mask entry from 0 and 1 up to which it is believed.
BELIEVED = 0.3
#: Share of a channel's square that a flip must explain.
WORTH = 0.1
#: Share of the image's largest signal below which an entry's signal says nothing about its mask.
FAINT = 1e-4


def doubted_channels(left: Tensor) -> Tensor:
    """Find the output channels whose part of a weight gradient is explained worst.

    left: (O, I, k, k), what is left of the gradient. One wrong entry of the mask behind output
    channel o changes the equations of that channel alone, ∂L/∂w[o], and no others. Returns 0/1,
    (O,), with at least one channel.
    """
    sizes = left.flatten(1).norm(dim=1)
    count = max(1, int(MOST_DOUBTED * len(sizes)))
    doubted = sizes > max(DOUBTED * sizes.median().item(), 0.0)
    top = torch.zeros_like(doubted)
    top[sizes.topk(count).indices] = True
    doubted = doubted & top
    doubted[sizes.argmax()] = True
    return doubted.to(left)


def fitted_signals(gradient: Tensor, u: Tensor, geometry: Geometry) -> Tensor:
    """Return the signals at a convolution's output that explain its weight gradient best.

    gradient: (O, I, k, k); u: (B, I, H, W), the input. With u known, the gradient is linear in the
    signal: one least-squares problem per output channel, all with the matrix of the patches of u.
    Returns (O, N) over the N = B·h·w positions; of the least norm where they are more than I·k².
    """
    patches = F.unfold(u, geometry.kernel, padding=geometry.padding, stride=geometry.stride)
    matrix = patches.transpose(1, 2).reshape(-1, patches.shape[1]).T  # (I·k·k, N)
    return least_norm(matrix, gradient.flatten(1).T).T


def pursued_flips(
    left: Tensor, u: Tensor, change: Tensor, geometry: Geometry, most: int
) -> list[int]:
    """Find the mask entries whose flips explain what is left of a weight gradient, one by one.

    left: (O, I, k, k), the gradient less that of u and the present signal. u: (B, I, H, W).
    change: (B, O, h, w), what a flip of each entry alone adds to the signal; 0 where none is
    wanted. Matching pursuit (Mallat & Zhang, 1993) over change × patch, which changes ∂L/∂w[o]
    alone. It takes a flip as long as that takes off a share WORTH of its channel's square. Returns
    flat indices, `most` at most.
    """
    size = change.square() * geometry.forward(
        u.square().sum(1, keepdim=True), u.new_ones(1, 1, *geometry.kernel)
    )
    patches = F.unfold(u, geometry.kernel, padding=geometry.padding, stride=geometry.stride)
    left, found = left.clone(), []
    for _ in range(most):
        gain = 2 * geometry.forward(u, left) * change - size
        gain = gain / left.flatten(1).square().sum(1).clamp_min(1e-300).view(1, -1, 1, 1)
        best = int(gain.argmax())
        if not gain.reshape(-1)[best] > WORTH:
            break
        image, channel, row, column = torch.unravel_index(torch.tensor(best), change.shape)
        patch = patches[image, :, row * change.shape[3] + column].view(left.shape[1:])
        left[channel] -= change[image, channel, row, column] * patch
        change = change.clone(memory_format=torch.contiguous_format)
        change.view(-1)[best] = 0
        found.append(best)
    return found


def rounded_mask(estimate: Tensor, arriving: Tensor, mask: Tensor) -> Tensor:
    """Round estimated mask entries to 0 or 1 where they are near and their signal is not faint.

    estimate, arriving (signals that the mask lets through), mask (the present one): (B, O, h, w).
    """
    strongest = arriving.abs().amax((1, 2, 3), keepdim=True)
    nearest = (estimate > 0.5).to(mask)
    clear = ((estimate - nearest).abs() < BELIEVED) & (arriving.abs() > FAINT * strongest)
    return torch.where(clear, nearest, mask)


def flipped(mask: Tensor, index: int) -> Tensor:
    """Return the mask with one entry, by flat index, turned over."""
    changed = mask.clone(memory_format=torch.contiguous_format)  # whatever order it came in
    changed.view(-1)[index] = 1 - changed.view(-1)[index]
    return changed
