"""Whether the reference and the project do the same work: the same batches and the same start give the same losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainers.adapters.plan import LayerPlan
from trainers.bench.contestants import Told, inputs_of
from trainers.bench.reference import Reference
from trainers.setup import Training
from trainers.train import update

STEPS = 10
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}


@dataclass(frozen=True)
class Agreement:
    """Losses of both, step by step, and the largest relative difference."""

    project: tuple[float, ...]
    reference: tuple[float, ...]
    worst: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether they agree within rounding."""
        return self.worst <= self.tolerance


def agree(
    training: Training, reference: Reference, precision: str, told: Told = lambda done, total: None, steps: int = STEPS
) -> Agreement:
    """Takes both back to step 0, at the same factors, and runs the project's own batches through both."""
    reset(training, reference)
    ours, theirs = [], []
    for number in range(steps):
        (batch,) = training.batches.step(training.step)
        theirs.append(reference.update(inputs_of(batch, reference)))
        ours.append(update(training)[0])
        told(number + 1, steps)
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return Agreement(tuple(ours), tuple(theirs), worst, TOLERANCE[precision])


@torch.no_grad()
def reset(training: Training, reference: Reference) -> None:
    """Step 0 again for both: new `down` factors, the same in both, `up` zero, and optimizers that remember nothing."""
    generator = torch.Generator().manual_seed(training.config.train.seed)
    training.step = 0
    training.flat.gradient.zero_()
    for optimizer in (training.optimizer, reference.optimizer):
        optimizer.state.clear()
    for plan in training.plans:
        factors = training.flat.views[plan.name]
        start = torch.randn(factors["down"].shape, generator=generator) / factors["down"].shape[1] ** 0.5
        factors["down"].copy_(start)
        factors["up"].zero_()
        down, up = _peft_factors(reference, plan)
        down.copy_(start)
        up.zero_()


def _peft_factors(reference: Reference, plan: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
    layer = reference.unet.get_submodule(plan.name.removeprefix("unet."))
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
