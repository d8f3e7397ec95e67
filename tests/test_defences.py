"""Defences: what each sends, what is said of it, and what the attacker makes of it."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.stats import norm as normal

from inversion.combine import combination_method, combine
from inversion.labels.evidence import gather_evidence
from inversion.labels.reconstruct import LabelInputs, reconstruct_labels
from inversion.layerwise.attack import accuracies, layerwise_attack, whole_tensors
from inversion.objective import Objective
from inversion.pixel_gradient import exact, plain
from inversion.settings import Weights
from models.build import build_model
from models.checkpoint import load
from models.choices import DEFENCE_NAMES, PROTECTION_MODES, SPARSE_MODES
from models.gradient import batch_gradient, trainable_parameters
from models.guarantee import NO_PRIVACY, bound_sentence, gaussian_mu, reconstruction_bound
from models.reading import target_from_checkpoint
from models.target import Protection, guarantee_lines, model_of
from tests.support import attack, call, capture_photos, photos, smooth_network, target_of
from tests.test_mlco import brute_force
from train.defence_settings import AMOUNTS, FLAGS, parsed, usage
from train.defences import (
    PROTECTIONS,
    above_percentile,
    kept_count,
    largest_entries,
    random_entries,
    rounded_to_int8,
    scaled_signs,
    sparse_vector,
)
from train.flags import parser
from train.settings import settings_from, with_defence
from utils.errors import InputError


def some_gradient(seed=0, dtype=torch.float64):
    """Three tensors, with 24 + 5 + 60 entries."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 6), (5,), (3, 4, 5))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def flat(gradient):
    return torch.cat([g.flatten() for g in gradient])


def drawing(seed=0):
    return torch.Generator().manual_seed(seed)


# What is sent ------------------------------------------------------------------------------


def test_every_name_has_a_function_amounts_and_a_sentence():
    assert AMOUNTS.keys() == DEFENCE_NAMES.keys()
    assert tuple(PROTECTIONS) == PROTECTION_MODES
    without = DEFENCE_NAMES.keys() - {"dp-sgd" if m == "per-sample" else m for m in PROTECTIONS}
    assert without == {"none", *FLAGS}
    assert set(NO_PRIVACY) == set(PROTECTION_MODES) - {"per-sample"}
    assert all(text[0].isupper() and text.endswith(".") for text in DEFENCE_NAMES.values())


@pytest.mark.parametrize("share", [0.01, 0.1, 1 / 3, 0.5, 1.0])
def test_the_largest_entries_of_all_tensors_are_kept(share):
    gradient = some_gradient()
    sent = flat(largest_entries(gradient, share))
    count = math.ceil(share * 89)
    order = sorted(range(89), key=lambda i: -abs(flat(gradient)[i].item()))
    for place, i in enumerate(order):
        assert sent[i] == (flat(gradient)[i] if place < count else 0)
    tied = largest_entries([torch.ones(5), -torch.ones(5)], 0.3)
    assert flat(tied).count_nonzero() == 3


def test_a_share_is_rounded_up_but_for_rounding():
    assert [kept_count(share, 10) for share in (1e-9, 0.1, 0.11, 0.3, 1.0)] == [1, 1, 2, 3, 10]
    assert kept_count(0.1 + 0.2, 10) == 3  # 0.30000000000000004


def test_random_entries_are_kept_as_they_are_and_equally_often():
    gradient, times, count = some_gradient(), torch.zeros(89), 18
    generator = drawing()
    for _ in range(400):
        sent = flat(random_entries(gradient, 0.2, generator))
        kept = sent != 0
        assert kept.sum() == count
        assert torch.equal(sent[kept], flat(gradient)[kept])
        times += kept
    expected = 400 * count / 89
    assert (times - expected).abs().max() < 5 * math.sqrt(expected * (1 - count / 89))
    again = [random_entries(gradient, 0.2, drawing(7)) for _ in range(2)]
    assert torch.equal(flat(again[0]), flat(again[1]))


