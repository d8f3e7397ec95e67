"""What several processes and one compute alike; tests/test_distributed.py compares it."""

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from inversion.audit.information import gradient_information_ratio
from inversion.combine import combine
from inversion.first_order import finite_differences
from inversion.mlco import mlco
from inversion.objective import Objective
from inversion.optimise import reconstruct
from inversion.pixel_gradient import exact, plain, prior_only
from inversion.restarts import Restarts, initial_images, noise_generator
from inversion.settings import Loop, MLCOSchedule, Weights
from inversion.strategies import best, mean
from models.gradient import ClientLoss, couples_samples, whole_batch_gradient
from tests.support import photos, smooth_network, target_of
from train.privacy import Mechanism, protect_per_sample
from utils.shard import ALONE

SIZE = 16
WEIGHTS = Weights(2.0, {"tv": 0.1, "bn": 0.01, "norm": -1e-3, "group": 0.5})


def network(name, dtype=torch.float64):
    torch.manual_seed(0)
    if name == "conv":
        model = smooth_network(8)
    if name == "residual":  # as resnet18, with two blocks and few channels
        down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1), BasicBlock(8, 8), BasicBlock(8, 16, 2, down),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8),
        )  # fmt: skip
    if name == "no affine":
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Softplus(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 8),
        )  # fmt: skip
    if name == "untracked":  # batch statistics in eval mode too, and a layer without shift
        layers = [nn.BatchNorm2d(width, track_running_stats=False) for width in (4, 5)]
        layers[1].bias = None
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), layers[0], nn.Softplus(), nn.Conv2d(4, 5, 3), layers[1],
            nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 8),
        )  # fmt: skip
    return model.to(dtype)


def batch(batch_size, dtype=torch.float64):
    x, y = photos(batch_size, SIZE, target_idx=1)
    return x.to(dtype), y


def objective_of(
    shard, name, batch_size, dtype=torch.float64, *, train_mode=True, device="cpu", **options
):
    model, (x, y) = network(name, dtype), batch(batch_size, dtype)
    target = target_of(model, x, y, train_mode=train_mode)
    options = {"weights": WEIGHTS, "bn_source": "batch"} | options
    return Objective(model.to(device), target, y, batch_shard=shard, **options)


def start(seed, batch_size, dtype=torch.float64):
    return initial_images(seed, batch_size, (3, SIZE, SIZE), dtype)


def derivatives(shard, device="cpu"):
    """Losses and ∂objective/∂x of every kind of objective, whole: name → tensor."""
    found = {}
    cases = [("conv", size, method, {}) for size in (6, 7) for method in (exact, plain)]
    cases += [("residual", 7, exact, {})]
    cases += [("conv", 2, exact, {}), ("no affine", 7, exact, {})]
    cases += [
        ("conv", 7, exact, {"train_mode": False}),
        ("conv", 7, plain, {"distance_name": "L2"}),
    ]
    cases += [("residual", 6, exact, {"bn_grad": "detached"})]
    cases += [("conv", size, finite_differences, {}) for size in (7, 2)]
    cases += [("conv", 7, finite_differences, {"train_mode": False})]
    forced = {"bn_coupling": "forced"}
    cases += [("conv", 7, finite_differences, forced)]
    cases += [("residual", 7, exact, forced), ("conv", 2, exact, forced)]
    cases += [("residual", 7, exact, forced | {"chunk_size": 2})]
    evaluated = {"train_mode": False, "chunk_size": 1}
    cases += [("conv", 2, method, evaluated) for method in (exact, prior_only)]
    cases += [("conv", size, prior_only, {}) for size in (7, 2)]
    cases += [
        ("untracked", 7, exact, {"train_mode": mode, "bn_grad": derivative})
        for mode in (True, False)
        for derivative in ("exact", "detached")
    ]
    for name, size, method, options in cases:
        objective = objective_of(shard, name, size, device=device, **options)
        objective = objective.with_consensus(start(9, size).to(device))
        losses, own = method(objective, objective.local_part(start(1, size).to(device)), 0.5)
        key = f"{name} {size} {method.__name__} {options}"
        found[key] = shard.gather(own, size)
        values = [losses.total, losses.criterion, *losses.terms.values()]
        found[f"{key} losses"] = torch.stack(values)
    return found


