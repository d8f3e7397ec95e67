"""Makes damaged and hostile files of every kind that the scripts read, from a seed.

`cases(files, seed, count)` yields them; `command` is what reads one, and `fault_of` says what is
wrong with how it was met. `python -m tests.damaged_files --count 1000` meets each in a process of
its own and prints how long and how much memory the worst took.
"""

import argparse
import collections
import contextlib
import copy
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from models.binding import with_checksums
from tests.support import Hostile, Outcome, call, capture_photos

#: What the worst may take: seconds of the processor, and MiB beyond what there was.
SECONDS, MEBIBYTES = 5, 1024
#: Kind of file → name of such a file; for "folder", of the image among sound ones.
NAMES = {
    "lenet": "lenet.tar", "convnet": "convnet.tar", "truth": "truth.tar", "weights": "weights.pth",
    "backup": "x_true.pth.bk", "labels": "labels.txt", "csv": "labels.csv", "cifar": "train",
    "svhn": "train_32x32.mat",
}  # fmt: skip

#: Tensor → tensor that nothing can be computed with, whatever the entry.
LAYOUTS = {
    "sparse": lambda t: t.to_sparse(),
    "huge and sparse": lambda t: torch.sparse_coo_tensor(
        torch.zeros(1, 1).long(), torch.ones(1), (2**40,)
    ),
    "meta": lambda t: t.to("meta"),
    "huge and meta": lambda t: torch.empty(2**40, device="meta"),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "nested": lambda t: torch.nested.nested_tensor([t.float(), t.float()]),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "complex": lambda t: t.to(torch.complex64),
    "boolean": lambda t: t.bool(),
    "expanded": lambda t: t.flatten()[:1].clone().expand(t.shape if t.numel() > 1 else (2,)),
    "huge and expanded": lambda t: t.flatten()[:1].clone().expand(750_000_000),
    "requiring a gradient": lambda t: t.float().clone().requires_grad_(),
    "a parameter": lambda t: nn.Parameter(t.float()),
    "with one dimension more": lambda t: t[None].repeat(2, *[1] * t.dim()),
    "empty": lambda t: t.new_zeros(0),
}
#: What no tensor of floating-point numbers may hold.
NUMBERS = {
    "not a number": lambda t: torch.full_like(t, torch.nan),
    "infinite in one place": lambda t: (
        t.flatten().index_fill(0, torch.tensor([0]), torch.inf).view(t.shape)
    ),
    "integer": lambda t: t.long(),
}
#: Values that are no tensor, no list of tensors, no mapping, no name and no number in range.
NO_VALUES = {
    "a tensor": torch.ones(3),
    "a tensor of one number": torch.tensor(1.0),
    "a sparse tensor": torch.ones(3).to_sparse(),
    "a meta tensor": torch.empty(2**40, device="meta"),
    "a list of tensors in lists": [[torch.ones(2)], [torch.ones(2)]],
    "an imaginary number": 1j,
    "bytes": b"bytes",
    "a set": {1, 2},
}
LISTS = ("target_gradient", "bn_mean_list", "bn_var_list")


def without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


def tensor_changes(base):
    """(description, changed checkpoint) for one tensor of every mapping or list of tensors."""
    places = [("state_dict", key) for key in base["state_dict"]]
    for key in LISTS:
        places += [(key, i) for i in range(len(base[key] or ()))]
    places += [("x_true", None), ("y_true", None)]
    for key in LISTS:
        places += [("control " + key, i) for i in range(len(base["control"][key] or ()))]
    for top, inner in places:
        holder = base["control"] if top.startswith("control ") else base
        entry = holder[top.removeprefix("control ")]
        old = entry if inner is None else entry[inner]
        kinds = LAYOUTS | (NUMBERS if old.is_floating_point() else {})
        if top.endswith("bn_var_list") or str(inner).endswith("running_var"):
            kinds = kinds | {"negative": lambda t: -t - 1}
        if top == "y_true":
            kinds = kinds | {
                "floating-point": lambda t: t.float(),
                "beyond the classes": lambda t: t + 8,
                "below 0": lambda t: t - 9,
            }
        for name, change in kinds.items():
            yield (
                f"{top} {'' if inner is None else inner}: {name}",
                lambda top=top, inner=inner, old=old, change=change: replaced(
                    base, top, inner, change(old)
                ),
            )


def replaced(base, top, inner, value):
    """`base` with another tensor in that place."""
    changed = {**base, "control": dict(base["control"])}
    holder = changed["control"] if top.startswith("control ") else changed
    key = top.removeprefix("control ")
    if inner is None:
        holder[key] = value
    else:
        holder[key] = copy.copy(holder[key])
        holder[key][inner] = value
    return changed


