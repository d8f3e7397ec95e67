"""How often the verdict says "leakage" where there is none, over simulated cases.

    python -m benchmarks.calibration --csv FILE

A case is a batch of B images, 99 decoys per image, and a control on other images' gradient. Every
image, true or decoy, resembles every reconstruction by chance: a part of the image, as some are
easier to resemble than others, a part of the reconstruction, and the rest of the pair alone; all
three metrics share most of each part. What is judged is what `run.py` judges.
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

#: Images per batch, cases per size, decoys per image.
SIZES, CASES, DECOYS = (1, 2, 4, 8, 16), 2000, 99
#: Draws from the null distribution per case; run.py takes ten times as many.
DRAWS = 999
#: Metrics with their mean and spread, and the share of their variance that they have in common.
METRICS = {"psnr": (11.0, 2.0), "ssim": (0.15, 0.06), "lpips": (0.6, 0.1)}
COMMON = 0.7


@dataclass(frozen=True)
class Case:
    """scores, control: metric → (B,). similar, other: metric → (B, N), the true image first."""

    scores: dict[str, np.ndarray]
    control: dict[str, np.ndarray]
    similar: dict[str, np.ndarray]
    other: dict[str, np.ndarray]


def null_case(draw: np.random.Generator, batch_size: int) -> Case:
    """A case in which no reconstruction holds anything of its true image."""
    shape = (batch_size, 1 + DECOYS)
    parts = {name: {} for name in ("similar", "other")}
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


def _parts(draw, shape) -> dict[str, np.ndarray]:
    """Standard normal values of the attack and of its control, which share the candidates' part."""
    candidates = draw.normal(size=shape)
    return {
        which: 0.5 * candidates
        + 0.5 * draw.normal(size=(shape[0], 1))
        + math.sqrt(0.5) * draw.normal(size=shape)
        for which in ("similar", "other")
    }


def judged(case: Case, seed: int, metric: str = "ssim") -> str:
    """The verdict on a case."""
    ranks = identify(case.similar[metric], draws=DRAWS, seed=seed)
    paired = None
    if len(case.scores[metric]) >= FEWEST_PAIRS:  # it counts from there on
        paired = paired_difference(case.similar[metric], case.other[metric], draws=DRAWS, seed=seed)
    if evidence_against_chance(ranks, paired)[0] > ALPHA:
        return NOT_SHOWN  # whatever the differences are: they need no intervals
    return judge(leakage(case.scores, [case.control]), ranks, paired, metric=metric).verdict


def false_alarms(batch_size: int, seed: int = 0, cases: int = CASES) -> dict[str, float]:
    """Share of cases without information that have each verdict, and of false "leakage"."""
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
