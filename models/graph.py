"""A network as torch.fx traces it: its tensors, where each comes from and what makes it."""

import copy

import torch
from torch import Tensor, fx, nn


def traced_tensors(
    model: nn.Module, batch_size: int, image_shape: tuple[int, int, int]
) -> list[fx.Node]:
    """Return the image and every tensor made from it, in order of execution.

    Their values (meta tensors) stand in meta["value"], their tensor inputs in meta["inputs"] and
    their modules, if any, in meta["module"]. Sizes and checks are left out; every tensor comes
    from the image and leads to the output.

    `model` may lie on the meta device. It is not touched: a copy on the meta device is traced in
    eval mode, so neither images (`batch_size` of the shape (C, H, W)) nor memory are needed.

    Raises ValueError with a one-line reason for a network that torch.fx cannot trace or that
    cannot take such images, that uses parameters outside of modules, makes tensors that do not
    come from the image or that the output does not use, or that returns several values.
    """
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    try:
        twin = copy.deepcopy(model, memo).eval()  # eval: BatchNorm takes one number a channel
        traced = fx.symbolic_trace(twin)
    except Exception as error:
        raise ValueError(f"torch.fx cannot trace the network: {_first_line(error)}") from error
    dtype = next((p.dtype for p in twin.parameters()), None)
    images = torch.empty(batch_size, *image_shape, dtype=dtype, device="meta")
    with torch.no_grad():
        _Values(traced).run(images)

    *nodes, output = traced.graph.nodes
    tensors = [node for node in nodes if _holds_tensor(node.meta["value"])]
    known = set(tensors)
    for node in tensors:
        node.meta["inputs"] = [source for source in node.all_input_nodes if source in known]
        if node.op == "call_module":
            node.meta["module"] = twin.get_submodule(node.target)
        if node.op == "get_attr":
            raise ValueError(f"{node.target} is used outside of a convolution or linear layer")
        if node.op != "placeholder" and not node.meta["inputs"]:
            raise ValueError(f"{place(node)} makes a tensor that does not come from the image")
        if known.isdisjoint(node.users) and output not in node.users:
            raise ValueError(f"{place(node)} computes a value that the output does not use")
    if not isinstance(output.meta["value"], Tensor):
        raise ValueError("the network returns several values instead of one tensor")
    return tensors


def operation(node: fx.Node) -> str:
    """Return what makes a traced tensor: the name of the module's class, function or method."""
    if node.op == "call_module":
        return type(node.meta["module"]).__name__
    return getattr(node.target, "__name__", str(node.target))


def operation_name(node: fx.Node) -> str:
    """Return `operation` in lower case without underscores: `relu` for nn.ReLU and F.relu_."""
    return operation(node).replace("_", "").lower()


def module_path(node: fx.Node) -> str:
    """Return the path of the module that a node is or that calls it; "" for the network."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def place(node: fx.Node) -> str:
    """Return how messages call a node: its module's path or, without one, its name in torch.fx."""
    return module_path(node) or node.name


class _Values(fx.Interpreter):
    """Runs a traced network and leaves every node's value in its meta["value"]."""

    def __init__(self, traced):
        super().__init__(traced)
        self.extra_traceback = False  # an error keeps its one line

    def run_node(self, n):
        try:
            n.meta["value"] = super().run_node(n)
        except Exception as error:
            raise ValueError(f"{place(n)} fails: {_first_line(error)}") from error
        return n.meta["value"]


def _holds_tensor(value) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
