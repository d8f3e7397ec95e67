"""Audits as `run.py --audit` describes them, made by hand or from the result.json of a run."""

import json
import re
from pathlib import Path

import torch

from inversion.audit import html
from inversion.audit.verdict import IDENTIFIABLE, INCOMPLETE, NOT_SHOWN, RECONSTRUCTION
from utils.pictures import save_panels

SENTENCES = {
    RECONSTRUCTION: "leakage: reconstruction: SSIM +0.773 (95 % interval +0.633 to +0.879) above "
    "everything made without the gradient; the client's gradient shows in the images "
    "(p = 0.00013); worst image 0 (rank 1 of 100, SSIM +0.939)",
    NOT_SHOWN: "no leakage shown: p = 0.31, where 0.0001 was the least possible; SSIM -0.193 (95 % "
    "interval -0.313 to -0.095) above the best control; nearest is image 2 (rank 3 of 100, SSIM "
    "-0.050)",
    INCOMPLETE: "incomplete: the positive control failed, so that finding nothing shows nothing",
}
#: What a small network's attacker has, in the form of the threat model's rows.
THREAT = {
    "letter": "D",
    "name": "data-enhanced eavesdropper",
    "reason": "public photographs, for the decoder",
    "rows": [
        ["gradient", "yes", "of one batch"],
        ["tensors", "yes", "all 8, 70,088 numbers"],
        ["BN statistics", "no", "the network has no BatchNorm layer"],
        ["labels", "given", "from the truth"],
        ["batch", "yes", "8 images (3, 32, 32)"],
        ["normalisation", "yes", "mean 0.49, deviation 0.24 per channel"],
        ["network", "yes", "lenet, 8 classes, with its weights"],
        ["loss", "yes", "train mode, mean cross-entropy"],
        ["protection", "withheld", "none is assumed"],
        ["other images", "yes", "public photographs, for the decoder"],
    ],
}


def part(name, verdict, ssim, psnr, **changes):
    """An attack that was run: per-image leakage in both metrics, the rest consistent with it."""
    count = len(ssim)
    found = verdict in (RECONSTRUCTION, IDENTIFIABLE)
    entry = {
        "name": name, "status": "done", "reason": None, "seconds": 17.2, "control_seconds": 19.6,
        "budget_seconds": 60.0, "verdict": verdict, "sentence": SENTENCES.get(verdict, verdict),
        "p": 0.00013 if found else 0.31, "smallest_p": 0.0001,
        "p_corrected": 0.00039 if found else 0.93, "arrived": found, "iterations": 600,
        "leakage": {"psnr": spread(psnr), "ssim": spread(ssim)},
        "mean": {"psnr": 12.0 + sum(psnr) / count, "ssim": 0.19 + sum(ssim) / count},
        "controls": {
            "mean image": {"psnr": 11.6, "ssim": 0.1863},
            "prior only": {"psnr": 11.59, "ssim": 0.1911},
            "other gradient": {"psnr": 10.76, "ssim": 0.0802},
        },
        "identified": list(range(count)) if found else [],
        "ranks": [1] * count if found else [16, 85, 3, 70, 76, 51, 18, 71][:count],
        "worst_image": max(range(count), key=ssim.__getitem__), "deepest_layer": None,
        "certified": None,
    }  # fmt: skip
    return entry | changes


def spread(values):
    """The leakage of one metric; the interval is that of the demo in width."""
    mean = sum(values) / len(values)
    return {
        "mean": mean,
        "low": mean - 0.14 * abs(mean),
        "high": mean + 0.106 * abs(mean),
        "images": values,
    }


LEAKED = ([0.939, 0.921, 0.874, 0.412, 0.683, 0.901, 0.802, 0.652],
          [22.3, 25.1, 24.6, 9.84, 17.2, 26.4, 21.9, 18.03])  # fmt: skip
NOTHING = ([-0.35, -0.29, -0.05, -0.17, -0.44, -0.08, -0.11, -0.06],
           [-6.1, -9.2, -4.4, -6.7, -8.9, -5.3, -6.0, -5.52])  # fmt: skip


