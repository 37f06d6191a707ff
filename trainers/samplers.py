"""The samplers by name: a class in diffusers and what its configuration adds to the base model's. No torch."""

from __future__ import annotations

from typing import Any

from trainers.errors import SettingError

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def check_sampler(name: str) -> None:
    """Raises SettingError, with the names that there are, for another one."""
    if name not in SAMPLERS:
        raise SettingError(f"There is no sampler {name!r}", hint=f"Choose one of: {', '.join(SAMPLERS)}.")
