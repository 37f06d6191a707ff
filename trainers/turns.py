"""The hook between two steps: a type that goes in periods (adapters/restart.py, projection.py) begins the next one.

A turn is taken right before the first update of a period; what is exported before it and after it has the same delta. How
many were taken is part of the training state, so that none is missed or taken twice, whenever a run is killed or goes back.
Everything follows from the seed, the layer's name and the turn's number, so all processes do the same. Factors and
constants keep their places in memory, as a recorded step reads them there. All that is new is computed before anything is
written, so that a turn for which memory was short is not taken at all, and can be taken later; one that changes no layer
leaves the optimizer alone.

The optimizer's running means are carried over in one place, `_carried`: a type says what becomes of those of a factor, an
optimizer by which names it has them (`moments`). Those in 8 bits are changed only where they become others, and there as
nearly as their blocks allow: see eight_bit.py. One whose state has another form begins with an empty one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from trainers.adapters.base import Carry, Turn
from trainers.objective import generator_for

if TYPE_CHECKING:
    from trainers.eight_bit import Blocks
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
    new: list[tuple[torch.Tensor, torch.Tensor]] = []
    carries: dict[str, Carry] = {}
    for plan in training.plans:
        turn = _turn(training, plan.name, number)
        if turn.changed:
            carries[plan.name] = turn.carry
            new += _in_places(training, plan.name, turn)
    if carries:
        means = _carried(training, carries)
        for place, tensor in new + means:
            place.copy_(tensor)
        _begin_anew(training)
    training.turned = number


def rate_after_turn(training: Training) -> float:
    """Factor in (0, 1] on the learning rate of the next update: it rises linearly after a turn, as in a warm-up."""
    period, warmup = _period(training), getattr(training.config.adapter.trained, "warmup", 0)
    since = training.step % period if period and training.step >= period else warmup
    return (since + 1) / (warmup + 1) if since < warmup else 1.0


def _period(training: Training) -> int:
    return getattr(training.config.adapter.trained, "every", 0)


def _turn(training: Training, layer: str, number: int) -> Turn:
    """One layer's turn, in float64; nothing is changed yet."""
    flat, kind = training.flat, training.config.adapter.trained
    known = {name: _wide(tensor) for name, tensor in {**flat.views[layer], **flat.constants[layer]}.items()}
    turn: Turn = kind.turn(known, generator_for(training.config.train.seed, "turn", number, layer))
    return turn


def _in_places(training: Training, layer: str, turn: Turn) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(place, what comes there) of a layer's factors and constants."""
    flat = training.flat
    pairs = ((flat.views[layer], turn.factors), (flat.constants[layer], turn.constants))
    return [(places[name], _held(new, places[name])) for places, given in pairs for name, new in given.items()]


def _carried(training: Training, carries: dict[str, Carry]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(place, what comes there) of the optimizer's running means of the layers that `carries` names."""
    settings, found = training.config.optimizer, []
    packed: dict[tuple[int, str], tuple[Blocks, torch.Tensor]] = {}  # by state and name, with what the mean becomes
    for state, layer, factor, place, shape in _states(training):
        for name, which in settings.moments.items():
            if name not in state or layer not in carries:
                continue
            blocks, key = settings.blocks(state, name), (id(state), name)
            if blocks is not None and key not in packed:
                packed[key] = blocks, blocks.mean()
            mean = packed[key][1] if blocks is not None else state[name]
            part = mean if settings.views else mean.view(-1)[place].view(shape)
            new = _held(carries[layer](which, factor, _wide(part)), part)
            if blocks is None:
                found.append((part, new))
            else:
                part.copy_(new)
    return found + [pair for blocks, new in packed.values() for pair in blocks.pairs(new)]


def _begin_anew(training: Training) -> None:
    if not training.config.optimizer.moments:
        training.optimizer.state.clear()
    training.config.optimizer.begin_anew(training.optimizer)


def _held(new: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """In the number format of its place, in the machine's memory: a GPU's would have to hold a second sum of each layer."""
    return new.to("cpu", place.dtype)


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