def checkpoint(verdict, parts, **changes):
    """One audited update."""
    strongest = parts[0]
    entry = {
        "file": "iddemo_lenet_random_photos_b8_i0-checkpoint.pth.tar",
        "sha256": "5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef",
        "id": "0f4c2c5e7d5b41a6a3f0a2c9a7e1d4b8", "captured": "2026-11-27T09:58:12+00:00",
        "system": {
            "arch": "lenet", "parameters": 70088, "image_shape": [3, 32, 32], "num_classes": 8,
            "batch_size": 8, "train_mode": True, "loss": "cross-entropy", "round": None,
        },
        "threat": THREAT,
        "data": {
            "name": "photos", "images": 8, "decoys": 99,
            "chosen": "one crop of each of eight public photographs, the first of each class; "
            "chosen by number, before any attack",
        },
        "protection": None,
        "labels": {"known": True, "accuracy": None, "method": "given", "chance": 0.125},
        "verdict": verdict, "sentence": strongest["sentence"],
        "worst_image": strongest["worst_image"], "identified": strongest["identified"],
        "batch_size": 8, "parts": parts, "pictures": {"worst": "worst-0.png", "pairs": "pairs.png"},
    }  # fmt: skip
    return entry | changes


def audit(verdict, checkpoints, **changes):
    """A whole audit."""
    entry = {
        "format": 1, "created": "2026-11-27T10:00:00+00:00",
        "command": "python run.py --audit --checkpoint results/demo/iddemo_lenet_random_photos_b8_"
        "i0-checkpoint.pth.tar --budget 5m --id demo-audit",
        "versions": {"python": "3.11.2", "torch": "2.11.0", "numpy": "2.3.1"},
        "git": "32bc68cf6a1e3c5bd1a5f0e1b4f8f3f0e26c9d1a",
        "budget_seconds": 300.0, "seconds": 287.1,
        "verdict": verdict, "sentence": SENTENCES[verdict],
        "warnings": [{"code": "labels-given", "text": "The attack was given the labels; without "
                      "them an attacker first has to work them out."}],
        "positive_control": {
            "passed": True, "what": "the same attacks on a small network without protection, on "
            "which they must succeed", "verdict": RECONSTRUCTION, "seconds": 31.0,
            "leakage": {
                "psnr": {"mean": 20.5, "low": 17.63, "high": 22.67},
                "ssim": {"mean": 0.79, "low": 0.679, "high": 0.874},
            },
        },
        "checkpoints": checkpoints,
    }  # fmt: skip
    return entry | changes


def leak():
    """The demo: everything leaks; a second attack found less, a third was not possible."""
    less = part("matching, short", IDENTIFIABLE, [0.55, 0.41, 0.32, 0.08, 0.21, 0.44, 0.3, 0.12],
                [9.1, 8.2, 6.4, 1.9, 4.4, 7.7, 6.1, 2.6], iterations=150, seconds=4.3,
                control_seconds=5.2, identified=[0, 1, 2, 5, 6], ranks=[1, 1, 1, 9, 2, 1, 1, 4],
                budget_seconds=15.0, p=0.0011, p_corrected=0.0033, arrived=False,
                sentence="leakage: identifiable: the client's gradient shows in the images "
                "(p = 0.0011); worst image 0 (rank 1 of 100, SSIM +0.550)")  # fmt: skip
    refused = {"name": "layerwise", "status": "refused", "seconds": 0.4,
               "reason": "the network has no layer that this attack can start from"}  # fmt: skip
    parts = [part("matching, long", RECONSTRUCTION, *LEAKED), less, refused]
    return audit(RECONSTRUCTION, [checkpoint(RECONSTRUCTION, parts)])


PROTECTION = {
    "mode": "dp-sgd", "text": "each image's gradient is clipped to norm 0.5; noise of multiplier 1 "
    "is added; this holds for 1000 updates", "epsilon": 2.101, "delta": 1e-05, "mu": 1.0,
    "unit": "one image more or less", "bound": {"kappa": 0.01, "gamma": 0.0924},
}  # fmt: skip


