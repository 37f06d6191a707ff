"""A step recorded as one list of operations, against the same step computed as usual: bit for bit, on ever new numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainers import tape
from trainers.graph import ON_CPU, Graphed
from trainers.train import update


@pytest.mark.parametrize("settings", [(), ("text_encoder.learning_rate=1e-3",)])
def test_recorded_steps_give_the_same_bits(start: Any, settings: tuple[str, ...]) -> None:
    common = ("train.batch_size=2", "train.accumulation=2", "optimizer.learning_rate=1e-2", "train.min_snr_gamma=5", *settings)
    recorded, usual = start(*common), start(*common, "train.recording=off")
    assert isinstance(recorded.runner, Graphed)
    for _ in range(ON_CPU + 4):
        assert update(recorded) == update(usual)
    assert recorded.runner._recorded and not recorded.runner._given_up
    assert torch.equal(recorded.flat.weights, usual.flat.weights)


def test_recording_leaves_things_as_they_were_and_reads_what_they_hold_later() -> None:
    given, total = torch.tensor([1.0, 2.0]), torch.zeros(2)
    leaf = torch.ones(2, requires_grad=True)

    def work() -> torch.Tensor:
        made = (given * leaf).exp()
        made.sum().backward()
        assert leaf.grad is not None
        total.add_(leaf.grad)
        leaf.grad.zero_()
        made.detach().add_(1.0)
        return made.detach().sum()

    leaf.grad = torch.zeros(2)
    again = tape.record(work)
    assert total.tolist() == [0.0, 0.0] and leaf.grad.tolist() == [0.0, 0.0]
    for numbers in ([1.0, 2.0], [3.0, -1.0]):
        given.copy_(torch.tensor(numbers))
        total.zero_()
        found = again()
        assert torch.equal(total, given * given.exp())
        assert float(found) == pytest.approx(float(given.exp().sum()) + 2.0)


def test_what_a_recording_cannot_know_is_refused() -> None:
    with pytest.raises(RuntimeError, match="cannot know"):
        tape.record(lambda: torch.ones(2) * float(torch.ones(()).sum()))
    with pytest.raises(RuntimeError, match="cannot know"):
        tape.record(lambda: torch.randn(2).sum())
