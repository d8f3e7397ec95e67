"""The certificate of a layerwise attack: which tensors the gradient determines, and how well."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from inversion.audit.inputs import Case, Sealed
from inversion.layerwise.attack import Recovered
from inversion.layerwise.front import Front, statistics_of
from inversion.layerwise.layer import Layer
from models.rank_analysis import LayerRank, rank_analysis
from utils.console import table
from utils.matching import assign

#: How the images were made, in words.
METHODS = {
    "solved": "the gradient determines the images: solved",
    "stem": "from the output of the first pooling, by the network's first convolution",
    "activations": "matched: images whose own activations come near the recovered ones",
    "decoded": "a linear decoder on certified activations, which were too few or were not matched",
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
    #: (B,) labels that the attack was given.
    given: Tensor

    @property
    def lines(self) -> list[str]:
        """What to print."""
        found = self.recovered
        lines = [f"on the way: {detour}" for detour in found.detours]
        lines += self._table() if found.layers else []
        if found.labels is not None:
            same = torch.equal(found.labels.cpu().sort().values, self.given.cpu().sort().values)
            shown = ", ".join(map(str, found.labels.tolist()))
            verdict = "those given" if same else "not those given"
            lines.append(f"labels read from that convolution and the head: {shown} ({verdict})")
        lines.append(f"the walk ended: {found.stopped or 'at the image'}")
        source = f" ({', '.join(found.sources)})" if found.sources else ""
        lines.append(f"images: {METHODS[found.method]}{source}")
        if found.residual is not None:
            shown = ", ".join(f"{value:.1e}" for value in found.residual.tolist())
            lines.append(f"relative distance of each image's own activations from those: {shown}")
        return lines

    def _table(self) -> list[str]:
        """Return the title and the table of all tensors."""
        header = [
            "tensor", "from", "unknowns", "equations", "rank", "condition", "residual",
            "expected error", "flips", "certified", "seconds", "RA-i",
        ]  # fmt: skip
        rows = [
            [
                layer.name, f"{layer.kind} {layer.place}", layer.unknowns, layer.equations,
                layer.rank, layer.condition, layer.residual, _shown(layer.expected_error),
                layer.flips, "yes" if layer.certified else "no", layer.seconds,
                _shown(self.ranks.get(layer.name)),
            ]
            for layer in self.recovered.layers
        ]  # fmt: skip
        title = "certificate, made without the truth"
        if self.errors:
            title += " but for the last column"
            header.append("true error")
            for row, layer in zip(rows, self.recovered.layers, strict=True):
                row.append(_shown(self.errors.get(layer.name)))
        return [f"{title} (RA-i: as --ra counts)", table(header, rows)]

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
            "detours": found.detours,
            "labels": None if found.labels is None else found.labels.tolist(),
            "method": found.method,
            "sources": found.sources,
            "certified": len(found.certified),
            "image_residuals": None if found.residual is None else found.residual.tolist(),
            "layers": layers,
            "seconds": found.seconds,
        }


def _shown(value: float | None) -> float | str:
    """Return a number as a cell of the table, which is empty where there is none."""
    return "" if value is None else value


def certificate_of(
    case: Case, recovered: Recovered | None, sealed: Sealed | None
) -> Certificate | None:
    """Compare a layerwise attack with the count of its equations and, if `sealed`, with the truth.

    None for an attack that matched gradients.
    """
    if recovered is None:
        return None
    errors = None if sealed is None else true_errors(case, recovered, sealed)
    return Certificate(recovered, predictions(case, recovered.layers), errors, case.y)


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

    Images are paired with the true ones by the first tensor (`assign`), since labels do not tell
    images of one class apart. Empty where nothing was recovered.
    """
    if not recovered.tensors:
        return {}
    front = Front(
        case.objective.model,
        list(recovered.tensors),
        statistics_of(case.target, case.objective.model),
    )
    with torch.no_grad():
        values = front(sealed.images_for(case).double())
    first, found = next(iter(recovered.tensors.items()))
    rows = assign(found, values[first])
    return {
        name: ((found[rows] - values[name]).norm() / values[name].norm()).item()
        for name, found in recovered.tensors.items()
    }
