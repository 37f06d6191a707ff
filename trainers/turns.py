"""The hook between two steps: a type that goes in periods (adapters/restart.py, projection.py) begins the next one.

A turn is taken right before the first update of a period; what is exported before it and after it has the same delta. How
many were taken is part of the training state, so that none is missed or taken twice, whenever a run is killed or goes back.
Everything follows from the seed, the layer's name and the turn's number, so all processes do the same. Factors and
constants keep their places in memory, as a recorded step reads them there.

The optimizer's running means are carried over in one place, `_carry_over`: a type says what becomes of those of a factor, an
optimizer by which names it has them (`moments`). One whose state has another form begins with an empty one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainers.adapters.base import Carry
from trainers.objective import generator_for

if TYPE_CHECKING:
    from trainers.setup import Training


def goes_in_periods(training: Training) -> bool:
    """Whether the adapter's type takes turns at all."""
    return _period(training) > 0


@torch.no_grad()
def turn_if_due(training: Training) -> None:
    """Takes the turn of the update that comes next, if there is one and it was not taken yet."""
    number = training.step // _period(training) if goes_in_periods(training) else 0
    if number <= training.turned:
        return
    training.turned = number
    carries = {plan.name: _turn(training, plan.name) for plan in training.plans}
    _carry_over(training, carries)


def rate_after_turn(training: Training) -> float:
    """Factor in (0, 1] on the learning rate of the next update: it rises linearly after a turn, as in a warm-up."""
    period, warmup = _period(training), getattr(training.config.adapter.trained, "warmup", 0)
    since = training.step % period if period and training.step >= period else warmup
    return (since + 1) / (warmup + 1) if since < warmup else 1.0


def _period(training: Training) -> int:
    return getattr(training.config.adapter.trained, "every", 0)


def _turn(training: Training, layer: str) -> Carry:
    """One layer's turn, in float64: new factors and constants in the places of the old ones."""
    flat, kind = training.flat, training.config.adapter.trained
    factors, constants = flat.views[layer], flat.constants[layer]
    known = {name: _wide(tensor) for name, tensor in {**factors, **constants}.items()}
    turn = kind.turn(known, generator_for(training.config.train.seed, "turn", training.turned, layer))
    for places, new in ((factors, turn.factors), (constants, turn.constants)):
        for name, tensor in new.items():
            places[name].copy_(tensor)
    carry: Carry = turn.carry
    return carry


def _carry_over(training: Training, carries: dict[str, Carry]) -> None:
    settings, optimizer = training.config.optimizer, training.optimizer
    if not settings.moments:
        optimizer.state.clear()
    for state, layer, factor, place, shape in _states(training):
        for name, which in settings.moments.items():
            if name in state:
                mean = state[name]
                part = mean if settings.views else mean.view(-1)[place].view(shape)
                part.copy_(carries[layer](which, factor, _wide(part)))
    settings.begin_anew(optimizer)


def _states(training: Training) -> Iterator[tuple[dict[str, Any], str, str, slice, tuple[int, ...]]]:
    """(the optimizer's state that has a factor, its layer, its name, its place in that state's parameter, its shape)."""
    flat, optimizer = training.flat, training.optimizer
    for group, part in zip(optimizer.param_groups, flat.groups.values(), strict=True):
        own = [
            (layer, factor, slice(place.start - part.start, place.stop - part.start), shape)
            for layer, factors in flat.shapes.items()
            for factor, (_, place, shape) in factors.items()
            if part.start <= place.start < part.stop
        ]
        parameters = group["params"] if len(group["params"]) > 1 else group["params"] * len(own)
        for parameter, one in zip(parameters, own, strict=True):
            yield optimizer.state.get(parameter, {}), *one


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, on its device; of Apple's GPUs, which have none, on the CPU."""
    wide = tensor.detach()
    return (wide.cpu() if wide.device.type == "mps" else wide).double()
