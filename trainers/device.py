"""Device, number format and processes: chosen once, with the reason in words."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch

from trainers.errors import LostProcessError, Problem, SettingError, is_out_of_memory
from trainers.kernels import Kernels
from trainers.process_id import place

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = 200_000_000  # bytes of denoiser files; below this, casts cost more than they save on a CPU (pocket: 34 MB)


@dataclass(frozen=True)
class Device:
    """Where a run computes, and `reason` says why there. It is `index` of `count` processes, which sum in `group`."""

    device: torch.device
    dtype: torch.dtype
    reason: str
    index: int = 0
    count: int = 1
    group: Any = field(default=None, compare=False, repr=False)
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
        """The sum of `tensor` over all processes, in place. Raises LostProcessError when one of them is gone."""
        if self.count > 1:
            try:
                torch.distributed.all_reduce(tensor, group=self.group)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                what = "Another process of this training no longer answers"
                hint = "What was saved until now is kept; `impasto resume` goes on."
                raise LostProcessError(what, hint=hint) from error
        return tensor

    def sum_step(
        self, gradient: torch.Tensor, loss: torch.Tensor, wish: Callable[[], int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums a step's flat gradient over all processes, in place; returns the sums of `loss` (a scalar) and of the wishes.

        One message for all three: a second one would cost its latency in every step. One process has no need of the last.
        """
        if self.count == 1:
            return loss, torch.zeros_like(loss)
        numbers = gradient.new_tensor([0.0, wish()])
        numbers[0] = loss
        total = self.sum_over_processes(torch.cat([gradient, numbers]))
        gradient.copy_(total[:-2])
        return total[-2], total[-1]

    def sent_per_step(self, numbers: int) -> str:
        """What the sum of a gradient of so many float32 numbers costs, in words; nothing for one process.

        Summed in a ring, every process sends each part of the message on, once to sum it and once to tell the sum.
        """
        if self.count == 1:
            return ""
        sent = 2 * (self.count - 1) / self.count * 4 * (numbers + 2)
        return f"{self.count} processes, {sent / 1e6:.2f} MB sent by each in a step"

    def sum_numbers(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes, to float32's precision where there are several."""
        if self.count == 1:
            return list(numbers)
        total: list[float] = self.sum_over_processes(torch.tensor(numbers, dtype=torch.float32, device=self.device)).tolist()
        return total

    def wait_for_all(self) -> None:
        """Returns once every process has come here."""
        self.sum_numbers(0.0)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`. On the way to a GPU it is pinned, so that nobody waits until it is there."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _join_processes() -> tuple[torch.device, int, Any]:
    """Meets the other processes: this one's device and index, and the group that they sum in. Raises SettingError."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not on_cpu and here > torch.cuda.device_count():
        what = f"{here} processes need as many GPUs, and {torch.cuda.device_count()} can be seen"
        raise SettingError(what, hint="Start fewer processes, or set ACCELERATE_USE_CPU=true.")
    state = PartialState(cpu=on_cpu)
    # While the first process draws samples or prior pictures the others wait in a sum, for minutes on a GPU and for hours on
    # a CPU; by default that would end the training after 10 or 30 minutes. Who has died is found out by trainers.peers.
    group = torch.distributed.new_group(timeout=timedelta(days=7))
    return state.device, state.process_index, group


def choose_device(precision: str, denoiser_bytes: int, before: Mapping[str, Any] | None = None) -> Device:
    """CUDA before Apple's GPU before the CPU. Raises SettingError when bf16 is asked for where there is none.

    Unless it is set, the format of a large denoiser is bf16 where the device computes in it, and fp16 on an older GPU.
    `before` are the `kernels` that a resumed run has computed with: what can be set is set again.
    """
    (index, count), group = place(), None
    if count > 1:
        device, index, group = _join_processes()
    elif torch.cuda.is_available():
        device = torch.device("cuda")
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if device.type == "cpu" and (count == 1 or (before and before["processes"] == count)):
        # Said aloud even though it changes no number: only then does MKL stop choosing by itself how many threads a
        # product gets, which a resumed process chose differently, in the last bit of a result.
        # Sums are cut into as many parts as there are threads, so a resumed run needs as many as before.
        torch.set_num_threads(before["threads"] if before else torch.get_num_threads())
    if before or device.type == "cuda":
        _settle_tf32(before["matmul"] if before else "highest" if precision == "fp32" else "high")
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
    kept = {name: before[name] for name in asdict(Kernels()) if name in before} if before and device.type == "cpu" else {}
    return Device(device, DTYPES[precision], reason, index, count, group, Kernels(**kept))


def _settle_tf32(matmul: str) -> None:
    """TF32, 10 bits of a factor's digits in place of 23, for a GPU's float32 products and convolutions but at "highest".

    Whoever asks for fp32 wants its digits. Else float32 is left to the VAE and to bases that are too small for 16 bits.
    """
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = matmul != "highest"


def _half_precision(device: torch.device) -> str | None:
    """The 16-bit format that a device computes in, the better one first; None where neither is sure to be there."""
    if device.type == "cuda":
        # GPUs before Ampere answer for bf16 by computing in float32, which is slower than either.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" else None


def check_device(device: Device) -> list[Problem]:
    """What is possible on the chosen device, but unwise."""
    found = []
    if device.dtype == torch.float16 and device.device.type == "cpu":
        what = "A CPU computes in fp16 many times more slowly than in bf16 or fp32"
        found.append(Problem("warning", what, "train.precision", "Set train.precision=auto."))
    if device.count == 1 and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys():
        # What accelerate leaves in the environment when it was asked for more, and starts one.
        what = "`accelerate launch --cpu` starts one process, whatever --num_processes says"
        found.append(Problem("warning", what, hint="With --multi_gpu in place of --cpu it starts several, without a GPU, too."))
    return found


def other_kernels(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resumed run cannot have as before, in words: its result may differ in the last digits from an unbroken run's."""
    return [f"{name} {before[name]} is now {now[name]}" for name in now if name in before and before[name] != now[name]]
