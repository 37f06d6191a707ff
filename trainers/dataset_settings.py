"""The settings about pictures: the folder that is learnt, and those that keep the base from forgetting. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainers.settings import Settings


class DatasetSettings(Settings):
    """The folder of pictures and how they are prepared."""

    images: str = ""
    """Folder of pictures; sub-folders are read too, and `10_name` repeats its pictures 10 times."""
    edits: str = ""
    """JSON file with captions that come before those in the folder, and pictures left out, by relative path."""
    trigger: str = ""
    """Trigger word put in front of every caption that lacks it."""
    resolution: int | None = Field(default=None, ge=32, le=4096)
    """Side in pixels of the square whose area a picture is scaled to. Unset: the base model's own."""
    repeats: int = Field(default=1, ge=1, le=1000)
    """How often each picture is shown in one epoch, times the repeats of its folder."""
    holdout: float = Field(default=0.1, ge=0, le=0.5)
    """Share of the pictures kept aside for the held-out loss. They are not trained on."""
    buckets: bool = True
    """Keep each picture's shape by aspect-ratio buckets; off crops everything to a square."""
    flip: bool = False
    """Show every picture mirrored half of the time. Off for text, faces with a parting, or anything with a side."""
    masks: Literal["off", "files", "alpha", "auto"] = "off"
    """What of a picture is learnt: all, what the mask file beside it or its own alpha shows, or `auto`, whichever it has."""
    caption_shuffle: bool = False
    """Shuffle the comma-separated parts of a caption, anew at each step."""
    caption_keep: int = Field(default=1, ge=0, le=100)
    """How many leading parts of a caption stay in place when it is shuffled."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of steps in which a caption is left empty, which keeps guidance working."""


class PriorSettings(Settings):
    """Prior preservation: pictures of the usual kind, drawn or given, learnt beside yours so that nothing is forgotten."""

    folder: str = ""
    """Folder of such pictures, with captions beside them. With it none are drawn."""
    caption: str = ""
    """Caption of the pictures in that folder that have none: what they all show, as `a cat`. Empty: their file names."""
    prompts: tuple[str, ...] = ()
    """Prompts without the trigger word that the base draws before training. None: no prior preservation."""
    images: int = Field(default=1, ge=1, le=100)
    """Pictures drawn for each prior prompt."""
    weight: float = Field(default=1.0, ge=0, le=10)
    """Weight of a prior picture's loss against one of yours."""
    repeats: int = Field(default=1, ge=1, le=1000)
    """How often each prior picture is shown in one epoch."""
    steps: int = Field(default=20, ge=1, le=200)
    """Sampling steps of a prior picture."""
    guidance: float = Field(default=3.0, ge=0, le=30)
    """Guidance of a prior picture."""
