"""The certificate of a layerwise attack: which tensors the gradient determines, and how well."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from inversion.audit.inputs import Case
from inversion.layerwise.attack import Recovered
from inversion.layerwise.front import Front
from inversion.layerwise.peel import Layer
from models.rank_analysis import LayerRank, rank_analysis
from utils.console import table

#: How the images were made, in words.
METHODS = {
    "solved": "the gradient determines the images: solved",
    "stem": "from the output of the first pooling, by the network's first convolution",
    "activations": "images whose activations are the recovered ones",
    "decoder": "a linear decoder on the features of the head, which are not certified",
    "nothing": "nothing was recovered: the mean of public photographs",
}


def certificate_lines(
    case: Case, recovered: Recovered, true_errors: Mapping[str, float] | None
) -> list[str]:
    """Return what to print of a layerwise attack.

    true_errors: name of a recovered tensor → its relative error, where scoring may see the truth.
    """
    header = [
        "tensor", "from", "unknowns", "equations", "rank", "condition", "residual", "flips",
        "certified", "seconds", "RA-i (--ra)",
    ]  # fmt: skip
    if true_errors is not None:
        header.append("true error")
    ranks = predictions(case, recovered.layers)
    rows = []
    for layer in recovered.layers:
        index = ranks.get(layer.name)
        row = [
            layer.name, f"{layer.kind} {layer.place}", layer.unknowns, layer.equations, layer.rank,
            layer.condition, layer.residual, layer.flips, "yes" if layer.certified else "no",
            layer.seconds, "" if index is None else index,
        ]  # fmt: skip
        if true_errors is not None:
            row.append(true_errors.get(layer.name, ""))
        rows.append(row)
    lines = ["certificate (made without the truth)", table(header, rows)] if rows else []
    lines.append(f"the walk ended: {recovered.stopped or 'at the image'}")
    source = f" ({', '.join(recovered.sources)})" if recovered.sources else ""
    lines.append(f"images: {METHODS[recovered.method]}{source}")
    if recovered.residual is not None:
        shown = ", ".join(f"{value:.1e}" for value in recovered.residual.tolist())
        lines.append(f"relative distance of each image's own activations from those: {shown}")
    return lines


def certificate_entry(
    case: Case, recovered: Recovered, true_errors: Mapping[str, float] | None
) -> dict:
    """Return the entry `layerwise` of result.json."""
    ranks = predictions(case, recovered.layers)
    layers = []
    for layer in recovered.layers:
        entry = asdict(layer) | {"ra": ranks.get(layer.name)}
        if true_errors is not None:
            entry["true_error"] = true_errors.get(layer.name)
        layers.append(entry)
    residual = recovered.residual
    return {
        "stopped": recovered.stopped,
        "method": recovered.method,
        "sources": recovered.sources,
        "certified": len(recovered.certified),
        "image_residuals": None if residual is None else residual.tolist(),
        "layers": layers,
        "seconds": recovered.seconds,
    }


def predictions(case: Case, layers: Sequence[Layer]) -> dict[str, int]:
    """Return what rank analysis predicts of every recovered tensor, by the tensor's name.

    The index RA-i of the layer that takes the tensor: above 0, so many of its numbers are not
    determined. A tensor inside a residual block has the index of the block. Empty where the network
    cannot be counted.
    """
    target = case.target
    try:
        ranks = rank_analysis(case.objective.model, target.batch_size, target.image_shape)
    except ValueError:
        return {}
    found = {}
    for layer in layers:
        for use in layer.used_by:
            rank = _layer_of(use, ranks)
            if rank is not None:
                found[layer.name] = rank.index
                break
    return found


def _layer_of(path: str, ranks: Sequence[LayerRank]) -> LayerRank | None:
    """Return the counted layer that a module is or belongs to."""
    for rank in ranks:
        if path == rank.name or path.startswith(f"{rank.name}."):
            return rank
    return None


def true_errors(
    model: nn.Module, recovered: Recovered, front: Front, x: Tensor
) -> dict[str, float]:
    """Return the relative error of every recovered tensor; for scoring only.

    front: of the recovered tensors' names. x: (B, C, H, W) true images, normalised, in the order
    of the labels that the attack went by.
    """
    with torch.no_grad():
        true = front(x.double())
    errors = {}
    for name, value in recovered.tensors.items():
        expected = true[name].reshape(value.shape)
        errors[name] = ((value - expected).norm() / expected.norm()).item()
    return errors
