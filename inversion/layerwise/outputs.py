"""Recovers a convolution's outputs from its gradient where BatchNorm couples the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from inversion.layerwise.least_squares import least_norm, solve_well
from inversion.layerwise.use import Use

#: Share of the largest singular value that a direction of a gradient must have.
DIRECTION = 3e-6
#: The same in shares of the noise, whose own singular values are smaller than itself.
DIRECTION_OF_NOISE = 0.3
#: Rounds of the search for wrong mask entries, the share of what is left that one must explain,
#: and of what the best one explains.
SEARCHES, WORTH, ALIKE = 20, 1e-3, 0.3
#: Numbers up to which the equations of all positions are solved together.
TOGETHER = 400


@dataclass(frozen=True)
class Outputs:
    """Holds a convolution's outputs and the signal there, recovered from its gradient."""

    #: (B, O, h, w), z without bias.
    z: Tensor
    #: (B, O, h, w), ∂L/∂z.
    signal: Tensor
    #: Norm of what the equations leave over, relative to their right sides.
    residual: float
    #: (B, O, h, w), what is left of the signal that does not depend on z, outside the gradient's
    #: column space: where a mask entry is wrong, its part of that signal.
    left: Tensor


def outputs_from_gradient(use: Use, mask: Tensor | None = None) -> Outputs:
    """Recover z and ∂L/∂z behind a coupled convolution whose channels are more than its positions.

    With G (O × I·k·k) the weight gradient, the columns of z − μ lie in W times the row space of G
    and those of ∂L/∂z = K − κ (z − μ) in the column space of G: as many linear equations per
    position as G has directions too few. Known outputs add theirs; where there are few numbers,
    Σ ∂L/∂z̃ z̃ = ∂L/∂γ and a zero sum of z − μ are added for all positions together. mask: in the
    place of the present one.
    """
    bn = use.batchnorm
    assert bn is not None
    assert bn.weight_gradient is not None
    dy = use.arriving * (use.mask if mask is None else mask)
    count, channels, height, width = dy.shape
    positions = count * height * width

    def flat(t: Tensor) -> Tensor:
        return t.permute(1, 0, 2, 3).reshape(channels, positions)

    constant, slope = bn.constants(dy)
    columns, rows = _spaces(
        use.gradient.reshape(channels, -1),
        min(positions - 1, channels),
        max(DIRECTION, DIRECTION_OF_NOISE * use.accuracy.noise),
    )
    basis = use.weight.reshape(channels, -1) @ rows.T  # z − μ = basis @ coefficients
    outside = _without(columns, slope[:, None] * basis)
    target = _without(columns, flat(constant))
    size = outside.square().mean().sqrt().clamp_min(1e-300)
    span = basis.square().mean().sqrt().clamp_min(1e-300)
    known = flat(use.known if mask is None else use.known * mask)
    centred = flat(use.output) - bn.mean[:, None]
    if basis.shape[1] * positions <= TOGETHER:
        inverse_std = (bn.var + bn.eps).rsqrt()
        whole = _Together(outside / size, target / size, basis, span, known, centred)
        moment = (flat(dy)[:, :, None] * basis[:, None, :]).reshape(channels, -1)
        coefficients, residual = whole.solve(moment * inverse_std[:, None], bn.weight_gradient)
    else:
        coefficients, residual = _one_by_one(
            outside / size, target / size, basis / span, known, centred / span
        )
    left = target - outside @ coefficients
    centred = basis @ coefficients

    def back(t: Tensor) -> Tensor:
        return t.reshape(channels, count, height, width).permute(1, 0, 2, 3).contiguous()

    signal = flat(constant) - slope[:, None] * centred
    signal = signal - signal.mean(1, keepdim=True)  # as BatchNorm's own are, but for noise
    return Outputs(back(centred + bn.mean[:, None]), back(signal), residual, back(left))


def search_mask(use: Use, doubtful: Tensor, good: float) -> tuple[Tensor, int]:
    """Correct the mask behind a coupled use by what it leaves of the signal.

    What is left, outside the column space of the gradient, is small where all entries are right. A
    wrong one leaves its own part of the signal, at its own place, nearly untouched, since the
    column space has few directions. doubtful: (B, O, h, w) of 0 and 1, entries that may be wrong.
    good: a residual that needs no search. Returns the mask and how many entries changed.
    """
    mask, best = use.mask, outputs_from_gradient(use)
    for _ in range(SEARCHES):
        if best.residual < good:
            break
        change = use.per_flip * (1 - 2 * mask)
        gain = (-2 * best.left * change - change.square()) * doubtful
        wrong = gain > max(WORTH * best.left.square().sum().item(), ALIKE * gain.max().item())
        other = torch.where(wrong, 1 - mask, mask)
        found = outputs_from_gradient(use, other)
        if not found.residual < best.residual:
            break
        mask, best = other, found
    return mask, int((mask != use.mask).sum())


