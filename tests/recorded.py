"""A stand-in for a CUDA graph on the CPU: operations recorded with their memory, and replayed.

As with a graph, whatever Python computed while it was recorded stays as it was; only what stands in
the memory of tensors may differ between replays. Recording leaves that memory as it was. A number
that Python asks for, or makes a tensor of, is refused, since a GPU would have to wait for it.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations between Python's numbers and tensors.
WITH_THE_HOST = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::lift_fresh", "aten::equal")


def storages(values):
    return {v.untyped_storage().data_ptr() for v in tree_leaves(values) if isinstance(v, Tensor)}


class Recording(TorchDispatchMode):
    """Records the operations within this context."""

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.before = [], set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.name().split(".")[0] in WITH_THE_HOST:
            raise RuntimeError("operation not permitted when stream is capturing")
        if function._schema.is_mutable:
            for of, value in zip(function._schema.arguments, args, strict=False):
                changed = of.alias_info is not None and of.alias_info.is_write
                if changed and not storages([value]) & self.made:
                    self.before.append((value.detach(), value.detach().clone()))
        out = function(*args, **kwargs)
        if function._schema.is_mutable:
            self.calls.append((function, args, kwargs, None))
        elif not storages([out]) & storages([args, kwargs]):  # no view
            self.made |= storages([out])
            self.calls.append((function, args, kwargs, out))
        return out


@torch.no_grad()
def replay(calls):
    for function, args, kwargs, out in calls:
        anew = function(*args, **kwargs)
        if out is not None:
            for old, new in zip(tree_leaves(out), tree_leaves(anew), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)


def recorded(function):
    """As inversion.step_graph.recorded, of what runs on the CPU."""
    with Recording() as recording:
        function()
    with torch.no_grad():
        for tensor, before in reversed(recording.before):
            tensor.copy_(before)
    return lambda: replay(recording.calls)
