"""Whole runs that train a trigger word's vectors: the files they leave, who reads them, and what goes wrong in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.command_line import TINY, impasto, read_events, result_of, tensor_bytes
from tests.conftest import make_pictures
from trainers.attach import attach_files
from trainers.cells import RenderRequest
from trainers.config import read_config
from trainers.draw_cells import answer
from trainers.embeddings import add_embedding, embedding_beside
from trainers.errors import AdapterFileError
from trainers.families import BaseModelFacts, load_family, recognise_base
from trainers.formats.embeddings import read_embedding, write_embedding
from trainers.generate import Picture, RenderSettings, render_latents
from trainers.library import read_facts
from trainers.run_folder import RunFolder
from trainers.verify import read_trained
from trainers.warm import Warm

LORA: list[Any] = ["--trigger", "zwx", "--set", "adapter.type=pivotal", "--set", "adapter.vectors_learning_rate=0.02"]
ALONE: list[Any] = [*LORA, "--set", "adapter.lora=false"]
PROMPT = "a photo of zwx, a red apple"


def words_of(pictures: Path, base: Path, *more: Any, steps: int = 3) -> list[Any]:
    own = TINY[2:] if "adapter.lora=false" in more else TINY  # a rank says nothing where no LoRA is trained
    return ["train", pictures, "--base", base, *own, "--steps", steps, *more]


@pytest.fixture(scope="module", params=["tiny_base", "tiny_sdxl_base"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with a LoRA beside the vectors, and checkpoints of its last steps. Read it only."""
    folder, base = tmp_path_factory.mktemp("trained"), request.getfixturevalue(request.param)
    more = ["--set", "checkpoints.every=1", "--set", "checkpoints.keep=2"]
    assert impasto(*words_of(make_pictures(folder / "pictures"), base, *LORA, *more), "-o", folder / "run") == 0
    return RunFolder(folder / "run")


def base_of(run: RunFolder) -> BaseModelFacts:
    return recognise_base(read_config(run.config).base.model)


