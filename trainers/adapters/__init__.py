"""The adapter types: the union of their settings and the table of their mathematics. One file each, one line here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from trainers.adapters.additive import AdditiveSettings
from trainers.adapters.dora import DORA, DORA_LOHA, DORA_LOKR, DoraSettings
from trainers.adapters.full import FULL, FullSettings
from trainers.adapters.loha import LOHA, LohaSettings
from trainers.adapters.lokr import LOKR, LokrSettings
from trainers.adapters.lora import LORA, LoraSettings
from trainers.adapters.pivotal import PivotalSettings
from trainers.adapters.projection import RandomProjectionSettings
from trainers.adapters.restart import RestartSettings

AdapterConfig = Annotated[
    LoraSettings
    | DoraSettings
    | LohaSettings
    | LokrSettings
    | AdditiveSettings
    | FullSettings
    | RandomProjectionSettings
    | RestartSettings
    | PivotalSettings,
    Field(discriminator="type"),
]
"""What can be trained; `trained` of the settings is the mathematics of it."""

# What files hold: all of them are loaded, blended, merged and converted.
ADAPTERS: dict[str, Any] = {
    "lora": LORA,
    "dora": DORA,
    "loha": LOHA,
    "lokr": LOKR,
    "dora and loha": DORA_LOHA,
    "dora and lokr": DORA_LOKR,
    "full": FULL,
}