def no_leak():
    """A protected update, in which nothing was found."""
    parts = [part("matching, long", NOT_SHOWN, *NOTHING)]
    labels = {"known": False, "accuracy": 0.375, "method": "counts", "chance": 0.125}
    found = checkpoint(NOT_SHOWN, parts, protection=PROTECTION, labels=labels)
    warning = {
        "code": "optimiser-limited",
        "text": "The attack's aim is lower at the private images.",
    }
    return audit(NOT_SHOWN, [found], warnings=[warning])


def incomplete():
    """Next to nothing is known: no threat, no part with figures, a failed positive control."""
    parts = [{"name": "layerwise", "status": "skipped", "reason": "the budget was used up"},
             {"name": "matching, short", "status": "interrupted", "seconds": 12.0}]  # fmt: skip
    found = {"file": "update.npz", "batch_size": 1, "verdict": INCOMPLETE, "parts": parts,
             "threat": None, "protection": None, "data": {"images": 1},
             "system": {"arch": "resnet18"}}  # fmt: skip
    control = {"passed": False, "what": "the same attacks on a small network", "verdict": NOT_SHOWN,
               "leakage": None, "seconds": 30.0}  # fmt: skip
    warning = {"code": "positive-control-failed", "text": "Give a larger --budget."}
    return audit(INCOMPLETE, [found], positive_control=control, warnings=[warning], git=None,
                 versions=None)  # fmt: skip


def several():
    """Three updates, one of each kind."""
    found = [no_leak(), leak(), incomplete()]
    checkpoints = [one["checkpoints"][0] for one in found]
    checkpoints[0]["file"] = "protected-checkpoint.pth.tar"
    return audit(RECONSTRUCTION, checkpoints, sentence="of 3 updates one leaks images: "
                 + SENTENCES[RECONSTRUCTION])  # fmt: skip


ROWS = Path(__file__).parents[1] / "docs" / "rows"
#: Audits that `run.py --audit` wrote: an update without protection and one with it.
GENUINE = {
    name: json.loads((ROWS / f"audit_{name}.json").read_text()) for name in ("demo", "defended")
}
EXAMPLES = {"leak": leak, "no leak": no_leak, "incomplete": incomplete, "several": several}


def palettes():
    """The named colours of the style sheet: light, dark and printed."""
    style = (html.TEMPLATES / "style.css").read_text()
    light, dark, printed = (
        dict(re.findall(r"--(\w+): (#\w{6});", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )
    return {"light": light, "dark": light | dark, "print": light | printed}


def write_pictures(folder):
    """Write the pictures that the examples name: three patterns side by side."""
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(
        torch.rand(3, 3, 8, 8, generator=generator), scale_factor=4, mode="bicubic"
    ).clamp(0, 1)
    save_panels([("worst", images)], folder / "worst-0.png", ["private", "rebuilt", "control"])


def from_result(result, name="matching, long"):
    """The part of an audit that a result.json of `run.py --metric` tells."""
    scores = result["metrics"]
    verdict = scores["verdict"]
    ranks = (scores["identification"] or {}).get("ranks")
    controls = {
        control: {metric: found["mean"][metric] for metric in ("psnr", "ssim")}
        for control, found in scores["controls"].items()
    }
    seconds = sum(control["seconds"] for control in (result["controls"] or {}).values())
    return {
        "name": name, "status": "done", "reason": None, "seconds": result["seconds"],
        "control_seconds": seconds, "budget_seconds": None, "p_corrected": verdict["p"],
        "arrived": scores["attack"]["arrived"], "iterations": result["iterations"],
        "leakage": scores["leakage"], "mean": scores["mean"], "controls": controls, "ranks": ranks,
        "deepest_layer": None, "certified": None,
    } | {key: verdict[key] for key in (
        "verdict", "sentence", "p", "smallest_p", "identified", "worst_image")}  # fmt: skip
