"""The certificate of a layerwise attack: which tensors the gradient determines, and how well."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from inversion.audit.inputs import Case, Sealed, public_images
from inversion.layerwise.attack import Recovered, decoded, statistics_of
from inversion.layerwise.front import Front
from inversion.layerwise.peel import Layer
from models.rank_analysis import LayerRank, rank_analysis
from utils.console import table

#: Public photographs that the decoders of the picture of all layers learn from.
DECODED_BY = 300
#: How the images were made, in words.
METHODS = {
    "solved": "the gradient determines the images: solved",
    "stem": "from the output of the first pooling, by the network's first convolution",
    "activations": "images whose activations are the recovered ones",
    "decoded": "a linear decoder on certified activations, too few numbers to match",
    "decoder": "a linear decoder on the features of the head, which are not certified",
    "nothing": "nothing was recovered: the mean of public photographs",
}


@dataclass(frozen=True)
class Certificate:
    """Holds what a layerwise attack recovered, with what was predicted and what is true of it."""

    recovered: Recovered
    #: Name of a tensor → RA-i of the layer that takes it, where the network can be counted.
    ranks: dict[str, int]
    #: Name of a tensor → its relative error; None where scoring does not see the truth.
    errors: dict[str, float] | None

    @property
    def lines(self) -> list[str]:
        """What to print."""
        found = self.recovered
        header = [
            "tensor", "from", "unknowns", "equations", "rank", "condition", "residual", "flips",
            "certified", "seconds", "RA-i",
        ]  # fmt: skip
        header += [] if self.errors is None else ["true error"]
        rows = []
        for layer in found.layers:
            row = [
                layer.name, f"{layer.kind} {layer.place}", layer.unknowns, layer.equations,
                layer.rank, layer.condition, layer.residual, layer.flips,
                "yes" if layer.certified else "no", layer.seconds, self.ranks.get(layer.name, ""),
            ]  # fmt: skip
            row += [] if self.errors is None else [self.errors.get(layer.name, "")]
            rows.append(row)
        lines = []
        if rows:
            lines = ["certificate, made without the truth (RA-i: as --ra counts)"]
            lines.append(table(header, rows))
        lines.append(f"the walk ended: {found.stopped or 'at the image'}")
        source = f" ({', '.join(found.sources)})" if found.sources else ""
        lines.append(f"images: {METHODS[found.method]}{source}")
        if found.residual is not None:
            shown = ", ".join(f"{value:.1e}" for value in found.residual.tolist())
            lines.append(f"relative distance of each image's own activations from those: {shown}")
        return lines

    @property
    def entry(self) -> dict:
        """The entry `layerwise` of result.json."""
        found, layers = self.recovered, []
        for layer in found.layers:
            entry = asdict(layer) | {"ra": self.ranks.get(layer.name)}
            if self.errors is not None:
                entry["true_error"] = self.errors.get(layer.name)
            layers.append(entry)
        return {
            "stopped": found.stopped,
            "method": found.method,
            "sources": found.sources,
            "certified": len(found.certified),
            "image_residuals": None if found.residual is None else found.residual.tolist(),
            "layers": layers,
            "seconds": found.seconds,
        }


def certificate_of(
    case: Case, recovered: Recovered | None, sealed: Sealed | None
) -> Certificate | None:
    """Compare a layerwise attack with the count of its equations and, if `sealed`, with the truth.

    None for an attack that matched gradients.
    """
    if recovered is None:
        return None
    errors = None if sealed is None else true_errors(case, recovered, sealed)
    return Certificate(recovered, predictions(case, recovered.layers), errors)


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


def true_errors(case: Case, recovered: Recovered, sealed: Sealed) -> dict[str, float]:
    """Return the relative error of every recovered tensor, by name; for scoring only.

    The images are taken in an order whose labels are those that the attack went by. Empty where
    there is none.
    """
    attacked, true = case.y.cpu(), sealed.truth.y.cpu()
    if not torch.equal(attacked.sort().values, true.sort().values):
        return {}
    order = torch.empty_like(true)
    order[attacked.argsort(stable=True)] = true.argsort(stable=True)
    x = sealed.images_for(case)[order].double()
    front = Front(
        case.objective.model,
        list(recovered.tensors),
        statistics_of(case.target, case.objective.model),
    )
    with torch.no_grad():
        values = front(x)
    return {
        name: ((found - values[name]).norm() / values[name].norm()).item()
        for name, found in recovered.tensors.items()
    }


def decoded_layers(case: Case, recovered: Recovered) -> dict[str, Tensor]:
    """Return the images (B, C, H, W) in [0, 1] that a decoder makes of every certified tensor."""
    model, target = case.objective.model, case.target
    public = public_images(DECODED_BY, target).to(case.device)
    return {
        layer.name: case.images(decoded(model, target, recovered, layer.name, public))
        for layer in recovered.certified
        if layer.name in recovered.tensors
    }