def _spaces(matrix: Tensor, most: int, least: float) -> tuple[Tensor, Tensor]:
    """Return bases of the column space (O, r) and the row space (r, n), r ≤ most.

    least: share of the largest singular value from which a direction counts.
    """
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    values, vectors = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    rank = min(most, int((values > least * values[0]).sum()))
    columns = vectors[:, :rank]
    rows, _ = torch.linalg.qr(((columns.T @ matrix) / values[:rank, None]).T)
    return columns, rows.T


def _without(columns: Tensor, t: Tensor) -> Tensor:
    return t - columns @ (columns.T @ t)


def _one_by_one(
    outside: Tensor, target: Tensor, basis: Tensor, known: Tensor, centred: Tensor
) -> tuple[Tensor, float]:
    """Solve every position's equations; return coefficients (r, N) and the mean residual.

    outside (O, r) x = target (O, N) at all positions, basis (O, r) x = centred (O, N) where known
    (O, N) is 1. The normal equations of all positions are made and solved at once. Those of a
    position that are too near to singular are solved by themselves, without them.
    """
    rank, positions = outside.shape[1], target.shape[1]
    outer = (basis[:, :, None] * basis[:, None, :]).flatten(1)  # (O, r·r)
    normal = outside.T @ outside + (known.T @ outer).view(positions, rank, rank)
    right = outside.T @ target + basis.T @ (known * centred)
    found, well = solve_well(normal, right.T)
    for n in (~well).nonzero()[:, 0].tolist():
        on = known[:, n] > 0
        matrix = torch.cat([outside, basis[on]])
        alone = torch.cat([target[:, n], centred[on, n]])
        found[n] = least_norm(matrix, alone[:, None])[:, 0]
    found = found.T
    left = (outside @ found - target).square().sum(0)
    left = left + (known * (basis @ found - centred)).square().sum(0)
    size = target.square().sum(0) + (known * centred).square().sum(0)
    return found, (left / size).sqrt().mean().item()


@dataclass(frozen=True)
class _Together:
    """Holds the equations of all positions, to be solved with those that join them."""

    outside: Tensor
    target: Tensor
    basis: Tensor
    span: Tensor
    known: Tensor
    centred: Tensor

    def solve(self, moment: Tensor, moment_target: Tensor) -> tuple[Tensor, float]:
        """Return coefficients (r, N) and the residual; moment (O, N·r) has a target of its own."""
        positions, rank = self.target.shape[1], self.basis.shape[1]
        size = moment.square().mean().sqrt().clamp_min(1e-300)
        joining = torch.cat([_zero_sum(rank, positions, moment), moment / size])
        joined = torch.cat([moment.new_zeros(rank), moment_target / size])
        basis, centred = self.basis / self.span, self.known * self.centred / self.span
        outer = (basis[:, :, None] * basis[:, None, :]).flatten(1)
        blocks = (self.known.T @ outer).view(positions, rank, rank) + self.outside.T @ self.outside
        normal = torch.block_diag(*blocks) + joining.T @ joining
        right = (self.outside.T @ self.target + basis.T @ centred).T.flatten() + joining.T @ joined
        found, well = solve_well(normal[None], right[None])
        if not bool(well):
            return self.solve_by_rank(joining, joined)
        x = found.reshape(positions, rank).T
        left = (self.outside @ x - self.target).square().sum()
        left = left + (self.known * (basis @ x) - centred).square().sum()
        left = left + (joining @ found[0] - joined).square().sum()
        whole = self.target.square().sum() + centred.square().sum() + joined.square().sum()
        return x, (left / whole).sqrt().item()

    def solve_by_rank(self, joining: Tensor, joined: Tensor) -> tuple[Tensor, float]:
        """Do the same by all rows, of any rank; joining (n, N·r): those that join positions."""
        positions, rank = self.target.shape[1], self.basis.shape[1]
        rows = [torch.block_diag(*[self.outside] * positions), joining]
        right = [self.target.T.reshape(-1), joined]
        if bool(self.known.any()):
            of_positions = [self.known[:, n, None] * self.basis for n in range(positions)]
            rows.append(torch.block_diag(*of_positions) / self.span)
            right.append((self.known * self.centred).T.reshape(-1) / self.span)
        matrix, whole = torch.cat(rows), torch.cat(right)
        found = least_norm(matrix, whole[:, None])[:, 0]
        residual = ((matrix @ found - whole).norm() / whole.norm()).item()
        return found.reshape(positions, rank).T, residual


def _zero_sum(rank: int, positions: int, like: Tensor) -> Tensor:
    """Return the equations (r, N·r) that say that the coefficients of all positions sum to 0."""
    return torch.eye(rank, dtype=like.dtype, device=like.device).repeat(1, positions)
