"""Device, number format and processes: chosen once, with the reason in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainers.errors import Problem, SettingError
from trainers.kernels import Kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = 200_000_000  # bytes of denoiser files; below this, casts cost more than they save on a CPU (pocket: 34 MB)


@dataclass(frozen=True)
class Device:
    """Where a run computes. `index` of `count` processes; `reason` says why device and dtype were chosen."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    index: int = 0
    count: int = 1
    fast: Kernels = field(default_factory=Kernels)

    @property
    def dtype_name(self) -> str:
        """fp32, bf16 or fp16."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    def kernels(self) -> dict[str, Any]:
        """What decides the last bits of a result beside the numbers that go in. Kept with the training state."""
        on_gpu = self.device.type == "cuda"
        return {
            "device": self.device.type,
            "processor": torch.cuda.get_device_name() if on_gpu else torch.backends.cpu.get_cpu_capability(),
            "processes": self.count,
            "torch": torch.__version__,
            "dtype": self.dtype_name,
            "threads": torch.get_num_threads(),
            "matmul": torch.get_float32_matmul_precision(),
            "onednn": torch.backends.mkldnn.enabled,
            **asdict(self.fast),
        }

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


def choose_device(precision: str, denoiser_bytes: int, before: Mapping[str, Any] | None = None) -> Device:
    """CUDA before Apple's GPU before the CPU. Raises SettingError when bf16 is asked for where there is none.

    Unless it is set, the format of a large denoiser is bf16 where the device computes in it, and fp16 on an older GPU.
    `before` are the `kernels` that a resumed run has computed with: what can be set is set again.
    """
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
        # Sums are cut into as many parts as there are threads, so a resumed run needs as many as before.
        torch.set_num_threads(before["threads"] if before else torch.get_num_threads())
    if before:
        torch.set_float32_matmul_precision(before["matmul"])
    half = _half_precision(device)
    if precision == "bf16" and half != "bf16":
        other = half or "fp32"
        raise SettingError("train.precision = bf16 is not possible on this GPU", hint=f"Set train.precision={other}.")
    if precision == "auto" and before and (before["dtype"] != "bf16" or half == "bf16"):
        precision = before["dtype"]
        reason = f"{device.type}, {precision} as before"
    elif precision == "auto":
        precision = half if half and denoiser_bytes > SMALL else "fp32"
        reason = f"{device.type}, {precision} chosen for a denoiser of {denoiser_bytes / 1e6:.0f} MB"
    else:
        reason = f"{device.type}, {precision} as set"
    fast = Kernels(**{name: before[name] for name in asdict(Kernels()) if name in before}) if before else Kernels()
    return Device(device, DTYPES[precision], reason, index, count, fast)


def _half_precision(device: torch.device) -> str | None:
    """The 16-bit format that a device computes in, the better one first; None where neither is sure to be there."""
    if device.type == "cuda":
        # GPUs before Ampere answer for bf16 by computing in float32, which is slower than either.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" else None


def check_device(device: Device) -> list[Problem]:
    """What is possible on the chosen device, but unwise."""
    if device.dtype != torch.float16 or device.device.type != "cpu":
        return []
    what = "A CPU computes in fp16 many times more slowly than in bf16 or fp32"
    return [Problem("warning", what, "train.precision", "Set train.precision=auto.")]


def other_kernels(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resumed run cannot have as before, in words: its result may differ in the last digits from an unbroken run's."""
    return [f"{name} {before[name]} is now {now[name]}" for name in now if name in before and before[name] != now[name]]
