"""Command lines of both scripts, generated from their parsers; and the files that these name.

Every flag is drawn, with values that its type and choices accept and, less often, others. A new
flag is therefore drawn without an edit here. Only values that make a run long are listed.
"""

import argparse
import collections
import os
import shutil

import torch
from hypothesis import strategies as st

from models.build import build_model
from models.choices import DEFENCE_NAMES, SWEEP_PARAMETERS
from tests.support import ROOT, capture_photos
from tests.test_datasets import image_folder

SIZE = 16
#: What the simulated client of most checkpoints is.
CLIENT = ("-a", "lenet", "-b", "2", "--image-size", str(SIZE), "--outlayer-state", "keep")
#: Name of a checkpoint → the client's flags beside, or instead of, CLIENT.
CHECKPOINTS = {
    "lenet.tar": (*CLIENT, "--with-control", "--decoys", "3"),
    "bare.tar": CLIENT,
    "other.tar": (*CLIENT, "--target-idx", "1"),
    "one.tar": ("-a", "lenet", "-b", "1", "--image-size", str(SIZE)),
    "convnet.tar": (*CLIENT, "-a", "convnet"),
    "uploaded.tar": (*CLIENT, "-a", "convnet", "--upload-bn", "--with-control", "--decoys", "1"),
    "steps.tar": (*CLIENT, "--local-steps", "2", "--local-lr", "0.1"),
    "sparse.tar": (*CLIENT, "--defence", "topk:0.1"),
    "noisy.tar": (*CLIENT, "--defence", "dp-sgd:1:0.1"),
    "signs.tar": (*CLIENT, "--defence", "sign"),
    "bce.tar": (*CLIENT, "--loss", "bce"),
    "own.tar": ("--model", "own.py:build", "-b", "2", "--image-size", str(SIZE)),
}
#: Numbers in words, for every flag; those that the flag's type accepts are its good values.
NUMBERS = (
    "0", "1", "2", "3", "8", "-1", "0.5", "1.0", "1e-3", "-1e-6", "-0.5", "0.3", "1e-30", "1e30",
    "1e308", "1e400", "nan", "inf", "-inf", "2147483647", "2147483648", "99999999999999999999",
    "-0", "0x10", "1_0", "1e3", " 2", "٣",
)  # fmt: skip
#: Other texts, and names of files of `make_files` and of none.
TEXTS = (
    "", " ", "x", "none", "0,1", "1,1", "0.5,0.5,0.5", "1s", "2s", "30s", "bn", "bn,labels",
    "protection", "bn,bn", "a/b", "..", "é ü", "%s", "{}", "a\nb", "--", "nowhere", "file.txt",
    "labels.csv", "labels.txt", "pictures", "single", "empty", "damaged.tar", "truth.tar",
    "sealed.tar", "lenet.tar", "weights.pth", "own.py", "own.py:build", "broken.py:build",
    "own.py:absent", "backup", "16x20", "x" * 300,
)  # fmt: skip
FILES = ("nowhere", "file.txt", "empty", "damaged.tar", "weights.pth", "truth.tar")
#: Flag → its likely values, where neither choices nor a type say them.
LIKELY = {
    "--checkpoint": (*CHECKPOINTS, "sealed.tar"),
    "--simulation-checkpoint": (*CHECKPOINTS, "sealed.tar"),
    "--truth": ("truth.tar", *CHECKPOINTS),
    "--model": ("own.py:build", "own.py:absent", "broken.py:build"),
    "--labels": ("0,1", "1,0", "0", "7,7", "labels.txt"),
    "--label-aux": ("pictures", "single", "empty"),
    "--sweep": tuple(f"{name}=0,1" for name in SWEEP_PARAMETERS) + ("topk=0.1,1", "sigma=0,1e-3"),
    "--sweep-TV": ("1e-4,1e-2", "0"),
    "--ray-address": ("127.0.0.1:1", "ray://127.0.0.1:1"),
    "--root": ("out", "out/new", "file.txt"),
    "--results": ("out", "out/new", "file.txt"),
    "--data-name": ("photos", "folder", "cifar10", "imagenet", "celeba"),
    "--data": ("pictures", "single", "empty"),
    "--data-backup": ("backup", "empty"),
    "--labels-csv": ("labels.csv", "labels.txt"),
    "--arch": ("lenet", "convnet", "resnet18_cifar", "resnet18"),
    "--pretrained": ("weights.pth", "damaged.tar", "convnet.pth"),
    "--import-update": ("weights.pth", "after.pth", "convnet.pth"),
    "--defence": tuple(DEFENCE_NAMES)
    + ("dp-sgd:1:1", "batch:1:0.1", "topk:0.1", "random:0.5", "percentile:5:1", "svt:0.2:1:1:1")
    + ("local-steps:2", "larger-batch:3", "sign:1"),
    "--dist-url": ("tcp://127.0.0.1:0", "env://", "tcp://nowhere", "127.0.0.1:1"),
}
#: Flag → all the accepted values that it is given, where others would make the run long.
SHORT = {
    "--epochs": ("1", "2"),
    "--n-seed": ("1", "2", "3"),
    "--HP-epochs": ("1", "2", "3"),
    "--min-t": ("1", "2", "3"),
    "--max-t": ("1", "2", "3"),
    "--num-samples": ("1", "2"),
    "--budget": ("1s", "2s"),
    "--repeats": ("1", "2"),
    "--sweep-workers": ("1", "2"),
    "--nproc": ("1", "2", "3"),
    "--batch-size": ("1", "2", "3", "9"),
    "--chunk-size": ("1", "2", "3", "auto"),
    "--max-memory": ("20GiB", "512MiB", "64", "0.1MiB"),
    "--image-size": ("16", "8", "1", "16x20"),
    "--decoys": ("1", "3"),
    "--local-steps": ("1", "2", "5"),
    "--local-epochs": ("1", "2"),
}
#: Flags that end the script otherwise: they print a help text, a version or a traceback.
LEFT_OUT = {"--help", "--version", "--traceback"}
#: Flags with which every command line of a script begins, unless it gives them itself.
BEGIN = {
    "run.py": {
        "--checkpoint": "lenet.tar", "--epochs": "2", "--lr": "0.1", "--root": "out",
    },
    "training.py": {
        "--data-name": "photos", "--arch": "lenet", "--batch-size": "2", "--image-size": "16",
        "--results": "out",
    },
}  # fmt: skip
#: A flag → the flags of BEGIN that it stands for, and that would contradict it.
INSTEAD = {
    "--model": ("--arch",),
    "--audit": ("--epochs", "--lr"),
    "--budget": ("--epochs", "--lr"),
    "--no-images": ("--epochs", "--lr"),
    "--data-backup": ("--image-size",),
}
#: What a search needs.
SEARCH = ("--superparameters-search", "--simulation-checkpoint", "other.tar", "--HP-epochs", "3")
SEARCH += ("--min-t", "1", "--max-t", "2", "--num-samples", "1")
#: Flag, or its ending → what it does nothing without.
NEEDS: collections.defaultdict[str, tuple[str, ...]] = collections.defaultdict(tuple)
NEEDS |= {
    "--decoys": ("--with-control",),
    "--sigma": ("--enable-dp",),
    "--noise-seed": ("--enable-dp", "--sigma", "1e-3"),
    "--max-per-sample-grad-norm": ("--enable-dp",),
    "--dp-mode": ("--enable-dp", "-C", "1"),
    "--dp-steps": ("--enable-dp", "-C", "1", "--dp-mode", "per-sample"),
    "--sample-rate": ("--enable-dp", "-C", "1", "--dp-mode", "per-sample"),
    "--data": ("--data-name", "folder"),
    "--labels-csv": ("--data-name", "folder", "--data", "pictures", "--loss", "bce"),
    "--mean": ("--std", "0.5,0.5,0.5"),
    "--std": ("--mean", "0.5,0.5,0.5"),
    "--ra-mode": ("--ra",),
    "--local-lr": ("--local-steps", "2"),
    "--local-batch": ("--local-steps", "2", "--local-lr", "0.1"),
    "--update-difference": ("--import-update", "weights.pth", "after.pth", "--local-lr", "1"),
    "--import-update": ("--local-lr", "1"),
    "--local-optimiser": ("--import-update", "weights.pth", "after.pth", "--local-lr", "1"),
    "--local-weight-decay": ("--import-update", "weights.pth", "after.pth", "--local-lr", "1"),
    "--label-method": ("--pseudo-label-init", "from_grads"),
    "--label-aux": ("--pseudo-label-init", "from_grads"),
    "--label-prior": ("--pseudo-label-init", "from_grads"),
    "--verdict-metric": ("--metric",),
    "--ssim": ("--metric",),
    "--lpips-weights": ("--metric",),
    "--controls": ("--metric",),
    "--difference-step": ("--pixel-gradient", "finite-differences"),
    "--TV-end": ("--TV", "1e-3"),
    "--budget": ("--audit",),
    "--no-images": ("--audit",),
    "--update-model": ("--checkpoint", "steps.tar"),
    "--exact-bn": ("--BN", "1e-3", "--checkpoint", "uploaded.tar"),
    "--repeats": ("--sweep", "sigma=0,1e-3"),
    "--sweep-workers": ("--sweep", "sigma=0,1e-3"),
    "--sweep-TV": ("--sweep", "sigma=0,1e-3"),
    "--keep-checkpoints": ("--sweep", "sigma=0,1e-3"),
    "-tune": SEARCH,
    "--superparameters-search": (*SEARCH, "--TV-tune"),
    "--simulation-checkpoint": (*SEARCH, "--TV-tune"),
    "--search-resume": (*SEARCH, "--TV-tune"),
    "--search-only": (*SEARCH, "--TV-tune"),
    "--ray-address": (*SEARCH, "--TV-tune"),
    "--bn-coupling": ("--checkpoint", "uploaded.tar"),
}


