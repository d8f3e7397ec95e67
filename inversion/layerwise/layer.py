"""The certificate of one tensor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """Holds the certificate of one tensor: how well the gradient determines it."""

    #: The tensor's name in the traced network.
    name: str
    #: The module that makes it, for people.
    place: str
    #: Convolutions and linear layers whose gradients were solved for it.
    used_by: tuple[str, ...]
    #: What it was recovered from: "head", "masks" (where a pooling's signal goes), "convolution",
    #: "linear"; "shifts" (the signal behind a convolution, from its gradient alone), "forward" (the
    #: features that follow from there).
    kind: str
    unknowns: int
    equations: int
    rank: int
    condition: float
    #: Norm of what the recovered tensor leaves of the gradients, relative to theirs.
    residual: float
    #: Relative error of the tensor that follows from that on average, None where nobody knows.
    expected_error: float | None
    #: Mask entries that were turned over on the way.
    flips: int
    certified: bool
    seconds: float
    #: Whether other solutions with fewer zeros exist, so that the certificate needs the next
    #: tensor's, whose equations see these zeros.
    rests_on_zeros: bool = False
