"""A layerwise attack that is killed anywhere goes on to the very same images and certificates."""

import contextlib
import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from inversion.layerwise import peel
from inversion.layerwise.attack import layerwise_attack, target_network
from inversion.layerwise.matching import Matching
from inversion.layerwise.saved import walk_from
from inversion.layerwise.smooth_matching import SmoothMatching
from tests.support import capture_photos, succeed, target_of, without
from tests.test_anchor import basic
from tests.test_layerwise_attack import noisy, private, public
from tests.test_layerwise_network import CLASSES, NETWORKS, deep, vgg
from tests.test_resume import run_until_save
from utils.errors import InputError
from utils.journal import FORGETFUL, FolderJournal, consolidate


def grouped():
    """A network whose first convolution is not solved: images are matched, and nothing is lost."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, groups=3), nn.Tanh(), nn.Conv2d(24, 32, 3, 2, 1),
        nn.Tanh(), nn.Flatten(), nn.Linear(512, CLASSES),
    )  # fmt: skip


#: The walk of "train" meets noise; the rounds of "stem" overshoot.
#: Case → network, labels, side of the images, train mode, how images are made, a kind of layer.
CASES = {
    "eval": (NETWORKS["residual"], [5, 1], 8, False, "solved", "masks"),
    "train": (lambda: deep(48), [5, 1, 3, 0], 8, True, "solved", "convolution"),
    "anchor": (basic, [2, 0, 1, 2, 2], 16, False, "solved", "shifts"),
    "stem": (lambda: nn.Sequential(*vgg(64, 8)), [5, 1], 8, False, "stem", "masks"),
    "matched": (grouped, [5, 1], 8, False, "activations", "convolution"),
    "smooth": (NETWORKS["convnet"], [5, 1], 16, False, "activations", "head"),
}


class KilledError(Exception):
    """Stands for the end of a process."""


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr("inversion.layerwise.images.WHOLE", Matching(3, 0.05, 20))
    monkeypatch.setattr("inversion.layerwise.images.SMOOTH", SmoothMatching(4, 0.05, 1.0))
    monkeypatch.setattr("inversion.layerwise.images.WORTH_MATCHING", 0.01)


@pytest.fixture
def solved(monkeypatch):
    """What was solved, by whichever process."""
    done, names = [], ("solve_head", "solve_node", "anchored", "find_route")
    functions = {name: getattr(peel, name) for name in names}
    for name in names:

        def counting(network, node, *args, _name=name, _function=functions[name], **options):
            found = _function(network, node, *args, **options)
            if found is not None:
                done.append((_name, node.name))
            return found

        monkeypatch.setattr(peel, name, counting)
    return done


def attack_of(case):
    """The attack of a case, as a function of its journal and callbacks."""
    make, labels, size, train_mode, *_ = CASES[case]
    torch.manual_seed(0)
    model = make().float()
    x, y = private(len(labels), (3, size, size)), torch.tensor(labels)
    target = target_of(model, x, y, train_mode=train_mode)
    target = noisy(1e-4)(target) if case == "train" else target

    def attacked(journal=FORGETFUL, **callbacks):
        return layerwise_attack(model, target, y, public(size), journal=journal, **callbacks)

    return attacked, lambda: target_network(model, target)


class Mortal(FolderJournal):
    """The journal of a process that ends behind its second save: the first may repeat the last."""

    saves = 0

    def save(self):
        super().save()
        self.saves += 1
        if self.saves == 2:
            raise KilledError


def opened(folder, every=0.0, kind=FolderJournal):
    folder.mkdir(exist_ok=True)
    consolidate(folder)
    return kind.opened(folder, every, pytest.fail, 0)


def assert_same(found, expected):
    assert torch.equal(found.images, expected.images)
    assert (found.method, found.sources) == (expected.method, expected.sources)
    assert (found.stopped, found.detours) == (expected.stopped, expected.detours)
    layers, others = ([replace(of, seconds=0.0) for of in r.layers] for r in (found, expected))
    assert layers == others
    assert list(found.tensors) == list(expected.tensors)
    pairs = [(found.tensors[name], t) for name, t in expected.tensors.items()]
    pairs += [(getattr(found, n), getattr(expected, n)) for n in ("residual", "decoder_only")]
    pairs.append((found.labels, expected.labels))
    for tensor, other in pairs:
        assert (tensor is None and other is None) or torch.equal(tensor, other)


@pytest.mark.parametrize("case", CASES)
def test_killed_after_every_layer_and_step(case, brief, solved, tmp_path):
    """Each process certifies one layer, or takes a step towards the images, and dies."""
    attacked, _ = attack_of(case)
    expected, once = attacked(), list(solved)
    *_, method, kind = CASES[case]
    assert expected.method == method
    assert kind in {layer.kind for layer in expected.layers}
    solved.clear()
    processes, told, recalled, found = 0, [], [], None

    def die(layer):
        told.append(layer.name)
        raise KilledError

    while found is None:
        processes += 1
        recalled.clear()
        journal = opened(tmp_path / "state", kind=Mortal)
        with contextlib.suppress(KilledError):
            found = attacked(journal, on_layer=die, on_recalled=recalled.append)
        assert processes < 40
    assert_same(found, expected)
    assert solved == once
    assert len(recalled) == len(expected.layers)
    assert len(told) == len(expected.layers) + len(expected.detours)  # which began uncertified
    steps = {"stem": 10, "matched": 3 + 2 * 2, "smooth": 4}.get(case, 0)
    assert processes == len(told) + steps + 2  # the last but one saves the result and dies
    again = attacked(opened(tmp_path / "state"), on_layer=die, should_stop=die)
    assert_same(again, expected)
    assert solved == once


@pytest.mark.parametrize("case", ["eval", "stem", "matched", "smooth"])
def test_what_is_told_to_stop_saves_though_no_save_is_due(case, brief, solved, tmp_path):
    attacked, _ = attack_of(case)
    expected, once = attacked(), list(solved)
    solved.clear()
    count = len(expected.layers)
    for stop_at in (1, 2, count + 2, count + 4, 10**9):
        asked = []

        def should_stop(asked=asked, stop_at=stop_at):
            asked.append(True)
            return len(asked) >= stop_at

        found = attacked(opened(tmp_path / "state", 1e9), should_stop=should_stop)
        assert found.images.isfinite().all()
        if len(asked) < stop_at:
            break
    assert_same(found, expected)
    assert solved == once
    assert found.seconds > expected.seconds / 2


def damaged(walk, *keys, value):
    """A saved walk with one entry replaced."""
    walk = copy.deepcopy(walk)
    at = walk
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return walk


def test_a_walk_that_does_not_fit_is_refused(brief, tmp_path):
    attacked, network = attack_of("eval")
    attacked(opened(tmp_path / "state"))
    walk = opened(tmp_path / "state").recall("walk")
    assert walk_from(walk, network()).ended
    (name, value), (raw, _) = (next(iter(walk[table].items())) for table in ("values", "raw"))
    line = r"^the saved state does not fit this run: the walk of [^\n]* is damaged; [^\n]*$"
    for wrong in (
        [], {}, {**walk, "values": 3}, damaged(walk, "values", name, value=value[:1]),
        damaged(walk, "values", name, value=value.float()),
        damaged(walk, "values", "other", value=value), damaged(walk, "todo", value=99),
        damaged(walk, "masks", "_4", value=[1.0]), damaged(walk, "raw", raw, value=[value, 0.0]),
        damaged(walk, "layers", 0, "rank", value="many"), damaged(walk, "reached", value=-1),
        damaged(walk, "layers", 0, "name", value="other"), damaged(walk, "noise", value={}),
        damaged(walk, "layers", 0, "place", value="a\x1b[2Jb"), damaged(walk, "stopped", value=1),
        damaged(walk, "layers", 0, "kind", value="certain"),
        damaged(walk, "labels", value=torch.tensor([0, 99])),
    ):  # fmt: skip
        with pytest.raises(InputError, match=line):
            walk_from(wrong, network())


@pytest.mark.parametrize(
    ("case", "fact", "keys"),
    [
        ("stem", "stem-0", ("number",)),
        ("stem", "stem-0", ("maps", 0)),
        ("matched", "adam", ("step",)),
        ("matched", "adam", ("x",)),
        ("matched", "lbfgs-0", ("optimiser", "old_dirs")),
        ("matched", "lbfgs-0", ("optimiser", "extra")),
        ("smooth", "smooth", ("optimiser", "exp_avg")),
        ("smooth", "decoded", ("images",)),
        ("smooth", "images", ("images",)),
        ("smooth", "images", ("sources",)),
    ],
)
def test_a_stage_that_does_not_fit_is_refused(case, fact, keys, brief, tmp_path):
    attacked, _ = attack_of(case)

    class Altered(FolderJournal):
        def recall(self, name):
            content = super().recall(name)
            return damaged(content, *keys, value=[torch.ones(3)]) if name == fact else content

    asked = []

    def stop():  # within the stage
        asked.append(True)
        return fact != "images" and len(asked) > {"stem-0": 5, "adam": 4, "lbfgs-0": 8}.get(fact, 3)

    attacked(opened(tmp_path / "state"), should_stop=stop)
    with pytest.raises(InputError, match=r"^the saved state does not fit this run: [^\n]*$"):
        attacked(opened(tmp_path / "state", kind=Altered))


#: Entries of result.json in which two runs of the same attack differ.
TIMES = {"settings", "seconds", "iterations_per_second", "peak_memory_mib"}


def test_a_killed_run_solves_first_and_then_matches(brief, tmp_path, monkeypatch):
    """It is killed while it makes images of the head's features, and while it matches."""
    monkeypatch.setattr("inversion.audit.attack.LAYERWISE_PUBLIC_IMAGES", 40)
    checkpoint = capture_photos(
        tmp_path, "--image-size", "8", "--arch", "convnet", "--batch-size", "2", "--model-eval"
    )
    flags = ("--checkpoint", checkpoint, "--root", tmp_path, "--attack", "auto", "--lr", "0.1")
    flags += ("--epochs", "3", "--save-every", "0.000001")
    saves = run_until_save(None, monkeypatch, *flags, "--id", "whole")
    found = {}
    for name, number in (("solving", 4), ("matching", saves - 1)):
        assert run_until_save(number, monkeypatch, *flags, "--id", name) == number
        folder = tmp_path / "results" / "exp" / name
        resumed = succeed("run.py", *flags, "--id", name, "--resume", folder)
        assert "_13: certified, from the saved state" in resumed.out
        assert "_13: rank" not in resumed.out
        assert "matching, since solving layer by layer does not do" in resumed.out
    for name in ("whole", "solving", "matching"):
        folder = tmp_path / "results" / "exp" / name
        images = torch.load(folder / "x_recon.pth")
        found[name] = images, without(TIMES, json.loads((folder / "result.json").read_text()))
        assert torch.equal(images, found["whole"][0])
        assert found[name][1] == found["whole"][1]
