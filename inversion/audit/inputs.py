"""The files of a run, read and checked: what an attacker has, and what only scoring may see."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from inversion.audit.memory import MemoryPlan, memory_plan
from inversion.audit.settings import InputSettings, Settings
from inversion.audit.truth import TruthCheck, check_truth_gradient
from inversion.audit.updates import update_model_of
from inversion.audit.withhold import withhold, withhold_from_control
from inversion.labels.counts import ScaledGradientError
from inversion.labels.reconstruct import LabelInputs, LabelResult, reconstruct_labels
from inversion.layerwise.attack import target_network
from inversion.objective import Objective
from inversion.pixel_gradient import pixel_gradient_of
from inversion.restarts import initial_images
from inversion.settings import AttackSettings
from models import checkpoint as checkpoints
from models.batchnorm import batchnorm_layers
from models.binding import check_bound
from models.build import is_known, some
from models.choices import DP_MODES
from models.forced import forced_statistics
from models.gradient import couples_samples, forward_failure, kept_bytes
from models.reading import target_from_checkpoint, truth_from_checkpoint
from models.target import GroundTruth, Target, Update, check_fits, guarantee_lines, model_of
from models.user_network import UserNetwork, is_user_network, load_user_network
from utils.console import Reporter
from utils.device import choose_device
from utils.errors import InputError, is_out_of_memory, naming
from utils.files import printable
from utils.image_files import load_auxiliary, public_photographs
from utils.image_reading import DepthError
from utils.images import denormalise, normalise
from utils.journal import Journal, reading
from utils.memory import free_memory, require_memory
from utils.metrics import LPIPS_BACKBONE, load_lpips
from utils.shard import ALONE, Shard

LPIPS_HINT = (
    f"LPIPS n/a: needs the AlexNet weights {LPIPS_BACKBONE} of torchvision, by "
    "--lpips-weights FILE or in the torch hub cache"
)
#: Networks make less than so many numbers of every number of an image; only beyond that is counted.
LEAST_GROWTH = 1000
#: Most bytes of a file of labels per label: numbers with whatever stands between them.
LABEL_BYTES = 256
#: Photographs that show labels' regime and make the mean image.
PUBLIC_IMAGES = 128


@dataclass(frozen=True)
class Case:
    """Holds what an attacker has, loaded and checked, and nothing of the truth."""

    #: As it is attacked: unscaled, and shuffled where that was asked for.
    target: Target
    #: Labels that the attack goes by: (B,), or (B, K) under binary cross-entropy.
    y: Tensor
    #: How the labels were reconstructed; None where they were known.
    labels: LabelResult | None
    objective: Objective
    #: Where the BN prior pulls to, "batch" or "running"; None without the prior.
    bn_source: str | None
    device: torch.device
    #: The processes of this run.
    processes: Shard
    #: Parts that the attacker is not given (WITHHELD) → what was there, in words for the reader.
    withheld: Mapping[str, str] = field(default_factory=dict)
    #: How many images matching takes at a time; None where nobody asked for a plan.
    memory: MemoryPlan | None = None

    def start(self, seed: int) -> Tensor:
        """Return the initial images of a seed, on the CPU."""
        target = self.target
        return initial_images(seed, target.batch_size, target.image_shape, target.gradient[0].dtype)

    def images(self, x: Tensor) -> Tensor:
        """Return images (B, C, H, W) as the network takes them as colours in [0, 1], on the CPU.

        The colours are those that the attacker sees: by the normalisation that it knows or assumes.
        """
        return denormalise(x, self.target.mean, self.target.std)

    def attacked_by(self, settings: AttackSettings, target: Target) -> "Case":
        """Return the case as these settings attack it, with this target in the place of its own."""
        if self.memory is not None:  # what was picked once holds for all that follows
            settings = replace(settings, chunk_size=self.memory.chunk_size, matching_memory=None)
        model = self.objective.model
        case = make_case(settings, model, target, self.y, self.labels, self.device, self.processes)
        return replace(case, withheld=self.withheld)

    def with_saved_memory(self, journal: Journal, reporter: Reporter) -> "Case":
        """Return the case with the chunks that the run began with, and note them for the next time.

        Other chunks are rounded otherwise, and what is free may have changed.
        """
        if self.memory is None:
            return self
        chosen, found = self.memory.chunk_size, journal.recall("memory")
        with reading("the size of the chunks"):
            if found is not None:
                size = found["chunk_size"]
                chosen = None if size is None else max(1, int(size))
        journal.note("memory", lambda: {"chunk_size": chosen})
        if chosen == self.memory.chunk_size:
            return self
        reporter.say(f"memory: {chosen or 'all'} images at a time, as the run began")
        memory = replace(self.memory, chunk_size=chosen)
        return replace(self, memory=memory, objective=self.objective.in_chunks(chosen))

    @property
    def protected(self) -> bool:
        """Whether the client reports a protection, known to the attacker or withheld from it."""
        return self.target.protection is not None or "protection" in self.withheld

    @property
    def uploads_bn(self) -> bool:
        """Whether the client sent statistics of its batch, known to the attacker or withheld."""
        return self.target.bn_mean is not None or "bn" in self.withheld

    @property
    def guarantee(self) -> list[str]:
        """What follows from the client's protection, and what it does not cover, in words."""
        target = self.target
        if target.protection is None:
            return []
        return guarantee_lines(
            target.protection,
            self.objective.model,
            train_mode=target.train_mode,
            uploads_bn=self.uploads_bn,
        )


