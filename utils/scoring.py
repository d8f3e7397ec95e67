"""Scoring a reconstruction against the truth: pairing, scores, what a flat image would score."""

import math
from collections.abc import Callable

from torch import Tensor

from utils import metrics
from utils.report import table


def score_reconstruction(
    found: Tensor,
    true: Tensor,
    y_found: Tensor,
    y_true: Tensor,
    *,
    by_index: bool,
    lpips_score: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[dict, str]:
    """Score images `found` against `true`, both (B, C, H, W) in [0, 1].

    Pairs by the best one-to-one assignment, or `by_index`. Beside the scores stand those of
    images that need no attack (`metrics.baselines`): an image whose PSNR is not above the
    better of them is no reconstruction.

    Returns the `metrics` entry of result.json and a table to print.
    """
    order = list(range(len(true))) if by_index else metrics.assign(found, true)
    used = {**metrics.METRICS, **({"lpips": lpips_score} if lpips_score else {})}
    names = [*metrics.METRICS, "lpips"]
    scores = metrics.score(found[order], true, used)
    references = {
        name: metrics.score(images, true, used) for name, images in metrics.baselines(true).items()
    }

    images = []
    for i, source in enumerate(order):
        values = {name: scores.images[name][i] if name in used else math.nan for name in names}
        floor = max(reference.images["psnr"][i] for reference in references.values())
        images.append(
            {
                "true": i,
                "reconstruction": source,
                "label_true": int(y_true[i]),
                "label": int(y_found[source]),
                **values,
                "above_baselines": values["psnr"] > floor,
            }
        )
    pairing = "index" if by_index else "assignment"
    result = {
        "pairing": pairing,
        "mean": {name: scores.mean.get(name) for name in names},
        "std": {name: scores.std.get(name) for name in names},
        "images": images,
        "baselines": {
            label: {name: reference.mean.get(name) for name in names}
            for label, reference in references.items()
        },
    }

    rows = [
        [
            image["true"],
            image["reconstruction"],
            f"{image['label_true']} / {image['label']}",
            *(image[name] for name in names),
            "yes" if image["above_baselines"] else "no: a flat image scores as well",
        ]
        for image in images
    ]
    summaries = {"mean": scores.mean, "std": scores.std}
    summaries |= {f"{label} image": reference.mean for label, reference in references.items()}
    rows += [
        [title, "", "", *(values.get(name, math.nan) for name in names), ""]
        for title, values in summaries.items()
    ]
    header = ["image", "paired with", "label true / used", "MSE", "PSNR dB", "SSIM", "LPIPS"]
    below = sum(not image["above_baselines"] for image in images)
    verdict = (
        f"{below} of {len(true)} images score no better in PSNR than a flat image: those are no "
        "reconstructions"
        if below
        else "every image scores above a grey image and above its own mean colour"
    )
    text = (
        f"{table([*header, 'reconstruction?'], rows, separated=len(summaries))}\n"
        f"label accuracy {100 * metrics.label_accuracy(y_found, y_true):.1f} %; paired by "
        f"{pairing}; {verdict}"
    )
    return result, text
