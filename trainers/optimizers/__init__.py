"""The optimizers: the union of their settings. One file each, one line in the union."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trainers.optimizers.adafactor import AdafactorSettings
from trainers.optimizers.adamw import AdamWSettings
from trainers.optimizers.adamw8bit import AdamW8bitSettings
from trainers.optimizers.prodigy import ProdigySettings

OptimizerConfig = Annotated[
    AdamWSettings | AdamW8bitSettings | AdafactorSettings | ProdigySettings,
    Field(discriminator="type"),
]