@pytest.mark.parametrize(("percentile", "gamma"), [(0, 9.0), (10, 0.5), (90, 0.01), (100, 9.0)])
def test_what_exceeds_a_percentile_is_kept_and_cut(percentile, gamma):
    gradient = [*some_gradient(dtype=torch.float32), torch.tensor(0.001)]
    magnitudes = sorted(g.abs().item() for g in flat(gradient))
    place = percentile / 100 * (len(magnitudes) - 1)
    low = math.floor(place)
    cutoff = magnitudes[low] + (place - low) * (magnitudes[min(low + 1, 89)] - magnitudes[low])
    *sent, single = above_percentile(gradient, percentile, gamma)
    for g, s in zip(flat(gradient[:-1]).tolist(), flat(sent).tolist(), strict=True):
        expected = max(-gamma, min(gamma, g)) if abs(g) >= cutoff - 1e-12 else 0
        assert s == pytest.approx(expected, abs=1e-9)
    assert single == gradient[-1]  # a single number is sent as it is


def test_the_percentile_of_one_to_a_hundred():
    sent = above_percentile([torch.arange(1.0, 101)], 10, 50.0)[0]  # the cutoff is 10.9
    assert torch.equal(sent, torch.arange(1.0, 101).clamp(max=50) * (torch.arange(1, 101) > 10))


def test_without_noise_the_sparse_vector_technique_is_a_threshold():
    """Noise of scale 0 but for rounding: what reaches tau may be drawn, and is cut."""
    gradient = some_gradient()
    sent = flat(sparse_vector(gradient, 0.3, 1e30, 1e30, 1.0, 0.5, drawing()))
    kept, count = sent != 0, kept_count(0.3, 89)
    assert bool((flat(gradient)[kept].abs() >= 0.5).all())
    torch.testing.assert_close(sent[kept], flat(gradient)[kept].clamp(-1, 1))
    # of m accepted ones n are drawn with replacement
    accepted = int((flat(gradient).abs() >= 0.5).sum())
    expected = accepted * (1 - (1 - 1 / accepted) ** count)
    draws = [
        flat(sparse_vector(gradient, 0.3, 1e30, 1e30, 1.0, 0.5, drawing(seed))).count_nonzero()
        for seed in range(60)
    ]
    assert torch.stack(draws).double().mean().item() == pytest.approx(expected, rel=0.03)


def test_the_noise_of_the_sparse_vector_technique():
    """All of a zero gradient: the mean magnitude of Laplace noise is its scale, 2 gamma / nu."""
    sent = sparse_vector([torch.zeros(40_000)], 1.0, 0.1, 100.0, 0.5, 1e-6, drawing())[0]
    drawn = sent[sent != 0]
    assert drawn.abs().mean().item() == pytest.approx(0.01, rel=0.03)
    assert drawn.std().item() == pytest.approx(math.sqrt(2) * 0.01, rel=0.03)
    assert drawn.mean().item() == pytest.approx(0, abs=5e-4)
    cut = sparse_vector([torch.zeros(1000)], 0.5, 0.1, 0.1, 1e-5, 1e-6, drawing())[0]
    assert cut.abs().max() == torch.tensor(1e-5)  # the noise has scale 2e-4
    with pytest.raises(InputError, match="entries reach the threshold; give a smaller TAU"):
        sparse_vector([torch.zeros(4)], 0.5, 0.1, 0.1, 1e-5, 1.0, drawing())


def test_int8_is_the_nearest_of_255_values():
    for g in some_gradient():
        (sent,) = rounded_to_int8([g])
        values = torch.linspace(-1, 1, 255, dtype=torch.float64) * g.abs().max()
        for true, found in zip(g.flatten(), sent.flatten(), strict=True):
            nearest = values[(values - true).abs().argmin()]
            assert found.item() == pytest.approx(nearest.item(), rel=1e-12, abs=1e-15)
    assert torch.equal(rounded_to_int8([torch.zeros(3)])[0], torch.zeros(3))


