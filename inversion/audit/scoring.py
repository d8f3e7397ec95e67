"""Scores of a reconstruction, of images that need no attack, and of the controls; the verdict."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from inversion.audit.identification import (
    Identification,
    Paired,
    identify,
    nearest_decoys,
    paired_difference,
    similarities,
)
from inversion.audit.verdict import ALPHA, LEAKAGE_DIGITS, judge
from utils import metrics
from utils.matching import assign, label_numbers

#: A control whose p is at most this many times the attack's tells true images from decoys nearly as
#: well, without knowing anything of them: the decoys are then unlike them.
NEARLY_AS_CLEAR = 10
#: Decoys that are recorded for the picture of an image.
SHOWN_DECOYS = 6
#: The control that has the client's settings and other images.
OTHER_GRADIENT = "other gradient"

Metric = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rules:
    """Says how images are paired and scored."""

    #: Pair image by image, not by the best one-to-one assignment within the labels.
    by_index: bool = False
    #: A function of `metrics.SSIMS`.
    ssim: Metric = metrics.ssim
    #: LPIPS, None without its weights.
    lpips: Metric | None = None
    #: The metric that decides the verdict, a name in VERDICT_METRICS.
    verdict_metric: str = "ssim"

    @property
    def metrics(self) -> dict[str, Metric]:
        """Name → function, of the metrics at hand."""
        return {
            **metrics.METRICS, "ssim": self.ssim, **({"lpips": self.lpips} if self.lpips else {})
        }  # fmt: skip


@dataclass(frozen=True)
class Doubts:
    """Holds what weakens a verdict; the fields are those of `verdict.judge`."""

    missing: Sequence[str] = ()
    doubt: str | None = None
    arrived: bool = True
    tests: int = 1


#: Names of all metrics, in the order of the tables.
NAMES = [*metrics.METRICS, "lpips"]


@dataclass(frozen=True)
class _Batch:
    """Holds a batch, and pairs and scores images against it by one set of rules."""

    true: Tensor
    y_true: Tensor
    y_found: Tensor
    rules: Rules

    def pairing(self, images: Tensor) -> list[int]:
        """For each true image the index of its reconstruction."""
        if self.rules.by_index:
            return list(range(len(self.true)))
        return assign(images, self.true, self.y_found, self.y_true)

    def score(self, images: Tensor) -> metrics.Scores:
        """Score images that are paired already."""
        return metrics.score(images, self.true, self.rules.metrics)

    def similar(self, metric: str, images: Tensor, decoys: Tensor) -> np.ndarray:
        """Similarities of true images and decoys to `images`, by that metric: (B, N)."""
        likeness = _likeness(metric, self.rules.metrics[metric])
        true = (self.true * 255).round() / 255  # as decoys are stored: rounding tells none apart
        return similarities(
            likeness, images, self.y_found, true, self.y_true, decoys, by_index=self.rules.by_index
        )


def score_images(
    found: Tensor,
    true: Tensor,
    y_found: Tensor,
    y_true: Tensor,
    rules: Rules = Rules(),
    *,
    controls: Mapping[str, Tensor] | None = None,
    decoys: Tensor | None = None,
    doubts: Doubts = Doubts(),
) -> dict:
    """Score images `found` against `true`, both (B, C, H, W) in [0, 1], and judge them.

    Beside the scores stand those of images that need no attack (`metrics.baselines`): an image
    whose PSNR is not above the better of them is no reconstruction.

    y_found, y_true: labels that the attack went by, and the true ones: classes (B,), or vectors
    (B, K), of which equal ones count as one class. controls: name →
    (B, C, H, W) in [0, 1], what an attack without the client's gradient made, paired by the same
    rules; `leakage` sets the scores against them. decoys: (B, N − 1, C, H, W) of uint8, images that
    could have been in the place of each true one (`identification.identify`).

    Returns the `metrics` entry of result.json. In it the PSNR of an exact image is None and
    `exact` true; metrics that do not apply are None or NaN.
    """
    numbers_found, numbers_true = label_numbers(y_found, y_true)
    batch = _Batch(true, numbers_true, numbers_found, rules)
    order = batch.pairing(found)
    scores = batch.score(found[order])
    references = {name: batch.score(x) for name, x in metrics.baselines(true).items()}
    images = _image_entries((y_found, y_true), order, scores, references)
    result: dict[str, Any] = {
        "pairing": "index" if rules.by_index else "assignment",
        "mean": {name: scores.mean.get(name) for name in NAMES},
        "std": {name: scores.std.get(name) for name in NAMES},
        "exact_images": _exact_images(scores),
        "images": images,
        "baselines": {
            label: {name: reference.mean.get(name) for name in NAMES}
            for label, reference in references.items()
        },
        "controls": None,
        "leakage": None,
        "identification": None,
        "paired": None,
    }
    control_scores: dict[str, metrics.Scores] = {}
    for name, theirs in (controls or {}).items():
        pairing = batch.pairing(theirs)
        control_scores[name] = batch.score(theirs[pairing])
        result["controls"] = result["controls"] or {}
        result["controls"][name] = _control_entry(pairing, control_scores[name], scores)
    if controls:
        result["leakage"] = leakage(scores.images, [c.images for c in control_scores.values()])
    metric = _deciding_metric(rules.verdict_metric, scores)
    identification, paired = None, None
    unlike: list[str] = []
    if decoys is not None:
        identification, paired, unlike = _test(batch, metric, found, controls or {}, decoys, result)
    elif OTHER_GRADIENT in control_scores:
        paired = _paired_without_decoys(metric, scores, control_scores[OTHER_GRADIENT])
    result["paired"] = paired and asdict(paired)
    verdict = judge(
        result["leakage"], identification, paired, metric=metric, unlike=unlike,
        missing=doubts.missing, doubt=doubts.doubt, arrived=doubts.arrived,
        tests=doubts.tests,
    )  # fmt: skip
    result["verdict"] = asdict(verdict)
    return result


def _test(
    batch: _Batch,
    metric: str,
    found: Tensor,
    controls: Mapping[str, Tensor],
    decoys: Tensor,
    result: dict,
) -> tuple[Identification, Paired | None, list[str]]:
    """Tests of the images and of the controls against decoys; fills in the entries of `result`.

    Returns the test of the images, their difference to the control with another gradient, and
    the controls that tell true images from decoys nearly as well.
    """
    matrix = batch.similar(metric, found, decoys)
    identification, paired, unlike = identify(matrix), None, []
    result["identification"] = asdict(identification) | {
        "metric": metric,
        "nearest": [nearest_decoys(row, SHOWN_DECOYS) for row in matrix],
    }
    for name, images in controls.items():
        theirs = batch.similar(metric, images, decoys)
        p = result["controls"][name]["identification_p"] = identify(theirs).p
        if p <= min(ALPHA, NEARLY_AS_CLEAR * identification.p):
            unlike.append(f"control {name}")
        if name == OTHER_GRADIENT:
            paired = paired_difference(matrix, theirs)
    return identification, paired, unlike


def _image_entries(
    labels: tuple[Tensor, Tensor],
    order: Sequence[int],
    scores: metrics.Scores,
    references: Mapping[str, metrics.Scores],
) -> list[dict]:
    """Make an entry per true image: its pair, labels, scores, and how they stand to flat images.

    labels: those that the attack went by, and the true ones.
    """
    y_found, y_true = labels
    images = []
    for i, source in enumerate(order):
        values = {
            name: scores.images[name][i] if name in scores.images else math.nan for name in NAMES
        }
        floor = max(reference.images["psnr"][i] for reference in references.values())
        images.append(
            {
                "true": i,
                "reconstruction": source,
                "label_true": y_true[i].tolist(),
                "label": y_found[source].tolist(),
                **values,
                "psnr": _written_psnr(values["psnr"]),
                "exact": values["mse"] == 0,
                "above_baselines": values["psnr"] > floor,
                "flat_psnr": _written_psnr(floor),
            }
        )
    return images


def _control_entry(pairing: Sequence[int], control: metrics.Scores, attack: metrics.Scores) -> dict:
    return {
        "mean": {name: control.mean.get(name) for name in NAMES},
        "exact_images": _exact_images(control),
        "images": control.images | {"psnr": [*map(_written_psnr, control.images["psnr"])]},
        "reconstruction": pairing,
        "leakage": leakage(attack.images, [control.images]),
    }


def _paired_without_decoys(metric: str, attack: metrics.Scores, control: metrics.Scores) -> Paired:
    mine, theirs = (_better_is_higher(metric, of.images)[:, None] for of in (attack, control))
    return paired_difference(mine, theirs)


def _deciding_metric(wanted: str, scores: metrics.Scores) -> str:
    """`wanted`, or PSNR where it has no value, as SSIM of images smaller than its window."""
    values = scores.images.get(wanted, [math.nan])
    return "psnr" if np.isnan(values).any() else wanted


def _better_is_higher(metric: str, values: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Turn the values (B,) of a metric so that higher is better and no PSNR is infinite."""
    sign = -1 if metric in metrics.LOWER_IS_BETTER else 1
    return np.minimum(sign * np.array(values[metric]), metrics.PSNR_CEILING)


