"""The command line of training.py."""

from models.batchnorm import BATCHNORM_REPLACEMENTS
from models.build import HEAD_INITS
from models.rank_analysis import MODES
from train.datasets import (
    DATASETS,
)
from utils.flags import Parser, add_process_flags, file_name, integer_from, number

#: `--dp-mode`: what is clipped.
DP_MODES = ("batch", "per-sample")


def parser() -> Parser:
    """All flags of the client."""
    parser = Parser(
        prog="training.py",
        description="The client of a federated-learning step: batch → gradient (+ BN statistics) "
        "→ checkpoint.",
    )
    add = parser.add_argument_group("run").add_argument
    add("--id", type=file_name, default="test", help="name of the run, part of the file names")
    add("--seed", type=integer_from(0), default=0, help="seed of all randomness")
    add("--results", default="./train/checkpoint", help="output folder")
    add("--gpu", type=int, help="number of the GPU; default: the first, else the CPU")
    add("--dry-run", action="store_true", help="check everything, print the plan, write nothing")

    add = parser.add_argument_group("data").add_argument
    add("--data-name", default="imagenet", help=f"one of {', '.join(DATASETS)}")
    add("--data", help="folder of the data set")
    add("--data-backup", help="folder with x_true.pth.bk and y_true.pth.bk, used instead")
    add("--target-idx", type=integer_from(0), default=0, help="number of the batch")
    add("-b", "--batch-size", type=integer_from(1), default=256, help="images in the batch")
    add("--image-size", type=integer_from(1), help="side in pixels; default: the data set's")
    add("--channels", type=int, choices=(1, 3), help="for folder; default: as the files are")
    add("--distinct-labels", type=int, help="for photos: number of distinct labels")
    add("-j", "--workers", type=integer_from(0), default=4, help="threads that decode images")

    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", default="resnet50", help="lenet, convnet or a torchvision classifier")
    add("--pretrained", help="weights: .pth, .tar or MoCo v2; default: random")
    add("--outlayer-state", choices=HEAD_INITS, default="normal", help="classifier head")
    add("--model-eval", action="store_true", help="BatchNorm in eval mode")
    add("--replace-bn", choices=BATCHNORM_REPLACEMENTS, help="put this in BatchNorm's place")

    add = parser.add_argument_group("what is sent").add_argument
    add("--upload-bn", action="store_true", help="store the batch's BatchNorm statistics")
    add("--seal", action="store_true", help="write the truth to a file of its own")
    add("--label-smoothing", type=number(0, below=1), default=0.0,
        help="share of every label that the loss moves to all classes")  # fmt: skip
    add("--with-control", action="store_true",
        help="store the same of other images, and decoys, for scoring")  # fmt: skip
    add("--decoys", type=integer_from(1),
        help="decoys per image, with --with-control; default: 99, in at most 512 MiB")  # fmt: skip

    add = parser.add_argument_group("protection").add_argument
    add("--enable-dp", action="store_true", help="clip the gradient and add noise")
    add("--dp-mode", choices=DP_MODES, default="batch",
        help="clip the batch's gradient as the original, or every sample's")  # fmt: skip
    add("--sigma", type=number(low=0), help="standard deviation of the noise in the mean gradient")
    add("-C", "--max-per-sample-grad-norm", type=number(above=0), help="clip to this norm")
    add("--noise-seed", type=integer_from(0),
        help="draw the noise from it; default: --seed for batch, else chance")  # fmt: skip
    add("--delta", type=number(above=0, below=1), default=1e-5, help="of (epsilon, delta)")
    add("--dp-steps", type=integer_from(1), default=1, help="gradients that epsilon is for")
    add("--sample-rate", type=number(above=0, high=1), default=1.0,
        help="chance of a sample to be in a batch, for epsilon")  # fmt: skip

    add = parser.add_argument_group("rank analysis").add_argument
    add("--ra", action="store_true", help="print RA-i of the network and stop")
    add("--ra-mode", choices=MODES, default="all",
        help="count all convolutions of a block, or as the original")  # fmt: skip
    add_process_flags(parser)
    return parser
