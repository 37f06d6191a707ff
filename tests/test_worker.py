"""The render worker: ladders against single pictures, LoRA files swapped beside one base, and what goes wrong told."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from tests.asked_worker import kinds, run, wait_for
from tests.tiny_lora import TEXT, UNET, UNET_OUT, save_lora
from trainers.errors import SettingError
from trainers.families import load_family, recognise_base
from trainers.generate import Picture, RenderSettings, render
from trainers.warm import KEPT_LORAS, Warm, adapted_layers
from trainers.worker import parse_request, serve

HOW = RenderSettings(height=32, width=32, steps=3, guidance=4.0, negative="blurry")


@pytest.fixture
def ask(tiny_base: Path, tmp_path: Path) -> Any:
    """ask(id=1, ...) -> a request's values for the tiny base, 3 steps at 32x32, into tmp_path/out."""
    usual = {
        "do": "render",
        "id": 1,
        "base": str(tiny_base),
        "lora": None,
        "prompt": "a red apple",
        "negative": "blurry",
        "seed": 5,
        "width": 32,
        "height": 32,
        "steps": 3,
        "guidance": 4.0,
        "scheduler": "dpm++",
        "strengths": [0.0],
        "folder": str(tmp_path / "out"),
    }
    return lambda **changes: {**usual, **changes}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bases that were read, in order."""
    read: list[str] = []

    def load(facts: Any, *more: Any) -> Any:
        read.append(facts.name)
        return load_family(facts, *more)

    monkeypatch.setattr("trainers.warm.load_family", load)
    return read


def pictures(events: list[dict[str, Any]], number: int = 1) -> dict[float, Any]:
    """Strength -> pixels (H, W, 3) as whole numbers."""
    found = [event for event in events if event["id"] == number and event["event"] == "picture"]
    return {event["strength"]: numpy.asarray(Image.open(event["path"])).astype(int) for event in found}


@pytest.mark.parametrize("layers", [(UNET, UNET_OUT), (TEXT,), (UNET, TEXT)], ids=["unet", "text", "both"])
def test_a_ladder_shows_what_single_pictures_show_and_zero_is_the_base_bit_for_bit(
    ask: Any, tiny_base: Path, tmp_path: Path, layers: tuple[str, ...]
) -> None:
    lora = str(save_lora(tmp_path / "a.safetensors", *layers))
    ladder, warm = [1.5, 0.0, 0.5, 1.0, -0.5], Warm()
    together = pictures(run(ask(lora=lora, strengths=ladder), warm=warm))
    assert list(together) != [] and set(together) == set(ladder)
    for place, strength in enumerate(ladder):
        request = ask(lora=lora, strengths=[strength], folder=str(tmp_path / f"single-{place}"))
        (alone,) = pictures(run(request, warm=warm)).values()
        assert numpy.abs(together[strength] - alone).max() <= (0 if strength == 0 else 1)
    base = load_family(recognise_base(str(tiny_base)), torch.float32, torch.device("cpu"))
    (expected,) = render(base, [Picture("a red apple", 5, {})], HOW)
    assert numpy.array_equal(together[0.0], numpy.asarray(expected))
    assert all(numpy.abs(together[s] - together[0.0]).max() > 2 for s in (0.5, 1.0, 1.5))  # a mix-up would be seen


def test_pictures_of_long_ago_make_room(ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(bytes(1000))
        os.utime(folder / f"{number}.png", (number, number))
    monkeypatch.setattr("trainers.warm.KEPT_BYTES", 2000)
    warm = Warm()
    run(ask(lora=None, folder=str(folder)), ask(lora=None, folder=str(folder), seed=6, id=2), warm=warm)
    assert {"2.png", "3.png"} < {path.name for path in folder.iterdir()} and len(list(folder.iterdir())) == 4


def test_a_picture_says_how_it_was_drawn(ask: Any, tmp_path: Path) -> None:
    events = run(ask(lora=str(save_lora(tmp_path / "zorbo.safetensors")), strengths=[0.0, 0.5]))
    paths = {event["strength"]: event["path"] for event in events if event["event"] == "picture"}
    told = {strength: Image.open(path).text["parameters"].splitlines() for strength, path in paths.items()}
    assert told[0.5][0] == "a red apple <lora:zorbo:0.5>" and told[0.0][0] == "a red apple"
    assert (
        told[0.5][1:]
        == told[0.0][1:]
        == [
            "Negative prompt: blurry",
            "Steps: 3, Sampler: dpm++, CFG scale: 4, Seed: 5, Size: 32x32",
        ]
    )


def test_each_step_and_picture_is_told(ask: Any, tmp_path: Path) -> None:
    events = run(ask(lora=str(save_lora(tmp_path / "a.safetensors")), strengths=[0, 1]))
    assert kinds(events) == ["loading", *["step"] * 3, "picture", "loading", *["step"] * 3, "picture", "done"]
    steps = [(event["done"], event["total"]) for event in events if event["event"] == "step"]
    assert steps == [(done, 6) for done in range(1, 7)]


def test_loras_are_swapped_without_reading_the_base_again(ask: Any, tmp_path: Path, loads: list[str]) -> None:
    files = [str(save_lora(tmp_path / f"{seed}.safetensors", seed=seed)) for seed in range(KEPT_LORAS + 2)]
    warm = Warm()
    asked = [ask(id=number, lora=file, strengths=[1.0]) for number, file in enumerate(files)]
    events = run(*asked, warm=warm)
    again = run(ask(lora=files[0], strengths=[1.0], folder=str(tmp_path / "again")), warm=warm)  # was ejected
    base = run(ask(lora=None, folder=str(tmp_path / "base")), warm=warm)
    assert loads == ["tiny"]
    assert all(kinds(events, number)[-1] == "done" for number in range(len(files)))
    seen = [pictures(events, number)[1.0] for number in range(len(files))]
    assert all(not numpy.array_equal(seen[0], other) for other in seen[1:])
    assert numpy.array_equal(pictures(again)[1.0], seen[0])
    assert not numpy.array_equal(pictures(base)[0.0], seen[-1])
    model = warm.model(recognise_base(asked[0]["base"]), lambda event: None)
    assert {len(layer.adapters) for layer in adapted_layers(model)} == {KEPT_LORAS}


def test_a_lora_that_was_written_again_is_read_again(ask: Any, tmp_path: Path, loads: list[str]) -> None:
    warm, path = Warm(), tmp_path / "a.safetensors"
    first = run(ask(lora=str(save_lora(path, UNET)), strengths=[1.0]), warm=warm)
    second = run(ask(lora=str(save_lora(path, UNET, UNET_OUT, seed=1)), strengths=[1.0]), warm=warm)
    assert not numpy.array_equal(pictures(first)[1.0], pictures(second)[1.0])
    assert loads == ["tiny"]


def test_a_repeated_request_is_answered_from_the_disk(ask: Any, tmp_path: Path, loads: list[str]) -> None:
    request = ask(lora=str(save_lora(tmp_path / "a.safetensors")), strengths=[0.0, 1.0])
    first, again = run(request), run(request)  # each with nothing warm
    assert kinds(again) == ["picture", "picture", "done"] and loads == ["tiny"]
    assert {e["path"] for e in first if e["event"] == "picture"} == {e["path"] for e in again if e["event"] == "picture"}
    other = run({**request, "lora": str(save_lora(tmp_path / "b.safetensors", seed=1))})
    assert next(event["strength"] for event in other if event["event"] == "picture") == 0.0  # the base's, not drawn again
    assert kinds(other).count("step") == 3
    assert kinds(run({**request, "seed": 6})).count("step") == 6


@pytest.mark.parametrize("how", ["cancel", "replaced", "end"])
def test_a_picture_that_nobody_wants_any_more_is_abandoned(ask: Any, tmp_path: Path, how: str) -> None:
    later = {"cancel": [{"do": "cancel", "id": 1}], "replaced": [ask(id=2, steps=2, replaces=True)], "end": []}[how]
    told: list[dict[str, Any]] = []

    def lines() -> Iterator[bytes]:
        yield json.dumps(ask(steps=500)).encode()
        wait_for(told, 1, "step")
        for message in later:
            yield json.dumps(message).encode()
            wait_for(told, message["id"], "done", "cancelled")

    serve(lines(), told.append, Warm())
    assert kinds(told)[-1] == "cancelled" and kinds(told).count("step") < 500 and "picture" not in kinds(told)
    if how == "replaced":
        assert kinds(told, 2)[-2:] == ["picture", "done"]


def test_what_cannot_be_drawn_is_told_and_the_next_is_drawn(ask: Any, tmp_path: Path, loads: list[str]) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    bad = [
        (ask(id=2, lora=str(broken), strengths=[1.0]), "broken.safetensors"),
        (ask(id=3, lora=str(tmp_path / "none.safetensors")), "no such LoRA"),
        (ask(id=4, base=str(tmp_path / "nowhere")), "no such base model"),
        (ask(id=5, width=33), "33x32"),
        (ask(id=6, scheduler="fast"), "fast"),
        (ask(id=7, folder=str(broken)), ""),
    ]
    warm = Warm()
    run(ask(), warm=warm)
    for request, words in bad:
        last = run(request, warm=warm)[-1]
        assert last["event"] == "failed" and words in f"{last['what']} {last['where']} {last['hint']}"
    assert kinds(run(ask(seed=8), warm=warm))[-1] == "done" and loads == ["tiny"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strengths": []}, "strengths"),
        ({"strengths": [5]}, "strengths.0"),
        ({"strengths": [float("nan")]}, "strengths.0"),
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"prompt": None}, "prompt"),
        ({"do": "dance"}, "does not know"),
    ],
)
def test_a_bad_request_is_refused_naming_the_field(ask: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        parse_request(ask(**changes))
    assert kinds(run(ask(**changes))) == ["failed"]


def test_stdout_holds_events_only_and_the_end_of_stdin_ends_the_process(ask: Any) -> None:
    lines = b"no json\n" + json.dumps({"do": "render", "id": 3}).encode() + b"\n"
    done = subprocess.run([sys.executable, "-P", "-m", "trainers.worker"], input=lines, capture_output=True, timeout=60)
    told = [json.loads(line) for line in io.BytesIO(done.stdout)]
    assert done.returncode == 0, done.stderr
    assert [(event["id"], event["event"]) for event in told] == [(None, "failed"), (3, "failed")]