def captures(shard):
    """What a client sends: gradients and BN statistics, whole."""
    found = {}
    for name, size in (("conv", 7), ("residual", 6), ("conv", 2), ("untracked", 7)):
        model = network(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        for mode in (True, False):
            sent = whole_batch_gradient(
                model, *batch(size), ClientLoss(mode, 0.1), shard, moments=True
            )
            for part in ("gradient", "bn_mean", "bn_var"):
                flat = torch.cat([t.flatten() for t in getattr(sent, part)])
                found[f"{name} {size} {mode} {part}"] = flat
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return found


def measures(shard):
    """Gradient information ratio and clipped samples, whole: name → tensor."""
    found = {}
    for name, size, mode in (
        ("conv", 7, True), ("conv", 7, False), ("conv", 2, True), ("conv", 2, False),
        ("residual", 6, True), ("untracked", 7, False),
    ):  # fmt: skip
        model, (x, y) = network(name), batch(size)
        loss = ClientLoss(mode, 0.1)
        information = gradient_information_ratio(model, x, y, loss, shard)
        for figure, value in vars(information).items():
            if figure == "sign_rate" and couples_samples(model, mode):
                continue  # a bias before BatchNorm has no gradient: the sign of its rounding
            found[f"{name} {size} {mode} {figure}"] = torch.as_tensor(value).double()
        if not couples_samples(model, mode):
            gradient = whole_batch_gradient(model, x, y, loss, shard).gradient
            how = Mechanism(0.1, 0.5, torch.Generator().manual_seed(0))
            sent = protect_per_sample(gradient, how, model, x, y, loss, shard)
            found[f"{name} {size} clipped"] = torch.cat([g.flatten() for g in sent.gradient])
            found[f"{name} {size} norms"] = sent.sample_norms
    return found


def runs(shard):
    """Twenty steps without signs, with noise and box; combinations; MLCO."""
    objective = objective_of(shard, "conv", 7)
    loop = Loop(20, 0.02, noise=0.1, box=(torch.full((3, 1, 1), -3.0), torch.full((3, 1, 1), 3.0)))
    result = reconstruct(
        lambda x, p: exact(objective, x, p), start(1, 7), loop,
        generator=noise_generator(1, torch.device("cpu")), batch_shard=shard,
    )  # fmt: skip
    found = {"run": result.x, "run loss": torch.tensor([result.losses.total])}
    for mode in (True, False):
        objective = objective_of(shard, "conv", 7, train_mode=mode)
        chosen = combine(objective, [start(seed, 7) for seed in range(3)])
        found[f"combine {mode}"] = torch.tensor(chosen.choice)
        found[f"combine {mode} loss"] = torch.tensor([chosen.loss, *chosen.seed_losses])
    forced = objective_of(shard, "conv", 7, bn_coupling="forced")
    chosen = combine(forced, [start(seed, 7) for seed in range(3)])
    found["combine forced"] = torch.tensor(chosen.choice)
    found["combine forced loss"] = torch.tensor([chosen.loss, *chosen.seed_losses])
    outcome = strategy(mlco, objective, schedule=MLCOSchedule(inner_steps=2))
    found["mlco"] = outcome.final.x
    return found


def strategy(which, objective, **options):
    starts = [start(seed, 7) for seed in range(3)]
    generators = [noise_generator(seed, torch.device("cpu")) for seed in range(3)]
    return which(
        objective, exact, Restarts(starts, generators, Loop(8, 0.02, noise=0.1), **options)
    )


def whole_seeds(shard):
    """Whole seeds shared out: the same bits as in one process."""
    found = {}
    objective = objective_of(ALONE, "conv", 7)
    schedule = {"schedule": MLCOSchedule(inner_steps=2)}
    for which, options in ((best, {}), (mean, {}), (mlco, schedule)):
        outcome = strategy(which, objective, seed_shard=shard, **options)
        found[which.__name__] = outcome.final.x
        found[f"{which.__name__} runs"] = torch.stack([run.x for run in outcome.runs])
        found[f"{which.__name__} iterations"] = torch.tensor([float(outcome.iterations)])
    return found


def sign_objective(shard):
    weights = Weights(1.0, {"tv": 1e-2, "bn": 1e-2})
    return objective_of(shard, "residual", 8, torch.float32, weights=weights)


def sign_descent():
    """Twenty iterates of a sign-descent run of one process, float32, and the signs there."""
    objective, x = sign_objective(ALONE), start(3, 8, torch.float32)
    iterates, signs = [], []
    for _ in range(20):
        iterates.append(x)
        signs.append(exact(objective, x)[1].sign())
        x = x - 0.05 * signs[-1]
    return torch.stack(iterates), torch.stack(signs)


def signs_at(shard, iterates):
    objective = sign_objective(shard)
    found = [shard.gather(exact(objective, objective.local_part(x))[1], 8).sign() for x in iterates]
    return torch.stack(found)


#: What every number of processes computes; the rest takes long where three share two cores.
PARTS = (derivatives, captures, whole_seeds)


def everything(shard, iterates=None):
    parts = PARTS if shard.size > 2 else (*PARTS, measures, runs)
    found = {part.__name__: part(shard) for part in parts}
    if iterates is not None:
        found["signs"] = signs_at(shard, iterates)
    return found


def work(argv, shard, local_rank):
    """Compute everything and leave it in argv[0].rank; argv[1], if given, holds the iterates."""
    iterates = torch.load(argv[1]) if len(argv) > 1 else None
    torch.save(everything(shard, iterates), f"{argv[0]}.{shard.rank}")
    return 0


def on_the_gpu(argv, shard, local_rank):
    """The derivatives on CUDA tensors, left in argv[0].rank."""
    torch.save(derivatives(shard, "cuda"), f"{argv[0]}.{shard.rank}")
    return 0
