"""Matches activations: images whose values inside the network are the recovered ones.

The part of a network before some of its tensors is its front. With BatchNorm as a known affine
map, images do not interact there and only first derivatives are needed, unlike for the matching of
gradients.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from models.batchnorm import BATCHNORM_TYPES, set_statistics

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
    #: Steps done: those of Adam plus the most that L-BFGS did on one image.
    steps: int


def match_activations(
    front: Front,
    targets: Mapping[str, Tensor],
    low: Tensor,
    high: Tensor,
    start: Tensor,
    *,
    adam_steps: int,
    lbfgs_steps: int,
    rate: float,
    total_variation: float = 0.0,
    masks: Mapping[str, Tensor] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Matched:
    """Find images (B, C, H, W) whose tensors `front` are the `targets`, from `start` on.

    Each image has its own loss, Σ over `targets` of ‖m ⊙ (front(x) − t)‖² / ‖m ⊙ t‖². First Adam
    in float32 with a cosine rate from `rate` to 0, clamped to the box of `low` and `high`
    (C, 1, 1); then L-BFGS in float64 for each image by itself, which ends early where ten steps no
    longer help, with a penalty outside of the box instead of the clamp. Where the tensors
    determine the image, the second stage makes it exact. An image whose residual it does not
    lower stays as Adam left it; with a total variation, one whose residual it does not divide by
    30, which is taken as a sign that the tensors alone do not determine the image.

    targets: name → (B, …), names of the front. total_variation: weight of the mean absolute
    difference of neighbours, per image, which falls linearly to 0 over the Adam steps; 0.1 suits
    photographs of which a pooling has lost pixels.
    masks: name → what counts of a target, 1 or 0, of its shape; all of it where a name is missing.
    on_step: called with the steps done and the residuals (B,) after every step of Adam and every
    few of L-BFGS, there of the image at work alone (1,) with the penalty.

    Raises ValueError for a target that the front does not compute.
    """
    missing = [name for name in targets if name not in front.names]
    if missing or not targets:
        raise ValueError(f"the front does not compute {', '.join(missing) or 'any target'}")
    problem = _Problem(front, targets, masks or {})
    x = start.detach().clone()
    if adam_steps:
        x = _adam(problem, x, (low, high), adam_steps, rate, total_variation, on_step)
    x, done = x.double(), 0
    box = low.to(x), high.to(x)
    x = x.clamp(*box)
    with torch.no_grad():
        best = problem.losses(x)
    if lbfgs_steps:
        images, steps = [], []
        for i in range(len(x)):
            image, count = _lbfgs(
                problem.of(i), x[i : i + 1], box, lbfgs_steps, adam_steps, on_step
            )
            images.append(image)
            steps.append(count)
        done, found = max(steps), torch.cat(images).clamp(*box)
        with torch.no_grad():
            losses = problem.losses(found)
        better = losses < best * (_DETERMINED if total_variation else 1.0)
        x = torch.where(better[:, None, None, None], found, x)
        best = torch.where(better, losses, best)
    return Matched(x, best.sqrt(), adam_steps + done)


class _Problem:
    """Compares images with targets: one loss per image."""

    def __init__(self, front, targets, masks):
        self.front, self.targets, self.masks = front, targets, masks
        weights = {name: masks[name] for name in targets if name in masks}
        self.scale = {
            name: 1 / _squares(value.double() * weights.get(name, 1)).clamp_min(1e-300)
            for name, value in targets.items()
        }

    def of(self, i: int) -> "_Problem":
        """Return the problem of image i alone."""
        one = slice(i, i + 1)
        targets = {name: value[one] for name, value in self.targets.items()}
        return _Problem(self.front, targets, {name: m[one] for name, m in self.masks.items()})

    def losses(self, x: Tensor) -> Tensor:
        """Return the squared relative residuals (B,), with derivatives, in the type of `x`."""
        found, total = self.front(x), x.new_zeros(len(x))
        for name, target in self.targets.items():
            difference = found[name] - target.to(x)
            if name in self.masks:
                difference = difference * self.masks[name].to(x)
            total = total + _squares(difference) * self.scale[name].to(x)
        return total


def _squares(values: Tensor) -> Tensor:
    return values.square().flatten(1).sum(1)


def _adam(problem, x, box, steps, rate, total_variation, on_step) -> Tensor:
    x = x.float().requires_grad_()
    low, high = (value.to(x) for value in box)
    optimiser = torch.optim.Adam([x], lr=rate)
    for step in range(steps):
        progress = step / steps
        optimiser.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * progress)) / 2
        losses = problem.losses(x)
        total = losses.sum()
        if total_variation:
            rough = sum(x.diff(dim=d).abs().flatten(1).mean(1).sum() for d in (-1, -2))
            total = total + total_variation * (1 - progress) * rough
        (x.grad,) = torch.autograd.grad(total, x)
        optimiser.step()
        with torch.no_grad():
            x.clamp_(low, high)
        if on_step:
            on_step(step + 1, losses.detach().sqrt())
    return x.detach()


def _lbfgs(problem, x, box, steps, before, on_step) -> tuple[Tensor, int]:
    """Improve one image (1, C, H, W) of float64; return it and the steps done."""
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

    def closure():
        loss = penalised()
        (x.grad,) = torch.autograd.grad(loss * scale, x)
        return loss.detach() * scale

    done = 0
    while done < steps and loss > _EXACT:
        optimiser.param_groups[0]["max_iter"] = min(_CHUNK, steps - done)
        optimiser.step(closure)
        done += min(_CHUNK, steps - done)
        with torch.no_grad():
            latest = penalised()
        if on_step:
            on_step(before + done, latest.sqrt()[None])
        if not latest < loss * (1 - _STALLED):  # or not finite
            break
        loss = latest
    return x.detach(), done
