"""What a whole audit prints and leaves behind: tables, audit.json, pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inversion.audit.positive import Positive
from inversion.audit.subject import LabelFinding, Subject
from inversion.audit.suite import FEWEST_ITERATIONS, SUITE, Done, matching_settings
from inversion.audit.suite_verdict import (
    ALREADY_SHOWN,
    LEAKAGE,
    audit_verdict,
    best_part,
    checkpoint_verdict,
)
from inversion.audit.threat import ThreatModel, threat_model
from inversion.audit.verdict import FEW_IMAGES, INCOMPLETE
from models.batchnorm import uses_learned_statistics
from models.gradient import trainable_parameters
from models.guarantee import CANDIDATES, reconstruction_bound
from utils.console import duration, table
from utils.metrics import LOWER_IS_BETTER
from utils.pictures import decibels, save_panels

#: Of audit.json: raised by one whenever a reader of the number before could misread it.
AUDIT_FORMAT = 1
#: Images that are printed of a part, the worst first.
PRINTED_IMAGES = 8
#: Metrics of a part that audit.json gives.
METRICS = ("psnr", "ssim", "lpips")
#: Fields of a verdict that the entry of its part holds by the same names.
FROM_VERDICT = ("verdict", "metric", "p", "smallest_p", "worst_image")


# One part ----------------------------------------------------------------------------------


def part_entry(done: Done) -> dict[str, Any]:
    """Return the entry of a part in audit.json."""
    verdict, scores = done.verdict, done.scores
    entry: dict[str, Any] = {
        "name": done.part.name,
        "method": done.part.method,
        "status": done.status,
        "reason": done.reason,
        "limited": done.is_limited,
        "seconds": done.seconds,
        "control_seconds": done.control_seconds,
        "budget_seconds": done.budget_seconds,
        "iterations": done.iterations,
        "arrived": done.arrived,
        "p_corrected": done.p_corrected,
        **{key: verdict.get(key) for key in FROM_VERDICT},
        "sentence": verdict.get("sentence", done.reason),
        "identified": verdict.get("identified", []),
        "leakage": None, "mean": None, "controls": {}, "ranks": None, "deepest_layer": None,
        "certified": None,
    }  # fmt: skip
    if scores is not None:
        controls = scores["controls"] or {}
        test = scores["identification"]
        entry |= {
            "leakage": scores["leakage"],
            "mean": scores["mean"],
            "controls": {
                name: {metric: of["mean"].get(metric) for metric in METRICS}
                for name, of in controls.items()
            },
            "ranks": None if test is None else test["ranks"],
        }
    if done.certified is not None:
        entry["certified"] = len(done.certified)
        entry["deepest_layer"] = done.certified[-1] if done.certified else None
    return entry


def worst_first(scores: Mapping[str, Any]) -> list[int]:
    """Order the images from the one that shows most: by rank, then by height above controls."""
    images, metric = scores["images"], scores["verdict"]["metric"]
    ranks = (scores["identification"] or {}).get("ranks") or [0] * len(images)
    above = ((scores["leakage"] or {}).get(metric) or {}).get("images") or [0.0] * len(images)
    return sorted(range(len(images)), key=lambda i: (ranks[i], -above[i]))


def part_lines(done: Done) -> list[str]:
    """Describe how a part ended, with a table of its images, the worst first."""
    name, taken = done.part.name, duration(done.seconds + done.control_seconds)
    if done.scores is None:
        return [f"{name}: {done.status}: {done.reason} ({taken})"]
    unit = "iterations" if done.certified is None else "tensors"
    lines = [*done.certificate, _image_table(done.scores)]
    lines.append(f"{name}: {done.verdict['sentence']}")
    if done.is_limited and done.verdict["verdict"] not in LEAKAGE:
        lines.append(f"{name}: optimiser-limited: it is no evidence of safety")
    lines.append(
        f"{name}: {done.iterations:,} {unit} in {duration(done.seconds)}, "
        f"controls and test {duration(done.control_seconds)}, of {duration(done.budget_seconds)}"
    )
    return lines


def _image_table(scores: Mapping[str, Any]) -> str:
    """Return the table of a part: its images, the worst first, then means and controls."""
    metric, test = scores["verdict"]["metric"], scores["identification"]
    above = ((scores["leakage"] or {}).get(metric) or {}).get("images")
    found, rows = scores["verdict"]["identified"], []
    for i in worst_first(scores)[:PRINTED_IMAGES]:
        image = scores["images"][i]
        rows.append(
            [
                i,
                "" if test is None else f"{test['ranks'][i]} of {test['candidates']}",
                decibels(image["psnr"]), image["ssim"],
                "" if above is None else above[i],
                "yes" if i in found else "no",
            ]
        )  # fmt: skip
    controls = {f"control: {n}": of["mean"] for n, of in (scores["controls"] or {}).items()}
    summaries = {f"mean of {len(scores['images'])}": scores["mean"], **controls}
    for title, mean in summaries.items():
        rows.append([title, "", decibels(mean["psnr"]), mean["ssim"], "", ""])
    header = ["image", "rank", "PSNR", "SSIM", f"{metric.upper()} above controls", "identified"]
    return table(header, rows, separated=len(summaries))


# Checkpoints -------------------------------------------------------------------------------


def checkpoint_entry(
    subject: Subject, labels: LabelFinding, parts: Sequence[Mapping[str, Any]],
    positive_passed: bool, pictures: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Return the entry of a checkpoint in audit.json."""
    source, target, truth = subject.source, subject.case.target, subject.sealed.truth
    verdict, sentence = checkpoint_verdict(parts, positive_passed=positive_passed, tests=len(SUITE))
    best = best_part(parts)
    return {
        "file": source.name,
        "sha256": source.sha256,
        "id": source.id,
        "captured": source.captured,
        "system": _system(subject),
        "threat": threat(subject).entry,
        "data": {
            "name": source.flags.get("data_name"),
            "chosen": source.chosen,
            "images": target.batch_size,
            "decoys": 0 if truth.decoys is None else truth.decoys.shape[1],
        },
        "protection": _protection(subject),
        "labels": labels.entry,
        "verdict": verdict,
        "sentence": sentence,
        "worst_image": None if best is None else best["worst_image"],
        "identified": sorted({image for part in parts for image in part["identified"]}),
        "batch_size": target.batch_size,
        "parts": list(parts),
        "pictures": dict(pictures),
    }


