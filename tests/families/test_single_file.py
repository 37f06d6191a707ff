"""A base as one file: the same numbers as its folder, read by diffusers too, and refused in words when it is another thing."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_models import tiny_unet
from trainers.errors import BaseModelError, SettingError
from trainers.families import BaseOptions, load_family, recognise_base
from trainers.families.base import DiffusionModel
from trainers.families.ldm import part_layouts
from trainers.families.stored import entries_of
from trainers.formats.base_file import write_base

FAMILIES = ("sd1", "sd2", "sdxl")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tiny_sd2_base: Path, tiny_sdxl_base: Path) -> dict[str, Path]:
    return {"sd1": tiny_base, "sd2": tiny_sd2_base, "sdxl": tiny_sdxl_base}


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> single file of the tiny base."""
    place = tmp_path_factory.mktemp("single")
    made = {}
    for family, folder in folders.items():
        made[family] = place / f"{family}.safetensors"
        write_base(recognise_base(str(folder)), made[family])
    return made


def load(base: Path, options: BaseOptions | None = None) -> Any:
    return load_family(recognise_base(str(base), options), torch.float32, CPU)


def answer(model: DiffusionModel) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents of a fixed picture, prediction for fixed noisy latents)."""
    draw = torch.Generator().manual_seed(5)
    pixels = torch.rand(1, 3, 32, 32, generator=draw) * 2 - 1
    noisy, framing = torch.randn(1, 4, 8, 8, generator=draw), torch.tensor([[40.0, 50.0, 2.0, 3.0, 32.0, 32.0]])
    with torch.no_grad():
        conditioning = model.encode_captions(["a photo of a cat"])
        return model.encode_pixels(pixels)[0], model.predict(noisy, torch.tensor([321]), conditioning, framing)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_and_its_folder_give_the_same_bits(family: str, folders: dict[str, Path], files: dict[str, Path]) -> None:
    there, here = load(folders[family]), load(files[family])
    assert here.facts.family.name == family == there.facts.family.name
    assert [here.fingerprint(part) for part in (*here.parts(), "vae")] == [
        there.fingerprint(part) for part in (*there.parts(), "vae")
    ]
    for one, other in zip(answer(there), answer(here), strict=True):
        assert torch.equal(one, other)
    assert here.facts.prediction_type == there.facts.prediction_type
    assert here.facts.resolution == there.facts.resolution


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_comes_back_bit_for_bit_from_a_folder(family: str, files: dict[str, Path], tmp_path: Path) -> None:
    write_base(recognise_base(str(files[family])), tmp_path / "folder")
    write_base(recognise_base(str(tmp_path / "folder")), tmp_path / "again.safetensors")
    first, again = load_file(files[family]), load_file(tmp_path / "again.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_our_single_file_with_every_number(
    family: str, folders: dict[str, Path], files: dict[str, Path]
) -> None:
    diffusers = importlib.import_module("diffusers")
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    theirs = kind.from_single_file(
        str(files[family]), config=str(folders[family]), torch_dtype=torch.float32, local_files_only=True
    )
    ours = load(folders[family])
    for part, module in {**ours.parts(), "vae": ours.vae}.items():
        read, own = getattr(theirs, part).state_dict(), module.state_dict()
        assert read.keys() == own.keys()
        assert all(torch.equal(read[name], own[name]) for name in own), part


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_folder_that_we_write(family: str, files: dict[str, Path], tmp_path: Path) -> None:
    diffusers = importlib.import_module("diffusers")
    write_base(recognise_base(str(files[family])), tmp_path / "folder")
    theirs = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "folder"), local_files_only=True)
    ours = load(files[family])
    for part, module in {**ours.parts(), "vae": ours.vae}.items():
        assert all(
            torch.equal(getattr(theirs, part).state_dict()[name], tensor) for name, tensor in module.state_dict().items()
        )
    for part in ours.tokenizers:
        theirs_ids = getattr(theirs, part.replace("text_encoder", "tokenizer"))(
            ["a cat"], padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
        assert torch.equal(theirs_ids, ours.token_ids(part, ["a cat"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configurations_that_ship_are_of_the_known_sizes(family: str) -> None:
    """Parameters of the real models: 859.5 M (SD 1.x), 865.9 M (SD 2.x), 2,567.5 M (SDXL); every tensor has a place."""
    from accelerate import init_empty_weights
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from trainers.families.configuration import read_configs
    from trainers.families.facts import ASSETS

    configs = read_configs(ASSETS / "families" / family)
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(configs["unet"])
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert count == {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}[family]
    layout = part_layouts(family, configs)["unet"]
    places = [layout.place(name) for name in unet.state_dict()]
    assert None not in places and len({place.key for place in places if place}) == len(places)
    assert [layout.names(place.key)[0][0] for place in places if place] == list(unet.state_dict())


def test_known_keys_of_the_real_checkpoints_have_their_names() -> None:
    from trainers.families.configuration import read_configs
    from trainers.families.facts import ASSETS

    known = {
        ("sd1", "unet"): [
            ("model.diffusion_model.input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
            ("model.diffusion_model.output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
            ("model.diffusion_model.output_blocks.5.2.conv.bias", "up_blocks.1.upsamplers.0.conv.bias"),
            ("model.diffusion_model.middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight"),
            ("model.diffusion_model.input_blocks.4.0.skip_connection.weight", "down_blocks.1.resnets.0.conv_shortcut.weight"),
        ],
        ("sd1", "vae"): [
            ("first_stage_model.decoder.up.3.block.0.norm1.weight", "decoder.up_blocks.0.resnets.0.norm1.weight"),
            ("first_stage_model.encoder.mid.attn_1.proj_out.weight", "encoder.mid_block.attentions.0.to_out.0.weight"),
        ],
        ("sd1", "text_encoder"): [
            ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "final_layer_norm.bias"),
            ("cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight", "encoder.layers.0.mlp.fc1.weight"),
        ],
        ("sd2", "text_encoder"): [
            ("cond_stage_model.model.transformer.resblocks.7.ln_2.weight", "encoder.layers.7.layer_norm2.weight"),
            ("cond_stage_model.model.transformer.resblocks.23.ln_2.weight", None),  # the layer that is never read
        ],
        ("sdxl", "unet"): [
            ("model.diffusion_model.label_emb.0.2.weight", "add_embedding.linear_2.weight"),
            ("model.diffusion_model.input_blocks.7.1.transformer_blocks.9.ff.net.0.proj.weight",
             "down_blocks.2.attentions.0.transformer_blocks.9.ff.net.0.proj.weight"),
        ],
        ("sdxl", "text_encoder_2"): [
            ("conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_bias",
             "encoder.layers.31.self_attn.q_proj.bias"),
            ("conditioner.embedders.1.model.text_projection", "text_projection.weight"),
        ],
    }  # fmt: skip
    for (family, part), pairs in known.items():
        layout = part_layouts(family, read_configs(ASSETS / "families" / family))[part]
        assert [(key, next((name for name, _ in layout.names(key)), None)) for key, _ in pairs] == pairs


def test_foreign_tensors_of_a_single_file_are_kept(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["sd1"]) | {"model_ema.decay": torch.tensor(0.5), "betas": torch.ones(3)}
    carried = json.loads(_header(files["sd1"]))["__metadata__"]
    save_file(tensors, tmp_path / "more.safetensors", carried)
    write_base(recognise_base(str(tmp_path / "more.safetensors")), tmp_path / "copy.safetensors")
    copy = load_file(tmp_path / "copy.safetensors")
    assert torch.equal(copy["betas"], torch.ones(3)) and float(copy["model_ema.decay"]) == 0.5


def _header(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]


def test_a_pickled_checkpoint_is_read_by_weights_only(any_size: None, files: dict[str, Path], tmp_path: Path) -> None:
    """Its configuration cannot be carried inside, so one of real size would be wanted: the widths are told."""
    torch.save({"state_dict": load_file(files["sd1"]), "global_step": 5}, tmp_path / "old.ckpt")
    facts = recognise_base(str(tmp_path / "old.ckpt"))
    assert (facts.family.name, facts.resolution) == ("sd1", 512)
    entries = entries_of(tmp_path / "old.ckpt")
    stored = entries_of(files["sd1"])
    assert {key: entry.shape for key, entry in entries.items()} == {key: entry.shape for key, entry in stored.items()}
    with pytest.raises(BaseModelError, match="another kind"):
        load(tmp_path / "old.ckpt")


def test_a_vae_of_ones_own_takes_the_place_of_the_base_s(
    files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    own = {key: tensor * 1.5 for key, tensor in load_file(files["sd1"]).items() if key.startswith("first_stage_model.")}
    save_file(own, tmp_path / "prefixed.safetensors")
    bare = {key.removeprefix("first_stage_model."): tensor for key, tensor in own.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    without = {key: tensor for key, tensor in load_file(files["sd1"]).items() if key not in own}
    save_file(without, tmp_path / "without.safetensors", json.loads(_header(files["sd1"]))["__metadata__"])
    models = [
        load(folders["sd1"], BaseOptions(vae=str(tmp_path / "prefixed.safetensors"))),
        load(files["sd1"], BaseOptions(vae=str(tmp_path / "bare.safetensors"))),
        load(tmp_path / "without.safetensors", BaseOptions(vae=str(tmp_path / "bare.safetensors"))),
    ]
    assert len({model.fingerprint("vae") for model in models}) == 1
    assert models[0].fingerprint("vae") != load(folders["sd1"]).fingerprint("vae")
    whole = load(folders["sd1"], BaseOptions(vae=str(folders["sd2"] / "vae")))
    assert whole.fingerprint("vae") == load(folders["sd2"]).fingerprint("vae")
    with pytest.raises(BaseModelError, match="no vae"):
        recognise_base(str(tmp_path / "without.safetensors"))


def test_what_a_checkpoint_predicts_is_known_by_its_marks(any_size: None, files: dict[str, Path], tmp_path: Path) -> None:
    """The empty tensors v_pred and ztsnr, or modelspec; a plain SD 2.x says nothing, and that is told."""
    sd2, sdxl = load_file(files["sd2"]), load_file(files["sdxl"])
    save_file(sd2, tmp_path / "unsaid.safetensors")
    assert "assumed" in recognise_base(str(tmp_path / "unsaid.safetensors")).guessed
    assert recognise_base(str(tmp_path / "unsaid.safetensors")).resolution == 768
    small = recognise_base(str(tmp_path / "unsaid.safetensors"), BaseOptions(prediction_type="epsilon"))
    assert (small.prediction_type, small.resolution, small.guessed) == ("epsilon", 512, "")
    save_file(sdxl | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "v.safetensors")
    facts = recognise_base(str(tmp_path / "v.safetensors"))
    assert (facts.prediction_type, facts.zero_terminal_snr) == ("v_prediction", True)
    save_file(sd2, tmp_path / "said.safetensors", {"modelspec.prediction_type": "epsilon"})
    assert recognise_base(str(tmp_path / "said.safetensors")).prediction_type == "epsilon"


def test_zero_terminal_snr_needs_v_prediction(folders: dict[str, Path]) -> None:
    with pytest.raises(SettingError, match="v-prediction"):
        recognise_base(str(folders["sd1"]), BaseOptions(zero_terminal_snr=True))
    model = load(folders["sd2"], BaseOptions(zero_terminal_snr=True))
    assert float(model.objective.alphas_cumprod[-1]) == 0.0
    noise, latents = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    last = torch.tensor([999])
    assert torch.equal(model.objective.add_noise(latents, noise, last), noise)
    assert torch.allclose(model.objective.target(latents, noise, last), -latents)


WRONG: dict[str, tuple[Any, str]] = {
    "an inpainting model": ({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "inpainting"),
    "SDXL's refiner": ({"model.diffusion_model.label_emb.0.0.weight": torch.zeros(2, 2560),
                        "conditioner.embedders.0.model.ln_final.weight": torch.zeros(2)}, "refiner"),
    "a denoiser only": (None, "no vae and no text encoder"),
    "a bare denoiser": ("bare", "denoiser only"),
    "a LoRA": ({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, "LoRA, not a base"),
    "a Flux model": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, "Flux"),
    "a VAE": ("vae", "VAE only"),
    "something else": ({"weight": torch.zeros(2)}, "no Stable Diffusion checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_base_is_called_by_its_name(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    change, words = WRONG[name]
    tensors = load_file(files["sd1"])
    if change is None:
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    elif change == "bare":
        tensors = dict(tiny_unet().state_dict())
    elif change == "vae":
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith("first_stage_model.")}
    else:
        first = "model.diffusion_model.input_blocks.0.0.weight"
        tensors = change | ({first: tensors[first]} if "label_emb" in str(change.keys()) else {})
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(BaseModelError, match=words):
        recognise_base(str(tmp_path / "wrong.safetensors"))


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("fault", ["missing", "nan", "width"])
def test_a_tensor_that_is_missing_misfitting_or_not_finite_is_named(
    layout: str, fault: str, files: dict[str, Path], tmp_path: Path
) -> None:
    single = layout == "file"
    if single:
        path, key = tmp_path / "bad.safetensors", "model.diffusion_model.middle_block.1.norm.weight"
        source, metadata = files["sd1"], json.loads(_header(files["sd1"]))["__metadata__"]
    else:
        write_base(recognise_base(str(files["sd1"])), tmp_path / "bad")
        source = path = tmp_path / "bad" / "unet" / "diffusion_pytorch_model.safetensors"
        key, metadata = "mid_block.attentions.0.norm.weight", {}
    tensors = {name: tensor.clone() for name, tensor in load_file(source).items()}
    if fault == "missing":
        del tensors[key]
    elif fault == "nan":
        tensors[key][3] = float("nan")
    else:
        tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, path, metadata)
    with pytest.raises(BaseModelError, match=r"mid_block\.attentions\.0\.norm\.weight") as caught:
        load(path if single else tmp_path / "bad")
    assert {"missing": "lacks 1 of its", "nan": "NaN", "width": "(63,)"}[fault] in str(caught.value)


@pytest.mark.parametrize("fault", ["cut short", "a header bomb", "a pickle inside", "a payload", "a safetensors called .ckpt"])
def test_a_damaged_or_dangerous_file_is_refused(fault: str, files: dict[str, Path], tmp_path: Path) -> None:
    path, mark = tmp_path / "bad.safetensors", tmp_path / "was run"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (mark,))

    if fault == "cut short":
        path.write_bytes(files["sd1"].read_bytes()[:-1000])
    elif fault == "a header bomb":
        path.write_bytes(struct.pack("<Q", 2**62) + b"{}" * 100)
    elif fault == "a pickle inside":
        torch.save({"state_dict": {"a": torch.ones(1)}}, path)
    elif fault == "a safetensors called .ckpt":
        path = tmp_path / "bad.ckpt"
        path.write_bytes(files["sd1"].read_bytes())
    else:
        path = tmp_path / "bad.ckpt"
        torch.save({"state_dict": {"a": torch.ones(1)}, "callbacks": Payload()}, path)
    with pytest.raises(BaseModelError, match="called .ckpt" if "called" in fault else None):
        recognise_base(str(path))
    assert not mark.exists()


def test_a_base_without_one_of_q_k_and_v_is_not_written_on(tiny_sd2_base: Path, tmp_path: Path) -> None:
    write_base(recognise_base(str(tiny_sd2_base)), tmp_path / "folder")
    path = tmp_path / "folder" / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["text_model.encoder.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(BaseModelError, match="One of q, k and v is missing"):
        write_base(recognise_base(str(tmp_path / "folder")), tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


def test_the_window_s_process_looks_into_a_ckpt_without_torch(files: dict[str, Path], tmp_path: Path) -> None:
    from tests.command_line import run_fresh

    torch.save(load_file(files["sd1"]), tmp_path / "old.ckpt")
    code = (
        "import json, sys\nimport trainers.families as families\nfamilies.check_tensors = lambda base: None\n"
        "facts = families.recognise_base(sys.argv[1])\nprint(json.dumps([facts.family.name, 'torch' in sys.modules]))"
    )
    assert run_fresh(code, str(tmp_path / "old.ckpt")) == ["sd1", False]


def test_layers_that_nothing_reads_get_no_adapter(folders: dict[str, Path]) -> None:
    def last(base: Path, part: str, skip: int = 1) -> int:
        paths = load(base, BaseOptions(clip_skip=skip)).find_targets(part, ["attention"])
        return max(int(path.split("encoder.layers.")[1].split(".")[0]) for path in paths)

    assert last(folders["sd1"], "text_encoder") == 1 and last(folders["sd1"], "text_encoder", 2) == 0
    assert last(folders["sd2"], "text_encoder") == 1
    assert last(folders["sdxl"], "text_encoder") == 0  # read one layer before its end
    assert last(folders["sdxl"], "text_encoder_2") == 1  # its pooled state is read to the end
    with pytest.raises(SettingError, match="leaves nothing"):
        recognise_base(str(folders["sd1"]), BaseOptions(clip_skip=3))


def test_no_network_is_asked_for_a_single_file(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something wanted the network")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for family in FAMILIES:
        assert load(files[family]).facts.family.name == family


def test_what_is_no_vae_or_another_family_s_is_refused_at_its_setting(
    files: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    (tmp_path / "picture.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    wrong = {
        tmp_path / "nowhere.safetensors": "no such VAE",
        tmp_path / "lora.safetensors": "no VAE in",
        tmp_path / "picture.safetensors": "This is a picture",
        folders["sdxl"] / "vae": "that of Stable Diffusion XL",
    }
    for path, words in wrong.items():
        with pytest.raises(SettingError, match=words) as caught:
            recognise_base(str(files["sd1"]), BaseOptions(vae=str(path)))
        assert caught.value.where == "base.vae"


def test_a_text_is_called_no_safetensors_file_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_text("# What I tried\n\nRank 16 was enough.\n", encoding="utf-8")
    with pytest.raises(BaseModelError, match="does not begin with a header"):
        recognise_base(str(tmp_path / "notes.safetensors"))


def test_a_path_may_stand_in_quotes(files: dict[str, Path]) -> None:
    from trainers.families.settings import BaseSettings

    quoted = BaseSettings(model=f' "{files["sd1"]}" ')
    assert recognise_base(quoted.model, quoted.options).family.name == "sd1"