def test_signs_have_the_mean_magnitude():
    gradient = [torch.tensor([3.0, -1.0, 0.0, -4.0]), torch.tensor([[0.5]])]
    first, second = scaled_signs(gradient)
    assert first.tolist() == [2.0, -2.0, 0.0, -2.0]
    assert second.tolist() == [[0.5]]


# The command line --------------------------------------------------------------------------


def flags(*given):
    return parser().parse_args(["--data-name", "photos", "-b", "4", *given])


def test_how_a_defence_is_written():
    assert usage("dp-sgd") == "dp-sgd:C:MULTIPLIER"
    assert usage("percentile") == "percentile[:P[:GAMMA]]"
    assert parsed("percentile:20").amounts == (20.0, 0.01)
    assert parsed("svt").amounts == (0.1, 0.1, 0.1, 1e-5, 1e-6)
    assert parsed("svt:0.2:3").amounts == (0.2, 3.0, 0.1, 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dropout", "unknown; choose from none, dp-sgd"),
        ("topk", "is written topk:SHARE"),
        ("int8:4", "is written int8"),
        ("topk:0", "SHARE must be above 0, and at most 1"),
        ("topk:1.5", "SHARE must be above 0, and at most 1"),
        ("percentile:101", "P must be 0 or more, and at most 100"),
        ("dp-sgd:nan:1", "C must be above 0"),
        ("batch:1:much", "SIGMA is 'much', not a number"),
        ("larger-batch:2.5", "B is '2.5', not a whole number"),
    ],
)
def test_what_is_no_defence_is_refused(text, says):
    with pytest.raises(InputError, match=f"^--defence {text}: {says}"):
        settings_from(flags("--defence", text))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("topk:0.1", "--enable-dp", "-C", "1"), "--enable-dp is a defence of its own"),
        (("topk:0.1", "-C", "1"), "-C 1: belongs to --enable-dp"),
        (("topk:0.1", "--noise-seed", "1"), "--noise-seed 1: --defence topk:0.1 draws nothing"),
        (("batch:1:1", "--dp-steps", "2"), "--dp-steps: is for epsilon"),
        (("int8", "--sample-rate", "0.5"), "--sample-rate: is for epsilon"),
        (("int8", "--dp-mode", "per-sample"), "--dp-mode per-sample: belongs to --enable-dp"),
    ],
)
def test_what_contradicts_a_defence_is_refused(given, says):
    with pytest.raises(InputError, match=says):
        settings_from(flags("--defence", *given))


def test_a_defence_may_stand_for_another_flag():
    args = flags("--replace-bn", "groupnorm")
    for text, changed in (("groupnorm", {}), ("larger-batch:9", {"batch_size": 9}), ("none", {})):
        found = with_defence(args, text)
        assert vars(found) == {**vars(args), "defence": text, **changed}
        settings = settings_from(found)
        assert settings.protection is None
        assert settings.batch.size == found.batch_size
        assert settings.record["defence"] == text
    assert args.defence is None
    assert settings_from(flags("--defence", "groupnorm")).network.replace_bn == "groupnorm"
    assert settings_from(with_defence(args, "local-steps:4")).local.steps == 4


def test_clipping_and_noise_are_those_of_the_other_flags(tmp_path):
    given = ("-a", "lenet", "-b", "4", "--noise-seed", "3")
    dp = ("--enable-dp", "-C", "0.5", "--sigma", "0.25")
    for text, other in (("dp-sgd:0.5:2", ("--dp-mode", "per-sample")), ("batch:0.5:0.25", ())):
        name = text[:2]
        ours = load(str(capture_photos(tmp_path / name, *given, "--defence", text)))
        theirs = load(str(capture_photos(tmp_path / f"{name}-flags", *given, *dp, *other)))
        assert ours["protection"] == theirs["protection"]
        for a, b in zip(ours["target_gradient"], theirs["target_gradient"], strict=True):
            assert torch.equal(a, b)


