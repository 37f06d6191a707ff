"""Captions by a model: what it writes is what the model itself gives, in a process of its own, and every failure is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tiny_captioners import save_tiny_blip, save_tiny_encoder_decoder
from trainers import captioner as captioner_module
from trainers.captioner import answer_line, describe, load_captioner, locate_model
from trainers.dataset.pictures import load_small
from trainers.errors import BaseModelError


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_blip(tmp_path_factory.mktemp("blip"))


def answers(request: dict[str, Any]) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    answer_line(json.dumps(request).encode(), told.append)
    return told


def test_a_caption_is_what_the_model_gives_and_depends_on_picture_and_prompt(blip: Path, pictures: Path) -> None:
    from transformers import BlipForConditionalGeneration, BlipProcessor

    captioner = load_captioner(blip)
    model, processor = BlipForConditionalGeneration.from_pretrained(blip).eval(), BlipProcessor.from_pretrained(blip)
    written = {}
    for path in sorted(pictures.glob("*.png")):
        image = load_small(path, 1024)
        for prompt in ("", "a photo of"):
            given = processor(images=image, text=prompt or None, return_tensors="pt")
            expected = processor.decode(model.generate(**given, max_new_tokens=6)[0], skip_special_tokens=True)
            written[path.name, prompt] = describe(captioner, image, prompt, 6)
            assert written[path.name, prompt] == expected.strip()
    assert len(set(written.values())) > 6
    assert all(text.startswith("a photo of") for (_, prompt), text in written.items() if prompt)


def test_a_model_without_a_common_processor_is_read_too(tmp_path: Path, pictures: Path) -> None:
    captioner = load_captioner(save_tiny_encoder_decoder(tmp_path / "model"))
    written = {describe(captioner, load_small(path, 1024), "", 6) for path in pictures.glob("*.png")}
    assert len(written) > 2


def test_an_answer_is_told_without_the_question(blip: Path) -> None:
    class Talks:
        chat_template = "there is one"

        def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
            assert add_generation_prompt and messages[0]["content"][0] == {"type": "image"}
            return f"USER {messages[0]['content'][1]['text']} ASSISTANT"

        def __call__(self, **given: Any) -> dict[str, torch.Tensor]:
            assert given["text"] == "USER what is it? ASSISTANT"
            return {"input_ids": torch.tensor([[7, 8]]), "pixel_values": torch.zeros(1, 3, 32, 32)}

    class Model:
        device, dtype = torch.device("cpu"), torch.float32

        class config:
            model_type = "talker"

        def generate(self, **given: Any) -> torch.Tensor:
            assert given["max_new_tokens"] == 9 and given["do_sample"] is False
            return torch.tensor([[7, 8, 9, 10]])

    tokenizer = load_captioner(blip).tokenizer
    talker = captioner_module.Captioner(Model(), Talks(), tokenizer)
    assert describe(talker, Image.new("RGB", (8, 8)), "what is it?", 9) == "cat house"


def test_pictures_are_told_one_by_one_and_a_damaged_one_is_skipped(blip: Path, pictures: Path) -> None:
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    listed = [[name, str(pictures / name)] for name in ("01.png", "broken.png", "05.png", "gone.png")]
    told = answers({"model": str(blip), "max_tokens": 6, "pictures": listed})
    assert [event["event"] for event in told] == ["loading", "loaded", "caption", "skipped", "caption", "skipped", "done"]
    captioner = load_captioner(blip)
    for event in told:
        if event["event"] == "caption":
            assert event["text"] == describe(captioner, load_small(pictures / event["name"], 1024), "", 6) != ""


def test_what_cannot_be_loaded_is_told_in_words(blip: Path, tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "empty").mkdir()
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in blip.iterdir():
        if path.suffix == ".json" or path.name == "vocab.txt":
            (pickled / path.name).write_bytes(path.read_bytes())
    torch.save({"weight": torch.zeros(2)}, pickled / "pytorch_model.bin")  # never read: it may run anything
    for model, words in (
        (str(tmp_path / "empty"), "holds no model"),
        (str(tmp_path / "nowhere"), "no such model"),
        ("nobody/nothing", "cannot be fetched"),
        (str(pickled), "cannot be loaded"),
    ):
        told = answers({"model": model, "pictures": [["00.png", str(pictures / "00.png")]]})
        assert told[-1]["event"] == "failed" and words in told[-1]["what"]
        assert told[-1]["hint"]
    assert answers({"model": "x"})[-1]["event"] == "failed"
    with pytest.raises(BaseModelError):
        locate_model("../up/there")


def test_a_model_that_fails_is_told_and_lack_of_memory_by_its_name(
    blip: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, words in ((MemoryError(), "not enough memory"), (RuntimeError("shapes differ"), "shapes differ")):

        def fail(*given: Any, error: Exception = error) -> str:
            raise error

        monkeypatch.setattr(captioner_module, "describe", fail)
        told = answers({"model": str(blip), "pictures": [["00.png", str(pictures / "00.png")]]})
        assert told[-1]["event"] == "failed" and words in told[-1]["what"]


def test_a_picture_at_which_the_model_fails_is_skipped_by_name_and_the_rest_described(
    blip: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = describe, []

    def fails_at_the_second(*given: Any) -> str:
        asked.append(given)
        if len(asked) == 2:
            raise ValueError("height and width must be > 28")
        return real(*given)

    monkeypatch.setattr(captioner_module, "describe", fails_at_the_second)
    listed = [[name, str(pictures / name)] for name in ("01.png", "02.png", "05.png")]
    told = answers({"model": str(blip), "max_tokens": 6, "pictures": listed})
    assert [(event["event"], event.get("name")) for event in told[2:]] == [
        ("caption", "01.png"), ("skipped", "02.png"), ("caption", "05.png"), ("done", None),
    ]  # fmt: skip
    assert "must be > 28" in told[3]["what"]


BUSY = """
import sys, time, trainers.captioner as captioner
def write(request, tell):
    tell({"event": "loading"})
    time.sleep(1000)  # as a large model does that is being loaded
captioner.write_captions = write
captioner.main()
"""


def test_the_end_of_its_input_ends_the_process_at_once_whatever_it_does() -> None:
    process = subprocess.Popen([sys.executable, "-P", "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps({"model": "x", "pictures": []}).encode() + b"\n")
    process.stdin.flush()
    assert json.loads(process.stdout.readline()) == {"event": "loading"}
    process.stdin.close()
    assert process.stdout.read() == b""
    assert process.wait(60) == 0
    process.stdout.close()
