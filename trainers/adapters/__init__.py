"""The adapter types: the union of their settings and the table of their mathematics. One file each, one line here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from trainers.adapters.dora import DORA, DORA_LOHA, DORA_LOKR
from trainers.adapters.full import FULL
from trainers.adapters.loha import LOHA
from trainers.adapters.lokr import LOKR
from trainers.adapters.lora import LORA, LoraSettings

AdapterConfig = Annotated[LoraSettings, Field()]

# All of them are loaded, blended, merged and converted; those whose settings stand in AdapterConfig are trained too.
ADAPTERS: dict[str, Any] = {
    "lora": LORA,
    "dora": DORA,
    "loha": LOHA,
    "lokr": LOKR,
    "dora and loha": DORA_LOHA,
    "dora and lokr": DORA_LOKR,
    "full": FULL,
}
