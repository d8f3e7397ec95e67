"""Does the client's gradient show in the images? Exact tests, whatever the attack or the metric.

Every true image has decoys: images that could have been in its place. If a reconstruction holds
nothing of the true image, it resembles the true image no more than any decoy, so every rank of
the true image among its candidates is equally likely. That needs no assumption on the attack, the
metric or the number of images; it needs decoys that were drawn as the true image was.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: Draws from the null distribution where there are more cases than that; else all cases.
DRAWS = 9999
#: The median absolute deviation of a normal distribution with standard deviation 1.
NORMAL_MAD = 0.6745


@dataclass(frozen=True)
class Identification:
    """Holds what the ranks of the true images among their decoys show."""

    #: Rank of each true image among its candidates, 1 being the most similar; ties count against.
    ranks: list[int]
    #: Candidates per image, N: the true image and its N − 1 decoys.
    candidates: int
    #: Similarity of each true image, in robust standard deviations of its candidates.
    deviations: list[float]
    #: Per image the probability of such an image somewhere in the batch, were nothing there.
    image_p: list[float]
    #: Probability of ranks as low as these in the whole batch, were nothing there.
    batch_p: float
    #: Probability that either of the two is as low as observed, were nothing there: the test.
    p: float
    #: The lowest `p` that this number of images and candidates allows.
    smallest_p: float


def similarities(
    metric: Callable[[Tensor, Tensor], Tensor],
    found: Tensor,
    y_found: Tensor,
    true: Tensor,
    y_true: Tensor,
    decoys: Tensor,
    *,
    by_index: bool = False,
) -> np.ndarray:
    """Return the similarity of every candidate to its reconstruction: (B, N), the true image first.

    metric(x, x_true) → (n,), higher being more similar. found, true: (B, C, H, W) in [0, 1].
    y_found, y_true: (B,) labels of the reconstructions and of the true images. decoys:
    (B, N − 1, C, H, W) of uint8.

    The best pairing of a batch is chosen with the true images in view and would flatter them. So
    every candidate, true or not, is compared with the reconstruction that is nearest to it among
    those of its label (all of them where none has its label), or, `by_index`, with that of the
    same index.
    """
    rows = []
    for i, image in enumerate(true):
        candidates = torch.cat([image[None], decoys[i].to(image) / 255])
        options = found[i : i + 1] if by_index else found[y_found == y_true[i]]
        options = (options if len(options) else found).to(candidates)
        nearest = torch.cdist(candidates.flatten(1), options.flatten(1)).argmin(1)
        rows.append(metric(options[nearest], candidates).double().cpu().numpy())
    return np.stack(rows)


def identify(scores: np.ndarray, *, draws: int = DRAWS, seed: int = 0) -> Identification:
    """Test whether true images are more similar to their reconstructions than decoys are.

    scores: (B, N) similarities, column 0 of the true image. Under the null hypothesis the true
    image is any of its N candidates with equal probability, image by image. Two statistics are
    set against the distribution that follows from it, over all N^B cases where these are at most
    `draws`, else over `draws` random ones (then p = (1 + count) / (1 + draws), which is valid for
    any number; Davison & Hinkley, 1997, 4.2):

    - the sum over images of log(rank / N), low where many images are found (Fisher, 1932);
    - the largest over images of the similarity in robust standard deviations of the image's own
      candidates, high where one image is found clearly. `image_p` corrects for the number of
      images by its distribution, step by step from the clearest image on (Westfall & Young, 1993,
      algorithm 2.8): each is compared with the largest of those that are no clearer.

    `p` is the probability under the null hypothesis that one of the two is as improbable as
    observed.
    """
    count, candidates = scores.shape
    ranks = np.stack([_ranks(row) for row in scores])
    low = np.log(ranks / candidates)
    centre = np.median(scores, axis=1, keepdims=True)
    spread = np.median(np.abs(scores - centre), axis=1, keepdims=True) / NORMAL_MAD
    high = np.divide(scores - centre, spread, out=np.zeros_like(scores), where=spread > 0)

    cases = _cases(count, candidates, draws, seed)
    images = np.arange(count)
    sums, largest = low[images, cases].sum(1), high[images, cases].max(1)
    # the observed case comes first: the true image of every batch
    batch_p, largest_p = _share_at_most(sums), _share_at_most(-largest)
    either = np.minimum(batch_p, largest_p)
    return Identification(
        ranks=ranks[:, 0].tolist(),
        candidates=candidates,
        deviations=high[:, 0].tolist(),
        image_p=_step_down(high, cases),
        batch_p=float(batch_p[0]),
        p=float((either <= either[0]).mean()),
        smallest_p=1 / len(cases),
    )


def _step_down(high: np.ndarray, cases: np.ndarray) -> list[float]:
    """Return per image the p of its deviation, corrected for the number of images.

    high: (B, N) deviations, column 0 observed. cases: (n, B) candidates drawn under the null
    hypothesis, the first one observed.
    """
    order = np.argsort(-high[:, 0], kind="stable")
    drawn = high[order, cases[:, order]]
    # the largest of each image and all that are no clearer
    largest = np.maximum.accumulate(drawn[:, ::-1], axis=1)[:, ::-1]
    p = np.maximum.accumulate((largest >= high[order, 0]).mean(0))
    return p[np.argsort(order)].tolist()


def _ranks(scores: np.ndarray) -> np.ndarray:
    """Return the rank of every score (N,), 1 for the highest; equal scores share the worst one."""
    return len(scores) - np.searchsorted(np.sort(scores), scores, side="left")


def _share_at_most(values: np.ndarray) -> np.ndarray:
    """Return for each of `values` (n,) the share that is at most as high, up to rounding."""
    rounded = values.round(9)
    return np.searchsorted(np.sort(rounded), rounded, side="right") / len(values)


@dataclass(frozen=True)
class Paired:
    """Compares the attack with the same attack without the client's gradient, image by image."""

    #: Difference in similarity to the true image, per image.
    images: list[float]
    #: Their mean.
    mean: float
    #: Probability of so high a mean, beside that of the decoys, were nothing there; None without.
    p: float | None
    #: The lowest `p` possible.
    smallest_p: float | None
    #: Probability of so high a mean if every sign were a coin's; None for one image.
    signs_p: float | None


