"""Minimum-loss combination: for every image of the batch, which seed's copy to take.

The combination whose batch gradient is nearest to the target's (E2EGI, section "Minimum Loss
Combinatorial Optimization"). Priors are left out of these evaluations, and no graph is built.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from inversion.objective import Objective
from inversion.optimise import lowest
from models.gradient import couples_samples, trainable_parameters
from utils.shard import Shard

#: Up to this many combinations all are tried, where their losses cost nothing.
EXHAUSTIVE = 4096
#: Memory that a block of the Gram matrix's product may take in float64, bytes.
BLOCK_BYTES = 2**27


@dataclass(frozen=True)
class Combination:
    """A consensus of several seeds.

    x: (B, C, H, W). choice: for every image the index of the seed it came from. loss: gradient
    distance of x. seed_losses: that of every seed. image_gradients: the work spent, in
    gradients of one image.
    """

    x: Tensor
    choice: tuple[int, ...]
    loss: float
    seed_losses: tuple[float, ...]
    image_gradients: int


def combination_method(objective: Objective, num_seeds: int, memory: int) -> tuple[str, str]:
    """How `combine` will search, "gram" or "greedy", and why, in words.

    memory: bytes that the per-sample gradients may take.
    """
    parameters = list(trainable_parameters(objective.model).values())
    count = num_seeds * len(objective.y)
    size = count * sum(p.numel() * p.element_size() for p in parameters) // objective.shard.size
    if couples_samples(objective.model, objective.loss.train_mode):
        return "greedy", "BatchNorm couples the images of a batch"
    if objective.distance_from_products is None:
        return "greedy", "this gradient distance is no function of inner products"
    where = "in all" if objective.shard.size == 1 else "a process"
    stored = f"{count} per-sample gradients of {size / 2**20:,.0f} MiB {where}"
    if size > memory:
        return "greedy", f"{stored} exceed --combine-memory {memory / 2**20:,.0f}"
    return "gram", stored


class InterruptedSearchError(Exception):
    """The search for a combination was asked to stop."""


def combine(
    objective: Objective,
    x_seeds: Sequence[Tensor],
    *,
    memory: int = 4 * 2**30,
    should_stop: Callable[[], bool] = lambda: False,
) -> Combination:
    """Combine the seeds' images `x_seeds`, S tensors (B, C, H, W), into one batch.

    Where no layer uses batch statistics the batch gradient is the mean of the images' own:
    B·S of them, their Gram matrix and their products with the target give the loss of every
    combination without any more gradients. Up to EXHAUSTIVE combinations all are compared; of more
    a descent over changes of one image and of two, from every seed, finds a local optimum that
    need not be the best. Elsewhere, or when they do not fit into `memory` bytes,
    combinations are evaluated one by one: a greedy search with repeated sweeps, until no single
    change improves. Either way the result is never worse than the best seed. Seeds may lie on
    another device than the model; only what is evaluated is moved. Seeds with images that are
    not finite take no part.

    Raises InterruptedSearchError soon after `should_stop()` is true: with many images a greedy
    search takes long.
    """
    usable = [s for s, x in enumerate(x_seeds) if x.isfinite().all()]
    if usable and len(usable) < len(x_seeds):
        found = combine(
            objective, [x_seeds[s] for s in usable], memory=memory, should_stop=should_stop
        )
        seed_losses = dict(zip(usable, found.seed_losses, strict=True))
        return replace(
            found,
            choice=tuple(usable[s] for s in found.choice),
            seed_losses=tuple(seed_losses.get(s, math.nan) for s in range(len(x_seeds))),
        )
    if len(x_seeds) == 1:
        loss = objective.gradient_distance(x_seeds[0].to(objective.y.device))
        batch_size = len(x_seeds[0])
        return Combination(x_seeds[0], (0,) * batch_size, loss, (loss,), batch_size)
    evaluated = _Evaluated(objective, x_seeds, should_stop)
    seeds = [(s,) * len(objective.y) for s in range(len(x_seeds))]
    if combination_method(objective, len(x_seeds), memory)[0] == "gram":
        gram, products, target_square = _inner_products(objective, x_seeds, should_stop)
        evaluated.image_gradients += len(products)
        losses = _Losses(objective, gram, products, target_square, len(x_seeds))
        seed_losses = losses.of(torch.tensor(seeds)).tolist()
        best = lowest(seed_losses)
        best_seed, seed_losses[best] = seeds[best], evaluated[seeds[best]]
        choice = _best_combination(losses, seeds)
        if evaluated[choice] > evaluated[best_seed]:  # only by rounding
            choice = best_seed
    else:
        seed_losses = [evaluated[seed] for seed in seeds]
        choice = _greedy(evaluated, seeds[lowest(seed_losses)], len(x_seeds))
    return Combination(
        evaluated.batch(choice),
        choice,
        evaluated[choice],
        tuple(seed_losses),
        evaluated.image_gradients,
    )


class _Evaluated:
    """Gradient distances of combinations, each evaluated once; counts the work."""

    def __init__(
        self, objective: Objective, x_seeds: Sequence[Tensor], should_stop: Callable[[], bool]
    ):
        self.objective, self.x_seeds, self.should_stop = objective, x_seeds, should_stop
        self.image_gradients = 0
        self._losses: dict[tuple[int, ...], float] = {}

    def batch(self, choice: tuple[int, ...]) -> Tensor:
        """The images of a combination."""
        return torch.stack([self.x_seeds[s][i] for i, s in enumerate(choice)])

    def __getitem__(self, choice: tuple[int, ...]) -> float:
        if choice not in self._losses:
            if self.should_stop():
                raise InterruptedSearchError
            x = self.batch(choice).to(self.objective.y.device)
            self._losses[choice] = self.objective.gradient_distance(x)
            self.image_gradients += len(choice)
        return self._losses[choice]


def _greedy(evaluated: _Evaluated, choice: tuple[int, ...], num_seeds: int) -> tuple[int, ...]:
    """Sweep over the images, taking each one's best seed, until a sweep changes nothing."""
    while True:
        before = choice
        for i in range(len(choice)):
            options = [(*choice[:i], s, *choice[i + 1 :]) for s in range(num_seeds)]
            losses = [evaluated[option] for option in options]
            if losses[lowest(losses)] < evaluated[choice]:
                choice = options[lowest(losses)]
        if choice == before:
            return choice