# The record, and what follows ---------------------------------------------------------------

RECORDS = {
    "topk:0.1": Protection("topk", 0.0, None, amount=0.1),
    "random:0.3": Protection("random", 0.0, None, amount=0.3),
    "percentile:90:0.02": Protection("percentile", 0.0, None, amount=90.0, largest=0.02),
    "svt:0.2:0.1:0.5:0.01": Protection("svt", math.sqrt(2) * 0.04, None, amount=0.2, largest=0.01),
    "int8": Protection("int8", 0.0, None, amount=8.0),
    "sign": Protection("sign", 0.0, None, amount=1.0),
}


@pytest.mark.parametrize("text", RECORDS)
def test_a_defence_comes_back_from_its_checkpoint(text, tmp_path, captured):
    name, record = text.partition(":")[0], RECORDS[text]
    options = ("-a", "lenet", "-b", "2", "--with-control", "--decoys", "1")
    whole = load(str(captured(*options)))
    found = load(str(capture_photos(tmp_path, *options, "--defence", text)))
    target = target_from_checkpoint(found)
    assert asdict(target.protection) == pytest.approx(asdict(record))
    share = {"topk": 0.1, "random": 0.3}.get(name)
    masks = []
    for source, before in ((found, whole), (found["control"], whole["control"])):
        sent, true = flat(source["target_gradient"]), flat(before["target_gradient"])
        kept = sent != 0
        masks.append(kept)
        if share is not None:
            assert kept.sum() == kept_count(share, len(true))
            assert torch.equal(sent[kept], true[kept])
        elif name in ("percentile", "svt"):
            assert sent.abs().max() <= torch.tensor(record.largest)
        else:
            assert torch.nn.functional.cosine_similarity(sent, true, dim=0) > 0.5
    assert (target.sent is not None) == (name in SPARSE_MODES)
    if target.sent is not None:
        assert torch.equal(flat(target.sent), masks[0])
        assert not torch.equal(*masks)  # the control's is its own
    (log,) = tmp_path.glob("*.log")
    assert f"defence: {record.description}" in log.read_text()
    why = f"this carries no differential-privacy guarantee: {NO_PRIVACY[name]}"
    assert why in log.read_text()
    assert guarantee_lines(target.protection, model_of(target), train_mode=True, uploads_bn=False) \
        == [why]  # fmt: skip


def test_records_of_before_are_read(captured):
    checkpoint = load(str(captured("-a", "lenet", "-b", "2")))
    old = {"mode": "batch", "sigma": 0.1, "clip": 1.0}
    assert target_from_checkpoint(checkpoint | {"protection": old}).protection == Protection(
        "batch", 0.1, 1.0
    )


def test_a_share_of_one_is_all():
    model = build_model("lenet", 8, (3, 32, 32))
    target = target_of(model, *photos(2, 32, target_idx=10))
    gradient = (torch.zeros_like(target.gradient[0]), *target.gradient[1:])
    for amount, whole in ((1.0, True), (0.5, False)):
        protection = Protection("topk", 0.0, None, amount=amount)
        sparse = replace(target, gradient=gradient, protection=protection)
        assert (sparse.sent is None) == whole