@dataclass(frozen=True)
class Sealed:
    """Holds what only scoring may see."""

    truth: GroundTruth
    #: How the truth's gradient compares with what was sent; None where nothing depends on it.
    check: TruthCheck | None
    #: Whether ids and digests bind the truth to the checkpoint.
    bound: bool
    #: LPIPS of (B, C, H, W) images in [0, 1]; None without its weights.
    lpips_score: Callable[[Tensor, Tensor], Tensor] | None
    #: Mean and standard deviation by which the client normalised its images, (C, 1, 1) each.
    normalisation: tuple[Tensor, Tensor]

    @property
    def colours(self) -> Tensor:
        """The true images as colours in [0, 1], on the CPU."""
        return denormalise(self.truth.x, *self.normalisation)

    def images_for(self, case: Case) -> Tensor:
        """Return the true images, normalised, where and as the attack computes."""
        return self.truth.x.to(case.device, case.target.gradient[0].dtype)


def load_inputs(
    settings: Settings, reporter: Reporter, processes: Shard, local_rank: int
) -> tuple[Case, Sealed | None]:
    """Load every file that the settings name, and refuse what cannot be attacked or scored.

    Returns the attacker's case, and what only scoring has: None where nothing is scored.
    """
    inputs, scoring, attack = settings.inputs, settings.scoring, settings.attack
    device = choose_device(inputs.gpu, local_rank)
    check_device(attack, device)
    files = _read_files(settings)
    target, truth = files.target, files.truth
    if files.note:
        reporter.say(files.note)
    with naming(_network_source(inputs)):
        model = model_of(target).to(device)
    if device.type == "cpu":
        _refuse_too_large(attack, model, target, processes)
    labels, y = _labels(inputs, target, truth, model, processes)
    _refuse_bn(attack, target, model)
    for line in _notes_on_bn(attack, target):
        reporter.say(line)
    case = make_case(attack, model, target, y, labels, device, processes)
    case = replace(case, withheld=files.withheld)
    lpips_score = load_lpips(scoring.lpips_weights) if scoring.metric else None
    if scoring.verdict_metric == "lpips" and lpips_score is None:
        raise InputError(f"--verdict-metric lpips: {LPIPS_HINT}")
    check_case(
        attack, case, f"--checkpoint {inputs.checkpoint}",
        None if inputs.model is None else f"--model {inputs.model}",
    )  # fmt: skip
    if truth is None:
        return case, None
    normalisation = files.sent.mean, files.sent.std
    sealed = Sealed(truth, None, files.bound, lpips_score, normalisation)
    if scoring.metric or not files.bound:
        sealed = replace(sealed, check=_check_truth(inputs, files, case, sealed))
    return case, sealed if scoring.needs_truth else None