def entry_changes(rng, base):
    """The same for whole entries: wrong types, ranges and sizes."""
    setup, protection = base["dataset_setup"], {"mode": "batch", "sigma": 0.1, "clip": 1.0}
    privacy = {"noise_multiplier": 1.0, "epsilon": 1.0, "delta": 0.1, "steps": 1}
    privacy |= {"sample_rate": 0.5, **protection, "mode": "per-sample"}
    gradient, names = base["target_gradient"], base["trainable"]
    bad = {
        "format": ["3", None, True, -1, 2.0, 10**400],
        "batch_size": [0, -1, True, 2.0, "2", 3, 2**40, 10**400],
        "arch": [1, True, None, "lenet5", "a\nb", "resnet18", "x" * 5000],
        "model_eval": [0, 1, None, "no"],
        "label_smoothing": [True, "0", 1.0, -0.1, float("nan"), None, 10**400],
        "replace_bn": [1, True, "nothing", ["groupnorm"]],
        "clock": [[1], {}, True],
        "args": [1, "text", [1, 2]],
        "protection_norms": [1, "text", [1.0]],
        "local_steps": [0, 5, True, "1", 1.5],
        "resolution": [0.0, 2, True, "1"],
        "free_last_layers_list": [1, {}, [[1]], 2.0],
        "state_dict": [None, [], {}, {"a": 1}, {1: torch.ones(1)}, [*base["state_dict"].values()]]
        + [without(base["state_dict"], key) for key in rng.sample([*base["state_dict"]], 2)]
        + [base["state_dict"] | {"more.weight": torch.ones(2)}],
        "target_gradient": [None, [], {}, 1, [1] * len(gradient), gradient[:-1], gradient[::-1]]
        + [[*gradient, gradient[0]], gradient * 50_000],
        "trainable": [5, "weight", [], names[:-1], [*names[:-1], names[0]], [1] * len(names)]
        + [["head.weight", *names[1:]], dict.fromkeys(names), [names] * len(names)],
        "dataset_setup": [None, [], {}, "text", [1, 2, 3]]
        + [without(setup, key) for key in setup]
        + [setup | {"size": size} for size in
           (None, 32, (3, 32), (3, 0, 32), (True, 32, 32), (3.0, 32, 32), (1, 32, 32), "332",
            (3, 64, 64), (3, 2**20, 2**20), (3, 2**30, 2**30), (3, 10**30, 32), [[3, 32, 32]])]
        + [setup | {"n_classes": count} for count in (0, -8, True, 8.0, "8", 9, 2**31 - 1, 10**400)]
        + [setup | {key: value} for key in ("mean", "std") for value in
           ([], [0.5], ["a"] * 3, "abc", [float("nan")] * 3, [True] * 3, torch.tensor(0.5),
            torch.ones(3).to_sparse(), torch.ones(1).expand(3), torch.empty(3, device="meta"),
            [torch.ones(2)] * 3, [None] * 3, [1j] * 3, [10**400] * 3)]
        + [setup | {"std": std} for std in ([0, 1, 1], [-1.0] * 3)],
        "protection": [1, "batch", [1], {}, without(protection, "clip"), protection | {"other": 1}]
        + [protection | {"mode": mode} for mode in ("all", None, 1, ["batch"], torch.ones(2))]
        + [protection | {"sigma": value} for value in (-1.0, None, True, "1", torch.ones(2))]
        + [protection | {"clip": value} for value in (0, 0.0, -1.0, True, "1", torch.ones(2))]
        + [privacy | {"delta": value} for value in (0, 1, 2, -1.0, True, "0", None)]
        + [privacy | {"steps": value} for value in (0, -1, 1.5, True, "1", None)]
        + [privacy | {"sample_rate": value} for value in (0, 1.5, -1.0, True, None)]
        + [privacy | {"noise_multiplier": value} for value in (-1.0, True, float("inf"), None)]
        + [privacy | {"epsilon": value} for value in (-1.0, True, float("nan"))],
        "x_true": ["text", 1.0, [base["x_true"]], base["x_true"][:1], base["x_true"].flatten()],
        "y_true": ["text", 1, [0, 1], base["y_true"][:1], base["y_true"][None], torch.tensor(1)],
        "control": [1, "text", [1], {}, {"target_gradient": torch.ones(3)},
                    base["control"] | {"target_gradient": gradient[::-1]},
                    base["control"] | {"bn_mean_list": torch.ones(3)}],
    }  # fmt: skip
    if base["bn_mean_list"]:
        means = base["bn_mean_list"]
        for values in (None, [], "ab", 1, means[:-1], [*means, means[0]], [m[:-1] for m in means]):
            bad.setdefault("bn_mean_list", []).append(values)
            bad.setdefault("bn_var_list", []).append(values)
    for key, values in bad.items():
        of_type = {f"{value!r:.60}" if not holds_tensors(value) else f"change {i}": value
                   for i, value in enumerate(values)}  # fmt: skip
        if key in ("x_true", "y_true"):
            of_type |= {k: v for k, v in NO_VALUES.items() if k != "a set"}
        else:
            of_type |= NO_VALUES
        for name, value in of_type.items():
            yield f"{key}: {name}", lambda key=key, value=value: base | {key: value}


def holds_tensors(value):
    if isinstance(value, dict):
        return any(holds_tensors(v) for v in value.values())
    if isinstance(value, list | tuple):
        return any(holds_tensors(v) for v in value)
    return isinstance(value, torch.Tensor)


def damages(rng, whole):
    """The bytes of a file, damaged: flipped bits where they matter, cut ends, odd archives."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = [m for m in archive.infolist() if m.file_size]
        contents = {m.filename: archive.read(m) for m in members}

    def flipped():
        member = rng.choice(members)
        header = whole[member.header_offset : member.header_offset + 30]
        start = (
            member.header_offset
            + 30
            + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        )
        place = start + rng.randrange(member.file_size)
        return whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]

    def packed(change=None, compression=zipfile.ZIP_STORED, repeat=None):
        file = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
            warnings.simplefilter("ignore")  # a name twice
            for name, data in contents.items():
                archive.writestr(name, change(name, data) if change else data)
            if repeat:
                name = next(name for name in contents if name.endswith(repeat))
                archive.writestr(name, contents[name])
        return file.getvalue()

    for i in range(45):
        yield f"flipped bit {i}", flipped
    for i in range(15):
        yield f"cut end {i}", lambda: whole[: rng.randrange(len(whole) - 1)]
    yield "compressed", lambda: packed(compression=zipfile.ZIP_DEFLATED)
    yield (
        "a bomb",
        lambda: packed(
            lambda name, data: bytes(2**26) if name.endswith("data/0") else data,
            zipfile.ZIP_DEFLATED,
        ),
    )
    yield "a member twice", lambda: packed(repeat="data/0")
    yield (
        "a storage too short",
        lambda: packed(lambda name, data: data[:-4] if name.endswith("data/0") else data),
    )
    yield (
        "a storage too long",
        lambda: packed(lambda name, data: data + data if name.endswith("data/0") else data),
    )
    yield (
        "no pickle",
        lambda: packed(lambda name, data: b"no pickle" if name.endswith("data.pkl") else data),
    )
    yield (
        "another archive",
        lambda: packed(lambda name, data: b"" if name.endswith("data.pkl") else data),
    )
    yield "text", lambda: b"text" * 100
    yield "zeros", lambda: bytes(1000)


# Archives and pickles ------------------------------------------------------------------------


def torch_bytes(content, zipped=True):
    """What torch.save writes of `content`."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def archive_of(program, name="archive/data.pkl"):
    """An archive as torch.save writes it, with the pickle `program`."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, program)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    return file.getvalue()


def text(value):
    """Steps of a pickle that push a string."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def hostile_programs(canary):
    """Pickles that cost memory or time, run something, or make what hides methods."""

    def run(function, *words):
        module, name = function.rsplit(".", 1)
        pushed = b"".join(text(word) for word in words)
        return b"c" + f"{module}\n{name}\n".encode() + b"(" + pushed + b"tR"

    start, number = b"\x80\x02", b"J" + struct.pack("<i", 2**31 - 1)
    encode = b"c_codecs\nencode\n"
    doubled = encode + text("x" * 100) + text("latin1") + b"\x86R"
    for _ in range(24):  # each step doubles the bytes
        doubled = encode + doubled + text("hex") + b"\x86R"
    laughs = b"]q\x00" + b"".join(
        b"](" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"eq" + bytes([i + 1])
        for i in range(30)
    )
    yield "runs a command", lambda: start + run("os.system", f"touch {canary}") + b"."
    yield "runs posix", lambda: start + run("posix.system", f"touch {canary}") + b"."
    yield "evaluates", lambda: start + run("builtins.eval", f"open({str(canary)!r}, 'w')") + b"."
    yield "executes", lambda: start + run("builtins.exec", f"open({str(canary)!r}, 'w')") + b"."
    yield "opens a file", lambda: start + run("builtins.open", str(canary), "w") + b"."
    yield "imports", lambda: start + run("importlib.import_module", "antigravity") + b"."
    yield "loads by torch", lambda: start + run("torch.load", str(canary)) + b"."
    yield "many bytes", lambda: start + b"c__builtin__\nbytearray\n" + number + b"\x85R."
    yield (
        "many bytes in a mapping",
        lambda: start + b"}" + text("arch") + b"c__builtin__\nbytearray\n" + number + b"\x85Rs.",
    )
    yield "a large tensor", lambda: start + b"ctorch\nFloatTensor\n" + number + b"\x85R."
    yield (
        "a large storage",
        lambda: start + b"ctorch.storage\nUntypedStorage\n" + number + b"\x85R.",
    )
    yield "bytes doubled", lambda: start + doubled + b"."
    yield "lists in lists", lambda: start + laughs + b"."
    yield "deep lists", lambda: start + b"]" * 200_000 + b"a" * 199_999 + b"."
    yield "a list of itself", lambda: start + b"]q\x00h\x00a."
    yield "many steps", lambda: start + b"](" + b"N" * 20_000_000 + b"e."
    yield "many lists", lambda: start + b"](" + b"]" * 5_000_000 + b"e."
    yield "no end", lambda: start + b"]"
    yield "an empty stack", lambda: start + b"0000."
    yield "a long text that is cut", lambda: start + b"X" + struct.pack("<I", 2**32 - 1) + b"x."
    yield (
        "hidden methods",
        lambda: (
            start + b"ccollections\nOrderedDict\n)R" + text("arch") + text("lenet") + b"s}"
            + text("items") + b"K\x05sb."
        ),
    )  # fmt: skip
    yield (
        "a class of an integer",
        lambda: start + b"}" + text("arch") + b"ctorch\nSize\nsN0.",
    )
    yield "an integer of many digits", lambda: start + b"\x8a\xff" + b"\x7f" * 255 + b"."


