"""The command line of training.py; what its flags mean together is in train/settings.py."""

import argparse
from collections.abc import Callable

from models.choices import (
    BATCHNORM_REPLACEMENTS,
    DEFENCE_NAMES,
    DP_MODES,
    HEAD_INITS,
    LOSS_KINDS,
    RANK_MODES,
)
from train.defence_settings import usage
from train.request import DATASET_NAMES
from train.update_settings import LOCAL_OPTIMISERS
from utils.flags import Parser, add_process_flags, file_name, integer_from, number

#: The network without --arch and --model.
DEFAULT_ARCH = "resnet50"


def parser() -> Parser:
    """Return the parser of all flags of the client."""
    parser = Parser(
        prog="training.py",
        description="The client of a federated-learning step: batch → gradient (+ BN statistics) "
        "→ checkpoint.",
    )
    _add_run(parser.add_argument_group("run").add_argument)
    data = parser.add_argument_group("data").add_argument
    _add_data(data)
    _add_files(data)
    _add_labels(parser.add_argument_group("labels and normalisation").add_argument)
    _add_model(parser.add_argument_group("model").add_argument)
    _add_sent(parser.add_argument_group("what is sent").add_argument)
    _add_defence(parser.add_argument_group("defence").add_argument)
    _add_protection(parser.add_argument_group("protection").add_argument)
    _add_local_steps(parser.add_argument_group("local steps").add_argument)
    _add_import(parser.add_argument_group("an update of your own").add_argument)
    _add_rank_analysis(parser.add_argument_group("rank analysis").add_argument)
    add_process_flags(parser)
    return parser


def _add_run(add) -> None:
    add("--id", type=file_name, default="test", help="Name of the run, part of the file names.")
    add(
        "--seed",
        type=integer_from(0),
        default=0,
        help="Seed of the weights, the head and the choice of the batch.",
    )
    add(
        "--results",
        default="./train/checkpoint",
        help="Output folder; it is created where it is missing.",
    )
    add(
        "--gpu",
        type=int,
        help="Number of the GPU to compute on. Without it: the first GPU, else the CPU.",
    )
    add(
        "--dry-run",
        action="store_true",
        help="Check everything, print the plan, and write nothing.",
    )


def _add_data(add) -> None:
    add("--data-name", default="imagenet", help=f"One of {', '.join(DATASET_NAMES)}.")
    add("--data", help="Folder of the data set; photos needs none.")
    add(
        "--data-backup",
        help="Folder with x_true.pth.bk and y_true.pth.bk, whose images are used instead.",
    )
    add(
        "--target-idx",
        type=integer_from(0),
        default=0,
        help="Number of the batch in the order that the seed gives.",
    )
    add("-b", "--batch-size", type=integer_from(1), default=256, help="Images per batch.")
    add(
        "--image-size",
        type=image_size,
        help="Side of the images in pixels, or HxW. Without it: that of the data set.",
    )
    add(
        "--channels",
        type=int,
        choices=(1, 3),
        help="For folder: channels to read; for an imported update: of its images. Without it: as "
        "the files are. For photos: 3, or 1 for grey.",
    )
    add("--distinct-labels", type=int, help="For photos: number of distinct labels.")
    add("-j", "--workers", type=integer_from(0), default=4, help="Threads that decode images.")


def _add_labels(add) -> None:
    add(
        "--loss",
        choices=LOSS_KINDS,
        default=LOSS_KINDS[0],
        help="Loss of the client; bce is binary cross-entropy for each output, as for several "
        "findings per image.",
    )
    add(
        "--labels-csv",
        help="For folder, with --loss bce: CSV file of the labels, with columns file, class, "
        "class, … of 0 and 1.",
    )
    add(
        "--mean",
        type=numbers(number()),
        help="Mean of the normalisation, one number per channel. Without it: that of the data set.",
    )
    add(
        "--std",
        type=numbers(number(above=0)),
        help="Standard deviation of the normalisation, as --mean.",
    )


def image_size(text: str) -> int | tuple[int, int]:
    """Return the side of square images, or (H, W) of "HxW" or "H,W" (a flag type)."""
    words = text.replace(",", "x").split("x")
    side = integer_from(1)
    if len(words) == 1:
        return side(text)
    if len(words) != 2:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a side nor HxW; give 224 or 192x256")
    return side(words[0]), side(words[1])


