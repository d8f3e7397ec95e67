"""Makes of an audit's dict what the report's template shows, with every field and in words."""

import base64
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from inversion.audit.page_plain import plain_sentence, told_warnings
from inversion.audit.page_words import MEANINGS, TRACES, Meaning
from inversion.audit.verdict import (
    CLEAR_DIFFERENCE,
    IDENTIFIABLE,
    INCOMPLETE,
    STRENGTH,
)

NOT_KNOWN = "not recorded"
SYSTEM = dict.fromkeys(
    (
        "arch",
        "parameters",
        "image_shape",
        "num_classes",
        "batch_size",
        "train_mode",
        "loss",
        "round",
    )
)
PROTECTION = dict.fromkeys(("mode", "text", "epsilon", "delta", "mu", "unit", "bound"))
THREAT = dict.fromkeys(("letter", "name", "reason", "rows"))
LABELS = dict.fromkeys(("known", "accuracy", "method", "chance"))
DATA = dict.fromkeys(("name", "chosen", "images", "decoys"))
CONTROL = dict.fromkeys(("passed", "what", "verdict", "leakage", "seconds"))
PART = dict.fromkeys(
    ("name", "status", "reason", "seconds", "control_seconds", "budget_seconds", "verdict",
     "sentence", "metric", "p", "smallest_p", "p_corrected", "arrived", "iterations", "leakage",
     "mean", "controls", "limited", "identified", "ranks", "worst_image", "deepest_layer",
     "certified")
)  # fmt: skip
LEAKAGE = dict.fromkeys(("mean", "low", "high", "images"))
CHECKPOINT = dict.fromkeys(
    ("file", "sha256", "id", "captured", "system", "threat", "data", "protection", "labels",
     "verdict", "sentence", "worst_image", "identified", "batch_size", "parts", "pictures")
)  # fmt: skip
AUDIT = dict.fromkeys(
    ("format", "created", "command", "versions", "git", "budget_seconds", "seconds", "verdict",
     "sentence", "warnings", "positive_control", "checkpoints")
)  # fmt: skip
#: The first bytes of a picture → its type.
PICTURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


def audit_view(audit: Mapping, folder: Path, *, with_images: bool) -> dict[str, Any]:
    """Return the audit with every field of audit.json, None where it holds none, and more.

    Added are to a part `short` (its name in the chart), `likeness` (metrics) and `news` (a sentence
    that was not told yet, or None); to a checkpoint `news`, `meaning`, `number` (from 1),
    `decisive` (the part that its verdict rests on, or None), `metric`, `highest` (image, value),
    `mean_leakage` and `picture` (a data URI, or None); to the audit `meaning`, `number_of_images`,
    `shown` (the checkpoint whose worst image comes first) and `plain` (a sentence about it, or
    None); to a warning `minor` and `rests`, as in `told_warnings`.
    folder: where the files of `pictures` lie.
    """
    view = {**AUDIT, **audit}
    warnings = [{"code": None, "text": None, **w} for w in view["warnings"] or []]
    if view["positive_control"] is not None:
        control = {**CONTROL, **view["positive_control"]}
        view["positive_control"] = control | {"leakage": _leakage_view(control["leakage"])}
    view["checkpoints"] = [
        _checkpoint_view(found, folder, with_images=with_images)
        for found in view["checkpoints"] or []
    ]
    view["verdict"] = view["verdict"] or INCOMPLETE
    view["warnings"] = told_warnings(warnings, view["checkpoints"])
    for number, checkpoint in enumerate(view["checkpoints"], start=1):
        checkpoint["number"] = number
        checkpoint["news"] = news(checkpoint, view["sentence"])
    view["shown"] = min(view["checkpoints"], key=_strength, default=None)
    shown = view["shown"]
    view["plain"] = shown and plain_sentence(shown, several=len(view["checkpoints"]) > 1)
    named = any(c["identified"] for c in view["checkpoints"] if c["verdict"] == view["verdict"])
    view["meaning"] = meaning_of(view["verdict"], named=named)
    view["number_of_images"] = sum(c["batch_size"] or 0 for c in view["checkpoints"])
    return view