def make_files(folder):
    """Make all files that the command lines name in `folder`, which is the current one."""
    shutil.copy(ROOT / "docs" / "examples" / "unet.py", folder / "own.py")
    (folder / "broken.py").write_text("import torch\n1 / 0\n")
    for name, flags in CHECKPOINTS.items():
        os.rename(capture_photos(folder / "made", *flags), folder / name)
    capture_photos(folder / "sealed", *CLIENT, "--seal", "--with-control", "--decoys", "1")
    for kind, name in (("checkpoint", "sealed.tar"), ("truth", "truth.tar")):
        os.rename(next((folder / "sealed").glob(f"*-{kind}.pth.tar")), folder / name)
    for name in ("made", "sealed"):
        shutil.rmtree(folder / name)
    (folder / "damaged.tar").write_bytes((folder / "lenet.tar").read_bytes()[:5000])
    (folder / "file.txt").write_text("a file")
    (folder / "labels.txt").write_text("0\n1\n")
    (folder / "empty").mkdir()
    pictures = image_folder(folder / "pictures", size=(SIZE, SIZE))
    names = [f"{path.parent.name}/{path.name}" for path in sorted(pictures.glob("*/*"))]
    rows = "".join(f"{name},{number % 2},1\n" for number, name in enumerate(names))
    (folder / "labels.csv").write_text("file,one,two\n" + rows)
    image_folder(folder / "single", classes=("all",), size=(SIZE, SIZE))
    network = build_model("lenet", 8, (3, SIZE, SIZE))
    torch.save(network.state_dict(), folder / "weights.pth")
    after = {name: value + 0.01 for name, value in network.state_dict().items()}
    torch.save(after, folder / "after.pth")
    convnet = build_model("convnet", 8, (3, SIZE, SIZE))
    torch.save(convnet.state_dict(), folder / "convnet.pth")
    (folder / "backup").mkdir()
    torch.save(torch.rand(4, 3, SIZE, SIZE), folder / "backup" / "x_true.pth.bk")
    torch.save(torch.tensor([0, 1, 2, 3]), folder / "backup" / "y_true.pth.bk")


