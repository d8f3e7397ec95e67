"""300 malformed files, made from a fixed seed: each is refused with one line, soon and cheaply."""

import contextlib
import copy
import io
import random
import resource
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support import call, capture_photos

COUNT = 300
SECONDS, MEBIBYTES = 5, 500  # of the processor, and of memory beyond what there was

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


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Files that are in order: two checkpoints with everything, a sealed one and its truth."""
    folder = tmp_path_factory.mktemp("sound")
    flags = ("-b", "2", "--with-control")
    lenet = capture_photos(folder / "lenet", "-a", "lenet", *flags)
    convnet = capture_photos(folder / "convnet", "-a", "convnet", "--upload-bn", *flags)
    sealed = capture_photos(folder / "sealed", "-a", "lenet", "--seal", *flags)
    truth = Path(str(sealed).replace("-checkpoint", "-truth"))
    return {"lenet": lenet, "convnet": convnet, "sealed": sealed, "truth": truth}


def malformed_files(sound):
    """COUNT (description, kind of file, function that gives its content), from a fixed seed."""
    rng = random.Random(0)
    pools = {}
    for name in ("lenet", "convnet"):
        base = torch.load(sound[name], weights_only=True)
        base = base | {"protection_norms": {}, "local_steps": 1}
        pools[name, "tensors"] = list(tensor_changes(base))
        pools[name, "entries"] = list(entry_changes(rng, base))
        pools[name, "bytes"] = list(damages(rng, sound[name].read_bytes()))
    truth = torch.load(sound["truth"], weights_only=True)
    base = torch.load(sound["sealed"], weights_only=True) | truth
    of_truth = [
        (what, lambda make=make: {key: make()[key] for key in truth})
        for changes in (tensor_changes(base), entry_changes(rng, base))
        for what, make in changes
        if what.startswith(("x_true", "y_true", "control", "format"))
    ]
    pools["truth", "entries"] = of_truth
    pools["truth", "bytes"] = list(damages(rng, sound["truth"].read_bytes()))
    for place, ((kind, _), pool) in enumerate(pools.items()):
        share = COUNT // len(pools) + (place < COUNT % len(pools))
        for what, make in rng.sample(pool, share):
            yield f"{kind}, {what}", kind, make


def peak_memory():
    """Highest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak():
    """Where the system allows it, so that what ran before hides nothing."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def fault_of(outcome, seconds, memory):
    """What is wrong with how a malformed file was met, "" where nothing is."""
    if outcome.code != 2:
        return f"exit code {outcome.code}"
    if not outcome.err.startswith("error: ") or outcome.err.count("\n") != 1:
        return f"not one line: {outcome.err[:300]!r}"
    if len(outcome.err) > 1000:
        return f"a line of {len(outcome.err)} letters"
    if seconds > SECONDS:
        return f"{seconds:.1f} s"
    return f"{memory:.0f} MiB" if memory > MEBIBYTES else ""


def attacked(sound, kind, path, root):
    files = {"--checkpoint": path}
    if kind == "truth":
        files = {"--checkpoint": sound["sealed"], "--truth": path}
    flags = [word for pair in files.items() for word in pair]
    return call("run.py", *flags, "--root", root, "--lr", 0.1, "--epochs", 1, "--dry-run")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the odd tensors, as they are made
def test_every_malformed_file_is_refused_with_one_line_soon_and_cheaply(sound, tmp_path):
    for kind in ("lenet", "convnet", "truth"):  # what the changes start from is accepted
        assert attacked(sound, kind, sound[kind], tmp_path).code == 0
    faults, count, path = [], 0, tmp_path / "malformed.tar"
    for what, kind, make in malformed_files(sound):
        content, count = make(), count + 1
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        del content
        forget_peak()
        before, start = peak_memory(), time.process_time()
        try:
            outcome = attacked(sound, kind, path, tmp_path)
        except Exception as error:
            faults.append(f"{what}: {type(error).__name__}: {error}"[:300])
            continue
        fault = fault_of(outcome, time.process_time() - start, peak_memory() - before)
        if fault:
            faults.append(f"{what}: {fault}")
    assert count == COUNT
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults)
    assert [path.name for path in tmp_path.iterdir()] == ["malformed.tar"]