def meaning_of(verdict: str, *, named: bool) -> Meaning:
    """Return the meaning of a verdict; a verdict that is not known means what "incomplete" does.

    named: whether an image was identified by itself.
    """
    if verdict == IDENTIFIABLE and not named:
        return TRACES
    return MEANINGS.get(verdict, MEANINGS[INCOMPLETE])


def _checkpoint_view(found: Mapping, folder: Path, *, with_images: bool) -> dict[str, Any]:
    view = {**CHECKPOINT, **found}
    for name, fields in {"system": SYSTEM, "data": DATA, "labels": LABELS}.items():
        view[name] = {**fields, **(view[name] or {})}
    if view["protection"] is not None:
        protection = {**PROTECTION, **view["protection"]}
        bound = {"kappa": None, "gamma": None, **(protection["bound"] or {})}
        view["protection"] = protection | {"bound": bound}
    if view["threat"] is not None:
        threat = {**THREAT, **view["threat"]}
        view["threat"] = threat | {"rows": threat["rows"] or []}
    view["parts"] = [_part_view(part, i) for i, part in enumerate(view["parts"] or [])]
    view["identified"] = view["identified"] or []
    view["verdict"] = view["verdict"] or INCOMPLETE
    view["meaning"] = meaning_of(view["verdict"], named=bool(view["identified"]))
    for part in view["parts"]:
        part["news"] = news(part, f"{view['sentence']} {part['reason']}")
    view["decisive"] = decisive_part(view["parts"], view["verdict"])
    view |= _figures(view["decisive"])
    picture = (view["pictures"] or {}).get("worst")
    view["picture"] = data_uri(folder, picture) if with_images and picture else None
    return view


def _part_view(found: Mapping, index: int) -> dict[str, Any]:
    view = {**PART, **found, "short": short_name(index)}
    view["identified"] = view["identified"] or []
    view["leakage"] = _leakage_view(view["leakage"])
    view["likeness"] = _likeness(view)
    return view


def _leakage_view(found: Mapping | None) -> dict[str, dict[str, Any]]:
    """Give every metric all its fields, and leave out those without any."""
    return {
        name: {**LEAKAGE, **figures, "images": figures.get("images") or []}
        for name, figures in (found or {}).items()
        if figures is not None
    }


def news(found: Mapping, told: str | None) -> str | None:
    """Return the sentence of a part or checkpoint unless what was told already holds it."""
    sentence = found["sentence"]
    if not sentence:
        return None
    return None if sentence.removeprefix(f"{found['verdict']}: ") in (told or "") else sentence


def short_name(index: int) -> str:
    """Name a part for the chart's legend by its letter in the table of parts."""
    return f"attack {chr(ord('A') + index)}"


def decisive_part(parts: Sequence[Mapping], verdict: str) -> Mapping | None:
    """Return the part that the verdict rests on: of those with this verdict, the most leakage.

    Where no part has this verdict, all count; None where no part has figures.
    """
    measured = [part for part in parts if metric_of(part) is not None]

    def strength(part: Mapping) -> tuple[bool, float]:
        return part["verdict"] == verdict, part["leakage"][metric_of(part)]["mean"]

    return max(measured, key=strength, default=None)


def metric_of(part: Mapping | None) -> str | None:
    """Return the metric that the report draws: the deciding one, else SSIM or PSNR; else None."""
    if part is None:
        return None
    for name in (part["metric"], "ssim", "psnr"):
        if (
            name in CLEAR_DIFFERENCE
            and finite(part["leakage"].get(name, LEAKAGE)["mean"]) is not None
        ):
            return name
    return None


