"""The verdict: exact tests against brute force, their calibration, and the sentences."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from benchmarks.calibration import CASES, SIZES, false_alarms, null_case
from inversion.audit.identification import (
    Identification,
    Paired,
    identify,
    nearest_decoys,
    paired_difference,
    similarities,
)
from inversion.audit.scoring import leakage
from inversion.audit.verdict import (
    IDENTIFIABLE,
    INCOMPLETE,
    NOT_SHOWN,
    RECONSTRUCTION,
    evidence_against_chance,
    judge,
)
from tests.support import attack, photos, scored
from train.batches import load_control
from train.datasets import DATASETS
from train.request import Request
from utils.images import denormalise
from utils.matching import assign
from utils.metrics import RESAMPLES, bootstrap_interval, psnr

# Identification -----------------------------------------------------------------------------


def test_one_image_has_its_rank_as_p():
    scores = np.arange(20.0)[None]
    for place in range(20):
        row = np.roll(scores, -place, axis=1)  # the true image has score `place`
        found = identify(row)
        assert found.ranks == [20 - place]
        assert found.p == found.batch_p == pytest.approx((20 - place) / 20)
        assert found.image_p == [pytest.approx((20 - place) / 20)]
        assert found.smallest_p == 1 / 20


def test_two_images_against_all_cases_by_hand():
    """Every pair of candidates could be the true one: count those at least as improbable."""
    draw = np.random.default_rng(3)
    scores = draw.normal(size=(2, 5))
    scores[0, 0] = 4
    found = identify(scores)

    def ranks(i, j):
        return [(scores[0] >= scores[0, i]).sum(), (scores[1] >= scores[1, j]).sum()]

    centre = np.median(scores, 1, keepdims=True)
    deviations = (scores - centre) / np.median(abs(scores - centre), 1, keepdims=True)
    cases = list(itertools.product(range(5), repeat=2))
    products = [math.prod(ranks(i, j)) for i, j in cases]
    largest = [max(deviations[0, i], deviations[1, j]) for i, j in cases]
    assert found.ranks == ranks(0, 0)
    assert found.batch_p == pytest.approx(np.mean(np.array(products) <= products[0]))
    assert min(found.image_p) == pytest.approx(np.mean(np.array(largest) >= largest[0] - 1e-12))
    assert found.smallest_p == 1 / 25


def test_equal_similarities_count_against_the_true_image():
    assert identify(np.zeros((1, 10))).ranks == [10]
    assert identify(np.zeros((3, 10))).p == 1
    scores = np.array([[1.0, 1.0, 0.0, 0.0]])
    assert identify(scores).p == 0.5  # shares rank 2


def test_p_values_are_uniform_without_information():
    draw = np.random.default_rng(0)
    ps = [identify(draw.standard_t(2, size=(3, 40)), draws=499, seed=k).p for k in range(600)]
    assert kstest(ps, "uniform").pvalue > 1e-3
    assert np.mean(np.array(ps) <= 0.05) <= 0.08


def test_one_clear_image_among_many_is_named():
    """99 decoys and the correction for 16 images still leave it: its rank alone could not."""
    draw = np.random.default_rng(1)
    scores = draw.normal(size=(16, 100))
    scores[11, 0] = 9
    found = identify(scores)
    assert found.p < 0.05
    assert [i for i, p in enumerate(found.image_p) if p <= 0.05] == [11]
    assert 16 / 100 > 0.05


def test_many_weak_images_are_found_together():
    draw = np.random.default_rng(2)
    scores = draw.normal(size=(16, 100))
    scores[:, 0] += 1
    found = identify(scores)
    assert found.batch_p < 0.001
    assert min(found.image_p) > 0.05
    assert found.p < 0.01


def test_a_batch_found_whole_has_every_image_identified():
    scores = np.random.default_rng(0).normal(size=(8, 100))
    scores[:, 0] = np.linspace(5, 9, 8)
    assert max(identify(scores).image_p) < 0.02


def test_images_of_one_label_are_not_paired_in_view_of_the_truth():
    """Every candidate has the choice among the reconstructions of its label that the truth has."""
    draw = torch.Generator().manual_seed(0)
    true, found = torch.rand(4, 1, 6, 6, generator=draw), torch.rand(4, 1, 6, 6, generator=draw)
    decoys = (torch.rand(4, 3, 1, 6, 6, generator=draw) * 255).byte()
    y_found, y_true = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 0, 2])

    def likeness(x, y):
        return -(x - y).square().flatten(1).mean(1)

    scores = similarities(likeness, found, y_found, true, y_true, decoys)
    assert scores.shape == (4, 4)
    choices = [[0, 1, 2], [3], [0, 1, 2], [0, 1, 2, 3]]  # nobody has label 2: all of them
    for i, choice in enumerate(choices):
        candidates = [true[i], *(decoys[i] / 255)]
        for k, candidate in enumerate(candidates):
            best = max(likeness(found[r][None], candidate[None]).item() for r in choice)
            assert scores[i, k] == pytest.approx(best, rel=1e-5)
    by_index = similarities(likeness, found, y_found, true, y_true, decoys, by_index=True)
    assert by_index[1, 0] == pytest.approx(likeness(found[1:2], true[1:2]).item(), rel=1e-5)
    assert nearest_decoys([0.5, 0.1, 0.9, 0.3], 2) == [1, 2]
    wide = similarities(likeness, found.double(), y_found, true, y_true, decoys)
    np.testing.assert_allclose(wide, scores, rtol=1e-5)  # an attack in float64 on a float32 truth


def test_paired_differences_by_hand():
    scores = np.array([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0], [1.0, 3.0, 0.0]])
    other = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
    found = paired_difference(scores, other)
    assert found.images == [2, 1, -1]
    assert found.mean == pytest.approx(2 / 3)
    gaps = scores - other
    sums = [sum(gaps[i, c] for i, c in enumerate(case))
            for case in itertools.product(range(3), repeat=3)]  # fmt: skip
    assert found.p == pytest.approx(np.mean(np.array(sums) >= 2))
    assert found.smallest_p == 1 / 27
    signed = [sum(s * g for s, g in zip(signs, (2, 1, -1), strict=True))
              for signs in itertools.product((1, -1), repeat=3)]  # fmt: skip
    assert found.signs_p == pytest.approx(np.mean(np.array(signed) >= 2))
    alone = paired_difference(np.ones((1, 1)), np.zeros((1, 1)))
    assert (alone.images, alone.p, alone.signs_p) == ([1], None, None)


def test_resembling_everything_more_is_no_difference():
    """An attack whose images are smoother than its control's gains as much on decoys; the signs of
    its differences alone would say otherwise."""
    draw = np.random.default_rng(0)
    other = draw.normal(size=(8, 50))
    found = paired_difference(other + 5 + 0.1 * draw.normal(size=(8, 50)), other)
    assert found.p > 0.05
    assert found.signs_p < 0.01


def test_paired_differences_are_exact_where_they_are_skewed():
    """Chance alone gives p at most 1 % no more often than that, whatever the distribution."""
    draw = np.random.default_rng(5)
    ps = [
        paired_difference(
            draw.exponential(size=(8, 30)) ** 3, np.zeros((8, 30)), seed=k, draws=499
        ).p
        for k in range(500)
    ]
    assert np.mean(np.array(ps) <= 0.01) <= 0.025


# Calibration --------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", SIZES)
def test_false_leakage_stays_below_five_percent(batch_size):
    """2,000 cases without information, with metrics that go together."""
    assert CASES == 2000
    found = false_alarms(batch_size)
    assert found["false leakage"] <= 0.05
    assert found["no leakage shown"] >= 0.95


def test_metrics_of_a_simulated_case_go_together():
    case = [null_case(np.random.default_rng(k), 16) for k in range(50)]
    psnrs, ssims = (np.concatenate([c.scores[m] for c in case]) for m in ("psnr", "ssim"))
    assert np.corrcoef(psnrs, ssims)[0, 1] > 0.5


def test_an_image_at_half_contrast_is_found_among_seven_of_noise():
    """In PSNR it lies below a flat image; the verdict names it."""
    true, y = photos(8, 32)
    true = denormalise(true, *DATASETS["photos"].normalisation)
    _, decoys = load_control("photos", Request(), 0, y, 99)
    noise = torch.rand(true.shape, generator=torch.Generator().manual_seed(0))
    found = noise.clone()
    found[5] = 0.5 * true[5]
    flat = true.mean((-2, -1), keepdim=True).expand_as(true)
    assert psnr(found, true)[5] < psnr(flat, true)[5]
    controls = {
        "mean image": flat.mean(0, keepdim=True).expand_as(true),
        "other gradient": noise.flip(0),
    }
    result, text = scored(found, true, y, y, by_index=False, controls=controls, decoys=decoys)
    verdict = result["verdict"]
    assert verdict["verdict"] == IDENTIFIABLE
    assert verdict["worst_image"] == 5
    assert verdict["identified"] == [5]
    assert "leakage: identifiable: the client's gradient shows in the images" in text
    assert "worst image 5 (rank 1 of 100" in text


def test_the_client_with_little_noise_is_found(captured, tmp_path):
    """Per-sample clipping to 20 with noise 0.001: what shows is found by the ranks."""
    path = captured(
        "-a", "lenet", "-b", "8", "--outlayer-state", "keep", "--with-control", "--enable-dp",
        "--dp-mode", "per-sample", "-C", "20", "--sigma", "0.001", "--noise-seed", "0",
    )  # fmt: skip
    result, folder = attack(
        tmp_path, path, "--epochs", 200, "--lr", 0.05, "--TV", 1e-4, "--TV-end", 1e-6,
        "--grad-sign", "--input-boxed", "--min-grads-loss", "--metric",
    )  # fmt: skip
    assert result["metrics"]["verdict"]["verdict"] == IDENTIFIABLE
    log = (folder / "log.txt").read_text()
    assert "leakage: identifiable: the client's gradient shows" in log
    assert "there is nothing to find" not in log
    assert (folder / "decoys.png").exists()


# The sentence -------------------------------------------------------------------------------


def differences(values, low, high):
    return {"ssim": {"mean": float(np.mean(values)), "low": low, "high": high, "images": values}}


def ranked(p, ranks, smallest=1e-4):
    return Identification(
        ranks, 100, [1 - r / 100 for r in ranks], [p] * len(ranks), p, p, smallest
    )


SHOWN, HIDDEN = ranked(0.001, [1, 2, 1]), ranked(0.4, [50, 20, 70])
ABOVE, BELOW = differences([0.5, 0.6, 0.4], 0.4, 0.6), differences([-0.2, 0.1, -0.3], -0.3, 0.1)
SLIGHT = differences([0.02, 0.01, 0.03], 0.01, 0.03)


@pytest.mark.parametrize(
    ("leak", "ranks", "options", "verdict", "says"),
    [
        (ABOVE, SHOWN, {}, RECONSTRUCTION, "worst image 0 (rank 1 of 100, SSIM +0.500)"),
        (BELOW, SHOWN, {}, IDENTIFIABLE, "on average no reconstruction: SSIM -0.133"),
        (SLIGHT, SHOWN, {}, IDENTIFIABLE, "on average no reconstruction: SSIM +0.020"),
        (ABOVE, HIDDEN, {}, NOT_SHOWN, "p = 0.4, where 0.0001 was the least possible"),
        (BELOW, HIDDEN, {}, NOT_SHOWN, "nearest is image 1 (rank 20 of 100"),
        (BELOW, HIDDEN, {"arrived": False}, NOT_SHOWN, "the attack's optimiser did not arrive"),
        (BELOW, HIDDEN, {"doubt": "it was not finished"}, INCOMPLETE, "not finished"),
        (ABOVE, SHOWN, {"doubt": "it was not finished"}, RECONSTRUCTION, "p = 0.001"),
        (BELOW, HIDDEN, {"missing": ["control x was interrupted"], "doubt": "it was cut short"},
         INCOMPLETE, "control x was interrupted: without it no verdict; by the test alone the "
         "client's gradient does not show (p = 0.4); it was cut short"),
        (ABOVE, SHOWN, {"missing": ["a", "b"]}, INCOMPLETE,
         "a; b: without it no verdict; by the test alone the client's gradient shows in the "
         "images (p = 0.001)"),
        (BELOW, ranked(0.4, [1, 1, 1], 0.2), {"missing": ["a"]}, INCOMPLETE,
         "incomplete: a: without it no verdict"),
        (BELOW, SHOWN, {"missing": ["a"], "unlike": ["control b"]}, INCOMPLETE,
         "incomplete: a: without it no verdict"),
        (None, None, {}, INCOMPLETE, "no control was run"),
        (None, SHOWN, {}, INCOMPLETE, "no control was run"),
        (ABOVE, None, {}, INCOMPLETE, "no decoys to test with"),
        (BELOW, ranked(0.4, [1, 1, 1], 0.2), {}, INCOMPLETE, "(smallest p 0.2)"),
        (BELOW, SHOWN, {"unlike": ["control prior only"]}, INCOMPLETE,
         "the decoys are unlike the true images in kind: control prior only"),
    ],
)  # fmt: skip
def test_verdicts(leak, ranks, options, verdict, says):
    found = judge(leak, ranks, None, metric="ssim", **options)
    assert found.verdict == verdict
    assert found.sentence.startswith(f"{verdict}: ")
    assert says in found.sentence
    assert "nothing to find" not in found.sentence
    assert not ("does not show" in found.sentence and found.p <= 0.04)


def test_one_image_needs_a_clear_difference():
    """It has no interval, and the sign of a difference is no evidence."""
    for value, verdict in ((0.3, RECONSTRUCTION), (0.02, IDENTIFIABLE), (-0.1, IDENTIFIABLE)):
        one = differences([value], math.nan, math.nan)
        assert judge(one, ranked(0.01, [1], 0.01), None, metric="ssim").verdict == verdict
        assert judge(one, ranked(0.6, [60], 0.01), None, metric="ssim").verdict == NOT_SHOWN


def test_no_image_is_called_identified_where_nothing_is_shown():
    almost = ranked(0.05, [1, 60, 70])
    almost.image_p[0] = 0.03
    found = judge(BELOW, almost, None, metric="ssim")
    assert (found.verdict, found.identified) == (NOT_SHOWN, [])


def test_both_tests_share_what_false_alarms_may_be():
    def pairs(p, count=8):
        return Paired([0.1] * count, 0.1, p, 1e-4, 0.5)

    ranks = ranked(0.03, [1] * 8)
    assert evidence_against_chance(ranks, None) == (0.03, 1e-4)
    assert evidence_against_chance(ranks, pairs(0.9))[0] == pytest.approx(0.03 / 0.8)
    assert evidence_against_chance(ranks, pairs(0.004))[0] == pytest.approx(0.02)
    assert evidence_against_chance(ranks, pairs(0.004))[1] == pytest.approx(1e-4 / 0.8)
    assert evidence_against_chance(ranks, pairs(0.004, 4))[0] == 0.03
    assert evidence_against_chance(None, pairs(0.001)) == (None, None)


def test_evidence_of_the_differences_alone_names_no_image():
    below = {"ssim": BELOW["ssim"] | {"images": [-0.2] * 8}}
    pairs = Paired([0.01] * 8, 0.01, 1e-3, 1e-4, 0.5)
    hidden = judge(below, ranked(0.9, [60] * 8), pairs, metric="ssim")
    assert (hidden.verdict, hidden.identified) == (IDENTIFIABLE, [])
    assert "no image stands out among its decoys; nearest is image" in hidden.sentence
    assert "worst image" not in hidden.sentence
    seen = judge(below, ranked(0.001, [1] * 8), pairs, metric="ssim")
    assert "worst image" in seen.sentence


def test_independent_noise_without_decoys_gives_no_verdict():
    """Differences alone, however equal their signs, are no test."""
    draw = torch.Generator().manual_seed(0)
    true, y = torch.rand(8, 3, 16, 16, generator=draw), torch.arange(8)
    noise = 0.4 + 0.2 * torch.rand(true.shape, generator=draw)
    black = torch.zeros_like(true)
    controls = {"prior only": black, "other gradient": black}
    result, text = scored(
        noise, true, y, y, by_index=True, controls=controls, verdict_metric="psnr"
    )
    assert result["verdict"]["verdict"] == INCOMPLETE
    assert result["paired"]["signs_p"] < 0.01
    assert "incomplete: no decoys to test with" in text


def test_decoys_that_a_control_tells_from_the_truth_prove_nothing():
    """True images dark, decoys bright: a dark control finds them as well as a dark attack."""
    draw = torch.Generator().manual_seed(0)
    true = 0.2 * torch.rand(8, 3, 16, 16, generator=draw)
    decoys = (200 + 55 * torch.rand(8, 60, 3, 16, 16, generator=draw)).byte()
    dark = [0.2 * torch.rand(true.shape, generator=draw) for _ in range(2)]
    y = torch.arange(8)
    result, text = scored(
        dark[0], true, y, y, by_index=True, controls={"other gradient": dark[1]}, decoys=decoys,
        verdict_metric="psnr",
    )  # fmt: skip
    assert result["identification"]["p"] < 0.001
    assert result["verdict"]["verdict"] == INCOMPLETE
    assert "the decoys are unlike the true images in kind: control other gradient" in text


def test_only_the_metric_named_beforehand_decides():
    leak = ABOVE | {"psnr": BELOW["ssim"]}
    assert judge(leak, SHOWN, None, metric="ssim").verdict == RECONSTRUCTION
    assert judge(leak, SHOWN, None, metric="psnr").verdict == IDENTIFIABLE


# Intervals, differences, pairing -------------------------------------------------------------


def test_bootstrap_interval():
    values = np.array([0.0, 1.0, 2.0, 5.0, 7.0])
    low, high = bootstrap_interval(values)
    draw = np.random.default_rng(1)
    means = draw.choice(values, (RESAMPLES, 5)).mean(1)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.1)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.1)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(np.full(6, 2.5)) == (2.5, 2.5)
    assert all(math.isnan(v) for v in bootstrap_interval(np.array([1.0])))


def test_leakage_is_what_stands_above_the_best_control():
    scores = {"psnr": [20.0, 12.0, 30.0], "ssim": [0.5, math.nan, 0.9], "lpips": [0.1, 0.2, 0.3]}
    controls = [
        {"psnr": [10.0, 13.0, 11.0], "ssim": [0.1] * 3, "lpips": [0.5, 0.1, 0.4]},
        {"psnr": [12.0, 11.0, 10.0], "ssim": [0.2] * 3, "lpips": [0.6, 0.3, 0.2]},
    ]
    found = leakage(scores, controls)
    assert found.keys() == {"psnr", "lpips"}  # one SSIM is missing
    assert found["psnr"]["images"] == [8, -1, 19]
    assert found["psnr"]["mean"] == pytest.approx(26 / 3)
    assert found["lpips"]["images"] == pytest.approx([0.4, -0.1, -0.1])
    assert found["psnr"]["low"] < 26 / 3 < found["psnr"]["high"]
    perfect = leakage({"psnr": [math.inf]}, [{"psnr": [10.0]}])
    assert perfect["psnr"]["mean"] == 90  # up to 100 dB


def test_every_control_is_told_alone():
    draw = torch.Generator().manual_seed(0)
    true = torch.rand(8, 3, 16, 16, generator=draw)
    y = torch.arange(8)
    noisy = (true + 0.2 * torch.randn(true.shape, generator=draw)).clamp(0, 1)
    flat = torch.full_like(true, 0.5)
    _, text = scored(
        noisy, true, y, y, by_index=True, controls={"prior only": true, "other gradient": flat}
    )
    assert "against one control alone: prior only SSIM -" in text
    assert "; other gradient SSIM +" in text
    assert "0 of 8 images stand above every control in SSIM" in text


def test_controls_are_paired_by_the_same_rule():
    true = torch.rand(3, 3, 16, 16)
    shuffled, y = true[[1, 2, 0]], torch.zeros(3, dtype=torch.long)
    controls = {"prior only": shuffled}
    scores, text = scored(true, true, y, y, by_index=False, controls=controls)
    assert scores["controls"]["prior only"]["reconstruction"] == [2, 0, 1]
    assert scores["leakage"]["psnr"]["mean"] == 0  # as good as the attack
    assert "control: prior only" in text
    scores, text = scored(true, true, y, y, by_index=True, controls=controls)
    assert scores["leakage"]["psnr"]["mean"] > 50
    assert scored(true, true, y, y, by_index=True)[0]["leakage"] is None


def test_pairing_respects_the_labels_that_the_attack_went_by():
    """Image 1 of label 5 lies nearer to the truth of label 7, which it was never made for."""
    true = torch.stack([torch.full((1, 4, 4), v) for v in (0.0, 1.0, 0.5)])
    found = torch.stack([torch.full((1, 4, 4), v) for v in (0.9, 0.1, 0.4)])
    y_true, y = torch.tensor([5, 7, 7]), torch.tensor([5, 7, 7])
    assert assign(found, true) == [1, 0, 2]
    assert assign(found, true, y, y_true) == [0, 2, 1]
    wrong = torch.tensor([7, 5, 5])  # as many wrong labels as there must be, then by likeness
    assert assign(found, true, wrong, y_true) == [1, 0, 2]


def test_psnr_decides_where_images_are_too_small_for_ssim():
    true = torch.rand(8, 1, 8, 8)
    y = torch.arange(8)
    result, _ = scored(true, true, y, y, by_index=True, controls={"mean image": true.flip(0)})
    assert result["verdict"]["metric"] == "psnr"