def threat(subject: Subject) -> ThreatModel:
    """Tell what the attacker of all parts together has."""
    attack = matching_settings(subject.case.target, FEWEST_ITERATIONS, 0)
    method = "matching" if "layerwise" in subject.refused else "auto"
    settings = replace(subject.settings, attack=replace(attack, method=method))
    return threat_model(subject.case, settings)


def _system(subject: Subject) -> dict[str, Any]:
    """Describe the network and the batch."""
    target, model = subject.case.target, subject.case.objective.model
    return {
        "arch": target.network,
        "parameters": sum(p.numel() for p in trainable_parameters(model).values()),
        "image_shape": list(target.image_shape),
        "num_classes": target.num_classes,
        "batch_size": target.batch_size,
        "train_mode": target.train_mode,
        "loss": target.loss_kind,
        "round": None,
    }


def _protection(subject: Subject) -> dict[str, Any] | None:
    """Describe what the client says that it did to the gradient, and what follows for its message.

    Nothing follows where it sent batch statistics beside the gradient, which are not protected.
    """
    protection, withheld = subject.case.target.protection, subject.case.withheld
    covered = not subject.case.uploads_bn
    if protection is None:
        if "protection" not in withheld:
            return None
        names = ("epsilon", "delta", "mu", "unit", "bound")
        return {"mode": "withheld", "text": withheld["protection"], **dict.fromkeys(names)}
    return {
        "mode": protection.mode,
        "text": "; ".join(subject.case.guarantee),
        "epsilon": protection.epsilon if covered else None,
        "delta": protection.delta if covered else None,
        "mu": protection.mu if covered else None,
        "unit": "one image more or less",
        "bound": _bound(subject),
    }


def _bound(subject: Subject) -> dict[str, float] | None:
    """Return with what probability any attacker names an image; None where nothing bounds it.

    Of CANDIDATES equally likely images, from one such gradient.
    """
    protection, kappa = subject.case.target.protection, 1 / CANDIDATES
    if protection is None or protection.mu is None or subject.case.uploads_bn:
        return None
    return {"kappa": kappa, "gamma": reconstruction_bound(kappa, protection.mu)}


def checkpoint_warnings(
    subject: Subject, parts: Sequence[Mapping[str, Any]], labels: LabelFinding
) -> list[tuple[str, str]]:
    """Return what weakens the verdict on a checkpoint: pairs of a code and a sentence."""
    case, truth, target = subject.case, subject.sealed.truth, subject.case.target
    found = []
    if target.batch_size < FEW_IMAGES:
        found.append(
            ("few-images", f"only {target.batch_size} images: the intervals are too narrow")
        )
    if case.uploads_bn:
        found.append(("bn-unprotected", "the BatchNorm statistics are sent without protection"))
    if uses_learned_statistics(case.objective.model, target.train_mode):
        found.append(
            ("running-statistics", "running statistics in the weights may hold private images")
        )
    if truth.decoys is None:
        found.append(("no-decoys", "there are no decoys, so nothing can be tested"))
    if subject.source.flags.get("data_name") == "photos":
        found.append(
            ("decoys-are-crops", "the decoys are crops of other photographs: a demonstration only")
        )
    if labels.known:
        found.append(("labels-given", "the attacks were given the labels"))
    for part in parts:
        found += _part_warnings(part)
    return found