def check_case(
    settings: AttackSettings, case: Case, source: str, own_network: str | None = None
) -> None:
    """Raise InputError, naming `source`, for a case that these settings cannot attack.

    own_network: what a network of the user's own is called in a message; None for a known one.
    """
    _refuse_unfit_network(case, source)
    _evaluate_once(settings, case, own_network)
    if settings.method == "layerwise":
        _refuse_unsolvable(case)


def check_device(settings: AttackSettings, device: torch.device) -> None:
    """Raise InputError for settings that concern GPUs, where the attack runs on another device."""
    if device.type == "cuda":
        return
    where = f"and this runs on the {device.type}"
    if settings.precision == "tf32":
        raise InputError(
            f"--precision tf32: TensorFloat-32 is a format of NVIDIA GPUs, {where}; leave it out"
        )
    if settings.loop.cuda_graph:
        raise InputError(f"--cuda-graph: is for NVIDIA GPUs, {where}; leave it out")


def _check_format(settings: AttackSettings, target: Target, update_model: str) -> None:
    """Raise InputError where precision and graph do not fit what was sent."""
    dtype = target.gradient[0].dtype
    if settings.precision != "float32" and dtype != torch.float32:
        raise InputError(
            f"--precision {settings.precision}: what was sent is {str(dtype)[6:]}, whose passes it "
            "leaves as they are; leave it out"
        )
    if settings.loop.cuda_graph and update_model == "sme":
        raise InputError(
            "--cuda-graph: the place between the two states of --update-model sme is learned on "
            "the host; give --update-model mean, or leave it out"
        )


def _refuse_unsolvable(case: Case) -> None:
    """Raise InputError where the gradient cannot be solved layer by layer at all."""
    try:
        target_network(case.objective.model, case.target)
    except ValueError as error:
        raise InputError(f"--attack layerwise: {error}; give --attack matching") from error


def _network_source(inputs: InputSettings) -> str:
    """Name the flag that the network comes from, with its value."""
    if inputs.model is None:
        return f"--checkpoint {inputs.checkpoint}"
    return f"--model {inputs.model}"


def user_network_of(inputs: InputSettings, checkpoint: dict) -> UserNetwork | None:
    """Load the network of --model for a checkpoint; None without that flag.

    Raises InputError where the flag is missing or does not belong to this checkpoint, and for
    errors in the file.
    """
    arch = checkpoint["arch"]
    if inputs.model is None:
        if not is_known(arch) and is_user_network(arch):
            raise InputError(
                f"--checkpoint {inputs.checkpoint}: its network {some([arch])} came from a file of "
                "its user, whose code no checkpoint holds; give --model FILE.py:function"
            )
        return None
    with naming(f"--model {inputs.model}"):
        if is_known(arch):
            raise InputError(f"the checkpoint's network is {arch}, of no file; leave it out")
        return load_user_network(inputs.model)


def public_images(count: int, target: Target) -> Tensor:
    """Return crops of public photographs as the network takes them, (count, C, H, W) normalised."""
    photographs = public_photographs(count, target.image_shape)
    return normalise(photographs, target.mean, target.std)


def make_case(
    settings: AttackSettings,
    model: nn.Module,
    target: Target,
    y: Tensor,
    labels: LabelResult | None,
    device: torch.device,
    processes: Shard,
) -> Case:
    """Put together what an attacker has, with the objective that the settings ask for.

    Raises InputError where the target's gradient is zero or does not fit the model.
    """
    source, update_model = bn_source(settings, target), update_model_of(settings, target)
    _check_format(settings, target, update_model)
    objective = Objective(
        model,
        target,
        y,
        settings.weights,
        distance_name=settings.distance,
        bn_source=source or "running",
        bn_grad=settings.bn_grad,
        bn_coupling=settings.bn_coupling,
        batch_shard=processes if settings.shared == "batch" else ALONE,
        update_model=update_model,
    )
    memory = memory_plan(settings, objective, target.image_shape, processes)
    if memory is not None:
        objective = objective.in_chunks(memory.chunk_size)
    return Case(target, y, labels, objective, source, device, processes, memory=memory)