def paired_difference(
    scores: np.ndarray, other: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> Paired:
    """Compare the attack with a control, such as the same attack on other images' gradient.

    scores, other: (B, N) of `similarities`, of the attack and of the control, the true image
    first. `p` sets the mean difference at the true images against those at decoys, by the same
    draws as `identify`: an attack that merely draws smoother or darker images than its control
    gains on everything. `signs_p` is the sign-flip permutation test (by scipy) of the differences
    at the true images alone. It takes the two attacks for exchangeable, which they are only where
    their images are alike in kind, and decides nothing.
    """
    gaps = scores - other
    count, candidates = gaps.shape
    gains, p, smallest, signs_p = gaps[:, 0], None, None, None
    if candidates > 1:
        cases = _cases(count, candidates, draws, seed)
        means = gaps[np.arange(count), cases].mean(1)
        p, smallest = float(_share_at_most(-means)[0]), 1 / len(cases)
    if count > 1:
        from scipy.stats import permutation_test  # half a second, where images are scored

        test = permutation_test(
            (gains,),
            np.mean,
            permutation_type="samples",
            alternative="greater",
            n_resamples=draws,
            random_state=np.random.default_rng(seed),
        )
        signs_p = float(test.pvalue)
    return Paired(gains.tolist(), float(gains.mean()), p, smallest, signs_p)


def _cases(count: int, candidates: int, draws: int, seed: int) -> np.ndarray:
    """Choose the candidate that stands for each true image: (n, B), the observed case first.

    All N^B cases where there are at most `draws`, else that many random ones after the observed.
    """
    if candidates**count <= draws:
        return np.array(list(itertools.product(range(candidates), repeat=count)))
    draw = np.random.default_rng([seed, count, candidates])
    cases = draw.integers(candidates, size=(draws, count))
    return np.concatenate([np.zeros((1, count), dtype=int), cases])


def nearest_decoys(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` decoys most similar to a reconstruction, the nearest first.

    scores: (N,) of one image, the true image first.
    """
    return np.argsort(-np.asarray(scores)[1:], kind="stable")[:count].tolist()
