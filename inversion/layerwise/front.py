"""Matches activations: images whose values inside the network are the recovered ones.

The part of a network before some of its tensors is its front. With BatchNorm as a known affine
map, images do not interact there and only first derivatives are needed, unlike for the matching of
gradients.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.batchnorm import BATCHNORM_TYPES, set_statistics
from models.target import Target

#: Mean and biased variance per channel at a BatchNorm layer's input, by the layer's module path.
Statistics = Mapping[str, tuple[Tensor, Tensor]]
#: L-BFGS steps between two looks at the residual.
_CHUNK = 10
#: A squared relative residual that float64 cannot improve.
_EXACT = 1e-29
#: Weight, beside the squared relative residual, of the mean square by which pixels leave the box.
_OUTSIDE = 1.0
#: Share of the squared residual that L-BFGS leaves at most where tensors determine the image.
_DETERMINED = 1 / 30**2
#: L-BFGS ends where that many steps lower the squared residual by a smaller share than this.
_STALLED = 1e-3


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


@dataclass(frozen=True)
class Matched:
    """Holds the images that a matching of activations arrived at."""

    #: (B, C, H, W) of float64, normalised, inside the box.
    images: Tensor
    #: (B,) of float64: the root of each image's squared relative residual, that of these images.
    residual: Tensor


@dataclass(frozen=True)
class Matching:
    """Says how images are matched to activations."""

    adam_steps: int
    #: First rate of Adam, which falls to 0 as a cosine.
    rate: float
    #: At most, for every image.
    lbfgs_steps: int
    #: Weight of the mean absolute difference of neighbours, per image, which falls linearly to 0
    #: over the Adam steps; 0.1 suits photographs of which a pooling has lost pixels.
    total_variation: float = 0.0


def match_activations(
    front: Front,
    targets: Mapping[str, Tensor],
    low: Tensor,
    high: Tensor,
    start: Tensor,
    how: Matching,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> Matched:
    """Find images (B, C, H, W) whose tensors `front` are the `targets`, from `start` on.

    Each image has its own loss, Σ over `targets` of ‖front(x) − t‖² / ‖t‖². First Adam in float32,
    clamped to the box of `low` and `high` (C, 1, 1); then L-BFGS in float64 for each image by
    itself, which ends early where ten steps no longer help, with a penalty outside of the box
    instead of the clamp. Where the tensors determine the image, the second stage makes it exact.
    An image whose residual it does not lower stays as Adam left it; with a total variation, one
    whose residual it does not divide by 30, which is taken as a sign that the tensors alone do not
    determine the image.

    targets: name → (B, …), names of the front. should_stop: asked between steps; true ends the
    matching with what there is, of every image no worse than its start.

    Raises ValueError for a target that the front does not compute.
    """
    missing = [name for name in targets if name not in front.names]
    if missing or not targets:
        raise ValueError(f"the front does not compute {', '.join(missing) or 'any target'}")
    problem = _Problem(front, targets)
    box = low.double().to(start.device), high.double().to(start.device)
    begun = start.detach().double().clamp(*box)
    x = begun
    if how.adam_steps:
        x = _adam(problem, start.detach().clone(), (low, high), how, should_stop)
        x = x.double().clamp(*box)
        if should_stop():  # Adam may have been at work, which goes astray before it arrives
            x = _nearer(problem, begun, x)
    if how.lbfgs_steps:
        found = [
            _lbfgs(problem.of(i), x[i : i + 1], box, how.lbfgs_steps, should_stop)
            for i in range(len(x))
        ]
        share = _DETERMINED if how.total_variation else 1.0
        x = _nearer(problem, x, torch.cat(found).clamp(*box), share)
    with torch.no_grad():
        return Matched(x, problem.losses(x).sqrt())


class _Problem:
    """Compares images with targets: one loss per image."""

    def __init__(self, front: Front, targets: Mapping[str, Tensor]):
        self.front, self.targets = front, targets
        self.scale = {
            name: 1 / _squares(value.double()).clamp_min(1e-300) for name, value in targets.items()
        }

    def of(self, i: int) -> "_Problem":
        """Return the problem of image i alone."""
        return _Problem(self.front, {name: t[i : i + 1] for name, t in self.targets.items()})

    def losses(self, x: Tensor) -> Tensor:
        """Return the squared relative residuals (B,), with derivatives, in the type of `x`."""
        found, total = self.front(x), x.new_zeros(len(x))
        for name, target in self.targets.items():
            total = total + _squares(found[name] - target.to(x)) * self.scale[name].to(x)
        return total


@torch.no_grad()
def _nearer(problem: _Problem, x: Tensor, other: Tensor, share: float = 1.0) -> Tensor:
    """Return, per image, the other one where its loss is below a share of that of x, else x."""
    better = problem.losses(other) < share * problem.losses(x)
    return torch.where(better[:, None, None, None], other, x)


def _squares(values: Tensor) -> Tensor:
    return values.square().flatten(1).sum(1)


def _adam(
    problem: _Problem,
    x: Tensor,
    box: tuple[Tensor, Tensor],
    how: Matching,
    should_stop: Callable[[], bool],
) -> Tensor:
    x = x.float().requires_grad_()
    low, high = (value.to(x) for value in box)
    optimiser = torch.optim.Adam([x], lr=how.rate)
    for step in range(how.adam_steps):
        if should_stop():
            break
        progress = step / how.adam_steps
        optimiser.param_groups[0]["lr"] = how.rate * (1 + math.cos(math.pi * progress)) / 2
        total = problem.losses(x).sum()
        if how.total_variation:
            rough = x.new_zeros(())
            for d in (-1, -2):
                rough = rough + x.diff(dim=d).abs().flatten(1).mean(1).sum()
            total = total + how.total_variation * (1 - progress) * rough
        (x.grad,) = torch.autograd.grad(total, x)
        optimiser.step()
        with torch.no_grad():
            x.clamp_(low, high)
    return x.detach()


def _lbfgs(
    problem: _Problem,
    x: Tensor,
    box: tuple[Tensor, Tensor],
    steps: int,
    should_stop: Callable[[], bool],
) -> Tensor:
    """Improve one image (1, C, H, W) of float64."""
    x = x.detach().clone().requires_grad_()

    def penalised() -> Tensor:
        outside = (x - x.clamp(*box)).square().mean()
        return problem.losses(x).sum() + _OUTSIDE * outside

    with torch.no_grad():
        loss = penalised()
    scale = 1 / loss.clamp_min(_EXACT)
    optimiser = torch.optim.LBFGS(
        [x],
        max_iter=_CHUNK,
        history_size=30,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Any:  # torch says float, and its optimisers pass on any type
        loss = penalised()
        (x.grad,) = torch.autograd.grad(loss * scale, x)
        return loss.detach() * scale

    for done in range(0, steps, _CHUNK):
        if loss <= _EXACT or should_stop():
            break
        optimiser.param_groups[0]["max_iter"] = min(_CHUNK, steps - done)
        optimiser.step(closure)
        with torch.no_grad():
            latest = penalised()
        if not latest < loss * (1 - _STALLED):  # or not finite
            break
        loss = latest
    return x.detach()
