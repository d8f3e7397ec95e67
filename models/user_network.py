"""A network from a Python file of the user's: the one place where code of the user's runs.

The file is named on the command line of each script. A checkpoint holds only a name to show and the
file's SHA-256: code is never taken from it.
"""

import hashlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Generator, Tensor, nn

from models.build import mark_head
from models.gradient import gradient_mode
from models.losses import output_problem
from utils.errors import InputError, is_out_of_memory

#: How the name of such a network looks in a checkpoint.
NAME = re.compile(r".+\.py:\w+")
#: Images of the pass by which a network is looked at.
PROBES = 2
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
#: Files of this project that a user's file may lie beside.
OWN = tuple(os.path.join(_ROOT, name) for name in ("run.py", "training.py"))


@dataclass(frozen=True)
class UserNetwork:
    """Builds a network by a function of a file; called as `models.build.Builder`s are."""

    #: FILE.py:function without the folder, to show and to store.
    name: str
    #: The file.
    path: str
    #: SHA-256 of the file, in hexadecimal.
    sha256: str
    #: The function, or a class.
    function: Callable[..., object]
    #: Name of the module as which the file ran, in sys.modules.
    module: str
    #: Whether it takes the number of classes and the images' shape.
    takes_task: bool

    def __call__(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """Build the network. Raises InputError for an error in the file, with file and line."""
        given = (num_classes, image_shape) if self.takes_task else ()
        try:
            model = self.function(*given)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise InputError(fault(error, self.path)) from error
        if not isinstance(model, nn.Module):
            raise InputError(
                f"{self.name} returns {type(model).__name__}, not an nn.Module; return the network"
            )
        return model


def is_user_network(name: str) -> bool:
    """Tell whether a network of this name is built by a file of the user's."""
    return NAME.fullmatch(name) is not None


def load_user_network(text: str) -> UserNetwork:
    """Run the file of `text`, "FILE.py:function", and return the builder of its network.

    The function is called as function(num_classes, image_shape) where it takes two positional
    arguments, image_shape being (C, H, W), else as function(). The file's folder is added to the
    end of the module search path, so that it can import its neighbours. A file runs once.

    Raises InputError where there is no such file or function, and for an error in the file, which
    is named with its line.
    """
    path, _, function_name = text.rpartition(":")
    if not path.endswith(".py") or not function_name.isidentifier():
        raise InputError("is not FILE.py:function; give a file and the function that it defines")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file that is there") from error
    digest = hashlib.sha256(content).hexdigest()
    module = _module(path, content, digest)
    function = getattr(module, function_name, None)
    base = os.path.basename(path)
    if isinstance(function, nn.Module):
        raise InputError(
            f"{function_name} is a network, not a function that builds one; write "
            f"`def build(): return …` and give {base}:build"
        )
    if not callable(function):
        raise InputError(f"{base} defines no function {function_name}")
    name = f"{base}:{function_name}"
    takes_task = _takes_task(function, name)
    return UserNetwork(name, path, digest, function, module.__name__, takes_task)


def _takes_task(function: Callable[..., object], name: str) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some classes written in C
        return True
    for given in ((0, (1, 1, 1)), ()):
        try:
            signature.bind(*given)
        except TypeError:
            continue
        return bool(given)
    raise InputError(
        f"{name}{signature} can be called neither with (num_classes, image_shape) nor without "
        "arguments; write one that can"
    )


def _module(path: str, content: bytes, digest: str) -> ModuleType:
    """Run a file as a module of its own, or return it where it ran before."""
    path = os.path.abspath(path)
    name = f"user_network_{hashlib.sha256(path.encode()).hexdigest()[:8]}_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)  # at the end: no file there takes the place of an installed package
    module = ModuleType(name)
    module.__file__ = path
    sys.modules[name] = module  # dataclasses and pickle look a class up there
    try:
        exec(compile(content, path, "exec"), vars(module))  # what was hashed, and no other file
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(fault(error, path)) from error
    return module


def fault(error: BaseException, path: str) -> str:
    """Describe an error in the user's code on one line, with the file and line where it arose.

    That is the deepest place in the file `path` or in a file beside it.
    """
    path = os.path.abspath(path)
    place = ""
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{os.path.basename(error.filename)}, line {error.lineno}: "
    for frame in traceback.extract_tb(error.__traceback__):
        file = os.path.abspath(frame.filename)
        if file not in OWN and os.path.dirname(file) == os.path.dirname(path):
            place = f"{os.path.basename(file)}, line {frame.lineno}: "
    text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    return f"{place}{type(error).__name__}: {text[:200]}".rstrip(": ")


def probe(
    model: nn.Module, num_classes: int, image_shape: tuple[int, int, int], path: str = ""
) -> None:
    """Pass two images of noise through a network, check what it makes of them, and mark its head.

    The head is the last linear layer or convolution whose outputs are the logits
    (`models.build.mark_head`); the order of a user's modules need not be that of execution.
    path: the file of its code, for messages. Weights and modes stay as they were.

    Raises InputError where the network cannot take such images, makes no logits of them
    (`output_problem`), or makes others of the same images in a second pass.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        raise InputError("the network has no parameters, so that it has no gradient")
    images = torch.randn(PROBES, *image_shape, generator=Generator().manual_seed(0)).to(like)
    outputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(_recorder(outputs, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.no_grad(), gradient_mode(model, train_mode=False):
            logits, again = model(images), model(images)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"cannot process images {image_shape}: {fault(error, path)}") from error
    finally:
        for handle in handles:
            handle.remove()
    problem = output_problem(logits, PROBES, num_classes)
    if problem:
        raise InputError(problem)
    if not torch.equal(logits, again):
        raise InputError(
            "its output is random: two passes of the same images differ; use nn.Dropout, or give "
            "F.dropout training=self.training"
        )
    matching = [
        name
        for name, values in outputs.items()
        if values.numel() == again.numel() and torch.equal(values.flatten(), again.flatten())
    ]
    mark_head(model, matching[-1] if matching else None)


def _recorder(outputs: dict[str, Tensor], name: str):
    def record(module: nn.Module, args, output: Tensor) -> None:
        outputs.pop(name, None)  # in the order of the last use
        outputs[name] = output.clone()  # an in-place layer behind it may change it

    return record
