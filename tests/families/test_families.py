"""Recognising a base model: by folder or hub id, from whole weights, and in words when its files say nonsense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from trainers.errors import BaseModelError, SettingError
from trainers.families import ASSETS, check_size, locate, recognise_base
from trainers.families.base import Conditioning
from trainers.families.latent_diffusion import LatentDiffusion
from trainers.families.stored import files_of_part

PLAIN = "diffusion_pytorch_model.safetensors"
# What a well-known repository holds beside the files that are needed.
REPOSITORY = (
    "README.md", "model_index.json", "v1-5-pruned-emaonly.safetensors", "v1-5-pruned.ckpt",
    "feature_extractor/preprocessor_config.json", "safety_checker/config.json", "safety_checker/model.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.fp16.safetensors", "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin", "tokenizer/merges.txt", "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json", "tokenizer/vocab.json", "unet/config.json", f"unet/{PLAIN}",
    "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model-00001-of-00002.fp16.safetensors", "vae/config.json", f"vae/{PLAIN}",
    "vae/diffusion_pytorch_model.fp16.safetensors", "unet/notes.json", "logs/unet/config.json",
)  # fmt: skip


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "mine"))


def change(path: Path, **values: Any) -> None:
    """Sets values in a JSON file; None takes one out."""
    config = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """A model hub that has every repository, in the cache's own layout; the calls it got."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append({"repository": repository, **options})
        snapshot = tmp_path / "cache" / f"models--{repository.replace('/', '--')}" / "snapshots" / ("0123456789" * 4)
        shutil.copytree(folder, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    locate._fetch_from_hub.cache_clear()
    yield calls
    locate._fetch_from_hub.cache_clear()


def test_a_base_of_the_hub_is_called_by_its_repository(hub: list[dict[str, Any]]) -> None:
    facts = recognise_base("somebody/painted-v1-5")
    assert facts.name == "painted-v1-5"
    assert recognise_base(str(facts.folder)).name == "painted-v1-5"  # also where a person names the cache's own folder


def test_the_hub_is_asked_once(hub: list[dict[str, Any]]) -> None:
    assert recognise_base("somebody/painted").folder == recognise_base("somebody/painted").folder
    assert [call["repository"] for call in hub] == ["somebody/painted"]


def test_only_what_is_needed_is_fetched_from_the_hub(hub: list[dict[str, Any]]) -> None:
    recognise_base("somebody/painted")
    options = {name: hub[0].get(name) for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(REPOSITORY, **options)) == [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
        "tokenizer/merges.txt", "tokenizer/special_tokens_map.json", "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json", "unet/config.json", f"unet/{PLAIN}",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json", f"vae/{PLAIN}",
    ]  # fmt: skip


def test_a_hub_that_does_not_answer_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repository: str, **options: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(BaseModelError, match="nobody/nothing"):
        recognise_base("nobody/nothing")


def test_a_folder_gives_its_own_name(folder: Path) -> None:
    assert recognise_base(str(folder)).name == "mine"
    assert recognise_base(f"{folder}/").name == "mine"


def test_only_plain_weights_count(folder: Path) -> None:
    for variant in ("fp16", "non_ema"):
        shutil.copy(folder / "unet" / PLAIN, folder / "unet" / f"diffusion_pytorch_model.{variant}.safetensors")
    assert files_of_part(folder, "unet", "unet") == [folder / "unet" / PLAIN]


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_with_a_variant_only_has_no_weights(folder: Path, part: str) -> None:
    (plain,) = files_of_part(folder, part, part)
    plain.rename(plain.with_name(plain.name.replace(".safe", ".fp16.safe")))
    with pytest.raises(BaseModelError, match=f"no weights for {part}") as caught:
        recognise_base(str(folder))
    assert plain.name in caught.value.hint


def test_the_pieces_of_a_divided_part_come_in_order() -> None:
    names = [path.name for path in files_of_part(ASSETS / "pocket", "unet", "unet")]
    assert names == sorted(path.name for path in (ASSETS / "pocket" / "unet").glob("*.safetensors"))
    assert len(names) > 1


def divide(folder: Path, *names: object, there: int = 2) -> None:
    (folder / "unet" / PLAIN).unlink()
    (folder / "unet" / f"{PLAIN}.index.json").write_text(json.dumps({"weight_map": dict(enumerate(names))}), encoding="utf-8")
    for name in names[:there]:
        (folder / "unet" / str(name)).write_bytes(b"")


def test_a_piece_that_is_missing_is_named(folder: Path) -> None:
    divide(folder, "one.safetensors", "two.safetensors", "one.safetensors", there=1)
    with pytest.raises(BaseModelError, match=r"two\.safetensors") as caught:
        files_of_part(folder, "unet", "unet")
    assert "unet" in str(caught.value)


@pytest.mark.parametrize("names", [(), (5,), ("../../elsewhere.safetensors",), ("",)])
def test_an_index_that_names_no_files_of_its_folder_is_refused(folder: Path, names: tuple[object, ...]) -> None:
    divide(folder, *names, there=0)
    (folder / "elsewhere.safetensors").touch()
    with pytest.raises(BaseModelError, match="unet"):
        files_of_part(folder, "unet", "unet")


CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "5", '"x"', "[" * 100_000, "{}"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_nonsense_is_refused_by_name(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    if (name, text) == (CONFIGS[3], "{}"):  # a schedule's defaults are a schedule
        assert recognise_base(str(folder)).prediction_type == "epsilon"
        return
    with pytest.raises(BaseModelError) as caught:
        recognise_base(str(folder))
    assert name in str(caught.value)


def test_empty_configurations_everywhere_are_refused(folder: Path) -> None:
    for name in CONFIGS:
        (folder / name).write_text("{}", encoding="utf-8")
    with pytest.raises(BaseModelError):
        recognise_base(str(folder))


@pytest.mark.parametrize("value", [None, "x", [], [1, "x"], {}, 0, -1, 1.5, True, [2**40] * 99])
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("unet/config.json", "in_channels"),
        ("unet/config.json", "cross_attention_dim"),
        ("unet/config.json", "sample_size"),
        ("unet/config.json", "block_out_channels"),
        ("vae/config.json", "latent_channels"),
        ("vae/config.json", "block_out_channels"),
        ("text_encoder/config.json", "hidden_size"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused_by_name(folder: Path, name: str, setting: str, value: Any) -> None:
    change(folder / name, **{setting: value})
    with pytest.raises(BaseModelError) as caught:
        recognise_base(str(folder))
    assert name in str(caught.value) and setting in str(caught.value)


def test_a_prediction_type_that_is_no_word_is_refused(folder: Path) -> None:
    change(folder / CONFIGS[3], prediction_type=["epsilon"])
    with pytest.raises(BaseModelError, match="prediction_type"):
        recognise_base(str(folder))


@pytest.mark.parametrize("size", [(4, 4), (36, 44), (64, 4096)])
def test_any_multiple_of_a_latents_pixels_can_be_drawn(tiny_base: Path, size: tuple[int, int]) -> None:
    check_size(recognise_base(str(tiny_base)), *size)


@pytest.mark.parametrize("size", [(0, 32), (32, -4), (34, 32), (32, 4100)])
def test_other_sizes_are_refused_as_width_x_height(tiny_base: Path, size: tuple[int, int]) -> None:
    with pytest.raises(SettingError, match=f"{size[1]}x{size[0]}.*multiples of 4"):
        check_size(recognise_base(str(tiny_base)), *size)


def test_prediction_brings_the_text_states_to_the_latents_device() -> None:
    seen: list[torch.Tensor] = []

    class Unet:
        def parameters(self) -> Iterator[torch.Tensor]:
            yield torch.zeros(1, dtype=torch.bfloat16)

        def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor, **more: Any) -> tuple[torch.Tensor]:
            seen.extend((latents, more["encoder_hidden_states"]))
            return (latents,)

    there = torch.zeros(1, 4, 2, 2, device="meta")
    model: Any = SimpleNamespace(unet=Unet(), _extras=lambda *_: {})
    LatentDiffusion.predict(model, there, torch.tensor([1]), Conditioning(torch.zeros(1, 77, 8)), torch.zeros(1, 6))
    assert {(tensor.device.type, tensor.dtype) for tensor in seen} == {("meta", torch.bfloat16)}