@pytest.mark.parametrize(
    ("kappa", "mu", "bound"),
    [
        (0.5, 1.0, 0.8413447460685429),  # Φ(1)
        (0.022750131948179195, 2.0, 0.5),  # Φ(−2 + 2)
        (0.01, 1.0, 0.0923622),  # Φ(−2.3263479 + 1) = Φ(−1.3263479)
        (0.01, 0.0, 0.01), (0.0, 3.0, 0.0), (1.0, 3.0, 1.0),
    ],
)  # fmt: skip
def test_the_bound_for_any_attacker(kappa, mu, bound):
    """Also the power of the most powerful test of N(0, 1) against N(mu, 1) at level kappa."""
    assert reconstruction_bound(kappa, mu) == pytest.approx(bound, rel=1e-6)
    if 0 < kappa < 1:
        power = normal.sf(normal.isf(kappa), loc=mu)
        assert reconstruction_bound(kappa, mu) == pytest.approx(power, rel=1e-9)


def test_the_bound_is_not_exceeded_by_the_best_guess():
    """One of four images is in the sum, at a distance of C; the likeliest is named."""
    generator, mu = np.random.default_rng(0), 1.5
    truth = generator.integers(4, size=200_000)
    released = generator.standard_normal((200_000, 4))
    released[np.arange(200_000), truth] += mu  # four orthogonal gradients of norm C = mu · σ
    hits = (released.argmax(1) == truth).mean()
    assert 0.25 < hits <= reconstruction_bound(0.25, mu)
    for wrong in ((-0.1, 1.0), (1.1, 1.0), (0.5, -1.0)):
        with pytest.raises(ValueError, match="kappa"):
            reconstruction_bound(*wrong)


def test_mu_is_recorded_and_said(tmp_path):
    """C = 0.5 and noise of 2 · 0.5 in the sum: mu = 1 / 2, and twice that after four steps."""
    given = ("-a", "lenet", "-b", "4", "--defence", "dp-sgd:0.5:2", "--dp-steps", "4")
    record = target_from_checkpoint(load(str(capture_photos(tmp_path, *given)))).protection
    assert record.mu == pytest.approx(0.5)
    assert record.mu == pytest.approx(record.clip / (record.sigma * 4))
    (log,) = tmp_path.glob("*.log")
    said = bound_sentence(0.5, 4)
    assert said in log.read_text()
    assert "mu 0.5: whatever the attack" in said
    assert f"at most {normal.cdf(normal.ppf(0.01) + 0.5):.3g}; after 4 gradients (mu 1)" in said
    assert f"of at most {normal.cdf(normal.ppf(0.01) + 1):.3g}" in said
    assert gaussian_mu(0.0) is None


# What the attacker makes of it --------------------------------------------------------------


def defended(target, how, seed=0):
    """A target whose gradient went through the defence that a record describes."""
    sent = {
        "topk": lambda g: largest_entries(g, how.amount),
        "random": lambda g: random_entries(g, how.amount, drawing(seed)),
        "percentile": lambda g: above_percentile(g, how.amount, how.largest),
        "int8": rounded_to_int8,
        "sign": scaled_signs,
    }[how.mode](target.gradient)
    return replace(target, gradient=tuple(sent), protection=how)


def cut_at(target):
    """A magnitude that a tenth of the entries exceed."""
    return flat(target.gradient).abs().quantile(0.9).item()


def small_case(mode, distance, *, batch_size=3):
    """Objective, candidate and target of a smooth network in float64, whose entries are masked."""
    generator = drawing(5)
    torch.manual_seed(0)
    model = smooth_network()
    x, other = torch.randn(2, batch_size, 3, 8, 8, dtype=torch.float64, generator=generator)
    y = torch.arange(batch_size) % 4
    target = target_of(model, x, y, train_mode=False, num_classes=4)
    how = {
        "topk": Protection("topk", 0.0, None, amount=0.3),
        "percentile": Protection("percentile", 0.0, None, amount=60.0, largest=cut_at(target)),
    }[mode]
    target = defended(target, how)
    return Objective(model, target, y, Weights(), distance_name=distance), other, target


