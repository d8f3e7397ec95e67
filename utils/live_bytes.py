"""Counts the bytes of the tensors that a computation holds at once."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):
    """Follows every storage that operations make, from its making to its end."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {id(s) for s in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if id(storage) not in before:
                self._note(storage)
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
        del self._references[key]


def _storages(values) -> list[torch.UntypedStorage]:
    return [v.untyped_storage() for v in tree_leaves(values) if isinstance(v, torch.Tensor)]


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by `function()` take at any moment.

    Tensors that existed before are not counted, nor what an operation uses while it computes. On
    tensors of the device "meta" nothing is computed, and the number is the same.
    """
    with _Live() as live:
        function()
    return live.peak
