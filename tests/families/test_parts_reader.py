"""The thread that reads a base: what it reads is what is stored, what stands in its way is told, and it ends when left."""

from __future__ import annotations

import hashlib
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainers.errors import BaseModelError
from trainers.families import load_family, recognise_base, tensor_files
from trainers.families.parts import PartsReader

CPU = torch.device("cpu")


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "impasto-beside"]


def test_tensors_come_in_the_number_format_of_their_part(tiny_base: Path) -> None:
    stored = load_file(tiny_base / "unet" / "diffusion_pytorch_model.safetensors")
    with PartsReader(recognise_base(str(tiny_base)), torch.bfloat16, CPU) as reader:
        assert reader.take("vae", "decoder.conv_in.bias").dtype == torch.float32
        name = "mid_block.resnets.0.conv1.weight"
        assert torch.equal(reader.take("unet", name), stored[name].to(torch.bfloat16))
    assert readers() == []


def test_a_reader_that_is_left_early_reads_no_further(tiny_base: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PartsReader(recognise_base(str(tiny_base)), torch.float32, CPU):
        raise KeyboardInterrupt
    assert readers() == []


def test_a_number_that_is_none_is_told_and_only_where_the_model_reads_it(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "another.weight": torch.full((2,), torch.nan)}, file)
    assert load_family(recognise_base(str(base)), torch.float32, CPU).parts()
    tensors["conv_in.bias"][1] = torch.inf
    save_file(tensors, file)
    with pytest.raises(BaseModelError, match=r"conv_in\.bias holds numbers that are NaN or infinite"):
        load_family(recognise_base(str(base)), torch.float32, CPU)
    assert readers() == []


def test_a_file_that_gets_shorter_while_it_is_read_is_told(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    facts = recognise_base(str(base))
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseModelError, match="short"):
        load_family(facts, torch.float32, CPU)


def test_without_room_for_a_thread_it_reads_all_the_same(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    model = load_family(recognise_base(str(tiny_base)), torch.float32, CPU)
    assert len(model.fingerprint("unet")) == 64


def test_two_threads_that_read_in_pieces_give_what_is_stored_and_leave_the_number_of_threads_alone(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "PIECE", 64)
    stored, before = load_file(tiny_base / "unet" / "diffusion_pytorch_model.safetensors"), torch.get_num_threads()
    with PartsReader(recognise_base(str(tiny_base)), torch.bfloat16, CPU) as reader:
        reader.hurry()
        for name, tensor in stored.items():
            wanted = tensor.to(torch.bfloat16)
            assert torch.equal(reader.take("unet", name), wanted)
            digest = hashlib.sha256(wanted.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
            assert reader.digests["unet", name] == digest
    assert readers() == []
    assert torch.get_num_threads() == before