def _inner_products(
    objective: Objective, x_seeds: Sequence[Tensor], should_stop: Callable[[], bool]
) -> tuple[Tensor, Tensor, float]:
    """Gram matrix (S·B, S·B) of the per-sample gradients over B, products with the target (S·B,).

    Row s·B + i is image i of seed s. Also the target's squared norm. All in float64 on the CPU,
    summed in blocks of parameters. Several processes have a part of the rows each.
    """
    batch_size, device, shard = len(objective.y), objective.y.device, objective.shard
    target = torch.cat([g.flatten() for g in objective.target_gradient])
    count = len(x_seeds) * batch_size
    own = shard.block(count)
    rows = target.new_empty(own.stop - own.start, target.numel())
    for place, number in enumerate(range(own.start, own.start + _largest_block(shard, count))):
        if should_stop():  # all processes ask equally often
            raise InterruptedSearchError
        if place < len(rows):
            s, i = divmod(number, batch_size)
            gradient = objective.image_gradient(x_seeds[s][i : i + 1].to(device), i)
            torch.cat([g.flatten() for g in gradient], out=rows[place])
    rows /= batch_size
    gram = torch.zeros(len(rows), count, dtype=torch.float64, device=device)
    products = torch.zeros(len(rows), dtype=torch.float64, device=device)
    width = max(1, BLOCK_BYTES // (8 * count))
    for start in range(0, target.numel(), width):
        block = rows[:, start : start + width].double()
        gram += block @ shard.gather(block, count).T
        products += block @ target[start : start + width].double()
    gram, products = shard.gather(gram, count), shard.gather(products, count)
    return gram.cpu(), products.cpu(), target.double().square().sum().item()


def _largest_block(shard: Shard, count: int) -> int:
    first = shard.block(count, rank=0)
    return first.stop - first.start


class _Losses:
    """Losses of combinations from inner products; row s·B + i is image i of seed s."""

    def __init__(self, objective, gram, products, target_square, num_seeds):
        self._distance = objective.distance_from_products
        self.gram, self.products, self.target_square = gram, products, target_square
        self.num_seeds = num_seeds
        self.batch_size = len(products) // num_seeds

    def rows(self, choice: Tensor) -> Tensor:
        """Rows of a combination (..., B)."""
        return choice * self.batch_size + torch.arange(self.batch_size)

    def distance(self, square: Tensor, product: Tensor) -> Tensor:
        """Distance from ‖g‖² and ⟨g, g*⟩."""
        return self._distance(square, product, self.target_square)

    def of(self, choices: Tensor) -> Tensor:
        """Losses (M,) of combinations (M, B)."""
        rows = self.rows(choices)
        square = self.gram[rows[:, :, None], rows[:, None, :]].sum((1, 2))
        return self.distance(square, self.products[rows].sum(1))

    def after_changes(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Losses after every single change and after every pair of changes.

        Change s·B + i gives image i to seed s. Returns (S·B,) and (S·B, S·B); where a pair
        changes the same image twice it holds infinity.
        """
        rows, count = self.rows(choice), len(self.products)
        new = torch.arange(count)
        old = rows[new % self.batch_size]
        square = self.gram[rows][:, rows].sum()
        product = self.products[rows].sum()
        from_sum = self.gram[:, rows].sum(1)  # ⟨g_m, g⟩
        along = from_sum[new] - from_sum[old]
        steps = (
            self.gram - self.gram[:, old] - self.gram[old] + self.gram[old][:, old]
        )  # ⟨d_m, d_n⟩ of the changes d_m = g_new − g_old
        shift = self.products[new] - self.products[old]
        own = steps.diagonal()
        single = self.distance(square + 2 * along + own, product + shift)
        one = 2 * along + own
        pairs = self.distance(
            square + one[:, None] + one[None] + 2 * steps, product + shift[:, None] + shift[None]
        )
        same = (new[:, None] - new[None]) % self.batch_size == 0
        return single, pairs.masked_fill(same, torch.inf)


def _best_combination(losses: _Losses, starts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The best combination found: by trying all of few, else by descent from every start."""
    if losses.num_seeds**losses.batch_size <= EXHAUSTIVE:
        every = torch.tensor(
            list(itertools.product(range(losses.num_seeds), repeat=losses.batch_size))
        )
        return tuple(every[losses.of(every).argmin()].tolist())
    ends = [_descend(losses, torch.tensor(start)) for start in starts]
    return tuple(ends[losses.of(torch.stack(ends)).argmin()].tolist())


def _descend(losses: _Losses, choice: Tensor) -> Tensor:
    """Steepest descent over changes of one image, and of two where no single one helps."""
    value = losses.of(choice[None])[0]
    while True:
        single, pairs = losses.after_changes(choice)
        best = single.argmin()
        changes = [best]
        if not single[best] < value:
            first, second = divmod(int(pairs.argmin()), len(single))
            changes = [torch.tensor(first), torch.tensor(second)]
        changed = choice.clone()
        for change in changes:
            changed[change % losses.batch_size] = change // losses.batch_size
        after = losses.of(changed[None])[0]
        if not after < value - 1e-12 * value.abs():
            return choice
        choice, value = changed, after