def stop_after_two(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(run: RunFolder) -> str | None:
        done = run.events.exists() and any(event["type"] == "step" and event["step"] == 2 for event in read_events(run.path))
        return "stop" if done else None

    monkeypatch.setattr(RunFolder, "stop_asked", asked)


@pytest.mark.parametrize("settings", [LORA, ALONE], ids=["lora", "alone"])
def test_a_stopped_run_goes_on_to_the_bytes_of_an_unbroken_one(
    settings: list[Any], pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = words_of(pictures, tiny_base, *settings, "--set", "output.verify=true")
    with monkeypatch.context() as patch:
        stop_after_two(patch)
        assert impasto(*words, "-o", tmp_path / "run") == 3
    assert [path.name for path in (tmp_path / "run" / "embeddings").iterdir()] == ["zwx-00000002.safetensors"]
    assert impasto("resume", tmp_path / "run") == 0
    assert impasto(*words, "-o", tmp_path / "whole") == 0
    broken, whole = (tmp_path / name / "embeddings" / "zwx.safetensors" for name in ("run", "whole"))
    assert tensor_bytes(broken) == tensor_bytes(whole)
    run = RunFolder(tmp_path / "whole")
    assert run.embedding == whole
    finished = read_events(run.path)[-1]
    if settings is LORA:
        assert tensor_bytes(result_of(tmp_path / "run")) == tensor_bytes(result_of(run.path))
        assert finished["path"] == result_of(run.path).name and "diffusers loads all" in finished["proof"]
    else:
        assert finished["path"] == "embeddings/zwx.safetensors" and run.result is None and not run.checkpoints.exists()
    before = whole.stat().st_mtime_ns
    assert impasto("resume", run.path) == 0 and whole.stat().st_mtime_ns == before


def test_diffusers_reads_the_file_to_the_same_conditioning_and_picture(trained: RunFolder) -> None:
    path, lora = trained.embeddings / "zwx.safetensors", result_of(trained.path)
    facts = base_of(trained)
    theirs, ours = (load_family(facts, torch.float32, torch.device("cpu")) for _ in range(2))
    pipeline = theirs.pipeline()
    if facts.family.name == "sdxl":
        tensors = load_file(path)
        assert set(tensors) == {"clip_l", "clip_g"}
        for key, ending in (("clip_l", ""), ("clip_g", "_2")):
            encoder, tokenizer = (getattr(pipeline, name + ending) for name in ("text_encoder", "tokenizer"))
            pipeline.load_textual_inversion(tensors[key], token="zwx", text_encoder=encoder, tokenizer=tokenizer)
    else:
        assert set(load_file(path)) == {"emb_params"}
        pipeline.load_textual_inversion(str(path.parent), weight_name=path.name, token="zwx", local_files_only=True)
    plain = ours.encode_captions([PROMPT])
    assert add_embedding(ours, path) == "zwx"
    mine, them = (
        ours.encode_captions([PROMPT]),
        pipeline.encode_prompt(PROMPT, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False),
    )
    assert float((mine.hidden_states - plain.hidden_states).abs().max()) > 0.1
    assert torch.allclose(them[0], mine.hidden_states, atol=1e-6)
    if "pooled" in mine.extras:
        assert torch.allclose(them[2], mine.extras["pooled"], atol=1e-6)
        assert not torch.allclose(plain.extras["pooled"], mine.extras["pooled"], atol=1e-3)
    pipeline.load_lora_weights(str(trained.path), weight_name=lora.name, local_files_only=True)
    drawn = pipeline(
        PROMPT, height=32, width=32, num_inference_steps=3, guidance_scale=1.0, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    (name,) = attach_files(ours, [lora])
    how = RenderSettings(32, 32, 3, guidance=1.0, scheduler="ddim")
    here = render_latents(ours, [Picture(PROMPT, 0, {name: 1.0})], how)
    bare = render_latents(ours, [Picture(PROMPT.replace("zwx", "cat"), 0, {name: 1.0})], how)
    assert float((drawn - here).abs().max()) < 1e-3 * float((bare - here).abs().max())


def test_checkpoints_are_kept_beside_their_loras_and_the_file_says_what_it_is(trained: RunFolder) -> None:
    run, facts = trained, base_of(trained)
    names = sorted(path.name for path in run.embeddings.iterdir())
    assert names == ["zwx-00000002.safetensors", "zwx-00000003.safetensors", "zwx.safetensors"]
    assert tensor_bytes(run.embeddings / names[1]) == tensor_bytes(run.embeddings / names[2])
    assert tensor_bytes(run.embeddings / names[0]) != tensor_bytes(run.embeddings / names[2])
    assert embedding_beside(result_of(run.path)) == run.embeddings / "zwx.safetensors"
    second = next(path for path in run.checkpoints.iterdir() if path.stem.endswith("-00000002"))
    assert embedding_beside(second) == run.embeddings / names[0]
    with safe_open(run.embeddings / names[2], "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.trigger_phrase"] == metadata["modelspec.title"] == "zwx" and metadata["ss_steps"] == "3"
    assert metadata["modelspec.architecture"].endswith("/textual-inversion") and metadata["ss_sd_model_name"] == facts.name
    assert str(run.path.parent) not in " ".join(metadata.values())
    with pytest.raises(AdapterFileError, match="textual inversion, not a LoRA"):
        read_facts(run.embeddings / names[2])
    found = read_trained(run, read_config(run.config), load_family(facts, torch.float32, torch.device("cpu")), 3)
    assert found and max(module.delta_norm() or 0.0 for module in found.values()) > 0  # though its state holds the vectors, too


@pytest.mark.parametrize("trained", ["tiny_base"], indirect=True)
def test_generate_draws_with_the_embedding_of_the_run_and_with_one_given(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, base = trained.path, read_config(trained.config).base.model
    own = run / "embeddings" / "zwx.safetensors"
    elsewhere, renamed = tmp_path / "elsewhere.safetensors", tmp_path / "qqq.safetensors"
    elsewhere.write_bytes(result_of(run).read_bytes())
    save_file({"emb_params": load_file(own)["emb_params"]}, renamed)  # as another program would write it
    draw = ["generate", "--base", base, "--steps", 2, "--guidance", 1, "--size", "32x32", "-o"]
    asked: dict[str, list[Any]] = {
        "run": ["-p", PROMPT, "--lora", result_of(run)],
        "renamed": ["-p", PROMPT.replace("zwx", "QQQ"), "--lora", elsewhere, "--embedding", renamed],
        "none": ["-p", PROMPT, "--lora", elsewhere],
    }
    drawn = {}
    for name, more in asked.items():
        assert impasto(*draw, tmp_path / f"{name}.png", *more) == 0
        drawn[name] = Image.open(tmp_path / f"{name}.png").tobytes()
    assert drawn["run"] == drawn["renamed"] != drawn["none"]
    assert "zwx is drawn as zwx.safetensors" in capsys.readouterr().err
    assert impasto(*draw, tmp_path / "x.png", *asked["none"], "--embedding", tmp_path / "no.safetensors") == 2
    assert impasto("inspect", own) == 2 and "textual inversion, not a LoRA" in capsys.readouterr().err


@pytest.mark.parametrize("trained", ["tiny_base"], indirect=True)
def test_the_studio_draws_a_run_s_lora_with_its_embedding_and_other_pictures_without(
    trained: RunFolder, tmp_path: Path
) -> None:
    elsewhere, result = tmp_path / "copy.safetensors", result_of(trained.path)
    elsewhere.write_bytes(result.read_bytes())
    checkpoint = next(path for path in trained.checkpoints.iterdir() if path.stem.endswith("-00000002"))

    def cell(prompt: str, lora: Path | None, strength: float = 1.0) -> dict[str, Any]:
        used = [{"path": str(lora), "unet": strength, "text": strength}] if lora else []
        return {"prompt": prompt, "seed": 1, "loras": used}

    cells = [
        cell(PROMPT, result), cell(PROMPT, elsewhere), cell(PROMPT, checkpoint), cell(PROMPT, None), cell(PROMPT, result, 0.0),
        cell("a cat", result), cell("a cat", elsewhere),
    ]  # fmt: skip
    how = {"width": 32, "height": 32, "steps": 2, "guidance": 1.0, "folder": str(tmp_path / "out")}
    base = {"id": 1, "base": read_config(trained.config).base.model}
    told: list[dict[str, Any]] = []
    answer(RenderRequest.model_validate({**base, "cells": cells, **how}), Warm(), told.append, lambda: None)
    paths = {event["cell"]: event["path"] for event in told if event["event"] == "picture"}
    drawn = [Image.open(paths[number]).tobytes() for number in range(len(cells))]
    with_it, without, earlier, bare, off, cat, cat_without = drawn
    assert len({with_it, without, earlier, bare}) == 4 and off == bare
    apart = max(abs(one - other) for one, other in zip(cat, cat_without, strict=True))
    assert apart <= 1 and paths[5] != paths[6]


def test_merging_says_which_embedding_the_file_needs(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, base = result_of(trained.path), read_config(trained.config).base.model
    checkpoint = max(trained.checkpoints.glob("*.safetensors"))
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(lora.read_bytes())
    wanted = {lora: "zwx.safetensors", checkpoint: "zwx-00000003.safetensors", moved: "zwx.safetensors"}
    for number, (file, name) in enumerate(wanted.items()):
        for more in ((), ("--base", base)):
            output = tmp_path / f"{number}{len(more)}.safetensors"
            assert impasto("merge", file, *more, "-o", output) == 0
            (told,) = [line for line in capsys.readouterr().err.splitlines() if "needs the embedding" in line]
            assert told.count(file.name) == 1 and name in told and "zwx is an ordinary word" in told


def test_samples_are_drawn_with_the_vectors_and_their_rate_is_told(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    more = ["--set", "samples.every=3", "--set", "samples.prompts=['zwx', 'a cat']"]
    assert impasto(*words_of(pictures, tiny_base, *ALONE, *more), "-o", tmp_path / "run") == 0
    first, last = ([Image.open(tmp_path / "run" / "samples" / f"{step}_{n:02d}.png").tobytes() for n in (0, 1)]
                   for step in ("00000000", "00000003"))  # fmt: skip
    assert first[0] != last[0] and first[1] == last[1]
    steps = [event for event in read_events(tmp_path / "run") if event["type"] == "step"]
    assert set(steps[0]["learning_rates"]) == {"vectors"} and steps[0]["learning_rates"]["vectors"] == pytest.approx(0.02)
    assert next(event for event in read_events(tmp_path / "run") if event["type"] == "started")["parameters"] == 64


def test_a_run_without_a_trigger_is_refused_before_weights_are_read(
    pictures: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", pictures, "--base", tiny_base, "--set", "adapter.type=pivotal", "-o", tmp_path / "run"]
    assert impasto(*words) == 2
    assert "needs a trigger word" in capsys.readouterr().err and not (tmp_path / "run" / "config.toml").exists()


def test_a_file_that_is_no_embedding_or_of_another_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    model = load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))
    file = tmp_path / "odd.safetensors"
    bad: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "two": ({"a": torch.ones(1, 32), "b": torch.ones(1, 32)}, "no embedding: it holds 2 tensors"),
        "none": ({}, "no embedding: it holds 0"),
        "shape": ({"emb_params": torch.ones(1, 1, 32)}, "no embedding: its tensor is"),
        "many": ({"emb_params": torch.ones(76, 32)}, "no embedding"),
        "nan": ({"emb_params": torch.full((1, 32), float("nan"))}, "NaN"),
        "wide": ({"emb_params": torch.ones(1, 768)}, "768 wide, and this base's words 32"),
        "sdxl": ({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 48)}, "32 and 48 wide"),
        "uneven": ({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(2, 48)}, "no embedding"),
    }
    for tensors, words in bad.values():
        save_file(tensors, file)
        with pytest.raises(AdapterFileError, match=words):
            add_embedding(model, file)
    assert not model.words
    write_embedding(file, {"text_encoder": torch.ones(3, 32)}, {})
    assert add_embedding(model, file) == "odd" and model.words == {"odd": 3}
    with pytest.raises(AdapterFileError, match="two embeddings of the word odd"):
        add_embedding(model, file)
    with pytest.raises(AdapterFileError, match="finite"):
        write_embedding(file, {"text_encoder": torch.full((1, 32), float("inf"))}, {})
    assert torch.equal(read_embedding(file).vectors["text_encoder"], torch.ones(3, 32))
