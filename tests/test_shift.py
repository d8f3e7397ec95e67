"""The shift method: signals, masks and inputs of a 3×3 convolution out of its weight gradient."""

import pytest
import torch
from torch.nn.functional import max_pool2d
from torch.nn.grad import conv2d_weight

from inversion.layerwise.shift.factors import shift_factors
from inversion.layerwise.shift.gauge import (
    gauge_by_signals,
    least_squares,
    match_to_signals,
)
from inversion.layerwise.shift.nonnegative import gauge_by_nonnegativity
from inversion.layerwise.shift.repair import repair_masks
from inversion.layerwise.shift.routing import routing_masks
from inversion.layerwise.shift.taps import (
    inputs_for,
    outputs_for,
    shifted_inputs,
    shifted_outputs,
    tap_slices,
)
from models.build import build_model, init_head
from models.gradient import ClientLoss, batch_gradient, trainable_parameters
from train.datasets import DATASETS, normalise
from train.photos import photo_batch

CHANNELS = 48


def layer(batch, height, width, *, seed=0, outputs=CHANNELS, inputs=CHANNELS, same=False):
    """Gradient, routed signal (B, O, h, w), masks and ReLU inputs of a layer before pooling."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    u = (normal(batch, inputs, height, width) + 0.2).relu()
    signal = normal(batch, outputs, 1, 1)
    if same:  # two images of one class
        signal[1] = signal[0] * (1 + 1e-3 * normal(outputs, 1, 1))
    routed = signal.expand(-1, -1, height, width).contiguous()
    masks = normal(batch, outputs, height, width) > 0
    return gradient_of(u, routed * masks), routed, masks, u


def pooled_layer(batch, side, *, seed=0):
    """The same before 2×2 max-pooling: the signal varies over windows, one position each has it."""
    _, _, _, u = layer(batch, side, side, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (batch, CHANNELS, side, side)
    activation = torch.randn(*shape, generator=generator, dtype=torch.float64).relu()
    activation.requires_grad_(True)
    pooled = max_pool2d(activation, 2)
    signal = torch.randn(pooled.shape, generator=generator, dtype=torch.float64)
    (arrived,) = torch.autograd.grad(pooled, activation, signal * (pooled > 0))
    routed = signal.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return gradient_of(u, arrived), routed, arrived != 0, u


def gradient_of(u, signal):
    return conv2d_weight(u, (signal.shape[1], u.shape[1], 3, 3), signal, padding=1)


def noisy(gradient, size, seed=3):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
    return gradient + size * gradient.square().mean().sqrt() * draw


def as_outputs(images):
    return images.flatten(2).permute(1, 2, 0)


def as_inputs(images):
    return images.flatten(2).permute(2, 0, 1)


def inputs_of(gradient, routed, routing):
    """The inputs that fit the masks best."""
    return repair_masks(gradient, routed, routing.masks, rounds=0)[1]


def mixing(batch, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, batch, generator=generator, dtype=torch.float64)


def explained_by_mixing(found, true):
    """The largest relative error of `true` (n, B) as found (n, B) times one B×B matrix."""
    matrix = torch.linalg.lstsq(found, true).solution
    return ((found @ matrix - true).norm() / true.norm()).item()


def test_taps_are_the_products_of_shifted_matrices():
    height, width, batch = 2, 3, 2
    gradient, routed, masks, u = layer(batch, height, width)
    shape = (height, width, batch)
    d, x = as_outputs(routed * masks).flatten(1), as_inputs(u).flatten(0, 1)
    slices = tap_slices(gradient)
    torch.testing.assert_close(d @ shifted_inputs(x, shape), slices)
    torch.testing.assert_close(shifted_outputs(d, shape) @ x, slices)
    torch.testing.assert_close(inputs_for(slices, d, shape), x)
    torch.testing.assert_close(outputs_for(slices, x, shape), d)


def test_least_squares_solves_and_stays_finite_where_the_rank_is_too_small():
    matrix, target = mixing(6)[:, :4], mixing(6, seed=8)[:, :2]
    expected = torch.linalg.pinv(matrix) @ target
    torch.testing.assert_close(least_squares(matrix, target), expected)
    matrix[:, 3] = 0
    found = least_squares(matrix, target)
    torch.testing.assert_close(matrix @ found, matrix @ (torch.linalg.pinv(matrix) @ target))
    assert least_squares(torch.zeros_like(matrix), target).isfinite().all()


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 3), (2, 2, 2), (3, 2, 4), (4, 3, 3)])
def test_factors_are_the_truth_up_to_one_matrix_for_all_positions(batch, height, width):
    gradient, routed, masks, u = layer(batch, height, width)
    factors = shift_factors(gradient, height, width, batch)
    assert factors.residual < 1e-9
    assert factors.gap[0] > 1e-4
    assert factors.gap[1] < 1e-6
    assert factors.outputs.shape == (CHANNELS, height * width, batch)
    assert factors.inputs.shape == (height * width, batch, CHANNELS)
    true = as_outputs(routed * masks)
    assert explained_by_mixing(factors.outputs.flatten(0, 1), true.flatten(0, 1)) < 1e-8
    rows = factors.inputs.transpose(1, 2).flatten(0, 1)
    assert explained_by_mixing(rows, as_inputs(u).transpose(1, 2).flatten(0, 1)) < 1e-8


def test_a_gradient_without_the_structure_is_not_split():
    gradient, *_ = layer(2, 2, 2)
    shuffled = gradient.flip(2, 3)[:, torch.randperm(CHANNELS, generator=torch.Generator())]
    shuffled = shuffled + noisy(gradient, 1.0)
    assert shift_factors(shuffled, 2, 2, 2).residual > 0.01


@pytest.mark.parametrize(("batch", "side"), [(1, 2), (2, 2), (4, 2), (1, 3), (2, 3), (4, 3)])
def test_masks_and_inputs_are_recovered(batch, side):
    gradient, routed, masks, u = layer(batch, side, side)
    routing = routing_masks(gradient, routed, side, side)
    assert torch.equal(routing.masks, masks)
    assert not routing.undecided.any()
    assert routing.residual < 1e-9
    torch.testing.assert_close(inputs_of(gradient, routed, routing), u)


def test_signals_undo_a_known_mixture():
    """By all patterns of bits, two images' signals alike or not; large batches by a programme."""
    for batch, same in ((3, False), (3, True), (12, False)):
        _, routed, masks, _ = layer(batch, 2, 2, same=same)
        true, matrix = as_outputs(routed * masks), mixing(batch)
        gauge = gauge_by_signals(true @ matrix, routed)
        torch.testing.assert_close(gauge, torch.linalg.inv(matrix))


