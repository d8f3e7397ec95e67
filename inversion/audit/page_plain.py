"""Says in plain sentences what an audit found, and how much each of its warnings weighs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from inversion.audit.verdict import IDENTIFIABLE, INCOMPLETE, NOT_SHOWN, RECONSTRUCTION

#: The code of warnings about an attack that had too little time, or did not reach its aim.
LIMITED = "optimiser-limited"
#: What no single image shows is told by the verdict: what the images show together.
TOGETHER = {
    RECONSTRUCTION: "The update shows in the rebuilt images on average",
    IDENTIFIABLE: "The update influences the images measurably",
}


def plain_sentence(checkpoint: Mapping, *, several: bool) -> str:
    """Return what was found in an update, for the first screen: counts of images, no statistics.

    checkpoint: of `page_view.audit_view`. several: whether the audit has other updates, so that the
    sentence names this one.
    """
    start = f"Update {checkpoint['number']}: " if several else ""
    verdict = checkpoint["verdict"]
    if checkpoint["decisive"] is None or verdict not in (*TOGETHER, NOT_SHOWN):
        return start + "Whether its images leak was not settled; the line below says why."
    found, count = checkpoint["identified"], checkpoint["batch_size"]
    decoys = checkpoint["data"]["decoys"]
    others = f"among {decoys + 1} candidates each" if decoys else "among other images"
    worst = _worst_words(checkpoint, "the nearest" if verdict == NOT_SHOWN else "the worst")
    if found:
        of = "" if count is None else f" of {count}"
        images = f"test image{'' if (count or len(found)) == 1 else 's'}"
        were = "was" if len(found) == 1 else "were"
        return f"{start}{len(found)}{of} {images} {were} singled out {others}{worst}."
    if verdict in TOGETHER:
        return f"{start}{TOGETHER[verdict]}, but no single image was singled out {others}{worst}."
    return f"{start}No test image was singled out {others}{worst}."


def _worst_words(checkpoint: Mapping, word: str) -> str:
    image = checkpoint["worst_image"]
    if image is None:
        return ""
    return f"; {word} is image {image}" + (", shown here" if checkpoint["picture"] else "")


def told_warnings(found: Sequence[Mapping], checkpoints: Sequence[Mapping]) -> list[dict[str, Any]]:
    """Return every warning once, with `minor` and `rests`.

    found: with `code` and `text`. minor: whether the verdict rests on attacks that the warning does
    not concern; rests: their names, else empty.
    """
    told: list[dict[str, Any]] = []
    for warning in found:
        rests = _rests_on(warning, checkpoints)
        entry = {**warning, "minor": bool(rests), "rests": rests}
        if entry not in told:
            told.append(entry)
    return told


def _rests_on(warning: Mapping, checkpoints: Sequence[Mapping]) -> list[str]:
    """Name the attacks that carry the verdict where the warning limits another one."""
    text = warning["text"] or ""
    if warning["code"] != LIMITED:
        return []
    for checkpoint in checkpoints:
        prefix = f"{checkpoint['file']}: " if len(checkpoints) > 1 else ""
        named = [
            part for part in checkpoint["parts"]
            if re.match(re.escape(f"{prefix}{part['name']} did not "), text)
        ]  # fmt: skip
        if named and checkpoint["verdict"] != INCOMPLETE:
            return _carrying(checkpoint, named[0])
    return []


def _carrying(checkpoint: Mapping, limited: Mapping) -> list[str]:
    """Name what a verdict rests on; nothing where it is the limited attack itself.

    Leakage rests on the attack that found it; that nothing was found rests on all attacks that
    ended so, and that their time did not limit.
    """
    if checkpoint["verdict"] == NOT_SHOWN:
        carrying = [
            part for part in checkpoint["parts"]
            if part["status"] == "done" and part["verdict"] == NOT_SHOWN and not part["limited"]
        ]  # fmt: skip
    else:
        carrying = [checkpoint["decisive"]] if checkpoint["decisive"] else []
    if any(part is limited for part in carrying):
        return []
    return [part["name"] for part in carrying if part["name"]]