@pytest.mark.parametrize("distance", ["sim", "L2"])
@pytest.mark.parametrize("mode", ["topk", "percentile"])
def test_only_what_was_sent_is_compared(mode, distance):
    """A slow twin: the entries one by one, as a list, and autograd."""
    objective, x, target = small_case(mode, distance)
    candidate = x.clone().requires_grad_()
    gradient = flat(
        batch_gradient(objective.model, candidate, objective.y, target.loss, create_graph=True)
    )
    goal = flat(target.gradient)
    places = [i for i, value in enumerate(goal.tolist()) if value != 0]
    assert 0 < len(places) < len(goal)
    ours, theirs = gradient[places], goal[places]
    largest = target.protection.largest
    if largest is not None:
        assert (theirs.abs() == largest).any()
        assert (ours.detach().abs() > largest).any()
        limit = torch.tensor(largest, dtype=torch.float64)
        ours = torch.minimum(torch.maximum(ours, -limit), limit)
    if distance == "L2":
        slow = (ours - theirs).square().sum()
    else:
        slow = 1 - ours @ theirs / (ours.norm() * theirs.norm())
    (derivative,) = torch.autograd.grad(slow, candidate)
    for function in (exact, plain):
        losses, found = function(objective, x)
        assert losses.gradient.item() == pytest.approx(slow.item(), rel=1e-9)
        torch.testing.assert_close(found, derivative, rtol=1e-8, atol=1e-14)
    assert objective.gradient_distance(x) == pytest.approx(slow.item(), rel=1e-9)
    assert objective.value(x).gradient.item() == pytest.approx(slow.item(), rel=1e-9)


def test_of_a_whole_gradient_nothing_is_masked():
    objective, x, target = small_case("topk", "sim")
    whole = replace(target, protection=Protection("int8", 0.0, None, amount=8.0))
    objective = Objective(objective.model, whole, objective.y, Weights())
    gradient = objective.gradient(x)
    assert objective.seen(gradient) is gradient


@pytest.mark.parametrize(("mode", "search"), [("topk", "gram"), ("percentile", "greedy")])
def test_seeds_are_combined_by_what_was_sent(mode, search):
    objective, x, _ = small_case(mode, "sim", batch_size=2)
    generator = drawing(1)
    seeds = [x + torch.randn(x.shape, dtype=x.dtype, generator=generator) for _ in range(3)]
    assert combination_method(objective, 3, 2**30)[0] == search
    found = combine(objective, seeds)
    best = brute_force(objective, seeds)
    if search == "gram":
        assert found.loss == pytest.approx(best, rel=1e-6)
    assert best * (1 - 1e-9) <= found.loss <= min(map(objective.gradient_distance, seeds))


def lenet_target(labels=(5, 1), size=16):
    torch.manual_seed(0)
    model = build_model("lenet", 8, (3, size, size))
    x, y = photos(len(labels), size, target_idx=10)[0], torch.tensor(labels)
    return model, target_of(model, x, y, train_mode=False), y


def walked(model, target, y):
    public = photos(8, 16, target_idx=11)[0]
    return layerwise_attack(model, target, y, public)


def test_the_walk_takes_no_zero_for_a_fact():
    """A tensor that lacks an entry is not used; what was sent whole is."""
    model, target, y = lenet_target()
    names = list(trainable_parameters(model))
    sparse = defended(target, Protection("random", 0.0, None, amount=0.5))
    found = walked(model, sparse, y)
    assert found.stopped.endswith("sent in part: the client's defence left the rest out")
    assert not found.certified
    # all is sent but for one entry of the first convolution
    gradient = list(target.gradient)
    gradient[0] = gradient[0].clone()
    gradient[0].view(-1)[3] = 0
    how = Protection("random", 0.0, None, amount=0.9)
    sparse = replace(target, gradient=tuple(gradient), protection=how)
    assert set(names) - set(whole_tensors(model, sparse)) == {names[0]}
    found, whole = walked(model, sparse, y), walked(model, target, y)
    assert names[0].removesuffix(".weight") in found.stopped
    assert "sent in part" in found.stopped
    assert len(found.certified) == len(whole.certified) - 1
    assert whole.method == "solved"