def odd_archives(whole):
    """Archives that lie about their members."""
    end = whole.rfind(b"PK\x05\x06")
    many = io.BytesIO()

    def crowded():
        with zipfile.ZipFile(many, "w") as archive:
            for i in range(150_000):
                archive.writestr(f"a/{i}", b"")
        return many.getvalue()

    def escaping():
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("../../../damaged-canary", b"x")
            archive.writestr("archive/\x1b[2Jdata.pkl", b"x")
        return file.getvalue()

    yield "150,000 members", crowded
    yield "members outside", escaping
    yield "no list of members", lambda: whole[:end]
    yield "a wrong count", lambda: whole[: end + 8] + b"\xff\xff\xff\xff" + whole[end + 12 :]
    yield "a wrong place", lambda: whole[: end + 16] + b"\xf0\xff\xff\x7f" + whole[end + 20 :]
    yield "twice", lambda: whole + whole
    yield "empty", lambda: b""
    yield "a sparse file", lambda: Sparse(2**40, b"PK\x03\x04")


@dataclass(frozen=True)
class Sparse:
    """A file that claims a size of which it holds the beginning alone."""

    size: int
    begin: bytes


class Pipe:
    """A named pipe, into which nobody writes."""


def altered(whole, rng):
    """The same archive with one bit of a tensor turned and its checksum made right."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        contents = {m.filename: archive.read(m) for m in archive.infolist()}
    name = rng.choice([n for n, data in contents.items() if "/data/" in n and data])
    data = bytearray(contents[name])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    contents[name] = bytes(data)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return file.getvalue()


def flipped_or_cut(whole, rng, count):
    """`count` damages of the bytes of any file: flipped bits, cut ends, spans of zeros."""
    for i in range(count):
        place, kind = rng.randrange(len(whole)), i % 3
        bit = bytes([whole[place] ^ 1 << rng.randrange(8)])
        made = (
            whole[:place] + bit + whole[place + 1 :], whole[:place],
            whole[:place] + bytes(min(64, len(whole) - place)) + whole[place + 64 :],
        )[kind]  # fmt: skip
        yield f"{('flipped bit', 'cut end', 'zeros')[kind]} {i}", lambda made=made: made


# Kinds of files ------------------------------------------------------------------------------


def checkpoint_cases(files, name, rng):
    base = torch.load(files.paths[name], weights_only=True)
    whole = files.paths[name].read_bytes()
    plain = {key: value for key, value in base.items() if key != "checksums"}
    plain |= {"protection_norms": {}, "local_steps": 1}
    yield list(tensor_changes(plain))
    yield [*entry_changes(rng, plain), *claims(plain)]
    yield [
        *damages(rng, whole), *odd_archives(whole),
        *((f"altered {i}", lambda: altered(whole, rng)) for i in range(10)),
        ("an entry taken out", lambda: without(base, "label_smoothing")),
        ("an entry put in", lambda: base | {"note": 1}),
        ("an entry changed", lambda: base | {"clock": "2020-01-01"}),
        ("checksums of another kind", lambda: base | {"checksums": [1]}),
        ("checksums of other values", lambda: base | {"checksums": dict.fromkeys(base, {1})}),
        *flipped_or_cut(torch_bytes(base, zipped=False), rng, 15),
        ("hostile", lambda: plain | {"args": Hostile(files.canary)}),
        ("hostile as before 1.6", lambda: torch_bytes({1: Hostile(files.canary)}, zipped=False)),
        ("a pickle", lambda: pickle.dumps(Hostile(files.canary))),
    ]  # fmt: skip
    yield [(what, lambda m=make: archive_of(m())) for what, make in hostile_programs(files.canary)]


def claims(base):
    """Sizes that a small file claims, without its truth, and values that would be run or shown."""
    public = {k: v for k, v in base.items() if k not in ("x_true", "y_true", "control")}
    setup = base["dataset_setup"]
    for size in ((3, 100_000, 100_000), (3, 1, 2**31 - 1), (3, 20_000, 20_000)):
        yield f"size {size}", lambda size=size: public | {"dataset_setup": setup | {"size": size}}
    for count in (2**31 - 1, 2**62, 2**63, 10**30):
        yield f"batch {count}", lambda count=count: public | {"batch_size": count}
        yield (
            f"classes {count}",
            lambda count=count: public | {"dataset_setup": setup | {"n_classes": count}},
        )
    wide = torch.zeros(1).expand(10**9)
    yield "an entry of 10^9 numbers in 4 bytes", lambda: public | {"note": wide}
    yield "strides beyond", lambda: public | {"note": torch.zeros(9).as_strided((9, 9), (0, 1))}
    yield "a name that clears the screen", lambda: public | {"arch": "\x1b[2J<script>"}
    yield "a file as the network", lambda: public | {"arch": "/elsewhere/evil.py:build"}


def truth_cases(files, rng):
    sealed, truth = (
        {k: v for k, v in torch.load(path, weights_only=True).items() if k != "checksums"}
        for path in (files.paths["sealed"], files.paths["truth"])
    )
    whole, base = files.paths["truth"].read_bytes(), sealed | truth
    yield [
        (what, lambda make=make: {key: make()[key] for key in truth})
        for changes in (tensor_changes(base), entry_changes(rng, base))
        for what, make in changes
        if what.startswith(("x_true", "y_true", "control", "format"))
    ]
    yield [
        *damages(rng, whole), *odd_archives(whole),
        *((f"altered {i}", lambda: altered(whole, rng)) for i in range(10)),
        *((what, lambda m=make: archive_of(m()))
          for what, make in hostile_programs(files.canary)),
    ]  # fmt: skip


def weights_cases(files, rng):
    whole = files.paths["weights"].read_bytes()
    state = torch.load(files.paths["weights"], weights_only=True)
    name = "0.weight"
    kinds = LAYOUTS | NUMBERS
    yield [
        *((f"{name}: {kind}", lambda c=change: {**state, name: c(state[name])})
          for kind, change in kinds.items() if kind != "requiring a gradient"
          and kind != "a parameter"),
        *((f"{name}: {kind}", lambda v=value: {**state, name: v})
          for kind, value in NO_VALUES.items() if kind != "a tensor"),
        ("a name missing", lambda: without(state, name)),
        ("a name more", lambda: {**state, "x\x1b[2J<b>": torch.ones(1)}),
        ("a name of dots", lambda: {"." * 10**6: torch.ones(1)}),
        ("names in names", lambda: {"a." * 10**5 + str(i): torch.ones(1) for i in range(20)}),
        ("a number as a name", lambda: {1: torch.ones(1)}),
        ("a list", lambda: [torch.ones(1)] * 10),
        ("one tensor 100,000 times", lambda: {f"a{i}": state[name] for i in range(100_000)}),
        ("hostile", lambda: {"state_dict": Hostile(files.canary)}),
    ]  # fmt: skip
    yield [
        *damages(rng, whole), *odd_archives(whole),
        *((what, lambda m=make: archive_of(m()))
          for what, make in hostile_programs(files.canary)),
    ]  # fmt: skip


def npz_of(arrays, compressed=False):
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def npy_header(shape, kind="<f4"):
    """An array's file that claims a shape and holds nothing."""
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


