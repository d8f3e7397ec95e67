"""The cases of benchmarks/layerwise.py: networks, batches, and what happened to the gradient."""

from dataclasses import dataclass

#: Clipping norm of per-sample protection.
CLIP = 1.0


@dataclass(frozen=True)
class Case:
    """Describes one client and what happened to its gradient."""

    arch: str = "resnet18"
    size: int = 32
    batch: int = 4
    seed: int = 0
    #: Number of the batch of `photos`.
    index: int = 0
    train_mode: bool = False
    #: Whether the network's body has the weights of --weights, else random ones.
    trained: bool = False
    #: A name in HEAD_INITS.
    head: str = "normal"
    #: "none", "relative" (to each tensor's root mean square), "float16", "bfloat16", "per-sample"
    #: (clipping to CLIP, then noise, which the client reports).
    noise: str = "none"
    #: Standard deviation of the noise, for "per-sample" per entry of the gradient.
    level: float = 0.0
    #: Match gradients too, for this many times the time that the layerwise attack took; 0 for not.
    matching: float = 0.0
    #: Classes whose labels repeat in turn in the batch; 0 leaves them to the batch's number.
    classes_used: int = 0
    #: Whether the attack runs once more, on the gradient of other images.
    control: bool = True


SEEDS = range(5)
LEVELS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
#: Side of the images → numbers of images, of the curve over these.
CURVE = {32: (1, 2, 4, 8, 16, 32, 64), 64: (1, 2, 4, 8, 16, 32, 64), 224: (1, 2, 4, 8)}
NETWORKS = [
    Case("convnet", batch=1), Case("convnet", batch=4), Case("convnet", batch=2, train_mode=True),
    Case("vgg11_bn", batch=1), Case("vgg11_bn", batch=4), Case("vgg11", batch=1),
    Case("lenet", batch=1, head="keep"), Case("lenet", batch=2, head="keep"),
    Case("lenet", batch=7, head="keep"), Case("resnet34", batch=4),
    *(Case("cnn6", batch=1, seed=seed, head="keep", matching=5.0) for seed in (0, 1, 2)),
]  # fmt: skip
CASES: dict[str, list[Case]] = {
    "eval": [Case(seed=seed) for seed in SEEDS],
    "crops": [Case(seed=seed, index=1) for seed in SEEDS],
    "train": [Case(seed=seed, train_mode=True) for seed in SEEDS],
    "trained": [
        Case(trained=True, train_mode=mode, head=head)
        for mode in (False, True)
        for head in ("normal", "keep")
    ],
    "64": [Case(size=64, batch=count, seed=seed) for count in (1, 4) for seed in (0, 1)]
    + [Case(size=64, batch=8)],
    "cifar": [Case("resnet18_cifar", batch=count) for count in (1, 2, 4, 7, 8)]
    + [Case("resnet18_cifar", batch=2, seed=1), Case("resnet18_cifar", batch=4, train_mode=True)],
    "networks": NETWORKS,
    "matching": [Case(matching=1.0), Case(train_mode=True, matching=1.0)],
    "noise": [Case(noise="relative", level=level, matching=1.0) for level in LEVELS]
    + [Case(noise=kind, matching=1.0) for kind in ("float16", "bfloat16")]
    + [Case(noise="per-sample", level=level, matching=1.0) for level in (1e-8, 1e-6, 1e-4)],
    "224": [
        Case(size=224, batch=count, seed=seed, control=seed == 0)
        for count in (1, 4)
        for seed in (0, 1, 2)
    ],
    "train-large": [
        Case(size=64, seed=seed, train_mode=True, control=seed == 0) for seed in (0, 1, 2)
    ]
    + [Case(size=224, batch=2, train_mode=True)],
    "repeated": [
        Case(
            batch=count, trained=True, head="keep", train_mode=mode, matching=1.0, classes_used=used
        )
        for count, used in ((8, 5), (16, 8))
        for mode in (False, True)
    ],
    "resnet50": [
        Case("resnet50", size=64),
        Case("resnet50", size=224, batch=1),
        Case("resnet50", train_mode=True),
    ],
}
#: Settings of the curve that other large parts measure; it takes their rows.
MEASURED = {(case.size, case.batch, case.train_mode) for part in ("224", "train-large")
            for case in CASES[part]}  # fmt: skip
#: BatchNorm in train mode has one number per channel there, which torch refuses.
IMPOSSIBLE = {(32, 1, True)}
CASES["curve"] = [
    Case(size=size, batch=count, train_mode=mode, control=False)
    for size, counts in CURVE.items()
    for mode in (False, True)
    for count in counts
    if (size, count, mode) not in MEASURED | IMPOSSIBLE
]
#: Parts whose rows have more columns, and files of their own.
LARGE = ("224", "train-large", "repeated", "resnet50", "curve")