def accepted(action, text):
    """Whether the flag's type and choices accept a value."""
    try:
        value = text if action.type is None else action.type(text)
    except (argparse.ArgumentTypeError, ValueError, TypeError):
        return False
    return action.choices is None or value in action.choices


def values_of(action, tidy):
    """A strategy for the values of a flag: a list of words, empty for a switch.

    tidy: only values that the flag's type and choices accept, and mostly likely ones.
    """
    if action.nargs == 0:
        return st.just([])
    flag = long_name(action)
    pool = [*map(str, action.choices or ()), *LIKELY.get(flag, ()), *NUMBERS, *TEXTS]
    good = [text for text in SHORT.get(flag, pool) if accepted(action, text)]
    bad = [text for text in pool if not accepted(action, text)]
    likely = LIKELY.get(flag, SHORT.get(flag, tuple(map(str, action.choices or good))))
    value = st.sampled_from(likely)
    if not tidy:
        value = value | st.sampled_from(good) | st.sampled_from(good + bad)
    if isinstance(action.nargs, int):
        return st.lists(value, min_size=action.nargs, max_size=action.nargs)
    if action.nargs in ("+", "*"):
        several = st.lists(value, min_size=2, max_size=3)
        return value.map(lambda text: [text]) | several
    return value.map(lambda text: [text])


def long_name(action):
    """The first of a flag's names with two dashes."""
    return next(name for name in action.option_strings if name.startswith("--"))


@st.composite
def flags_of(draw, parser, script, always=()):
    """Flags of a script, up to six beside those of BEGIN; `always` are words that all have.

    Half of them come from one group of the help text, since such flags often need each other.
    """
    groups = []
    for group in parser._action_groups:
        members = [a for a in group._group_actions if a.option_strings]
        groups.append([a for a in members if not LEFT_OUT & set(a.option_strings)])
    flags = {long_name(action): action for group in groups for action in group}
    group = sorted(map(long_name, draw(st.sampled_from([group for group in groups if group]))))
    drawn = draw(st.lists(st.sampled_from(group), max_size=3, unique=True))
    drawn += draw(st.lists(st.sampled_from(sorted(flags)), max_size=3, unique=True))
    tidy = draw(st.sampled_from((True, True, True, False)))
    begin = dict(BEGIN[script])
    for flag in drawn:
        for stands_for in (flag, *INSTEAD.get(flag, ())):
            begin.pop(stands_for, None)
    begin.pop(draw(st.sampled_from((*[""] * 20, *BEGIN[script]))), None)  # it may need that flag
    line = [word for pair in begin.items() for word in pair] + list(always)
    for flag in dict.fromkeys(drawn):
        if tidy:
            line += NEEDS["-tune" if flag.endswith("-tune") else flag]
        names = flags[flag].option_strings
        line += [draw(st.sampled_from(names)), *draw(values_of(flags[flag], tidy))]
    return line
