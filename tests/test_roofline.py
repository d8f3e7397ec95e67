"""The roofline's counts are those of the layers' shapes."""

import pytest
import torch

from benchmarks import roofline
from benchmarks.roofline import (
    NORMALISATION,
    OTHER,
    Operations,
    bound_seconds,
    counted_by_hand,
    kind_of,
    operations_of,
    steps_of,
)
from benchmarks.setting import photo_objective


@pytest.mark.parametrize("method", ["plain", "exact"])
def test_counted_arithmetic_is_that_of_the_shapes(method):
    """Of the plain step it is more: convolutions with a stride compute too many taps."""
    objective, x = photo_objective("lenet", 16, 2), torch.randn(2, 3, 16, 16)
    counted = sum(flop for flop, _ in operations_of(steps_of(objective, x)[method]))
    by_hand = counted_by_hand(objective.model, x, method)
    if method == "plain":
        layer = objective.model[2]
        assert layer.kernel_size == (5, 5)
        assert layer.stride == (2, 2)
        by_hand += 2 * layer.weight[..., 0, 0].numel() * (6**2 - 5**2) * 2 * 4**2
    assert counted == by_hand


def test_bytes_are_those_of_what_is_read_and_written():
    x, y = torch.ones(4, 6), torch.ones(6)
    with Operations() as counter:
        z = x.t().t() + y.expand(4, 6)  # views move nothing, and y has 6 entries
        z.mul_(2)
        torch.empty(3)
        x @ x.t()
    assert counter.found == [
        (0, 4 * (24 + 6 + 24)), (0, 4 * (24 + 24)), (0, 12), (2 * 4 * 4 * 6, 4 * (24 + 24 + 16))
    ]  # fmt: skip
    assert bound_seconds([(10, 1), (1, 10)], 1.0, 2.0) == 15.0


def test_kinds_follow_from_the_operation_and_its_callers():
    product = next(iter(roofline.KINDS))
    assert kind_of(["aten::mm", "_NormaliseBackward"]) == product
    assert kind_of(["aten::mul", "_NormaliseBackward"]) == NORMALISATION
    assert kind_of(["aten::mul", "MulBackward0"]) == "element-wise"
    assert kind_of(["aten::copy_"]) == "copies"
    assert kind_of(["aten::unheard_of"]) == OTHER


def test_one_command_writes_rows_and_kinds(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "SETTINGS", {"lenet": roofline.Setting("lenet", 16, 1)})
    monkeypatch.setattr(roofline, "MATRIX", 64)
    monkeypatch.setattr(roofline, "COPIED", 2**10)
    threads = torch.get_num_threads()
    path = tmp_path / "roofline.csv"
    try:
        roofline.main(
            ["--rounds", "2", "--profiled", "1", "--settings", "lenet", "--csv", str(path)]
        )
    finally:
        torch.set_num_threads(threads)
    assert len(path.read_text().splitlines()) == 1 + 2 * 2
    assert (tmp_path / "roofline_kinds.csv").read_text().count("exact") >= 4
