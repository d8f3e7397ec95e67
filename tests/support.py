"""What several test files need."""

import contextlib
import io
import json
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

import run
import training
from inversion.audit.scoring import Rules, score_images
from inversion.audit.tables import score_table
from models.checkpoint import Task, make_checkpoint
from models.gradient import ClientLoss, whole_batch_gradient
from models.reading import target_from_checkpoint
from train.datasets import DATASETS, normalise
from train.photos import photo_batch
from utils.script import run_script

ROOT = Path(__file__).resolve().parent.parent
#: In seconds: what only something that waits for ever reaches, however busy the machine is.
HANG = 600
MEAN, STD = DATASETS["photos"].mean, DATASETS["photos"].std


def photos(batch_size, size, target_idx=0):
    """Normalised photographs and their labels."""
    x, y = photo_batch(batch_size, target_idx, size, seed=0)
    return normalise(x, DATASETS["photos"]), y


def target_of(model, x, y, *, train_mode=True, arch="own", num_classes=8, capture_bn=True):
    """The Target of a batch, through a checkpoint as the scripts make it."""
    loss = ClientLoss(train_mode)
    sent = whole_batch_gradient(model, x, y, loss, moments=capture_bn)
    shape = tuple(x.shape[1:])
    task = Task(arch, len(x), shape, num_classes, MEAN[: shape[0]], STD[: shape[0]], loss)
    return target_from_checkpoint(make_checkpoint(model, sent, task))


def smooth_network(num_classes=4):
    """Three conv-BN layers with a smooth activation, in float64."""
    layers, channels = [], 3
    for width in (4, 5, 6):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.BatchNorm2d(width)]
        layers += [nn.Softplus()]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    ).double()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


class Hostile:
    """Pickles to a command that leaves a marker behind."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Outcome:
    """What a script did: exit code, what it printed, what it complained of."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err


def call(script, *flags):
    """Run training.py or run.py within this process, as its command line would."""
    main = {"training.py": training.main, "run.py": run.main}[script]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_script(main, [str(flag) for flag in flags])
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(script, *flags):
    outcome = call(script, *flags)
    assert outcome.code == 0, f"{script} {flags}: {outcome.code}\n{outcome.out}\n{outcome.err}"
    return outcome


def wait_until(condition, process=None):
    """Return when condition() is true; fail where `process` ends before, or nothing happens."""
    deadline = time.monotonic() + HANG
    while not condition():
        assert process is None or process.poll() is None, "the process ended"
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


@contextlib.contextmanager
def no_hang():
    """Raise TimeoutError in the main thread when the context lasts as only a hang does."""

    def end(*_):
        raise TimeoutError(f"not done after {HANG} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def capture_photos(folder, *flags):
    """Capture photographs with training.py into `folder`; return the checkpoint's path."""
    succeed("training.py", "--data-name", "photos", "--results", folder, *flags)
    (path,) = Path(folder).glob("*-checkpoint.pth.tar")
    return path


def scored(found, true, y_found, y_true, *, controls=None, decoys=None, **rules):
    """Scores of images by `Rules(**rules)`, and what is printed of them."""
    scores = score_images(
        found, true, y_found, y_true, Rules(**rules), controls=controls, decoys=decoys
    )
    return scores, score_table(scores)


def attack(folder, checkpoint, *flags):
    """Attack with run.py; return the parsed result.json and its folder."""
    flags = [str(flag) for flag in flags]
    for flag, value in (("--lr", "0.1"), ("--epochs", "1")):
        if flag not in flags and "layerwise" not in flags:
            flags += [flag, value]
    succeed("run.py", "--root", folder, "--checkpoint", checkpoint, *flags)
    results = Path(folder) / "results" / "exp"
    newest = max(results.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return json.loads((newest / "result.json").read_text()), newest


def without(names, value):
    """A parsed JSON file without the entries of these names, at any depth."""
    if isinstance(value, dict):
        return {key: without(names, v) for key, v in value.items() if key not in names}
    return [without(names, v) for v in value] if isinstance(value, list) else value
