"""The adapter types: the union of their settings and the table of their mathematics. One file each, one line here."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from trainers.adapters.lora import LORA, LoraSettings

AdapterConfig = Annotated[LoraSettings, Field()]

ADAPTERS: dict[str, Any] = {
    "lora": LORA,
}
