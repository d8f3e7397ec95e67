"""The client as one function: settings → what it sends for its batch, and what scoring needs."""

from dataclasses import dataclass

import torch
from torch import nn

from models.target import Protection
from train import client, output, report
from train.batches import Batch, client_batch
from train.client import Sent
from train.settings import ClientSettings
from utils.console import Reporter
from utils.shard import Shard


@dataclass(frozen=True)
class Captured:
    """Holds what one run of the client gave."""

    settings: ClientSettings
    #: The private batch, with the control's images and decoys where they were asked for.
    batch: Batch
    #: The network, with the weights that the client started from, where it was computed.
    model: nn.Module
    #: What the client sends for the batch.
    sent: Sent
    #: What it would have sent for the control's images; None without them.
    control: Sent | None
    #: The record of the protection; None without.
    protection: Protection | None

    @property
    def checkpoint(self) -> dict:
        """Make what the server gets, with the truth for the audit, as checkpoints hold it."""
        return output.checkpoint_of(
            self.settings, self.batch, self.model, self.sent, self.control, self.protection
        )


def capture(
    settings: ClientSettings, device: torch.device, reporter: Reporter, shard: Shard
) -> Captured:
    """Load the private batch and compute what the client sends for it; write nothing.

    device: where to compute. The processes of `shard` share the batch and return the same; give
    each but the first a silent reporter. Raises InputError for what cannot be captured.
    """
    # the private batch, and the network that the server sent
    batch = client_batch(settings.batch, reporter.say)
    spec = batch.spec
    model = client.network(settings.network, spec.class_count, spec.shape, reporter.say)
    client.check_network(settings, model)
    report.say_batch(batch, model, device, reporter)
    if shard.size > 1:
        reporter.say(f"{shard.size} processes share the batch")

    # the update, protected if the flags ask for it, and that of other images as a control
    model.to(device)
    x, y = batch.x.to(device), batch.y.to(device)
    client.check_processes(settings, model, x, spec.class_count)
    protection, noise = client.protection_of(settings)
    sent = client.update(settings, model, x, y, noise, shard)
    control = None
    if batch.other is not None:
        other = batch.other.to(device)
        control = client.update(settings, model, other, y, noise, shard, "control")
    return Captured(settings, batch, model, sent, control, protection)