def numbers(of: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    """Return a flag type for numbers with commas between them, each as `of` reads it."""

    def parse(text: str) -> tuple[float, ...]:
        return tuple(of(word) for word in text.split(","))

    return parse


def _add_files(add) -> None:
    add(
        "--bit-depth",
        type=integer_from(8, 16),
        help="Bits per grey value in image files of more than 8 bits that do not say it. "
        "Without it: 16.",
    )


def _add_model(add) -> None:
    add(
        "-a",
        "--arch",
        default=DEFAULT_ARCH,
        help="Network: lenet, convnet, resnet18_cifar, or a classifier of torchvision by its name.",
    )
    add(
        "--model",
        help="FILE.py:function, instead of --arch: a function of yours that builds the network. "
        "The file is run.",
    )
    add("--pretrained", help="File of weights: .pth, .tar or MoCo v2. Without it: random weights.")
    add(
        "--outlayer-state",
        choices=HEAD_INITS,
        default="normal",
        help="How the classifier head starts; keep leaves it as the weights have it.",
    )
    add("--model-eval", action="store_true", help="Take the gradient with BatchNorm in eval mode.")
    add(
        "--replace-bn",
        choices=BATCHNORM_REPLACEMENTS,
        help="Replace every BatchNorm layer by this one.",
    )


def _add_sent(add) -> None:
    add("--upload-bn", action="store_true", help="Also send the batch's BatchNorm statistics.")
    add("--seal", action="store_true", help="Write the truth to a file of its own.")
    add(
        "--label-smoothing",
        type=number(0, below=1),
        default=0.0,
        help="Share of every label that the loss moves to all classes.",
    )
    add(
        "--with-control",
        action="store_true",
        help="Also store the gradient of other images with the same labels, as a control, and "
        "decoys, for scoring.",
    )
    add(
        "--decoys",
        type=integer_from(1),
        help="Decoys per image, with --with-control. Without it: 99, in at most 512 MiB.",
    )


def _add_defence(add) -> None:
    add(
        "--defence",
        metavar="NAME[:AMOUNT…]",
        help=f"Defend by one of {', '.join(map(usage, DEFENCE_NAMES))} (docs/defences.md).",
    )


def _add_protection(add) -> None:
    add("--enable-dp", action="store_true", help="Clip the gradient and add noise.")
    add(
        "--dp-mode",
        choices=DP_MODES,
        default="batch",
        help="Clip the batch's mean gradient, as the original does, or every sample's.",
    )
    add(
        "--sigma",
        type=number(low=0),
        help="Standard deviation of the noise per entry of the mean gradient.",
    )
    add(
        "-C",
        "--max-per-sample-grad-norm",
        type=number(above=0),
        help="Largest Euclidean norm that clipping leaves.",
    )
    add(
        "--noise-seed",
        type=integer_from(0),
        help="Seed of the noise. Without it: --seed for batch, else drawn afresh every time.",
    )
    add(
        "--delta",
        type=number(above=0, below=1),
        default=1e-5,
        help="Delta of (epsilon, delta)-differential privacy.",
    )
    add(
        "--dp-steps",
        type=integer_from(1),
        default=1,
        help="Number of gradients that epsilon is for.",
    )
    add(
        "--sample-rate",
        type=number(above=0, high=1),
        default=1.0,
        help="Probability that a sample is in a batch (Poisson sampling), for epsilon.",
    )


def _add_local_steps(add) -> None:
    add(
        "--local-steps",
        type=integer_from(1),
        help="Steps of plain SGD that the client takes before it sends the update. Without it: "
        "one, the gradient.",
    )
    add(
        "--local-epochs",
        type=integer_from(1),
        help="Passes over the batch in the place of --local-steps, of ceil(B / b) steps each.",
    )
    add(
        "--local-batch",
        type=integer_from(1),
        help="Images b per local step, taken from the batch in turn. Without it: the whole batch.",
    )
    add(
        "--local-lr",
        type=number(above=0),
        help="Step size of the local steps. Without it: 0.01 in a simulation.",
    )


def _add_import(add) -> None:
    add(
        "--import-update",
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="Make the checkpoint from the weights that a real client was sent and those that it "
        "sent back, instead of simulating one.",
    )
    add(
        "--update-difference",
        action="store_true",
        help="AFTER holds the difference, after minus before.",
    )
    add(
        "--local-optimiser",
        choices=LOCAL_OPTIMISERS,
        default="sgd",
        help="What the real client stepped with; others than sgd are undone for one step at most.",
    )
    add(
        "--local-momentum",
        type=number(0, below=1),
        help="Momentum of the real client's optimiser; nesterov needs it.",
    )
    add(
        "--local-weight-decay",
        type=number(low=0),
        default=0.0,
        help="Weight decay of the real client's optimiser, undone for one step.",
    )
    add(
        "--bn-momentum",
        type=number(low=0, high=1),
        default=0.1,
        help="Momentum of BatchNorm's running statistics in the real client; 0 for the cumulative "
        "average.",
    )
    add(
        "--num-classes",
        type=integer_from(2),
        help="Classes of the imported network, as many as the data set has or more. Without it: "
        "those of the data set.",
    )


def _add_rank_analysis(add) -> None:
    add("--ra", action="store_true", help="Print RA-i of the network and stop.")
    add(
        "--ra-mode",
        choices=RANK_MODES,
        default="all",
        help="Count all convolutions of a block, or only those that the original counts.",
    )
