"""Solves the weight gradient of a convolution for the convolution's input.

With the signal d = ∂L/∂z at the output z = w∗u known, the gradient of the weights is linear in the
input u, and the matrix of that is the same for all input channels. R-GAP (Zhu & Blaschko, ICLR
2021, arXiv 2010.07733) solves it for a single image, here it is solved for a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from inversion.layerwise.least_squares import (
    WELL,
    Equations,
    Propagation,
    add_gram,
    conjugate_gradients,
    fast_in_single,
    inverse_square,
    known_entries,
    largest_value,
    relative,
    solve_symmetric,
)

#: Singular values, in shares of the largest, that normal equations count as 0: their rounding makes
#: 1e-8 of a 0.
NOTHING = 1e-5


@dataclass(frozen=True)
class Geometry:
    """Says how a convolution moves over its input."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def forward(self, u: Tensor, weight: Tensor) -> Tensor:
        """Return w∗u, (B, O, h, w), of u (B, I, H, W) and w (O, I, k, k)."""
        return F.conv2d(u, weight, stride=self.stride, padding=self.padding)

    def backward(self, d: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """Return ∂L/∂u of this shape from d = ∂L/∂z (B, O, h, w)."""
        return conv2d_input(shape, weight, d, stride=self.stride, padding=self.padding)

    def weight_gradient(self, u: Tensor, d: Tensor) -> Tensor:
        """Return ∂L/∂w (O, I, k, k) from u (B, I, H, W) and d (B, O, h, w)."""
        shape = (d.shape[1], u.shape[1], *self.kernel)
        return conv2d_weight(u, shape, d, stride=self.stride, padding=self.padding)


def gradient_matrix(d: Tensor, height: int, width: int, geometry: Geometry) -> Tensor:
    """Return the matrix M (O·k·k, B·H·W) with ∂L/∂w[:, i] = M u[:, i] for every input channel i.

    d: (B, O, h, w) signal at the output; height, width: H and W of the input.
    """
    count, channels, rows, columns = d.shape
    (k_y, k_x), (s_y, s_x), (p_y, p_x) = geometry.kernel, geometry.stride, geometry.padding
    matrix = d.new_zeros(channels, k_y, k_x, count, height + 2 * p_y, width + 2 * p_x)
    by_channel = d.transpose(0, 1)
    for y in range(k_y):
        for x in range(k_x):
            y_end, x_end = y + s_y * (rows - 1) + 1, x + s_x * (columns - 1) + 1
            matrix[:, y, x, :, y:y_end:s_y, x:x_end:s_x] = by_channel
    inside = matrix[..., p_y : p_y + height, p_x : p_x + width]
    return inside.reshape(channels * k_y * k_x, count * height * width)


@dataclass(frozen=True)
class Term:
    """Holds one convolution's equations about its input."""

    geometry: Geometry
    #: (O, I, k, k).
    weight: Tensor
    #: (O, I, k, k), ∂L/∂w.
    gradient: Tensor
    #: (B, O, h, w), ∂L/∂z at the output z without bias.
    signal: Tensor
    #: (B, O, h, w) of 0 and 1: where z is known; None for nowhere.
    known: Tensor | None = None
    #: (B, O, h, w): z, without bias, where it is known, any finite numbers elsewhere.
    output: Tensor | None = None

    def normalised(self) -> "Term":
        """Return the same equations with a gradient of norm 1."""
        scale = inverse_square(self.gradient) ** 0.5
        return replace(self, gradient=scale * self.gradient, signal=scale * self.signal)

    def single(self) -> "Term":
        """Return the same in float32."""
        weight, gradient, signal = self.weight.float(), self.gradient.float(), self.signal.float()
        known, output = (None if t is None else t.float() for t in (self.known, self.output))
        return Term(self.geometry, weight, gradient, signal, known, output)


@dataclass(frozen=True)
class Solution:
    """Holds the input that a system of equations has, and how well it is determined."""

    #: (B, I, H, W).
    u: Tensor
    #: Numbers sought, and equations for them.
    unknowns: int
    equations: int
    #: Numbers that the equations determine: directions whose singular value is large enough.
    rank: int
    #: Largest singular value over the smallest one that counts.
    condition: float
    #: Of the gradients' equations and of the known outputs'.
    gradients: Propagation
    outputs: Propagation | None = None

    @property
    def determined(self) -> bool:
        """Whether the equations determine every number."""
        return self.rank == self.unknowns


@dataclass(frozen=True)
class _Spectrum:
    """Holds the singular values of all terms' gradient matrices together, and the solution by them.

    With M = U S Vᵀ: S in descending order, Vᵀ, and Uᵀ g of the gradients g, (·, I).
    """

    values: Tensor
    right: Tensor
    left_parts: Tensor


def _decomposed(matrix: Tensor, rows: Tensor) -> _Spectrum:
    """Return the singular value decomposition of the terms' stacked matrix."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return _Spectrum(values, right, left.T @ rows)


def _from_gram(gram: Tensor, right: Tensor) -> _Spectrum:
    """Return the same from MᵀM and Mᵀ g; what belongs to singular values of 0 is of no use."""
    squares, vectors = torch.linalg.eigh(gram)
    values, vectors = squares.flip(0).clamp_min(1e-300).sqrt(), vectors.flip(1)
    return _Spectrum(values, vectors.T, (vectors.T @ right) / values[:, None])


def stacked_matrices(terms: Sequence[Term], shape: Sequence[int]) -> Tensor:
    """Return the terms' matrices one above the other, each divided by its gradient's norm."""
    return torch.cat(
        [
            gradient_matrix(term.signal, shape[2], shape[3], term.geometry)
            * inverse_square(term.gradient) ** 0.5
            for term in terms
        ]
    )


def stacked_gradients(terms: Sequence[Term]) -> Tensor:
    """Return the terms' gradients as the rows (·, I) of those matrices, divided by their norms."""
    return torch.cat(
        [
            term.gradient.permute(0, 2, 3, 1).reshape(-1, term.gradient.shape[1])
            * inverse_square(term.gradient) ** 0.5
            for term in terms
        ]
    )


def solve_gradients(
    terms: Sequence[Term], shape: Sequence[int], cut: float, *, use_outputs: bool = True
) -> Solution:
    """Solve the weight gradients of all convolutions that take u (B, I, H, W) = shape for u.

    Directions (B·H·W numbers, the same for all channels) whose singular value is at most `cut` of
    the largest are not taken from the gradients; the known outputs of the terms say what they are
    (`use_outputs`), as far as they do.
    """
    count, channels, height, width = shape
    matrix, rows = stacked_matrices(terms, shape), stacked_gradients(terms)
    clear = _clear_gram(matrix, cut)
    if clear is None:
        found = _decomposed(matrix, rows)
    elif clear.least > max(cut, WELL):
        numbers = torch.cholesky_solve(matrix.T @ rows, torch.linalg.cholesky(clear.gram))
        trace, unknowns = channels * clear.squares.reciprocal().sum().item(), matrix.shape[1]
        unknowns *= channels
        gradients = Propagation(trace, rows.numel(), unknowns)
        u = numbers.T.reshape(channels, count, height, width).transpose(0, 1).contiguous()
        return Solution(u, unknowns, rows.numel(), unknowns, 1 / clear.least, gradients)
    else:
        found = _from_gram(clear.gram, matrix.T @ rows)
    kept = (found.values > cut * found.values[0]) & (found.values > 0)
    numbers = found.right[kept].T @ (found.left_parts[kept] / found.values[kept, None])
    u = numbers.T.reshape(channels, count, height, width).transpose(0, 1).contiguous()
    places, rank = count * height * width, int(kept.sum()) * channels
    equations = rows.numel()
    condition = (found.values[0] / found.values[kept][-1]).item() if bool(kept.any()) else 1.0
    gradients = Propagation(channels * found.values[kept].pow(-2).sum().item(), rows.numel(), rank)
    outputs = None
    left_open = (places - int(kept.sum())) * channels
    with_outputs = [term for term in terms if term.known is not None and bool(term.known.any())]
    if left_open and use_outputs and with_outputs:
        equations += sum(int(term.known.sum()) for term in with_outputs if term.known is not None)
        if left_open <= MOST_NULL:
            null = _null_space(found, kept, places).reshape(-1, count, height, width)
            u, outputs, worst = _from_outputs(with_outputs, u, null)
            rank += outputs.rank
            condition = max(condition, worst)
    return Solution(u, places * channels, equations, rank, condition, gradients, outputs)


@dataclass(frozen=True)
class _Gram:
    """Holds MᵀM, its eigenvalues in ascending order, and the least singular value of M.

    The latter in shares of the largest.
    """

    gram: Tensor
    squares: Tensor
    least: float


def _clear_gram(matrix: Tensor, cut: float) -> _Gram | None:
    """Return MᵀM if it tells which directions M determines, and those well; None elsewhere.

    It does where every singular value of M, in shares of the largest, is above WELL, or below
    NOTHING and the cut.
    """
    if len(matrix) < matrix.shape[1]:
        return None
    gram = matrix.T @ matrix
    if not bool(gram.isfinite().all()):
        return None
    squares = torch.linalg.eigvalsh(gram)
    shares = squares / squares[-1].clamp_min(1e-300)
    unclear = shares <= WELL**2
    if cut >= NOTHING:
        unclear &= shares > NOTHING**2
    if bool(unclear.any()) or not bool(squares[-1] > 0):
        return None
    return _Gram(gram, squares, shares[0].clamp_min(0).sqrt().item())


#: Numbers that products of channels at several positions take at once.
POINTWISE = 2**24
#: Numbers that the gradients leave open which are still solved for densely.
MOST_NULL = 4_000


def _null_space(found: _Spectrum, kept: Tensor, places: int) -> Tensor:
    """Return an orthonormal basis (n, places) of the directions that were not kept."""
    if len(found.values) == places:
        return found.right[~kept]
    whole = torch.linalg.qr(found.right[kept].T, mode="complete")[0]
    return whole[:, int(kept.sum()) :].T


def _from_outputs(
    terms: Sequence[Term], u: Tensor, null: Tensor
) -> tuple[Tensor, Propagation, float]:
    """Add to u the part along `null` (n, B, H, W), for every channel, that the outputs call for.

    Returns u, how errors of the outputs become errors of the n·I numbers, and their condition.
    """
    count, channels = u.shape[:2]
    size = len(null) * channels
    normal, right = u.new_zeros(size, size), u.new_zeros(size)
    for term in terms:
        known, output = term.known, term.output
        assert known is not None
        assert output is not None
        left = (output - term.geometry.forward(u, term.weight)) * known
        scale = 1 / (output * known).square().sum().clamp_min(1e-300)
        add = _add_pointwise if term.geometry.kernel == (1, 1) else _add_outputs
        for image in range(count):
            add(normal, right, term, null[:, image : image + 1], known[image], left[image], scale)
    normal = normal.tril() + normal.tril(-1).T
    steps, determined, trace, worst = solve_symmetric(normal, right)
    added = torch.einsum("nbhw,ni->bihw", null, steps.reshape(len(null), channels))
    equations = sum(int(term.known.sum()) for term in terms if term.known is not None)
    return u + added, Propagation(trace, equations, determined), worst


def _add_outputs(
    normal: Tensor,
    right: Tensor,
    term: Term,
    null: Tensor,
    known: Tensor,
    left: Tensor,
    scale: Tensor,
) -> None:
    """Add the known outputs of one image to the normal equations for the steps along `null`.

    normal: (n·I, n·I), whose lower triangle counts; right: (n·I,); null: (n, 1, H, W); known, left:
    (O, h, w) of 0 and 1, and what the outputs lack; scale: the square of the weight.
    """
    outputs, channels = term.weight.shape[:2]
    kernels = term.weight.transpose(0, 1).reshape(channels * outputs, 1, *term.geometry.kernel)
    moved = term.geometry.forward(null, kernels)
    chosen = known.reshape(outputs, -1) > 0
    rows = moved.reshape(len(null), channels, outputs, -1)[:, :, chosen]
    rows = rows.reshape(len(null) * channels, -1)
    add_gram(normal, rows, scale.item())
    right += scale * (rows @ left.reshape(outputs, -1)[chosen])


def _add_pointwise(
    normal: Tensor,
    right: Tensor,
    term: Term,
    null: Tensor,
    known: Tensor,
    left: Tensor,
    scale: Tensor,
) -> None:
    """Do what `_add_outputs` does for a 1×1 convolution, both triangles.

    Its rows are products of a direction at a position and a weight, so that directions and
    channels part: Σ_p v_m(p) v_n(p) Σ_o known(o, p) w(o, i) w(o, j).
    """
    weight, count = term.weight[:, :, 0, 0], len(null)
    outputs, channels = weight.shape
    at = term.geometry.forward(null, weight.new_ones(1, 1, 1, 1)).reshape(count, -1)  # (n, p)
    right += scale * (at @ left.reshape(outputs, -1).T @ weight).flatten()
    shaped = normal.view(count, channels, count, channels)
    most = max(1, POINTWISE // channels**2)
    for v, on in zip(at.split(most, 1), known.reshape(outputs, -1).split(most, 1), strict=True):
        products = (on.T[:, :, None] * weight).transpose(1, 2) @ weight  # (p, I, I)
        pairs = (v[:, None] * v[None]).flatten(0, 1)  # (n·n, p)
        summed = scale * (pairs @ products.flatten(1)).view(count, count, channels, channels)
        shaped += summed.transpose(1, 2)


def term_equations(term: Term, shape: Sequence[int]) -> list[Equations]:
    """Return the equations of one convolution about its input u of this shape (B, I, H, W).

    The gradient's, ∂L/∂w(u) = G, and the forward pass's, w∗u = z where z is known, each divided by
    the norm of its right side.
    """
    geometry, signal, weight, known = term.geometry, term.signal, term.weight, term.known
    found = [
        relative(
            lambda u: geometry.weight_gradient(u, signal),
            lambda g: geometry.backward(signal, g, shape),
            term.gradient,
        )
    ]
    if known is not None and term.output is not None and bool(known.any()):
        found.append(
            relative(
                lambda u: geometry.forward(u, weight) * known,
                lambda r: geometry.backward(r * known, weight, shape),
                term.output * known,
            )
        )
    return found


def preconditioner(terms: Sequence[Term], shape: Sequence[int], damping: float = 1e-3):
    """Return a map near the inverse of the gradients' normal equations, the same for all channels.

    shape: (B, I, H, W) of what it maps. Directions whose eigenvalue is small are held back by
    `damping`² of the largest one, which power iteration finds to about 1 %.
    """
    count, channels, height, width = shape
    matrix = stacked_matrices(terms, shape)
    gram = matrix.T @ matrix
    largest = largest_value(lambda v: gram @ v, gram[:, 0])
    gram.diagonal().add_(max(damping**2 * largest, 1e-300))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))

    def apply(u: Tensor) -> Tensor:
        flat = u.transpose(0, 1).reshape(channels, -1) @ inverse.to(u)
        return flat.reshape(channels, count, height, width).transpose(0, 1)

    return apply