def test_nonnegative_inputs_undo_a_known_mixture_up_to_factors_and_order():
    for batch in (1, 4):
        _, routed, masks, u = layer(batch, 3, 3)
        true, matrix = as_outputs(routed * masks), mixing(batch)
        gauge = gauge_by_nonnegativity(torch.linalg.inv(matrix) @ -as_inputs(u))
        unmixed = torch.linalg.inv(matrix @ gauge)
        assert ((unmixed.abs() > 1e-6 * unmixed.abs().max()).sum(0) == 1).all()
        assert (unmixed.sum(0) < 0).all()  # the inputs were handed over negative
        matched = match_to_signals(true @ matrix, -gauge, routed)
        torch.testing.assert_close(matched, torch.linalg.inv(matrix))


@pytest.mark.parametrize("batch", [3, 11])
def test_two_images_with_almost_the_same_signals_are_told_apart(batch):
    gradient, routed, masks, _ = layer(batch, 2, 2, same=True)
    routing = routing_masks(gradient, routed, 2, 2)
    assert torch.equal(routing.masks, masks)
    assert routing.residual < 1e-9


@pytest.mark.parametrize("batch", [1, 3])
def test_masks_behind_max_pooling_whose_signal_varies_over_windows(batch):
    gradient, routed, masks, u = pooled_layer(batch, 4)
    assert routed[0, 0].unique().numel() == 4
    routing = routing_masks(gradient, routed, 4, 4)
    assert torch.equal(routing.masks, masks)
    assert routing.residual < 1e-9
    torch.testing.assert_close(inputs_of(gradient, routed, routing), u)


def test_entries_without_signal_are_undecided():
    gradient, routed, masks, u = layer(2, 2, 2)
    routed[0, 3] = 0
    gradient = gradient_of(u, routed * masks)
    routing = routing_masks(gradient, routed, 2, 2)
    assert routing.undecided[0, 3].all()
    assert routing.undecided.sum() == 4
    assert torch.equal(routing.masks & ~routing.undecided, masks & ~routing.undecided)
    assert not routing.masks[0, 3].any()


