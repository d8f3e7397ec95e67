"""What one client of a sweep gave: a row of sweep.csv and sweep.json."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from utils.journal import Journal


@dataclass(frozen=True)
class Job:
    """Names one client of a sweep: a value, and which of its batches."""

    value: str
    #: Number of the batch, from 0.
    repeat: int

    @property
    def name(self) -> str:
        """Its name in the journal of the sweep."""
        return f"client-{self.value.replace('/', '|')}-{self.repeat}"

    def journal_in(self, journal: Journal) -> Journal:
        """Return its part of the journal of the sweep."""
        return journal.under(self.name)


@dataclass(frozen=True)
class Row:
    """Holds what one client gave, and to which attack. A field is None where there is no value."""

    value: str
    repeat: int
    #: Why there is no verdict; None where there is one.
    reason: str | None
    #: The command that captures such a client.
    client: str | None = None
    batch_size: int | None = None
    #: The client's protection as its checkpoint records it; None without.
    protection: Mapping | None = None
    #: ε of (ε, δ)-differential privacy; None for none.
    epsilon: float | None = None
    #: μ of Gaussian differential privacy of what was sent; None for none.
    mu: float | None = None
    #: Largest probability with which any attacker, however strong, picks the true image out of
    #: `candidates` ones; None where nothing bounds it.
    bound: float | None = None
    #: Candidates N for each image: itself and its decoys.
    candidates: int | None = None
    #: Cosine between what was sent and the gradient of the true images at the client's weights.
    cosine: float | None = None
    #: Share of the labels that the gradient gives away, in [0, 1], and by which method.
    label_accuracy: float | None = None
    label_method: str | None = None
    #: Weight of total variation of the strongest attack.
    tv: float | None = None
    verdict: str | None = None
    sentence: str | None = None
    #: Of the test, corrected for the number of attacks, and the lowest that was possible.
    p: float | None = None
    smallest_p: float | None = None
    #: Images that are identified one by one.
    identified: Sequence[int] = ()
    #: The metric that the verdict goes by.
    metric: str | None = None
    #: Per image how far it stands above the best of its controls, in that metric.
    leakage: Sequence[float] = ()
    #: Per image how far the lowest of its controls stands above the best one (≤ 0), in that metric.
    lowest_control: Sequence[float] = ()
    #: Whether the attack's objective became as low as at the truth.
    arrived: bool | None = None
    #: Metric → value per image, of the attack and of the image's best control.
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)
    controls: Mapping[str, Sequence[float]] = field(default_factory=dict)
    #: The deepest tensor that a layerwise attack certified, and how many there are.
    deepest: str | None = None
    certified: int | None = None
    #: Verdict of every attack on this client, by its weight of total variation.
    attempts: Sequence[Mapping] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """A row with its pictures, which no table has."""

    row: Row
    #: (B, C, H, W) of uint8: the true images, and their reconstructions in the same order.
    true: np.ndarray | None = None
    found: np.ndarray | None = None

    @property
    def job(self) -> Job:
        """The client that gave it."""
        return Job(self.row.value, self.row.repeat)

    @property
    def fact(self) -> dict[str, Any]:
        """The result as plain values and tensors, for a journal."""
        pictures = (None if x is None else torch.from_numpy(x) for x in (self.true, self.found))
        return {"row": asdict(self.row), "pictures": list(pictures)}

    @classmethod
    def of_fact(cls, fact: Mapping[str, Any]) -> "Result":
        """Return the result that a `fact` was made of."""
        true, found = (None if x is None else x.numpy() for x in fact["pictures"])
        return cls(Row(**fact["row"]), true, found)