def bn_source(settings: AttackSettings, target: Target) -> str | None:
    """Return where the BN prior pulls to: "batch", "running", or None without the prior."""
    if not settings.weights.priors.get("bn"):
        return None
    return "batch" if settings.exact_bn and target.bn_mean is not None else "running"


# Files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """Holds what was read from the checkpoint and the truth file."""

    #: The target that is attacked.
    target: Target
    #: The target as it was sent, before anything was shuffled.
    sent: Target
    #: Only where the settings call for it.
    truth: GroundTruth | None = None
    #: Whether ids and digests bind the truth to the checkpoint.
    bound: bool = False
    #: The file of the truth, with its flag.
    truth_source: str = ""
    #: What a reader should know of the network's file; "" for nothing.
    note: str = ""
    #: As in `Case`.
    withheld: Mapping[str, str] = field(default_factory=dict)


def _read_files(settings: Settings) -> _Files:
    """Load the checkpoint, and the truth if scoring or known labels need it."""
    inputs, scoring = settings.inputs, settings.scoring
    seed = settings.attack.first_seed
    with naming(f"--checkpoint {inputs.checkpoint}"):
        checkpoint = checkpoints.load(inputs.checkpoint)
    builder = user_network_of(inputs, checkpoint)
    note = "" if builder is None else _other_file(builder, checkpoint)
    with naming(f"--checkpoint {inputs.checkpoint}"):
        sent = target_from_checkpoint(checkpoint, builder)
        check_fits(sent)  # before a truth is compared with it, which may be the sound one
    target = sent = sent.unscaled(inputs.gradient_scale)
    if inputs.shuffled:
        target = shuffled(sent, seed)
    with naming(f"--checkpoint {inputs.checkpoint}"):
        target, withheld = withhold(target, inputs.without)
    knows_labels = inputs.labels is not None or inputs.labels_from_gradient
    if not scoring.needs_truth and knows_labels:
        return _Files(target, sent, note=note, withheld=withheld)
    source, truth_source = checkpoint, f"--checkpoint {inputs.checkpoint}"
    if inputs.truth is not None:
        truth_source = f"--truth {inputs.truth}"
        with naming(truth_source):
            source = checkpoints.load_truth(inputs.truth)
    if source.get("x_true") is None or source.get("y_true") is None:
        needs = "--metric" if scoring.metric else "--GInfoR"
        needs = needs if knows_labels else "--pseudo-label-init known"
        remedy = ""
        if not knows_labels:
            remedy = ", the labels by --labels, or --pseudo-label-init from_grads"
        raise InputError(
            f"{needs}: {inputs.checkpoint} holds no truth; give the sealed file by --truth{remedy}"
        )
    with naming(truth_source):
        checkpoints.check_truth(source, checkpoint)
    bound = check_bound(source, checkpoint, truth_source, f"--checkpoint {inputs.checkpoint}")
    truth = truth_from_checkpoint(source, checkpoint, builder)
    assert truth is not None  # its entries are there
    truth = truth.unscaled(inputs.gradient_scale)
    if inputs.shuffled and truth.control is not None:
        truth = replace(truth, control=shuffled_update(truth.control, seed + 1))
    truth = withhold_from_control(truth, inputs.without)
    return _Files(target, sent, truth, bound, truth_source, note, withheld)


def _other_file(builder: UserNetwork, checkpoint: dict) -> str:
    """Warn where the file of the network is not the one that the client used; "" where it is."""
    if checkpoint.get("model_sha256") in (None, builder.sha256):
        return ""
    return (
        f"warning: {builder.name} is not the file that the client built its network from (its "
        "SHA-256 is another); the weights fit, but the network may compute something else"
    )


def shuffled(target: Target, seed: int) -> Target:
    """Return the target with the numbers of every tensor that was sent in a random order."""
    sent = Update(target.gradient, target.bn_mean, target.bn_var)
    return replace(target, **vars(shuffled_update(sent, seed)))


def shuffled_update(sent: Update, seed: int) -> Update:
    """Return what a client sent with the numbers of every tensor in a random order."""
    draw = torch.Generator().manual_seed(seed)

    def mixed(tensors):
        return tensors and tuple(
            t.flatten()[torch.randperm(t.numel(), generator=draw)].view(t.shape) for t in tensors
        )

    return Update(mixed(sent.gradient), mixed(sent.bn_mean), mixed(sent.bn_var))