def safetensors_of(header, data=b""):
    words = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(words)) + words + data


def update_cases(files, rng):
    """Pools of (description, make) for files that end in .npz, .safetensors and .pt."""
    from safetensors.torch import save

    state = torch.load(files.paths["after"], weights_only=True)
    arrays = {name: value.numpy() for name, value in state.items()}
    name, first = "0.weight", arrays["0.weight"]
    hostile = np.array([Hostile(files.canary)], dtype=object)

    def member(content, compression=zipfile.ZIP_STORED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            archive.writestr(f"{name}.npy", content)
        return file.getvalue()

    odd = {
        "not numbers": np.full_like(first, np.nan), "complex": first * 1j,
        "text": np.array(["x"]), "times": np.array(["2020-01-01"], dtype="M8[s]"),
        "swapped bytes": first.astype(">f4"), "records": np.zeros(3, dtype="f4,i4"),
        "long doubles": first.astype(np.longdouble), "another shape": first[:1],
        "unsigned": first.astype(np.uint32), "reversed": first[::-1], "objects": hostile,
    }  # fmt: skip
    whole = npz_of(arrays)
    yield ".npz", [
        *((f"npz: {what}", lambda v=value: npz_of({**arrays, name: v}))
          for what, value in odd.items()),
        ("npz: a bomb", lambda: member(npy_header((2**29,)) + bytes(2**31), zipfile.ZIP_DEFLATED)),
        ("npz: zeros for a small network", lambda: npz_of({name: np.zeros(2**25)}, True)),
        ("npz: a claim", lambda: member(npy_header((2**40,)))),
        ("npz: a claim of text", lambda: member(npy_header((2**20,), "<U100000"))),
        ("npz: a negative claim", lambda: member(npy_header((-1,)))),
        ("npz: a long header", lambda: member(npy_header((1,) * 20_000))),
        ("npz: code", lambda: member(npy_header("__import__('os').system('true')"))),
        ("npz: no arrays", lambda: member(b"text")),
        *((f"npz: {what}", make) for what, make in odd_archives(whole)),
        *((f"npz: {what}", make) for what, make in flipped_or_cut(whole, rng, 30)),
    ]  # fmt: skip
    whole = save(state)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    entry = header[name]
    yield ".safetensors", [
        ("safetensors: a long header", lambda: struct.pack("<Q", 2**62) + whole[8:]),
        ("safetensors: many entries", lambda: safetensors_of(
            {f"a{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
             for i in range(300_000)})),
        ("safetensors: a claim", lambda: safetensors_of(
            {name: entry | {"shape": [2**40]}}, whole[8 + length :])),
        ("safetensors: places beyond", lambda: safetensors_of(
            {name: entry | {"data_offsets": [0, 2**40]}}, whole[8 + length :])),
        ("safetensors: another kind", lambda: safetensors_of(
            {name: {"dtype": "F8_E5M2", "shape": [4], "data_offsets": [0, 4]}}, bytes(4))),
        ("safetensors: no JSON", lambda: safetensors_of(b"{" * 1000)),
        ("safetensors: deep JSON", lambda: safetensors_of(b"[" * 500_000)),
        *((f"safetensors: {what}", make) for what, make in flipped_or_cut(whole, rng, 30)),
    ]  # fmt: skip
    part = io.BytesIO()
    np.save(part, first)
    yield ".pt", [
        *((f"state dict: {kind}", lambda c=change: {**state, name: c(state[name])})
          for kind, change in (LAYOUTS | NUMBERS).items()
          if kind not in ("requiring a gradient", "a parameter")),
        *((f"state dict: {kind}", lambda v=value: {**state, name: v})
          for kind, value in NO_VALUES.items() if kind != "a tensor"),
        ("a list too short", lambda: list(state.values())[:-1]),
        ("Parameters: a claim", lambda: {
            "tensors": [npy_header((2**40,))] * 3, "tensor_type": "numpy.ndarray"}),
        ("Parameters: objects", lambda: {
            "tensors": [npz_of({"a": hostile})], "tensor_type": "numpy.ndarray"}),
        ("Parameters: no bytes", lambda: {"tensors": [3], "tensor_type": "numpy.ndarray"}),
        ("Parameters: one 100,000 times", lambda: {
            "tensors": [part.getvalue()] * 100_000, "tensor_type": "numpy.ndarray"}),
        ("a DXO of nothing", lambda: {"kind": "WEIGHTS", "data": {}, "meta": {}}),
        ("a DXO of text", lambda: {"kind": "WEIGHTS", "data": {name: "text"}, "meta": 3}),
        ("a DXO of a number", lambda: {"kind": "WEIGHTS", "data": {name: 10**30}, "meta": {}}),
        ("a DXO of a tensor", lambda: {"kind": torch.ones(3), "data": {}}),
        ("counts that are none", lambda: {
            **state, "1.num_batches_tracked": torch.tensor(float("nan"))}),
        ("a count beyond", lambda: {**state, "1.num_batches_tracked": torch.tensor(2**62)}),
        ("hostile", lambda: {"kind": "WEIGHTS", "data": Hostile(files.canary)}),
        *((what, lambda m=make: archive_of(m()))
          for what, make in hostile_programs(files.canary)),
    ]  # fmt: skip


def label_cases():
    yield "binary", lambda: bytes(range(256))
    yield "no digits", lambda: b"a,b"
    yield "empty", lambda: b""
    yield "beyond the classes", lambda: b"1,99999999999999999999999999"
    yield "many digits", lambda: b"1," + b"9" * 10_000
    yield "below 0", lambda: b"-1,0"
    yield "fractions", lambda: b"0.5,1"
    yield "not a number", lambda: b"nan,inf"
    yield "too many", lambda: b"1," * 5_000_000
    yield "a sparse file", lambda: Sparse(2**40, b"1,0")
    yield "control characters", lambda: b"\x1b[2J,\x00"
    yield "other digits", lambda: "٣,¹".encode()


def csv_cases(files, rng):
    whole = files.paths["csv"].read_bytes()
    first = whole.split(b"\n")[0]
    image = whole.split(b"\n")[1].split(b",")[0]
    secret = str(files.canary).encode()
    yield "outside by dots", lambda: first + b"\n../../../../../etc/hostname,1,0\n"
    yield "outside by its root", lambda: first + b"\n/etc/hostname,1,0\n"
    yield "a file that is not there", lambda: first + b"\n" + secret + b",1,0\n"
    yield "control characters", lambda: first + b"\n\x1b[2J<script>,1,0\n"
    yield "a zero byte", lambda: first + b"\n" + image + b"\x00,1,0\n"
    yield "not a number", lambda: first + b"\n" + image + b",nan,0\n"
    yield "control characters as a number", lambda: first + b"\n" + image + b",\x1b[2J,0\n"
    yield "a long name", lambda: first + b"\n" + b"x" * 100_000 + b",1,0\n"
    yield "a long field", lambda: first + b"\n" + b"x" * 10**7 + b",1,0\n"
    yield "an open quotation", lambda: first + b'\n"' + image + b",1,0\n" * 1000
    yield "other letters", lambda: b"\xff\xfe" + whole
    yield "a sparse file", lambda: Sparse(2**40, first)
    yield from flipped_or_cut(whole, rng, 10)


def png_of(width, height, data=b"", kind=2, chunks=b""):
    """A PNG file that claims a size, with whatever data."""

    def chunk(name, content):
        crc = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros_packed(size):
    """`size` zeros, compressed without holding them all."""
    packer = zlib.compressobj(9)
    made = [packer.compress(bytes(2**20)) for _ in range(size // 2**20)]
    return b"".join([*made, packer.compress(bytes(size % 2**20)), packer.flush()])


def image_cases(rng):
    """(description, (name, bytes)) of one image of a folder."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))

    def stored(form, **options):
        file = io.BytesIO()
        picture.save(file, form, **options)
        return file.getvalue()

    def frames():
        file = io.BytesIO()
        small = [Image.new("L", (2, 2), i % 256) for i in range(20_000)]
        small[0].save(file, "GIF", save_all=True, append_images=small[1:])
        return file.getvalue()

    def chunk_bomb():
        content = b"note\x00\x00" + zeros_packed(2**29)
        crc = struct.pack(">I", zlib.crc32(b"zTXt" + content))
        return struct.pack(">I", len(content)) + b"zTXt" + content + crc

    def tiff(**tags):
        return stored("TIFF", tiffinfo={int(k[1:]): v for k, v in tags.items()})

    def looped():
        whole = bytearray(stored("TIFF"))
        place = int.from_bytes(whole[4:8], "little")
        count = int.from_bytes(whole[place : place + 2], "little")
        at = place + 2 + 12 * count
        whole[at : at + 4] = whole[4:8]
        return bytes(whole)

    def scans():
        whole = stored("JPEG", progressive=True)
        start = whole.rfind(b"\xff\xda")
        head = bytearray(whole[:start])
        place = head.find(b"\xff\xc2")
        head[place + 5 : place + 9] = struct.pack(">HH", 6000, 6000)
        return bytes(head) + whole[start:-2] * 500 + b"\xff\xd9"

    yield "png of 10^10 pixels", lambda: ("x.png", png_of(100_000, 100_000))
    yield "png of 2^62 pixels", lambda: ("x.png", png_of(2**31 - 1, 2**31 - 1))
    yield "png of no pixels", lambda: ("x.png", png_of(0, 5))
    yield "png bomb", lambda: ("x.png", png_of(12_000, 9_000, zeros_packed(9_000 * 36_001)))
    yield "large png", lambda: ("x.png", png_of(7_000, 7_000, zeros_packed(7_000 * 21_001)))
    yield "png with more data", lambda: ("x.png", png_of(9, 9, zeros_packed(2**29)))
    yield (
        "png with a text bomb",
        lambda: ("x.png", png_of(9, 9, zeros_packed(9 * 28), chunks=chunk_bomb())),
    )
    yield "narrow png", lambda: ("x.png", png_of(1, 10**7, zeros_packed(4 * 10**7)))
    yield "gif of 20,000 frames", lambda: ("x.gif", frames())
    yield "tiff in a loop", lambda: ("x.tif", looped())
    yield "tiff of a large strip", lambda: ("x.tif", tiff(t279=2**31 - 1))
    yield "tiff of many bits", lambda: ("x.tif", tiff(t277=65_000))
    yield "jpeg of many scans", lambda: ("x.jpg", scans())
    yield "DICOM", lambda: ("x.png", bytes(128) + b"DICM" + bytes(2000))
    yield "a program", lambda: ("x.eps", b"%!PS\n(/elsewhere/x) (w) file")
    yield (
        "a program as png",
        lambda: ("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    )
    yield "a page as png", lambda: ("x.png", b"<svg onload='alert(1)'/>")
    yield "a pickle as png", lambda: ("x.png", pickle.dumps([1] * 9))
    yield "a name of controls", lambda: ("\x1b[2J<script>.png", b"x")
    yield "a sparse file", lambda: ("x.png", Sparse(2**40, stored("PNG")))
    yield "a named pipe", lambda: ("x.png", Pipe())
    for form, ending in (("PNG", "png"), ("JPEG", "jpg"), ("GIF", "gif"), ("TIFF", "tif"),
                         ("BMP", "bmp"), ("WEBP", "webp"), ("PPM", "ppm"),
                         ("JPEG2000", "jp2")):  # fmt: skip
        for what, make in flipped_or_cut(stored(form), rng, 9):
            yield f"{form}: {what}", lambda make=make, ending=ending: (f"x.{ending}", make())


def backup_cases(files, rng):
    x = torch.load(files.paths["backup"] / "x_true.pth.bk", weights_only=True)
    whole = (files.paths["backup"] / "x_true.pth.bk").read_bytes()
    for kind, change in (LAYOUTS | NUMBERS).items():
        if kind not in ("requiring a gradient", "a parameter"):
            yield f"backup: {kind}", lambda change=change: change(x)
    for kind, value in NO_VALUES.items():
        yield f"backup: {kind}", lambda value=value: value
    yield "backup: many empty images", lambda: torch.zeros(4, 3, 0, 0)
    yield "backup: other channels", lambda: torch.zeros(4, 7, 9, 9)
    for pool in (damages(rng, whole), odd_archives(whole)):
        for what, make in pool:
            yield f"backup: {what}", make
    for what, make in hostile_programs(files.canary):
        yield f"backup: {what}", lambda make=make: archive_of(make())


def cifar_cases(files, rng):
    whole = files.paths["cifar"].read_bytes()
    good = pickle.loads(whole)

    def written(content):
        return lambda: pickle.dumps(content, protocol=2)

    start, encode = b"\x80\x02", b"c_codecs\nencode\n"
    grown = encode + text("x" * 100) + text("latin1") + b"\x86R"
    for _ in range(24):
        grown = encode + grown + text("hex") + b"\x86R"
    yield "cifar: hostile", written({"data": Hostile(files.canary), "fine_labels": [1]})
    yield "cifar: bytes that grow", lambda: start + grown + b"."
    yield "cifar: a claim", lambda: (
        start + b"}" + text("data") + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
        + b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft" + text("b") + b"\x87Rs."
    )  # fmt: skip
    yield "cifar: runs a module", lambda: start + b"cnumpy.f2py.__main__\n_reconstruct\n."
    yield "cifar: no mapping", written([1, 2])
    yield "cifar: floats", written(good | {"data": good["data"].astype(float)})
    yield "cifar: not numbers", written(good | {"data": np.full((4, 3072), np.nan)})
    yield "cifar: other sizes", written(good | {"data": good["data"][:3]})
    yield "cifar: objects", written(good | {"data": np.array([None] * 4, dtype=object)})
    yield "cifar: beyond the classes", written(good | {"fine_labels": [0, 1, 2, 100]})
    yield "cifar: text as labels", written(good | {"fine_labels": "abcd"})
    yield "cifar: no labels", written(good | {"fine_labels": []})
    yield "cifar: many steps", lambda: start + b"](" + b"N" * 20_000_000 + b"e."
    yield "cifar: a sparse file", lambda: Sparse(2**40, start)
    for what, make in hostile_programs(files.canary):
        yield f"cifar: {what}", make
    for what, make in flipped_or_cut(whole, rng, 15):
        yield f"cifar: {what}", make


def matrices(packed=True, **content):
    """A file as of the data set svhn, of four images, with other content."""
    from scipy.io import savemat

    good = {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.array([[1], [2], [3], [10]])}
    file = io.BytesIO()
    savemat(file, good | content, do_compression=packed)
    return file.getvalue()


def svhn_cases(rng):
    x, written = np.zeros((32, 32, 3, 4), np.uint8), matrices

    def bomb():
        """A matrix of 2^31 zeros."""
        count = 2**31 - 2**20
        body = struct.pack("<IIII", 6, 8, 9, 0) + struct.pack("<IIiiii", 5, 16, 32, 32, 3, 699_050)
        body += struct.pack("<HH4s", 1, 1, b"X") + struct.pack("<II", 2, count)
        packer = zlib.compressobj(9)
        made = [packer.compress(struct.pack("<II", 14, len(body) + count) + body)]
        made += [packer.compress(bytes(2**20)) for _ in range(count // 2**20)] + [packer.flush()]
        data = b"".join(made)
        return written()[:128] + struct.pack("<II", 15, len(data)) + data

    yield "svhn: a bomb", bomb
    yield "svhn: floats", lambda: written(X=x.astype(float))
    yield "svhn: another shape", lambda: written(X=x[..., 0])
    yield "svhn: other labels", lambda: written(y=np.array([[11]] * 4))
    yield "svhn: labels that are none", lambda: written(y=np.array([[np.nan]] * 4))
    yield "svhn: text", lambda: written(y=np.array(["a", "b", "c", "d"]))
    yield "svhn: cells", lambda: written(X=np.array([[1], "a"], dtype=object))
    yield "svhn: as of HDF5", lambda: b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(99)
    yield "svhn: a sparse file", lambda: Sparse(2**40, written()[:128])
    for packed in (True, False):
        for what, make in flipped_or_cut(written(packed), rng, 15):
            yield f"svhn: {what}", make


# Meeting them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """Sound files, and a path that no file may make."""

    paths: dict[str, Path]
    canary: Path


@dataclass(frozen=True)
class Case:
    """One damaged file."""

    #: What is wrong with it.
    what: str
    #: A key of NAMES, "update" or "folder".
    kind: str
    #: Name of the file.
    name: str
    #: Returns its content: bytes, a `Sparse`, or what torch.save is to write.
    make: Callable


def sound_files(folder: Path) -> Files:
    """Write files that are in order: what all damage starts from."""
    flags = ("-b", "2", "--with-control")
    paths = {
        "lenet": capture_photos(folder / "lenet", "-a", "lenet", *flags),
        "convnet": capture_photos(folder / "convnet", "-a", "convnet", "--upload-bn", *flags),
        "sealed": capture_photos(folder / "sealed", "-a", "lenet", "--seal", *flags),
    }
    paths["truth"] = Path(str(paths["sealed"]).replace("-checkpoint", "-truth"))
    state = torch.load(paths["convnet"], weights_only=True)["state_dict"]
    after = {k: v + 0.01 if v.is_floating_point() else v + 1 for k, v in state.items()}
    for name, content in (("weights", state), ("after", after)):
        paths[name] = folder / f"{name}.pth"
        torch.save(content, paths[name])
    draw = np.random.default_rng(0)
    for i, label in itertools.product(range(2), "ab"):
        (folder / "pictures" / label).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(draw.integers(0, 256, (40, 40, 3), np.uint8))
        picture.save(folder / "pictures" / label / f"{i}.png")
    paths["pictures"] = folder / "pictures"
    paths["csv"] = folder / "labels.csv"
    paths["csv"].write_text("file,one,two\na/0.png,1,0\nb/0.png,0,1\n")
    paths["backup"] = folder / "backup"
    paths["backup"].mkdir()
    torch.save(torch.randn(4, 3, 32, 32), paths["backup"] / "x_true.pth.bk")
    torch.save(torch.arange(4), paths["backup"] / "y_true.pth.bk")
    paths["labels"] = folder / "labels.txt"
    paths["labels"].write_text("1,0\n")
    paths["cifar"] = folder / "cifar-100-python" / "train"
    paths["cifar"].parent.mkdir()
    content = {"data": np.zeros((4, 3072), np.uint8), "fine_labels": [0, 1, 2, 3]}
    paths["cifar"].write_bytes(pickle.dumps(content, protocol=2))
    paths["svhn"] = folder / "train_32x32.mat"
    paths["svhn"].write_bytes(matrices())
    return Files(paths, folder / "ran")


def sound_paths(files: Files) -> dict[str, Path]:
    """Return a sound file of every kind, as `command` takes it."""
    kinds = ("lenet", "convnet", "truth", "weights", "labels", "csv", "cifar", "svhn")
    return {
        **{kind: files.paths[kind] for kind in kinds},
        "backup": files.paths["backup"] / "x_true.pth.bk",
        "update": files.paths["after"],
        "folder": files.paths["pictures"] / "a" / "0.png",
    }


def pools(files: Files, seed: int) -> dict[str, list[Case]]:
    """All damaged files that can be made, by group."""
    rng = random.Random(seed)
    found: dict[str, list[Case]] = {}

    def add(kind, group, cases, ending=None):
        named = NAMES.get(kind, f"file{ending}")
        found[group] = [Case(what, kind, named, make) for what, make in cases]
        if kind != "folder":
            found[group].append(Case("a named pipe", kind, named, Pipe))

    for name in ("lenet", "convnet"):
        for i, pool in enumerate(checkpoint_cases(files, name, rng)):
            add(name, f"{name} {i}", pool)
    for i, pool in enumerate(truth_cases(files, rng)):
        add("truth", f"truth {i}", pool)
    for i, pool in enumerate(weights_cases(files, rng)):
        add("weights", f"weights {i}", pool)
    for ending, pool in update_cases(files, rng):
        add("update", f"update {ending}", pool, ending)
    add("labels", "labels", label_cases())
    add("csv", "csv", csv_cases(files, rng))
    add("folder", "images", image_cases(rng))
    add("backup", "backup", backup_cases(files, rng))
    add("cifar", "cifar", cifar_cases(files, rng))
    add("svhn", "svhn", svhn_cases(rng))
    return found


def cases(files: Files, seed: int, count: int | None = None) -> Iterator[Case]:
    """Yield `count` damaged files, evenly from all groups; all that there are without a count."""
    rng, found = random.Random(seed), pools(files, seed)
    for pool in found.values():
        rng.shuffle(pool)
    in_turn = (case for row in itertools.zip_longest(*found.values()) for case in row if case)
    yield from itertools.islice(in_turn, count)


def written(case: Case, folder: Path) -> Path:
    """Write the file of a case into an empty folder; return the path that a script is given."""
    content, path = case.make(), folder / case.name
    if case.kind == "folder":
        name, content = content
        path = folder / "set" / "a" / name
    elif case.kind == "cifar":
        path = folder / "cifar-100-python" / "train"
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Pipe):
        os.mkfifo(path)
    elif isinstance(content, Sparse):
        path.write_bytes(content.begin)
        os.truncate(path, content.size)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def command(case_kind: str, path: Path, files: Files, root: Path) -> list:
    """Return the script and the flags that read the file of a case."""
    sound = files.paths
    run = ["run.py", "--root", root, "--lr", "0.1", "--epochs", "1", "--dry-run", "--checkpoint"]
    client = ["training.py", "--results", root, "-b", "2", "--dry-run"]
    photos = [*client, "--data-name", "photos", "-a", "convnet"]
    folder = [*client, "--data-name", "folder", "-a", "lenet", "--image-size", "32", "--data"]
    classes = ["--num-classes", "8", "--image-size", "32"]
    if case_kind in ("cifar", "svhn"):
        name = {"cifar": "cifar100", "svhn": "svhn"}[case_kind]
        source = path.parent.parent if case_kind == "cifar" else path.parent
        return [*client, "--data-name", name, "-a", "lenet", "--data", source]
    if case_kind == "backup":
        return [
            *client, "--data-name", "cifar100", "-a", "lenet", "--data-backup", path.parent,
        ]  # fmt: skip
    return {
        "lenet": [*run, path],
        "convnet": [*run, path],
        "truth": [*run, sound["sealed"], "--truth", path],
        "weights": [*photos, "--pretrained", path],
        "update": [
            *photos[:-2], "-a", "convnet", *classes, "--import-update", sound["weights"], path,
            "--local-lr", "1",
        ],
        "labels": [*run, sound["lenet"], "--labels", path],
        "csv": [*folder, sound["pictures"], "--labels-csv", path, "--loss", "bce"],
        "folder": [*folder, path.parent.parent],
    }[case_kind]  # fmt: skip


def companions(case: Case, path: Path, files: Files) -> None:
    """Put sound files beside the damaged one where a script reads a folder."""
    if case.kind == "folder":
        for label in "ab":
            (path.parent.parent / label).mkdir(exist_ok=True)
            whole = (files.paths["pictures"] / label / "0.png").read_bytes()
            (path.parent.parent / label / "0.png").write_bytes(whole)
    elif case.kind == "backup":
        whole = (files.paths["backup"] / "y_true.pth.bk").read_bytes()
        (path.parent / "y_true.pth.bk").write_bytes(whole)


def holds_the_same(case: Case, path: Path, files: Files) -> bool:
    """Tell whether a checkpoint or a truth holds what the sound one holds, by its checksums."""
    found, sound = (torch.load(p, weights_only=True) for p in (path, files.paths[case.kind]))
    plain = {key: value for key, value in found.items() if key != "checksums"}
    return with_checksums(plain)["checksums"] == sound["checksums"]


def fault_of(
    case: Case, path: Path, files: Files, outcome: Outcome, seconds: float, mebibytes: float
) -> str:
    """Say what is wrong with how a damaged file was met, "" where nothing is.

    A checkpoint or a truth is read only where the damage is beside its content. Other files may be
    read where what is left of them is sound.
    """
    shown = outcome.out + outcome.err
    if case.kind in ("lenet", "convnet", "truth") and outcome.code == 0:
        return "" if holds_the_same(case, path, files) else "read, though it holds something else"
    if outcome.code not in (0, 2):
        return f"exit code {outcome.code}: {outcome.err[-300:]!r}"
    if outcome.code == 2 and not outcome.err.startswith("error: "):
        return f"no refusal: {outcome.err[:300]!r}"
    if outcome.err.count("\n") != (outcome.code == 2):
        return f"not one line: {outcome.err[:300]!r}"
    if len(outcome.err) > 1000:
        return f"a line of {len(outcome.err)} letters"
    if any(not letter.isprintable() for letter in shown.replace("\n", "")):
        return f"control characters: {shown!r:.300}"
    if seconds > SECONDS:
        return f"{seconds:.1f} s"
    return f"{mebibytes:.0f} MiB" if mebibytes > MEBIBYTES else ""


def peak_memory():
    """Highest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak():
    """Where the system allows it, so that what ran before hides nothing."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def digest_of(path: Path) -> str:
    """Digest of a file as it is on the disk; of a huge one its size and beginning."""
    with open(path, "rb") as file:
        begin = hashlib.sha256(file.read(2**28)).hexdigest()
    return f"{path.stat().st_size} {begin}"


# As a program ---------------------------------------------------------------------------------


def met_alone(case: Case, files: Files, folder: Path) -> tuple[str, float, float, int]:
    """Meet one case in a process of its own: fault, seconds, MiB, exit code."""
    path = written(case, folder)
    companions(case, path, files)
    everything = [p for p in [*folder.rglob("*"), *files.canary.parent.rglob("*")] if p.is_file()]
    before = {p: digest_of(p) for p in everything}
    script, *flags = command(case.kind, path, files, folder / "results")
    out, err, used = (folder.parent / name for name in ("out", "err", "used"))
    child = os.fork()
    if not child:
        code = 70
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
            signal.alarm(120)
            forget_peak()
            memory, start = peak_memory(), time.process_time()
            outcome = call(script, *flags)
            code = outcome.code
        except BaseException as error:
            outcome = Outcome(70, "", f"{type(error).__name__}: {error}")
        out.write_text(outcome.out, errors="replace")
        err.write_text(outcome.err, errors="replace")
        used.write_text(f"{time.process_time() - start} {peak_memory() - memory}")
        os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"ended by signal {-code}", 60.0, 0.0, code
    seconds, memory = map(float, used.read_text().split())
    outcome = Outcome(code, out.read_text(), err.read_text())
    fault = fault_of(case, path, files, outcome, seconds, memory)
    after = {p: digest_of(p) for p in everything if p.is_file()}
    if not fault and after != before:
        fault = "a file was changed"
    if files.canary.exists():
        fault = "code was run"
        files.canary.unlink()
    return fault, seconds, memory, code


def main(argv: list[str] | None = None) -> int:
    """Meet many damaged files and print what was found; returns 1 where one was met wrongly."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=None, help="How many; all without it.")
    parser.add_argument("--seed", type=int, default=0, help="Which ones, and their damage.")
    parser.add_argument("--only", default="", help="Only those whose kind or damage holds this.")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    codes, faults, slowest, largest = collections.Counter(), [], (0.0, ""), (0.0, "")
    with tempfile.TemporaryDirectory() as place:
        files = sound_files(Path(place) / "sound")
        for kind, path in sound_paths(files).items():  # imports here what all would import
            script, *flags = command(kind, path, files, Path(place) / "results")
            assert call(script, *flags).code == 0
        for number, case in enumerate(cases(files, args.seed, args.count)):
            name = f"{case.kind}, {case.what}"
            if args.only not in name:
                continue
            with tempfile.TemporaryDirectory(dir=place) as own:
                (Path(own) / "file").mkdir()
                fault, seconds, memory, code = met_alone(case, files, Path(own) / "file")
            codes[code] += 1
            slowest, largest = max(slowest, (seconds, name)), max(largest, (memory, name))
            if sys.stderr.isatty():
                print(f"\r{number + 1}", end="", file=sys.stderr)
            if fault:
                faults.append(name)
                print(f"{number}: {name}: {fault}", flush=True)
    print(f"{sum(codes.values())} files, seed {args.seed}; exit codes {dict(codes)}")
    print(f"slowest: {slowest[0]:.1f} s ({slowest[1]})")
    print(f"most memory: {largest[0]:.0f} MiB ({largest[1]})")
    print(f"met wrongly: {len(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
