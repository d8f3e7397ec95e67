"""Names the kinds of operations that the walk tells apart, and reads how a layer moves."""

from collections.abc import Sequence

from torch import fx, nn

from inversion.layerwise.convolution import Geometry
from models.graph import operation_name

# Kinds of operations, by their names (`operation_name`).
WEIGHTED = {"conv2d", "linear"}
BATCHNORMS = {"batchnorm2d", "syncbatchnorm"}
RELUS = {"relu"}
ADDITIONS = {"add", "iadd"}
MAXIMA = {"maxpool2d", "adaptivemaxpool2d"}
AVERAGES = {"avgpool2d", "adaptiveavgpool2d", "mean"}
COPIES = {"identity", "dropout", "dropout2d", "stochasticdepth", "flatten", "view", "reshape"}
COPIES |= {"squeeze", "unsqueeze", "contiguous", "clone"}


class StoppedError(Exception):
    """Says in one line why a layer cannot be solved."""


def is_maximum(node: fx.Node) -> bool:
    """Tell whether a node is a max-pooling."""
    return operation_name(node) in MAXIMA


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Return a layer's setting for rows and columns, where it may be one number for both."""
    if isinstance(value, int):
        return value, value
    rows, columns = value
    return rows, columns


def geometry_of(module: nn.Module, name: str) -> Geometry:
    """Return how a layer moves over its input; raise StoppedError for one that is not plain."""
    if isinstance(module, nn.Linear):
        return Geometry((1, 1))
    assert isinstance(module, nn.Conv2d)
    plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    if not plain or isinstance(module.padding, str):
        raise StoppedError(
            f"{name}: grouped, dilated and unusually padded convolutions are not solved"
        )
    return Geometry(pair(module.kernel_size), pair(module.stride), pair(module.padding))
