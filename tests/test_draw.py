"""`impasto generate`: LoRA files put into a base, what of them does not fit, and sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from trainers.attach import attach_files
from trainers.draw import DrawRequest, draw
from trainers.errors import SettingError
from trainers.families import load_family, recognise_base
from trainers.formats import ModuleWeights, write_adapter

TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def save_lora(path: Path, *strangers: str) -> Path:
    """A LoRA of one layer of the tiny base, and of layers that it has not."""
    factors = {"down": torch.full((2, 32), 0.1), "up": torch.full((32, 2), 0.1)}
    write_adapter(path, {name: ModuleWeights(factors, 2.0) for name in (TO_Q, *strangers)}, {}, "fp32")
    return path


def request(base: Path, lora: Path, output: Path, *, scheduler: str = "dpm++", size: tuple[int, int] = (32, 32)) -> DrawRequest:
    """One picture in two steps."""
    loras = ((lora, 1.0),)
    return DrawRequest(
        str(base), loras, ("a cat",), (1.0,), output, as_folder=False, steps=2, guidance=1, scheduler=scheduler, size=size
    )


def test_modules_that_the_base_has_not_are_told_once_for_each_file_on_the_error_stream(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = save_lora(tmp_path / "odd.safetensors", "unet.up_blocks.7.to_q", "unet.up_blocks.8.to_q")
    draw(request(tiny_base, lora, tmp_path / "out.png"))
    out, err = capsys.readouterr()
    assert "2 of 3 modules of odd.safetensors are not in this base, for example lora_unet_up_blocks_7_to_q" in err
    assert err.count("modules of") == 1 and "modules of" not in out


def test_what_a_checkpoint_predicts_can_be_said_and_is_told_where_it_was_guessed(
    any_size: None, tiny_sd2_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may have been trained with it set; drawn with the other, all its pictures would be noise."""
    from safetensors.torch import load_file, save_file

    from tests.test_cli import impasto
    from trainers import families
    from trainers.formats.base_file import write_base

    write_base(recognise_base(str(tiny_sd2_base)), tmp_path / "told.safetensors")
    save_file(load_file(tmp_path / "told.safetensors"), tmp_path / "unsaid.safetensors")
    seen = []

    def stop(facts: families.BaseModelFacts, *more: object) -> object:
        seen.append((facts.prediction_type, facts.zero_terminal_snr))
        raise SettingError("seen")

    monkeypatch.setattr(families, "load_family", stop)
    command = ("generate", "-p", "x", "-o", tmp_path / "x.png", "--base", tmp_path / "unsaid.safetensors")
    impasto(*command)
    assert "--prediction-type epsilon" in capsys.readouterr().err
    impasto(*command, "--prediction-type", "epsilon")
    impasto(*command, "--prediction-type", "v_prediction", "--zero-terminal-snr")
    assert "assumed" not in capsys.readouterr().err
    assert seen == [("v_prediction", False), ("epsilon", False), ("v_prediction", True)]


def test_a_file_that_fits_is_put_in_without_a_word(tiny_base: Path, tmp_path: Path) -> None:
    told: list[str] = []
    model = load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))
    files = [save_lora(tmp_path / "a.safetensors"), save_lora(tmp_path / "b.safetensors")]
    assert attach_files(model, files, told.append) == ["file-0", "file-1"]
    assert told == []


def test_a_picture_may_have_any_size_in_whole_latents(tiny_base: Path, tmp_path: Path) -> None:
    (path,) = draw(request(tiny_base, save_lora(tmp_path / "a.safetensors"), tmp_path / "out.png", size=(44, 36)))
    with Image.open(path) as image:
        assert image.size == (44, 36)


def test_what_cannot_be_drawn_is_refused_before_weights_are_read(tiny_base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "never read.safetensors"
    with pytest.raises(SettingError, match=r"46x36.*multiples of 4"):
        draw(request(tiny_base, lora, tmp_path / "out.png", size=(46, 36)))
    with pytest.raises(SettingError, match=r"'fast'.*dpm\+\+"):
        draw(request(tiny_base, lora, tmp_path / "out.png", scheduler="fast"))