def polished(
    terms: Sequence[Term], known: Tensor, value: Tensor, u: Tensor, steps: int, tolerance: float
) -> Tensor:
    """Improve u (B, I, H, W) on all equations of the terms and on its known entries.

    By conjugate gradients with `preconditioner`, that many steps at most, until the slope has
    fallen to `tolerance` of the first one. known: (B, I, H, W) of 0 and 1; value: the entries
    there. What u leaves of the equations is computed in float64; the change that it asks for, of
    which a few digits count, in float32 where that is faster.
    """
    shape = u.shape
    terms = [term.normalised() for term in terms]
    better = preconditioner(terms, shape)

    def equations(like: Tensor) -> list[Equations]:
        single = like.dtype == torch.float32
        of_terms = [term.single() for term in terms] if single else terms
        found = [e for term in of_terms for e in term_equations(term, shape)]
        if bool(known.any()):
            found.append(known_entries(known.to(like), value.to(like)))
        return found

    exact = equations(u)
    if not fast_in_single(u):
        return conjugate_gradients(exact, u, steps, tolerance, better)
    left = [e.target - e.forward(u) for e in exact]
    squares = (e.weight * r.square().sum() for e, r in zip(exact, left, strict=True))
    size = sum(square.item() for square in squares) ** 0.5
    if not size > 0:
        return u
    none = torch.zeros_like(u).float()
    rough = [
        replace(fast, target=(r / size).float(), weight=e.weight)
        for fast, e, r in zip(equations(none), exact, left, strict=True)
    ]
    return u + size * conjugate_gradients(rough, none, steps, tolerance, better).double()
