"""The one sentence that an auditor acts on, and what stands behind it.

Two questions with two answers: does the client's gradient show in the images at all, which a test
answers, and are the images reconstructions, which their distance from everything that can be made
without the gradient answers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inversion.audit.identification import Identification

RECONSTRUCTION = "leakage: reconstruction"
IDENTIFIABLE = "leakage: identifiable"
NOT_SHOWN = "no leakage shown"
INCOMPLETE = "incomplete"

#: Probability of a false "leakage" that is accepted: below 5 %, so that 2,000 simulated cases
#: stay below it too (benchmarks/calibration.py). For a single image at least 24 decoys are needed.
ALPHA = 0.04
#: Share of ALPHA that the paired difference may spend; the ranks have the rest.
PAIRED_SHARE = 0.2
#: Images from which on 2^−B is low enough for that share, and for all of ALPHA.
FEWEST_PAIRS, FEWEST_PAIRS_ALONE = 7, 5
#: Metrics in which leakage is told: name → digits to print.
LEAKAGE_DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3}
#: What a single image, which has no interval, must stand above the controls.
CLEAR_DIFFERENCE = {"psnr": 1.0, "ssim": 0.1, "lpips": 0.05}
#: Bootstrap intervals of fewer images are said to be too narrow.
FEW_IMAGES = 8


@dataclass(frozen=True)
class Verdict:
    """What follows from a scored attack and its controls."""

    #: RECONSTRUCTION, IDENTIFIABLE, NOT_SHOWN or INCOMPLETE.
    verdict: str
    #: The headline: the verdict, its figures, the worst image.
    sentence: str
    #: The metric that decides whether images are reconstructions.
    metric: str
    #: Probability of such evidence were the gradient not in the images; None without a test.
    p: float | None
    #: The lowest `p` that the test could have given.
    smallest_p: float | None
    #: The image that shows the gradient most, by its number in the batch; None without evidence.
    worst_image: int | None
    #: Images that are identified one by one, corrected for their number.
    identified: list[int]


def judge(
    leakage: Mapping[str, Mapping] | None,
    identification: Identification | None,
    paired_p: float | None,
    *,
    metric: str,
    missing: Sequence[str] = (),
    doubt: str | None = None,
    arrived: bool = True,
) -> Verdict:
    """Decide what may be said of an attack.

    leakage: metric → mean, low, high and images of the difference to the best control (of
    `inversion.audit.scoring.leakage`), None without controls. identification: None without decoys.
    paired_p: of `paired_difference`, None without the gradient of other images. metric: the one in
    `leakage` that decides. missing: words for every control that should be there and is not. doubt:
    why an attack that found nothing has shown nothing, None where there is no such reason.
    arrived: whether the attack's objective became as low as it is at the truth.
    """
    p, smallest = evidence_against_chance(identification, paired_p, _count(leakage, identification))
    above = None if leakage is None else leakage[metric]
    worst = _worst(above, identification)
    identified = []
    if identification is not None:
        identified = [i for i, q in enumerate(identification.image_p) if q <= ALPHA]
    test = "no test, for want of decoys" if p is None else f"p = {p:.2g}"
    if missing or above is None:
        verdict = INCOMPLETE
        reasons = list(missing) or ["no control was run"]
        words = f"{'; '.join(reasons)}: without it no verdict"
        if p is not None:
            shows = "shows" if p <= ALPHA else "does not show"
            words += f"; by the test alone the client's gradient {shows} in the images ({test})"
    elif p is not None and p <= ALPHA:
        stands = _stands_above(above, metric)
        verdict = RECONSTRUCTION if stands else IDENTIFIABLE
        shows = f"the client's gradient shows in the images ({test})"
        if stands:
            words = (
                f"{difference(metric, above)} above everything made without the gradient; {shows}; "
                f"worst image {worst}{_standing(worst, identification, above, metric)}"
            )
        else:
            words = (
                f"{shows}; worst image {worst}{_standing(worst, identification, above, metric)}; "
                f"on average no reconstruction: {difference(metric, above)}"
            )
    elif p is None or smallest > ALPHA or doubt is not None:
        verdict = INCOMPLETE
        if p is None:
            words = (
                "no decoys to test with, so nothing follows; capture with training.py "
                f"--with-control to have them ({difference(metric, above)} above the best control)"
            )
        elif smallest > ALPHA:
            words = (
                f"so few decoys and images could not have shown leakage (smallest p {smallest:.2g})"
                f"; {test}; give training.py more --decoys"
            )
        else:
            words = f"nothing was found ({test}), but {doubt}"
    else:
        verdict = NOT_SHOWN
        words = (
            f"{test}, where {smallest:.1g} was the least possible; {difference(metric, above)} "
            f"above the best control; nearest is image {worst}"
            f"{_standing(worst, identification, above, metric)}"
        )
        if not arrived:
            words += "; the attack's optimiser did not arrive, so a better one may find more"
    return Verdict(verdict, f"{verdict}: {words}", metric, p, smallest, worst, identified)


def evidence_against_chance(
    identification: Identification | None, paired_p: float | None, count: int
) -> tuple[float | None, float | None]:
    """The p of the first question and the lowest possible one, from both tests; None without any.

    By Bonferroni's inequality with fixed shares of ALPHA, so that false "leakage" stays below it
    whatever the two have to do with each other. Below FEWEST_PAIRS images the signs of paired
    differences cannot be improbable enough, and the ranks have all of ALPHA.
    """
    if identification is None:
        if paired_p is None or count < FEWEST_PAIRS_ALONE:
            return None, None
        return paired_p, 0.5**count
    if paired_p is None or count < FEWEST_PAIRS:
        return identification.p, identification.smallest_p
    shares = (1 - PAIRED_SHARE, PAIRED_SHARE)
    found, least = (
        min(1.0, *(p / share for p, share in zip(ps, shares, strict=True)))
        for ps in ((identification.p, paired_p), (identification.smallest_p, 0.5**count))
    )
    return found, least


def _count(leakage, identification) -> int:
    if identification is not None:
        return len(identification.ranks)
    return 0 if leakage is None else len(next(iter(leakage.values()))["images"])


def _stands_above(above: Mapping, metric: str) -> bool:
    if math.isnan(above["low"]):  # one image has no interval
        return above["mean"] >= CLEAR_DIFFERENCE[metric]
    return above["low"] > 0


def _worst(above: Mapping | None, identification: Identification | None) -> int | None:
    """The image that is identified most clearly, then the one furthest above the controls."""
    if above is None and identification is None:
        return None
    count = len(above["images"]) if above is not None else len(identification.ranks)

    def standing(i):
        ranked = () if identification is None else (-identification.ranks[i],)
        distance = above["images"][i] if above is not None else identification.deviations[i]
        return (*ranked, distance)

    return max(range(count), key=standing)


def _standing(image: int, identification, above: Mapping, metric: str) -> str:
    digits = f"+.{LEAKAGE_DIGITS[metric]}f"
    text = f"{metric.upper()} {above['images'][image]:{digits}}{_unit(metric)}"
    if identification is not None:
        text = f"rank {identification.ranks[image]} of {identification.candidates}, {text}"
    return f" ({text})"


def _unit(metric: str) -> str:
    return " dB" if metric == "psnr" else ""


def difference(name: str, of: Mapping) -> str:
    """A difference to controls in words: the metric, its mean and interval."""
    digits = f"+.{LEAKAGE_DIGITS[name]}f"
    mean, low, high = (format(of[key], digits) for key in ("mean", "low", "high"))
    text = f"{name.upper()} {mean}{_unit(name)}"
    return text if math.isnan(of["low"]) else f"{text} (95 % interval {low} to {high})"