def _figures(part: Mapping | None) -> dict[str, Any]:
    metric = metric_of(part)
    if part is None or metric is None:
        return {"metric": None, "highest": None, "mean_leakage": None}
    found = part["leakage"][metric]
    values = [(value, i) for i, v in enumerate(found["images"]) if (value := finite(v)) is not None]
    value, image = max(values, default=(None, None))
    highest = None if image is None else {"image": image, "value": value}
    return {"metric": metric, "highest": highest, "mean_leakage": found}


def _likeness(part: Mapping) -> list[str]:
    """Name the metrics in which a part tells how alike images are, to compare with its controls.

    A metric that no control has a value in is left out; without controls, the attack's own are all.
    """
    own = part["mean"] or {}
    rows = [found for found in (part["controls"] or {}).values() if found] or [own]
    return [name for name in own or rows[-1] if any(finite(r.get(name)) is not None for r in rows)]


def _strength(checkpoint: Mapping) -> tuple:
    """Order checkpoints: the gravest verdict first, then the image that leaks most."""
    verdict = checkpoint["verdict"]
    place = STRENGTH.index(verdict) if verdict in STRENGTH else len(STRENGTH)
    highest = checkpoint["highest"]
    return place, 0.0 if highest is None else -highest["value"]


def data_uri(folder: Path, name: str) -> str | None:
    """Return a picture of the folder as a data URI; None if it is not a picture in this folder."""
    path = folder / name
    if path.name != name or not path.is_file():
        return None
    content = path.read_bytes()
    for start, kind in PICTURES.items():
        if content.startswith(start):
            return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return None


# Formats ----------------------------------------------------------------------------------------


def finite(value: float | None) -> float | None:
    """Return the value, None if it is none or not finite."""
    return value if value is not None and math.isfinite(value) else None


def leakage_text(value: float | None, metric: str, *, unit: bool = True) -> str:
    """Write a difference to the controls with its sign, and its unit where that is asked for."""
    if finite(value) is None:
        return "n/a"
    if metric == "psnr":
        return f"{value:+.2f}" + (" dB" if unit else "")
    return f"{value:+.3f}"


def interval_text(found: Mapping | None, metric: str) -> str:
    """Write the 95 % interval of a mean; empty where it has none."""
    if found is None or finite(found.get("low")) is None or finite(found.get("high")) is None:
        return ""
    unit = " dB" if metric == "psnr" else ""
    digits = "+.2f" if metric == "psnr" else "+.3f"
    return f"{found['low']:{digits}} to {found['high']:{digits}}{unit}"


def quality_text(value: float | None, metric: str) -> str:
    """Write how alike images are in one metric, without its unit."""
    if finite(value) is None:
        return "n/a"
    return format(value, {"psnr": ".2f", "ssim": ".3f"}.get(metric, ".3g"))


def probability_text(value: float | None) -> str:
    """Write a probability with two digits."""
    return "n/a" if finite(value) is None else f"{value:.2g}"


def number_text(value: float | None) -> str:
    """Write a number: whole ones with commas, others with four digits."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return NOT_KNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def time_text(seconds: float | None) -> str:
    """Write seconds as s, min and s, or h and min."""
    if finite(seconds) is None:
        return NOT_KNOWN
    assert seconds is not None  # finite says so
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{rest} s" if seconds >= 10 or rest == seconds else f"{seconds:.1f} s"


def moment_text(text: str | None) -> str:
    """Write an ISO 8601 time without its fractions; other texts as they are."""
    if not text:
        return NOT_KNOWN
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = moment.strftime("%Z")
    return f"{moment:%Y-%m-%d %H:%M} {zone}".strip()


def sentences(text: str | Sequence[str] | None) -> list[str]:
    """Return one or several sentences as a list of them, each with a capital and a full stop."""
    found = [text] if isinstance(text, str) else list(text or [])
    parts = [part.strip() for one in found for part in re.split(r";\s+", one)]
    return [
        part[:1].upper() + part[1:] + ("" if part[-1] in ".!?" else ".") for part in parts if part
    ]


def image_list(images: Sequence[int] | None) -> str:
    """Write the numbers of images; "none" for an empty list."""
    return ", ".join(map(str, images or [])) or "none"
