"""Device, number format and processes: chosen once, with the reason in words."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from trainers.errors import SettingError

SMALL = 200_000_000  # bytes of denoiser files; below this, bf16's casts cost more than they save on a CPU (pocket: 34 MB)


@dataclass(frozen=True)
class Device:
    """Where a run computes. `index` of `count` processes; `reason` says why device and dtype were chosen."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    index: int = 0
    count: int = 1

    @property
    def dtype_name(self) -> str:
        """fp32 or bf16."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    def sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all processes, in place where there is only one."""
        if self.count == 1:
            return tensor
        from accelerate.utils import reduce

        total: torch.Tensor = reduce(tensor, reduction="sum")
        return total

    def largest_of_processes(self, number: int) -> int:
        """The largest `number` that any process gives, so that all decide alike."""
        if self.count == 1:
            return number
        from accelerate.utils import gather

        numbers: torch.Tensor = gather(torch.tensor([number], device=self.device))
        return int(numbers.max())

    def wait_for_all(self) -> None:
        """Returns once every process has come here."""
        if self.count > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()


def choose_device(precision: str, denoiser_bytes: int) -> Device:
    """CUDA before Apple's GPU before the CPU. Raises SettingError when bf16 is asked for where there is none."""
    index, count = 0, 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        index, count, device = state.process_index, state.num_processes, state.device
    elif torch.cuda.is_available():
        device = torch.device("cuda")
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
        # Said aloud even though it changes no number: only then does MKL stop choosing by itself how many threads a
        # product gets, which a resumed process chose differently, in the last bit of a result.
        torch.set_num_threads(torch.get_num_threads())
    bf16 = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    if precision == "bf16" and not bf16:
        raise SettingError("train.precision = bf16 is not possible on this GPU", hint="Set train.precision=fp32.")
    if precision == "auto":
        precision = "bf16" if bf16 and denoiser_bytes > SMALL else "fp32"
        reason = f"{device.type}, {precision} chosen for a denoiser of {denoiser_bytes / 1e6:.0f} MB"
    else:
        reason = f"{device.type}, {precision} as set"
    return Device(device, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], reason, index, count)