def test_masks_of_a_resnet_from_a_float32_gradient():
    torch.manual_seed(20)
    x, _ = photo_batch(2, 20, 64, seed=20)
    x, y = normalise(x, DATASETS["photos"]), torch.tensor([1, 5])
    model = build_model("resnet18", 8, (3, 64, 64))
    init_head(model, "normal")
    gradient = dict(
        zip(
            trainable_parameters(model),
            batch_gradient(model, x, y, ClientLoss(train_mode=False)),
            strict=True,
        )
    )
    block, seen = model.eval().layer4[-1], []
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    probabilities = model(x).softmax(1)
    (activation,) = seen
    by_features = (probabilities - torch.eye(8)[y]) @ model.fc.weight / len(x)
    scale = block.bn2.weight / (block.bn2.running_var + block.bn2.eps).sqrt()
    routed = (scale * by_features / 4).detach()[:, :, None, None].expand(-1, -1, 2, 2)
    routing = routing_masks(gradient["layer4.1.conv2.weight"], routed, 2, 2)
    assert routing.masks.dtype == torch.bool
    assert torch.equal(routing.masks, activation > 0)
    assert routing.residual < 1e-6


def test_what_shifts_cannot_identify_is_refused():
    gradient, routed, _, _ = layer(2, 3, 3, outputs=17)
    with pytest.raises(ValueError, match=r"2 images of 3×3 positions need 18 .* 48 → 17"):
        routing_masks(gradient, routed, 3, 3)
    with pytest.raises(ValueError, match="1×1 map"):
        shift_factors(gradient, 1, 1, 2)
    with pytest.raises(ValueError, match="none of 3×3 taps"):
        shift_factors(gradient[..., :1, :1], 2, 2, 2)
    with pytest.raises(ValueError, match="17 channels of 2×2"):
        routing_masks(gradient, routed, 2, 2)


def test_noise_leaves_the_masks_of_strong_signals():
    gradient, routed, masks, _ = layer(2, 2, 2)
    routing = routing_masks(noisy(gradient, 1e-3), routed, 2, 2)
    assert torch.equal(routing.masks, masks)
    assert 5e-4 < routing.residual < 2e-3
    routing = routing_masks(noisy(gradient, 3e-2), routed, 2, 2)
    assert 1e-2 < routing.residual < 6e-2
    assert torch.equal(routing.masks[~routing.undecided], masks[~routing.undecided])
    assert 0 < routing.undecided.sum() < masks.numel() / 5


@pytest.mark.parametrize(
    "kind", ["noise", "other signals", "zero", "not finite", "small rank", "silent"]
)
def test_where_nothing_fits_the_residual_says_so(kind):
    gradient, routed, _, _ = layer(3, 2, 2)
    if kind == "noise":
        gradient = noisy(0 * gradient + 1e-3, 1e3)
    elif kind == "other signals":
        routed = layer(3, 2, 2, seed=9)[1]
    elif kind == "small rank":
        gradient = gradient[:1] * routed[0, :, 0, 0, None, None, None]
    else:
        gradient = 0 * gradient + (0 if kind == "zero" else torch.inf)
    routing = routing_masks(gradient, routed, 2, 2)
    assert routing.residual > 0.1


def test_flips_that_only_make_up_for_signals_that_are_off_are_taken_back():
    gradient, routed, masks, _ = layer(2, 3, 3)
    generator = torch.Generator().manual_seed(5)
    routed[1] += 0.05 * torch.randn(CHANNELS, 1, 1, generator=generator, dtype=torch.float64)
    routing = routing_masks(gradient, routed, 3, 3)
    repaired, _, residual = repair_masks(gradient, routed, routing.masks)
    assert residual < routing.residual < 0.1
    wrong, more = (routing.masks != masks).sum(), (repaired != masks).sum()
    assert 5 * wrong < more


def test_an_image_whose_signal_is_unknown_leaves_the_others_right():
    gradient, routed, masks, _ = layer(3, 2, 2)
    routed[1] = 0
    routing = routing_masks(gradient, routed, 2, 2)
    assert routing.residual > 0.1
    assert torch.equal(routing.masks[[0, 2]], masks[[0, 2]])
    assert routing.undecided[1].all()
    assert not routing.masks[1].any()


@pytest.mark.parametrize("flips", [1, 4])
def test_flipped_bits_show_in_the_residual_and_are_repaired(flips):
    gradient, routed, masks, u = layer(2, 3, 3)
    wrong = masks.clone()
    places = torch.randperm(masks.numel(), generator=torch.Generator().manual_seed(0))[:flips]
    wrong.view(-1)[places] ^= True
    assert repair_masks(gradient, routed, wrong, rounds=0)[2] > 1e-4
    repaired, inputs, residual = repair_masks(gradient, routed, wrong)
    assert torch.equal(repaired, masks)
    assert residual < 1e-9
    torch.testing.assert_close(inputs, u)
