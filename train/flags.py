"""The command line of training.py; what its flags mean together is in train/settings.py."""

from models.choices import BATCHNORM_REPLACEMENTS, HEAD_INITS, PROTECTION_MODES, RANK_MODES
from train.request import DATASET_NAMES
from utils.flags import Parser, add_process_flags, file_name, integer_from, number


def parser() -> Parser:
    """Make the parser of all flags of the client."""
    parser = Parser(
        prog="training.py",
        description="The client of a federated-learning step: batch → gradient (+ BN statistics) "
        "→ checkpoint.",
    )
    add = parser.add_argument_group("run").add_argument
    add("--id", type=file_name, default="test", help="name of the run, part of the file names")
    add(
        "--seed",
        type=integer_from(0),
        default=0,
        help="seed of the weights, the head and the choice of the batch",
    )
    add("--results", default="./train/checkpoint", help="output folder")
    add("--gpu", type=int, help="number of the GPU; default: the first, else the CPU")
    add("--dry-run", action="store_true", help="check everything, print the plan, write nothing")

    add = parser.add_argument_group("data").add_argument
    add("--data-name", default="imagenet", help=f"one of {', '.join(DATASET_NAMES)}")
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
    add(
        "--outlayer-state",
        choices=HEAD_INITS,
        default="normal",
        help="how the classifier head starts",
    )
    add("--model-eval", action="store_true", help="take the gradient with BatchNorm in eval mode")
    add(
        "--replace-bn", choices=BATCHNORM_REPLACEMENTS, help="replace every BatchNorm layer by this"
    )

    add = parser.add_argument_group("what is sent").add_argument
    add("--upload-bn", action="store_true", help="also send the batch's BatchNorm statistics")
    add("--seal", action="store_true", help="write the truth to a file of its own")
    add(
        "--label-smoothing",
        type=number(0, below=1),
        default=0.0,
        help="share of every label that the loss moves to all classes",
    )
    add(
        "--with-control",
        action="store_true",
        help="also store the gradient of other images with the same labels, as a control, "
        "and decoys, for scoring",
    )
    add(
        "--decoys",
        type=integer_from(1),
        help="decoys per image, with --with-control; default: 99, in at most 512 MiB",
    )

    add = parser.add_argument_group("protection").add_argument
    add("--enable-dp", action="store_true", help="clip the gradient and add noise")
    add(
        "--dp-mode",
        choices=PROTECTION_MODES,
        default="batch",
        help="clip the batch's mean gradient, as the original does, or every sample's",
    )
    add(
        "--sigma",
        type=number(low=0),
        help="standard deviation of the noise added per entry of the mean gradient",
    )
    add(
        "-C",
        "--max-per-sample-grad-norm",
        type=number(above=0),
        help="largest Euclidean norm that clipping leaves",
    )
    add(
        "--noise-seed",
        type=integer_from(0),
        help="seed of the noise; default: --seed for batch, else drawn afresh every time",
    )
    add(
        "--delta",
        type=number(above=0, below=1),
        default=1e-5,
        help="delta of (epsilon, delta)-differential privacy",
    )
    add(
        "--dp-steps",
        type=integer_from(1),
        default=1,
        help="number of gradients that epsilon is for",
    )
    add(
        "--sample-rate",
        type=number(above=0, high=1),
        default=1.0,
        help="probability that a sample is in a batch (Poisson sampling), for epsilon",
    )

    add = parser.add_argument_group("rank analysis").add_argument
    add("--ra", action="store_true", help="print RA-i of the network and stop")
    add(
        "--ra-mode",
        choices=RANK_MODES,
        default="all",
        help="count all convolutions of a block, or only those that the original counts",
    )
    add_process_flags(parser)
    return parser
