"""The front: the part of a network between the image and some of its tensors."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from models.batchnorm import BATCHNORM_TYPES, set_statistics
from models.target import Target

#: Mean and biased variance per channel at a BatchNorm layer's input, by the layer's module path.
Statistics = Mapping[str, tuple[Tensor, Tensor]]


def statistics_of(target: Target, model: nn.Module) -> Statistics | None:
    """Return the batch statistics that a client in train mode sent, in the model's order.

    None in eval mode, and where it sent none.
    """
    if not target.train_mode or target.bn_mean is None or target.bn_var is None:
        return None
    paths = [path for path, m in model.named_modules() if isinstance(m, BATCHNORM_TYPES)]
    pairs = zip(target.bn_mean, target.bn_var, strict=True)
    return dict(zip(paths, pairs, strict=True))


class Front:
    """Evaluates a network from the image up to some of its tensors, and nothing behind them.

    The network is traced by torch.fx as in `models.graph.traced_tensors`, whose nodes' names
    `names` are. Dropout is off. BatchNorm is an affine map per channel: by the running statistics
    or, with `statistics` (of a client in train mode), by those of its batch. Parameters and
    buffers are constants and follow the images' type and device. `model` is not modified, and
    later changes of its parameters may or may not be seen.

    Raises ValueError for a network that cannot be traced, for an unknown name and for a BatchNorm
    layer in the front without statistics.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], statistics: Statistics | None = None
    ):
        #: The names of the tensors, as given.
        self.names = tuple(names)
        twin = _constant_copy(model)
        try:
            graph = fx.Tracer().trace(twin)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"torch.fx cannot trace the network: {reason}") from error
        _end_at(graph, self.names)
        used = {node.target for node in graph.nodes if node.op == "call_module"}
        for path, module in twin.named_modules():
            if path in used and isinstance(module, BATCHNORM_TYPES):
                _fix_statistics(path, module, statistics)
        self._module = fx.GraphModule(twin, graph)
        self._cast: dict[tuple[torch.dtype, torch.device], fx.GraphModule] = {}

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        """Return the tensors at images `x` (B, C, H, W), by name, in the type of `x`."""
        key = (x.dtype, x.device)
        if key not in self._cast:
            self._cast[key] = copy.deepcopy(self._module).to(*key[::-1])
        return self._cast[key](x)


def _constant_copy(model: nn.Module) -> nn.Module:
    """Return the model in eval mode on the same numbers, which have no derivatives."""
    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, memo).eval()


def _end_at(graph: fx.Graph, names: Sequence[str]) -> None:
    """Let a graph return the nodes of these names, as a dict, and drop what they do not need."""
    nodes = {node.name: node for node in graph.nodes}
    unknown = [name for name in names if name not in nodes or nodes[name].op == "output"]
    if unknown or not names:
        raise ValueError(f"the network has no tensor {', '.join(unknown) or 'without a name'}")
    taken = {}
    for name in names:
        with graph.inserting_after(nodes[name]):  # a later operation may work in place
            taken[name] = graph.call_method("clone", (nodes[name],))
    for node in reversed(graph.nodes):
        if node.op == "output":
            node.args = (taken,)
        elif node.op != "placeholder" and not node.users:
            graph.erase_node(node)


def _fix_statistics(path: str, layer: nn.Module, statistics: Statistics | None) -> None:
    if statistics is not None:
        if path not in statistics:
            raise ValueError(f"the statistics of {path} are missing")
        set_statistics(layer, *statistics[path])
    elif layer.running_mean is None:
        raise ValueError(f"{path} keeps no running statistics; give those of the batch")
