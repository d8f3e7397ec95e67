"""Which samples a batch's gradient tells most of: the gradient information ratio of E2EGI."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.batchnorm import batch_statistics
from models.gradient import (
    ClientLoss,
    couples_samples,
    gradient_mode,
    per_sample_gradients,
    trainable_parameters,
    whole_batch_gradient,
)
from models.losses import image_losses
from utils.shard import ALONE, Shard, sum_tensors


@dataclass(frozen=True)
class Information:
    """Compares every sample's gradient g_i with g, that of the batch. Tensors are (B,)."""

    #: Softmax output of the true class; under binary cross-entropy the mean over the outputs of the
    #: probability of what is true there.
    confidence: Tensor
    #: The class with the highest output, and that output's probability.
    predicted: Tensor
    predicted_confidence: Tensor
    #: ‖g_i‖.
    norm: Tensor
    #: ‖g_i − g‖².
    squared_l2: Tensor
    #: 1 − cos(g_i, g).
    cosine_distance: Tensor
    #: Share of the entries whose signs agree, in %.
    sign_rate: Tensor
    #: ⟨g_i, g⟩, whose mean is ‖g‖².
    information: Tensor
    #: Its share in the sum over samples, in %; all are shifted by the smallest if that is negative.
    ratio: Tensor
    #: ‖g‖.
    batch_norm: float
    #: Whether g_i depends on sample i alone. It does not where BatchNorm in train mode mixes the
    #: samples; g_i is then the sample's share inside the batch's statistics.
    independent: bool


def gradient_information_ratio(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: ClientLoss,
    shard: Shard = ALONE,
) -> Information:
    """Compare every sample's gradient with the batch's (E2EGI, 2023, its GInfoR).

    x: (B, C, H, W) normalised, y: its labels, on the model's device; the whole batch on every
    process. g is the mean of the g_i, without any protection. The model is left as it was.
    """
    own_x, own_y = shard.split(x), shard.split(y)
    whole = whole_batch_gradient(model, x, y, loss, shard).gradient
    with (
        batch_statistics(model, shard, train_mode=loss.train_mode, needed=False, images=len(x)),
        gradient_mode(model, loss.train_mode),
        torch.no_grad(),
    ):
        logits = model(own_x)
        outputs = logits.softmax(1) if loss.kind == "cross-entropy" else logits.sigmoid()
        probabilities = shard.gather(outputs, len(x)).double().cpu()

    coupled = couples_samples(model, loss.train_mode)
    if coupled:
        rows = [
            _compare([g[None] for g in gradient], whole)
            for gradient in _shares_of_samples(model, x, y, loss, shard)
        ]
        figures = torch.cat(rows)
    else:
        chunks = per_sample_gradients(model, own_x, own_y, loss)
        rows = [_compare(chunk, whole) for chunk in chunks]
        figures = shard.gather(torch.cat([x.new_zeros(0, 4).double(), *rows]), len(x))

    square, squared_l2, product, agreeing = figures.cpu().T
    batch_square = sum(g.double().square().sum().item() for g in whole)
    lengths = (square * batch_square).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    if probabilities.shape[1] == 1:  # a binary head: the classes are 0 and 1
        highest, predicted = torch.cat([1 - probabilities, probabilities], 1).max(1)
    else:
        highest, predicted = probabilities.max(1)
    return Information(
        confidence=_confidence(probabilities, y.cpu()),
        predicted=predicted,
        predicted_confidence=highest,
        norm=square.sqrt(),
        squared_l2=squared_l2,
        cosine_distance=1 - product / lengths,
        sign_rate=100 * agreeing / sum(g.numel() for g in whole),
        information=product,
        ratio=information_ratio(product),
        batch_norm=batch_square**0.5,
        independent=not coupled,
    )


def _confidence(probabilities: Tensor, y: Tensor) -> Tensor:
    """Return how sure the network is of what is true: (B,)."""
    if y.dim() == 1:
        return probabilities[torch.arange(len(y)), y]
    y = y.double()
    return (y * probabilities + (1 - y) * (1 - probabilities)).mean(1)


def information_ratio(information: Tensor) -> Tensor:
    """Shares (B,) in % of the sum; shifted by the smallest where negative, all alike if 0."""
    shifted = information - information.min().clamp(max=0)
    total = shifted.sum()
    if not total > 0:
        return torch.full_like(information, 100 / len(information))
    return 100 * shifted / total


def _compare(chunk: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
    """‖g_i‖², ‖g_i − g‖², ⟨g_i, g⟩ and the number of equal signs: (n, 4), float64.

    chunk: tensors (n, *shape), whole: tensors (*shape).
    """
    figures = 0
    for samples, g in zip(chunk, whole, strict=True):
        samples, g = samples.flatten(1).double(), g.flatten().double()
        figures = figures + torch.stack(
            [
                samples.square().sum(1),
                (samples - g).square().sum(1),
                samples @ g,
                (samples.sign() == g.sign()).sum(1),
            ],
            1,
        )
    return figures


def _shares_of_samples(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: ClientLoss,
    shard: Shard,
) -> Iterator[tuple[Tensor, ...]]:
    """Every sample's loss inside the batch, differentiated: one forward pass, B backward ones.

    All processes take part in every one, since BatchNorm's derivative needs all of them.
    """
    parameters = list(trainable_parameters(model).values())
    block = shard.block(len(x))
    with (
        batch_statistics(model, shard, train_mode=loss.train_mode, needed=False, images=len(x)),
        gradient_mode(model, loss.train_mode),
        torch.enable_grad(),
    ):
        losses = image_losses(model(shard.split(x)), shard.split(y), loss)
        for index in range(len(x)):
            own = 0 * losses
            if block.start <= index < block.stop:
                own = losses[index - block.start]
            gradient = torch.autograd.grad(
                own.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            yield sum_tensors(gradient, shard)
