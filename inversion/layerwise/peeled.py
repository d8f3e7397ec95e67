"""What a walk from the head to the image has recovered, and where it is."""

from dataclasses import dataclass, field

from torch import Tensor, fx

from inversion.layerwise.layer import Layer
from inversion.layerwise.network import Network

#: Kinds of certificates that are about signals, not about a tensor's values.
SIGNALS = ("masks", "shifts")


@dataclass
class Peeled:
    """Holds what was recovered, deepest last."""

    network: Network
    layers: list[Layer] = field(default_factory=list)
    #: Why it ended where it did, in one line.
    stopped: str = ""
    #: Why it turned to convolutions that were attacked directly, a line each.
    detours: list[str] = field(default_factory=list)
    #: (B,) labels that such a convolution gave; None without one.
    labels: Tensor | None = None
    #: Place in the network's nodes down to which it came.
    reached: int = 0
    #: How many of the network's nodes it has yet to visit, the last of these next.
    todo: int = 0
    #: Certificates of a convolution that was attacked directly which are yet to be yielded.
    pending: list[Layer] = field(default_factory=list)
    #: Whether nothing is left to be tried.
    ended: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """Return what was recovered, by name: values only, in the order of `layers`."""
        by_name = {node.name: node for node in self.network.nodes}
        found = {}
        for layer in self.layers:
            if layer.kind not in SIGNALS and by_name[layer.name] in self.network.values:
                found[layer.name] = self.network.values[by_name[layer.name]]
        return found

    def frontier(self) -> list[fx.Node]:
        """Return the certified tensors that no deeper ones determine, the deepest first."""
        certified = {
            layer.name for layer in self.layers if layer.certified and layer.kind not in SIGNALS
        }
        known: set[fx.Node] = set()
        found = []
        for node in self.network.nodes:
            inputs = self.network.inputs(node)
            follows = bool(inputs) and all(source in known for source in inputs)
            solved = node.name in certified and node in self.network.values
            if solved and not follows:
                found.append(node)
            if solved or follows:
                known.add(node)
        return found