def _likeness(metric: str, score: Callable) -> Callable[[Tensor, Tensor], Tensor]:
    sign = -1 if metric in metrics.LOWER_IS_BETTER else 1
    return lambda x, y: (sign * score(x, y)).clamp(max=metrics.PSNR_CEILING)


def _written_psnr(value: float) -> float | None:
    return None if math.isinf(value) else value


def _exact_images(scores: metrics.Scores) -> int:
    return scores.images["mse"].count(0)


def leakage(
    scores: Mapping[str, Sequence[float]], controls: Sequence[Mapping[str, Sequence[float]]]
) -> dict:
    """Tell how far each image stands above the best of its controls.

    scores, controls: metric → (B,) values. Returns metric → its mean, the bootstrap interval
    over images ("low", "high"; metrics.bootstrap_interval) and the (B,) differences, above 0
    where the attack is better. Metrics without a value are left out; PSNR counts up to 100 dB.
    """
    found = {}
    for name in LEAKAGE_DIGITS:
        if name not in scores or np.isnan(scores[name]).any():
            continue
        values = [_better_is_higher(name, of) for of in (scores, *controls)]
        above = values[0] - np.max(values[1:], axis=0)
        low, high = metrics.bootstrap_interval(above)
        found[name] = {
            "mean": float(above.mean()), "low": low, "high": high, "images": above.tolist()
        }  # fmt: skip
    return found
