"""Small networks of a user's: what works, and what is refused."""

import torch
from beside import width
from torch import nn
from torch.nn.functional import avg_pool2d, dropout, interpolate, relu, softplus


class UNet(nn.Module):
    """One skip connection; its head is defined first and made last."""

    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.head = nn.Linear(4 * width(), num_classes)
        self.down = nn.Conv2d(image_shape[0], width(), 3, padding=1)
        self.bottom = nn.Conv2d(width(), width(), 3, padding=1)
        self.norm = nn.BatchNorm2d(width())
        self.up = nn.Conv2d(2 * width(), width(), 3, padding=1)
        self.last = nn.Linear(1, 1)

    def forward(self, x):
        x = self.last(x[..., None])[..., 0]
        first = softplus(self.down(x))
        deep = softplus(self.norm(self.bottom(avg_pool2d(first, 2))))
        x = softplus(self.up(torch.cat([first, interpolate(deep, scale_factor=2)], 1)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class DenseNet(nn.Module):
    """Two dense layers with functional ReLUs."""

    def __init__(self, num_classes, image_shape):
        super().__init__()
        self.first = nn.Conv2d(image_shape[0], 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 * n) for n in (1, 2))
        self.convolutions = nn.ModuleList(nn.Conv2d(4 * n, 4, 3, padding=1) for n in (1, 2))
        self.head = nn.Linear(12, num_classes)

    def forward(self, x):
        x = self.first(x)
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            x = torch.cat([x, convolution(relu(norm(x)))], 1)
        return self.head(relu(x).mean((2, 3)))


class Attention(nn.Module):
    """Attention, LayerNorm and BatchNorm of vectors, without a convolution, for three classes."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.batch_norm = nn.LayerNorm(8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.tokens(x.flatten(1).unflatten(1, (-1, 8)))
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.batch_norm(x.mean(1)))


class Wrapped(nn.Module):
    """Applies a function to what a small network makes of the images."""

    def __init__(self, image_shape, outputs, function):
        super().__init__()
        channels, height, columns = image_shape
        self.inner = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * height * columns, outputs), nn.Softplus()
        )
        self.head, self.function = nn.Linear(outputs, outputs), function

    def forward(self, x):
        return self.function(self.head(self.inner(x)))


def no_head(num_classes, image_shape):
    return Wrapped(image_shape, num_classes, lambda logits: 2 * logits)


def as_tuple(num_classes, image_shape):
    return Wrapped(image_shape, num_classes, lambda logits: (logits, logits))


def as_dict(num_classes, image_shape):
    return Wrapped(image_shape, num_classes, lambda logits: {"out": logits, "aux": logits})


def as_map(num_classes, image_shape):
    return nn.Conv2d(image_shape[0], num_classes, 1)


def squeezed(num_classes, image_shape):
    return Wrapped(image_shape, num_classes, lambda logits: logits[:, 0])


def seven(num_classes, image_shape):
    return Wrapped(image_shape, 7, lambda logits: logits)


def random(num_classes, image_shape):
    return Wrapped(image_shape, num_classes, lambda logits: dropout(logits, 0.5))


def broken_forward(num_classes, image_shape):
    return Wrapped(image_shape, num_classes, lambda logits: logits.no_such_thing)


def broken(num_classes, image_shape):
    return UNet(num_classes, image_shape[5])


def nothing(num_classes, image_shape):
    return None


def three(one, two, three):
    return None


def no_second_derivative(num_classes, image_shape):
    return Wrapped(image_shape, num_classes, nn.functional.hardsigmoid)


network = nn.Linear(1, 1)