def _part_warnings(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what weakens a part."""
    name = part["name"]
    if part["status"] == "refused":
        return [("part-refused", f"{name} cannot be run on this network: {part['reason']}")]
    if part["limited"]:
        so = "more may be found" if part["verdict"] in LEAKAGE else "it is no evidence of safety"
        return [("optimiser-limited", f"{name} did not get enough time: {so}")]
    if part["status"] != "done":
        if part["reason"].startswith(ALREADY_SHOWN):
            return []
        return [("part-missing", f"{name} was not done: {part['reason']}")]
    if part["verdict"] == INCOMPLETE:
        return [("part-incomplete", f"{name}: {part['sentence'].removeprefix('incomplete: ')}")]
    stuck = part["method"] == "matching" and part["arrived"] is False
    if stuck and part["verdict"] not in LEAKAGE:
        return [("optimiser-limited", f"{name} did not arrive; a better optimiser may find more")]
    return []


def summary(entry: Mapping[str, Any]) -> str:
    """Return the table of all parts of a checkpoint, its verdict and its worst image."""
    rows = []
    for part in entry["parts"]:
        mean = part["mean"] or {}
        p = part["p_corrected"]
        rows.append(
            [
                part["name"], part["verdict"] or part["status"], "" if p is None else p,
                decibels(mean["psnr"]) if mean else "", mean.get("ssim", ""),
                f"{len(part['identified'])} of {entry['batch_size']}" if mean else "",
                part["iterations"], duration(part["seconds"] + part["control_seconds"]),
            ]
        )  # fmt: skip
    header = ["part", "verdict", "p corrected", "PSNR", "SSIM", "identified", "iterations", "time"]
    return f"{table(header, rows)}\n{entry['file']}: {entry['sentence']}"


# The whole ---------------------------------------------------------------------------------


def audit_entry(
    frame: Mapping[str, Any], positive: Positive, checkpoints: Sequence[Mapping[str, Any]],
    warnings: Sequence[Sequence[tuple[str, str]]], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    """Return audit.json.

    frame: what was known before the first part. warnings: of every checkpoint.
    """
    verdict, sentence = audit_verdict(checkpoints)
    said = [] if positive.passed else [("positive-control-failed", _failed(positive))]
    for entry, of_one in zip(checkpoints, warnings, strict=True):
        prefix = f"{entry['file']}: " if len(checkpoints) > 1 else ""
        said += [(code, prefix + text) for code, text in of_one]
    return {
        **frame,
        "seconds": seconds,
        "verdict": verdict,
        "sentence": sentence,
        "warnings": [{"code": code, "text": text} for code, text in said],
        "positive_control": positive.entry,
        "checkpoints": list(checkpoints),
    }


def _failed(positive: Positive) -> str:
    return (
        f"the positive control failed ({positive.what}): this budget is too short for an attack "
        "that finds nothing to show anything"
    )


# Pictures ----------------------------------------------------------------------------------


def save_pictures(subject: Subject, done: Done, folder: Path, number: int) -> dict[str, str]:
    """Write the worst image beside its controls, and all pairs; return the files' names.

    done: the part that found most.
    """
    scores, images = done.scores, done.images
    if scores is None or images is None:
        return {}
    true = subject.sealed.colours
    paired = images[[image["reconstruction"] for image in scores["images"]]]
    captions = [f"{i['true']}: {decibels(i['psnr'])}" for i in scores["images"]]
    names = {"worst": f"worst-{number}.png", "pairs": f"pairs-{number}.png"}
    worst = scores["verdict"]["worst_image"]
    save_panels(
        [("truth", true), ("reconstruction", paired)], folder / names["pairs"], captions, worst
    )
    if worst is None:
        return {"pairs": names["pairs"]}
    shown, titles = [true[worst], paired[worst]], ["truth", "reconstruction"]
    if best := best_control(scores, worst):
        shown.append(_control_image(done, best, worst))
        titles.append(best)
    save_panels([(f"image {worst}", torch.stack(shown))], folder / names["worst"], titles)
    return names


def best_control(scores: Mapping[str, Any], image: int) -> str | None:
    """Return the control that comes nearest to an image, by the deciding metric."""
    metric = scores["verdict"]["metric"]
    sign = -1 if metric in LOWER_IS_BETTER else 1

    def value(name: str) -> float:
        score = scores["controls"][name]["images"][metric][image]
        return float("inf") if score is None else sign * score

    return max(scores["controls"] or {}, key=value, default=None)


def _control_image(done: Done, name: str, image: int) -> Tensor:
    """Return the image (C, H, W) of a control that is paired with a true one."""
    assert done.scores is not None  # it has controls
    pairing = done.scores["controls"][name]["reconstruction"]
    return done.controls[name][pairing[image]]