def _check_truth(inputs: InputSettings, files: _Files, case: Case, sealed: Sealed) -> TruthCheck:
    """Compare the truth's gradient with what was sent.

    Raises InputError where no id binds the truth to the checkpoint and its gradient is another.
    """
    x, y = sealed.images_for(case), sealed.truth.y.to(case.device)
    objective = case.objective
    check = check_truth_gradient(
        objective.model, files.sent, x, y, objective.batch_shard, objective.chunk_size
    )
    if not (files.bound or check.fits):
        raise InputError(
            f"{files.truth_source}: no id binds its truth to --checkpoint {inputs.checkpoint}, and "
            f"{check.finding}; give the truth of this checkpoint"
        )
    return check


# Labels ------------------------------------------------------------------------------------


def _labels(
    inputs: InputSettings,
    target: Target,
    truth: GroundTruth | None,
    model: nn.Module,
    processes: Shard,
) -> tuple[LabelResult | None, Tensor]:
    """Return the labels after how they were reconstructed, None for known ones."""
    if inputs.labels_from_gradient:
        found = None
        if processes.is_main:  # rounding may differ between machines, labels may not
            found = labels_from_gradient(inputs, target, model)
        found = processes.objects(found)[0]
        return found, found.labels
    if inputs.labels is not None:
        return None, _given_labels(inputs.labels, target)
    assert truth is not None  # _read_files saw to it
    return None, truth.y


def _given_labels(given: str, target: Target) -> Tensor:
    """Read the labels of `--labels`: (B,), or (B, K) under binary cross-entropy."""
    text, is_bce = given, target.loss_kind == "bce"
    kind = "numbers like 1,0,1" if is_bce else "integers like 3,1,2"
    try:
        if os.path.isfile(text):
            most = LABEL_BYTES * (1 + target.batch_size * (target.num_classes if is_bce else 1))
            if os.path.getsize(text) > most:
                raise InputError(
                    f"--labels {given[:80]}: a file of {os.path.getsize(text):,} bytes, too many "
                    f"for the labels of {target.batch_size} images; give only these"
                )
            with open(text, errors="replace") as file:
                text = file.read()
        words = text.replace(",", " ").split()
        y = torch.tensor([float(word) if is_bce else int(word) for word in words])
    except InputError:
        raise
    except (ValueError, OSError, OverflowError, RuntimeError) as error:
        raise InputError(f"--labels {given[:80]}: neither a readable file nor {kind}") from error
    with naming(f"--labels {given[:80]}"):
        if is_bce and len(y) == target.batch_size * target.num_classes:
            y = y.view(target.batch_size, target.num_classes)
        checkpoints.check_labels(y, target.batch_size, target.num_classes, target.loss_kind)
    return y


def labels_from_gradient(inputs: InputSettings, target: Target, model: nn.Module) -> LabelResult:
    """Reconstruct the labels from the gradient, by the method that the inputs name.

    Raises InputError, naming the flags, where they cannot be reconstructed.
    """
    shape = target.image_shape
    public = public_images(PUBLIC_IMAGES, target)
    auxiliary = None
    if inputs.label_images is not None:
        with naming(f"--label-aux {printable(inputs.label_images)}"):
            try:
                x, y = load_auxiliary(
                    inputs.label_images, target.num_classes, shape, inputs.bit_depth
                )
            except DepthError as error:
                raise InputError(
                    f"{error}; give --bit-depth with the bits that the files hold"
                ) from error
        auxiliary = normalise(x, target.mean, target.std), y
    known = LabelInputs(model, public, auxiliary, inputs.uniform_labels)
    try:
        return reconstruct_labels(target, known, inputs.label_method)
    except ScaledGradientError as error:
        scale = "its factor by --gradient-scale"
        if error.scale is not None:
            scale = f"--gradient-scale {error.scale:.10g}"
        raise InputError(f"--checkpoint {inputs.checkpoint}: {error}; give {scale}") from error
    except ValueError as error:
        raise InputError(
            f"--pseudo-label-init from_grads: {error}; give the labels by --labels"
        ) from error


