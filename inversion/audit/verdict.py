"""The one sentence that an auditor acts on, and what stands behind it.

Two questions with two answers: does the client's gradient show in the images at all, which a test
answers, and are the images reconstructions, which their distance from everything that can be made
without the gradient answers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inversion.audit.identification import Identification, Paired

RECONSTRUCTION = "leakage: reconstruction"
IDENTIFIABLE = "leakage: identifiable"
NOT_SHOWN = "no leakage shown"
INCOMPLETE = "incomplete"
#: From the strongest verdict to the weakest. What is incomplete could have hidden leakage.
STRENGTH = (RECONSTRUCTION, IDENTIFIABLE, INCOMPLETE, NOT_SHOWN)

#: Probability of a false "leakage" that is accepted: below 5 %, so that 2,000 simulated cases
#: stay below it too (benchmarks/calibration.py). For a single image at least 24 decoys are needed.
ALPHA = 0.04
#: Share of ALPHA that the paired difference may spend; the ranks have the rest.
PAIRED_SHARE = 0.2
#: What a sentence says of an attack whose objective is lower at the truth.
NOT_ARRIVED = "the attack's optimiser did not arrive"
#: Images from which on it gets that share; fewer leave all of ALPHA to the ranks.
FEWEST_PAIRS = 7
#: Metrics in which leakage is told: name → digits to print.
LEAKAGE_DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3}
#: What images must stand above the controls on average to be called reconstructions.
CLEAR_DIFFERENCE = {"psnr": 1.0, "ssim": 0.1, "lpips": 0.05}
#: Bootstrap intervals of fewer images are said to be too narrow.
FEW_IMAGES = 8


@dataclass(frozen=True)
class Verdict:
    """Holds what follows from a scored attack and its controls."""

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
    #: Images that are identified one by one, corrected for their number and that of the tests.
    identified: list[int]
    #: Number of attacks for which `p` is corrected before it decides (Bonferroni).
    tests: int = 1


def judge(
    leakage: Mapping[str, Mapping] | None,
    identification: Identification | None,
    paired: Paired | None,
    *,
    metric: str,
    unlike: Sequence[str] = (),
    missing: Sequence[str] = (),
    doubt: str | None = None,
    arrived: bool = True,
    tests: int = 1,
) -> Verdict:
    """Decide what may be said of an attack.

    leakage: metric → mean, low, high and images of the difference to the best control (of
    `inversion.audit.scoring.leakage`), None without controls. identification: None without decoys.
    paired: the difference to the control with other images' gradient, None without one. metric:
    the one in `leakage` that decides. unlike: controls that tell the true images from the decoys
    nearly as clearly as the attack: the decoys are then unlike the true images.
    missing: words for every control that should be there and is not. doubt: why an attack that
    found nothing has shown nothing, None where there is no such reason. arrived: whether the
    attack's objective became as low as it is at the truth. tests: attacks of which the strongest
    verdict counts; every p, that of a single image too, is multiplied by their number before it
    decides (Bonferroni), and printed so.
    """
    found, least = evidence_against_chance(identification, paired)
    p, smallest = corrected(found, tests), corrected(least, tests)
    above = None if leakage is None else leakage[metric]
    worst = _worst(above, identification)
    shown = p is not None and p <= ALPHA and not unlike
    identified = []
    if shown and identification is not None:
        identified = [i for i, q in enumerate(identification.image_p) if q * tests <= ALPHA]
    test = "no test, for want of decoys" if p is None else f"p = {p:.2g}"
    if p is not None and tests > 1:
        test += f", corrected for {tests} attacks"
    able = smallest is not None and smallest <= ALPHA
    if missing or above is None:
        verdict = INCOMPLETE
        words = f"{'; '.join(missing or ['no control was run'])}: without it no verdict"
        if shown:
            words += f"; by the test alone the client's gradient shows in the images ({test})"
        elif able and p is not None and p > ALPHA:
            words += f"; by the test alone the client's gradient does not show ({test})"
            words += f"; {doubt}" if doubt else ""
    elif shown:
        stands = _stands_above(above, metric)
        verdict = RECONSTRUCTION if stands else IDENTIFIABLE
        shows = f"the client's gradient shows in the images ({test})"
        named = f"worst image {worst}{_standing(worst, identification, above, metric)}"
        if stands:
            words = (
                f"{difference(metric, above)} above everything made without the gradient; {shows}; "
                f"{named}"
            )
        else:
            if _by_pairs_alone(identification, tests):
                named = (
                    "only in the images' differences to those of another gradient, all together: "
                    f"no image stands out among its decoys; nearest is image {worst}"
                    f"{_standing(worst, identification, above, metric)}"
                )
            words = f"{shows}; {named}; on average no reconstruction: {difference(metric, above)}"
    elif p is None:
        verdict = INCOMPLETE
        words = (
            "no decoys to test with, so nothing follows; capture with training.py --with-control "
            f"to have them ({difference(metric, above)} above the best control)"
        )
    elif unlike and p <= ALPHA:
        verdict = INCOMPLETE
        words = (
            f"the decoys are unlike the true images in kind: {', '.join(unlike)}, which knows "
            f"nothing of the client's gradient, tells them apart nearly as well ({test})"
        )
    elif not able:
        verdict = INCOMPLETE
        words = (
            f"so few decoys and images could not have shown leakage (smallest p {smallest:.2g}); "
            f"{test}; give training.py more --decoys"
        )
    elif doubt is not None:
        verdict = INCOMPLETE
        words = f"nothing was found ({test}), but {doubt}"
    else:
        verdict = NOT_SHOWN
        words = (
            f"{test}, where {smallest:.1g} was the least possible; {difference(metric, above)} "
            f"above the best control; nearest is image {worst}"
            f"{_standing(worst, identification, above, metric)}"
        )
        if not arrived:
            words += f"; {NOT_ARRIVED}, so a better one may find more"
    sentence = f"{verdict}: {words}"
    return Verdict(verdict, sentence, metric, found, least, worst, identified, tests)


def _by_pairs_alone(identification: Identification | None, tests: int) -> bool:
    """Tell whether the ranks among decoys, of which the first test is made, show nothing."""
    if identification is None:
        return False
    ranks = corrected(identification.p, tests)
    return ranks is not None and ranks > ALPHA


def corrected(p: float | None, tests: int) -> float | None:
    """Return p times the number of tests, at most 1 (Bonferroni); None without a test."""
    return None if p is None else min(1.0, tests * p)


def evidence_against_chance(
    identification: Identification | None, paired: Paired | None
) -> tuple[float | None, float | None]:
    """Return the p of the first question and the lowest possible one; None for both without decoys.

    From FEWEST_PAIRS images on the paired difference counts as well, by Bonferroni's inequality
    with fixed shares of ALPHA, so that false "leakage" stays below it whatever the two tests have
    to do with each other.
    """
    if identification is None:
        return None, None
    if paired is None or len(paired.images) < FEWEST_PAIRS:
        return identification.p, identification.smallest_p
    assert paired.p is not None  # there are decoys, so there is a test against them
    assert paired.smallest_p is not None
    ranks, pairs = 1 - PAIRED_SHARE, PAIRED_SHARE
    p = min(1.0, identification.p / ranks, paired.p / pairs)
    return p, min(1.0, identification.smallest_p / ranks, paired.smallest_p / pairs)


def _stands_above(above: Mapping, metric: str) -> bool:
    """Tell whether a difference is clear, and, of several images, its interval above 0."""
    interval = math.isnan(above["low"]) or above["low"] > 0  # one image has none
    return interval and above["mean"] >= CLEAR_DIFFERENCE[metric]


def _worst(above: Mapping | None, identification: Identification | None) -> int | None:
    """Choose the image that is identified most clearly, then the one highest above controls."""
    ranks = None if identification is None else [-rank for rank in identification.ranks]
    if above is not None:
        distances = above["images"]
    elif identification is not None:
        distances = identification.deviations
    else:
        return None
    keys = list(zip(ranks or distances, distances, strict=True))
    return max(range(len(keys)), key=keys.__getitem__)


def _standing(
    image: int | None, identification: Identification | None, above: Mapping, metric: str
) -> str:
    assert image is not None  # `above` has images
    digits = f"+.{LEAKAGE_DIGITS[metric]}f"
    text = f"{metric.upper()} {above['images'][image]:{digits}}{_unit(metric)}"
    if identification is not None:
        text = f"rank {identification.ranks[image]} of {identification.candidates}, {text}"
    return f" ({text})"


def _unit(metric: str) -> str:
    return " dB" if metric == "psnr" else ""


def difference(name: str, of: Mapping) -> str:
    """Describe a difference to controls: the metric, its mean and interval."""
    digits = f"+.{LEAKAGE_DIGITS[name]}f"
    mean, low, high = (format(of[key], digits) for key in ("mean", "low", "high"))
    text = f"{name.upper()} {mean}{_unit(name)}"
    return text if math.isnan(of["low"]) else f"{text} (95 % interval {low} to {high})"