def test_a_cut_tensor_is_not_whole():
    model, target, _ = lenet_target()
    how = Protection("percentile", 0.0, None, amount=0.0, largest=cut_at(target))
    names, sent = list(trainable_parameters(model)), defended(target, how)
    cut = {n for n, g in zip(names, target.gradient, strict=True) if g.abs().max() >= how.largest}
    zero = {n for n, g in zip(names, target.gradient, strict=True) if not g.all()}
    assert set(names) - set(whole_tensors(model, sent)) == cut | zero
    assert cut


def test_rounding_to_8_bits_counts_as_noise():
    model, target, y = lenet_target()
    sent = defended(target, Protection("int8", 0.0, None, amount=8.0))
    for (name, accuracy), g, s in zip(
        accuracies(model, sent).items(), target.gradient, sent.gradient, strict=True
    ):
        error = ((g - s).norm() / s.norm()).item()
        step = g.abs().max().item() / 127
        expected = step / math.sqrt(12) * math.sqrt(g.numel()) / s.norm().item()
        assert accuracy.noise == pytest.approx(expected, rel=1e-4), name
        if g.numel() > 200:
            assert error == pytest.approx(expected, rel=0.25), name
    assert len(walked(model, sent, y).certified) < len(walked(model, target, y).certified)


def test_signs_hold_no_equation():
    model, target, y = lenet_target()
    with pytest.raises(ValueError, match="signs of its gradient alone"):
        walked(model, defended(target, Protection("sign", 0.0, None, amount=1.0)), y)


@pytest.mark.parametrize("mode", ["topk", "random", "percentile", "int8", "sign"])
def test_labels_are_not_claimed_to_be_certain(mode):
    amount = {"topk": 0.2, "random": 0.5, "percentile": 50.0, "int8": 8.0, "sign": 1.0}[mode]
    model, target, y = lenet_target((5, 1, 5, 2, 5))
    largest = 1e-3 if mode == "percentile" else None
    sent = defended(target, Protection(mode, 0.0, None, amount=amount, largest=largest))
    plain_result = reconstruct_labels(target, LabelInputs(model))
    assert plain_result.certain
    found = reconstruct_labels(sent, LabelInputs(model))
    assert not found.certain
    what = {"int8": "rounded to 8 bits", "sign": "only signs were sent"}
    assert what.get(mode, "entries of the gradient were left out") in found.reason
    if mode != "int8":  # these bounds hold without noise
        assert (found.lower_bounds <= torch.bincount(y, minlength=8)).all()
    if mode == "sign":
        assert set(found.labels.tolist()) == set(y.tolist())
    evidence = gather_evidence(model, sent)
    steps = [g.abs().max().item() / 127 / math.sqrt(12) for g in sent.gradient[-2:]]
    assert evidence.sigma == pytest.approx(max(steps) if mode == "int8" else 0.0)


def test_the_attacker_is_told(tmp_path, captured):
    """Plan, result and score say what was done; layer by layer the signs are refused."""
    path = captured("-a", "lenet", "-b", "2", "--defence", "topk:0.2")
    result, folder = attack(tmp_path, path, "--epochs", 2, "--metric")
    assert result["target"]["protection"]["amount"] == 0.2
    told = (folder / "log.txt").read_text()
    assert "the client's protection: topk, 0.2 of the entries, the largest ones; this" in told
    assert "no differential-privacy guarantee: the entries sent are exact, and one image" in told
    signs = captured("-a", "lenet", "-b", "2", "--defence", "sign")
    outcome = call(
        "run.py", "--root", tmp_path, "--checkpoint", signs, "--attack", "layerwise"
    )  # fmt: skip
    assert outcome.code == 2
    assert "--attack layerwise: the client sent the signs of its gradient alone" in outcome.err
