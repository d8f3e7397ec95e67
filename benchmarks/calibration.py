"""Measures how often the verdict is "leakage" where there is none, over simulated cases.

    python -m benchmarks.calibration --csv FILE

A case is a batch of B images, 99 decoys per image, and a control on other images' gradient. Every
image, true or decoy, resembles every reconstruction by chance. A similarity is the sum of three
random parts: one of the image (some are easier to resemble than others), one of the reconstruction,
and one of the pair. The three metrics share most of each part. The verdict is computed by the
functions that `run.py` uses.
"""

import argparse
import math
from dataclasses import dataclass

import numpy as np

from inversion.audit.identification import identify, paired_difference
from inversion.audit.scoring import leakage
from inversion.audit.verdict import (
    ALPHA,
    FEWEST_PAIRS,
    IDENTIFIABLE,
    NOT_SHOWN,
    RECONSTRUCTION,
    evidence_against_chance,
    judge,
)
from utils.console import table
from utils.files import write_csv

#: Images per batch.
SIZES = (1, 2, 4, 8, 16)
#: Cases per batch size.
CASES = 2000
#: Decoys per image.
DECOYS = 99
#: Draws from the null distribution per case; run.py takes ten times as many.
DRAWS = 999
#: Metrics with their mean and spread, and the share of their variance that they have in common.
METRICS = {"psnr": (11.0, 2.0), "ssim": (0.15, 0.06), "lpips": (0.6, 0.1)}
COMMON = 0.7


@dataclass(frozen=True)
class Case:
    """The scores of one simulated attack and of its control, by the name of the metric."""

    #: Scores of the attack: (B,).
    scores: dict[str, np.ndarray]
    #: Scores of the control with other images' gradient: (B,).
    control: dict[str, np.ndarray]
    #: Similarity of the attack's images to every candidate, the true image first: (B, 1 + DECOYS).
    similar: dict[str, np.ndarray]
    #: The same for the control's images.
    other: dict[str, np.ndarray]


def null_case(draw: np.random.Generator, batch_size: int) -> Case:
    """Draw a case in which no reconstruction contains anything of its true image."""
    shape = (batch_size, 1 + DECOYS)
    parts: dict[str, dict[str, np.ndarray]] = {"similar": {}, "other": {}}
    common = _parts(draw, shape)
    own = {name: _parts(draw, shape) for name in METRICS}
    for name, (mean, spread) in METRICS.items():
        sign = -1 if name == "lpips" else 1
        for which in parts:
            value = math.sqrt(COMMON) * common[which] + math.sqrt(1 - COMMON) * own[name][which]
            parts[which][name] = sign * mean + spread * value
    scores, control = (
        {name: (-1 if name == "lpips" else 1) * values[:, 0] for name, values in of.items()}
        for of in parts.values()
    )
    return Case(scores, control, parts["similar"], parts["other"])


def _parts(draw: np.random.Generator, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Draw standard normal similarities of the attack and the control: (B, 1 + DECOYS) each.

    Both share the part of the candidates.
    """
    candidates = draw.normal(size=shape)
    return {
        which: 0.5 * candidates
        + 0.5 * draw.normal(size=(shape[0], 1))
        + math.sqrt(0.5) * draw.normal(size=shape)
        for which in ("similar", "other")
    }


def judged(case: Case, seed: int, metric: str = "ssim") -> str:
    """Return the verdict on a case, decided by `metric`."""
    ranks = identify(case.similar[metric], draws=DRAWS, seed=seed)
    paired = None
    if len(case.scores[metric]) >= FEWEST_PAIRS:  # with fewer pairs the verdict does not use it
        paired = paired_difference(case.similar[metric], case.other[metric], draws=DRAWS, seed=seed)
    p, _ = evidence_against_chance(ranks, paired)
    if p is None or p > ALPHA:
        return NOT_SHOWN  # for any differences, so that they need no intervals
    return judge(leakage(case.scores, [case.control]), ranks, paired, metric=metric).verdict


def false_alarms(batch_size: int, seed: int = 0, cases: int = CASES) -> dict[str, float]:
    """Return the share of each verdict, and of a false "leakage", in cases without information."""
    verdicts = [
        judged(null_case(np.random.default_rng([seed, batch_size, k]), batch_size), seed=k)
        for k in range(cases)
    ]
    shares = {v: verdicts.count(v) / cases for v in (NOT_SHOWN, IDENTIFIABLE, RECONSTRUCTION)}
    return {"false leakage": 1 - shares[NOT_SHOWN], **shares}


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="sets of cases per batch size")
    parser.add_argument("--csv", help="file for the raw rows")
    args = parser.parse_args()
    rows = []
    for batch_size in SIZES:
        for seed in range(args.seeds):
            found = false_alarms(batch_size, seed)
            rows.append([batch_size, DECOYS, seed, CASES, *found.values()])
    header = ["images", "decoys per image", "seed", "cases", *found]
    print(table(header, rows))
    if args.csv:
        write_csv(header, rows, args.csv)


if __name__ == "__main__":
    main()