# What the network allows -------------------------------------------------------------------


def _refuse_bn(settings: AttackSettings, target: Target, model: nn.Module) -> None:
    """Raise InputError for what concerns BatchNorm where the target has too little of it."""
    if settings.bn_grad == "detached" and not couples_samples(model, target.train_mode):
        raise InputError(
            "--bn-grad detached: concerns BatchNorm by batch statistics, which this checkpoint's "
            "network does not use; leave it out"
        )
    if settings.bn_coupling == "forced":
        with naming("--bn-coupling forced"):
            if target.local is not None:
                raise InputError("each local step has batch statistics of its own; leave it out")
            forced_statistics(model, target)
    weight = settings.weights.priors.get("bn", 0.0)
    if weight and not batchnorm_layers(model):
        raise InputError(f"--BN {weight:g}: {target.arch} has no BatchNorm layer; leave it out")


def _notes_on_bn(settings: AttackSettings, target: Target) -> Sequence[str]:
    notes = []
    if settings.exact_bn and not settings.weights.priors.get("bn"):
        notes.append("note: --exact-bn says where the BN prior pulls to; --BN is 0")
    elif settings.exact_bn and target.bn_mean is None:
        notes.append(
            "warning: --exact-bn, but the checkpoint holds no batch statistics: running ones are "
            "used; capture with training.py --upload-bn to have them"
        )
    if settings.bn_coupling == "forced" and target.protection is not None:
        how = target.protection.mode
        what = "clipped them or added noise" if how in DP_MODES else f"changed them by {how}"
        notes.append(
            "warning: --bn-coupling forced takes the gradients of BatchNorm's scale and shift for "
            f"exact, but the client {what}"
        )
    return notes


def _refuse_too_large(
    settings: AttackSettings, model: nn.Module, target: Target, processes: Shard
) -> None:
    """Raise InputError where the seeds' images, or what the network makes of them, do not fit."""
    seeds = settings.num_seeds * target.batch_size * math.prod(target.image_shape)
    with naming(f"--n-seed {settings.num_seeds}"):
        require_memory(
            seeds * target.gradient[0].element_size(), "the images of all seeds", "give fewer"
        )
    images = 2 if settings.method == "layerwise" else -(-target.batch_size // processes.size)
    if isinstance(settings.chunk_size, int):
        images = min(images, settings.chunk_size)
    elif settings.chunk_size is not None or settings.matching_memory is not None:
        return  # the plan of the memory counts more, and refuses
    numbers = images * math.prod(target.image_shape)
    free = free_memory()
    if free is None or numbers * 4 * LEAST_GROWTH < free:
        return
    require_memory(
        kept_bytes(model, target.image_shape, target.train_mode) * images // 2,
        f"what {target.arch} makes of {images:,} images {target.image_shape}",
        "take a machine with more memory or a GPU, more processes (--nproc), or a smaller batch",
    )


def _refuse_unfit_network(case: Case, source: str) -> None:
    """Raise InputError, naming `source`, when the network cannot process the images."""
    target = case.target
    start = case.start(0).to(case.device)
    error = forward_failure(case.objective.model, start, target.train_mode, target.num_classes)
    if error is not None:
        raise InputError(
            f"{source}: {target.arch} cannot process its images {target.image_shape}: "
            f"{' '.join(str(error).split())[:160]}"
        ) from error


def _evaluate_once(settings: AttackSettings, case: Case, own_network: str | None) -> None:
    """Evaluate the objective at the initial images, so that a fault shows before the long work.

    Raises InputError where a network of the user's has an operation without a second derivative.
    """
    x = case.start(settings.first_seed).to(case.device)
    objective = case.objective
    try:
        once = pixel_gradient_of(replace(settings, detect_anomaly=False))
        once(objective, objective.local_part(x), 0.0)
    except RuntimeError as error:  # of whatever kind
        if own_network is None or is_out_of_memory(error):
            raise
        raise InputError(
            f"{own_network}: its gradient cannot be differentiated by the images: "
            f"{' '.join(str(error).split())[:160]}"
        ) from error
