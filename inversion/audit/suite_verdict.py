"""What follows from the parts of an audit, for a checkpoint and for all; plain data in and out.

`parts` are the entries `parts` of audit.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from inversion.audit.verdict import (
    IDENTIFIABLE,
    INCOMPLETE,
    NOT_SHOWN,
    RECONSTRUCTION,
    STRENGTH,
)

#: Verdicts that stand however the rest of an audit ends.
LEAKAGE = (RECONSTRUCTION, IDENTIFIABLE)
#: Why a later part was left out without weakening the verdict.
ALREADY_SHOWN = "already shown"
LIMITS = "a statement about these attacks within this time, not about all attacks"


def strongest(verdicts: Sequence[str]) -> str:
    """Return the verdict that counts among several; incomplete without one."""
    return min(verdicts, key=STRENGTH.index, default=INCOMPLETE)


def best_part(parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the part that found most: the strongest verdict, then the highest leakage."""
    scored = [part for part in parts if part["verdict"] is not None]

    def strength(part: Mapping[str, Any]) -> tuple[int, float]:
        of_metric = (part["leakage"] or {}).get(part["metric"]) or {"mean": float("-inf")}
        return -STRENGTH.index(part["verdict"]), of_metric["mean"]

    return max(scored, key=strength, default=None)


def gaps(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why these parts do not show that nothing leaks, a reason each; none where they do.

    A part that the network refuses could not be run by anybody and is no gap. One that its time
    limited is none where a later part of the same method found nothing without that limit.
    """
    found = []
    if not any(map(_is_evidence, parts)):
        found.append("no attack ended with a verdict of its own")
    for place, part in enumerate(parts, start=1):
        whole = {later["method"] for later in parts[place:] if _is_evidence(later)}
        if part["status"] == "refused" or _is_evidence(part):
            continue
        if part["status"] in ("skipped", "interrupted"):
            found.append(f"{part['name']} was not done: {part['reason']}")
        elif not (part["limited"] and part["method"] in whole):
            found.append(f"{part['name']}: {part['sentence'].removeprefix(f'{INCOMPLETE}: ')}")
    return found


def _is_evidence(part: Mapping[str, Any]) -> bool:
    """Tell whether a part by itself says that nothing leaks."""
    return part["status"] == "done" and part["verdict"] == NOT_SHOWN


def checkpoint_verdict(
    parts: Sequence[Mapping[str, Any]], *, positive_passed: bool, tests: int
) -> tuple[str, str]:
    """Return the verdict of a checkpoint and its sentence.

    The strongest of the parts counts; each has been corrected for `tests` attacks. Nothing is
    called "no leakage shown" where the positive control failed or a part is missing (`gaps`).
    """
    best = best_part(parts)
    if best is not None and best["verdict"] in LEAKAGE:
        words = best["sentence"].removeprefix(f"{best['verdict']}: ")
        return best["verdict"], f"{best['verdict']}: by {best['name']}: {words}"
    reasons = gaps(parts)
    if not positive_passed:
        reasons.insert(
            0, "the positive control failed, so an attack that finds nothing shows nothing"
        )
    if reasons:
        return INCOMPLETE, f"{INCOMPLETE}: {'; '.join(reasons)}"
    done = [part["name"] for part in parts if _is_evidence(part)]
    refused = [part["name"] for part in parts if part["status"] == "refused"]
    least = min(part["p_corrected"] for part in parts if part["p_corrected"] is not None)
    words = f"{' and '.join(done)} found nothing (p = {least:.2g}, corrected for {tests} attacks)"
    if refused:
        words += f"; {' and '.join(refused)} cannot be run on this network"
    if any(part["arrived"] is False for part in parts if _is_evidence(part)):
        words += "; an optimiser did not arrive, so a better one may find more"
    return NOT_SHOWN, f"{NOT_SHOWN}: {words}; {LIMITS}"


def audit_verdict(checkpoints: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the verdict over all checkpoints, the strongest of theirs, and its sentence."""
    verdict = strongest([of["verdict"] for of in checkpoints])
    if len(checkpoints) == 1:
        return verdict, checkpoints[0]["sentence"]
    those = [of for of in checkpoints if of["verdict"] == verdict]
    count = f"{len(those)} of {len(checkpoints)} checkpoints"
    first = f"{those[0]['file']}: {those[0]['sentence'].removeprefix(f'{verdict}: ')}"
    return verdict, f"{verdict}: {count}, each tested by itself; {first}"
