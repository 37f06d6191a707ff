"""Edited captions and excluded pictures: the scan, the command and the manifest see them, and the folder stays untouched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.command_line import contents, impasto
from tests.tiny_runs import tiny_config
from trainers.config import read_config
from trainers.dataset.edits import Edits, read_edits, write_edits
from trainers.dataset.folder import Scan, scan_folder
from trainers.dataset.prepare import scan_images
from trainers.errors import DatasetError
from trainers.launch import plan_run


def captions_of(scan: Scan) -> dict[str, str]:
    return {example.name: example.caption for example in scan.examples}


def told(scan: Scan, name: str) -> str:
    return " ".join(str(problem) for problem in scan.problems if problem.where == name)


def edit(folder: Path, captions: dict[str, str] | None = None, excluded: tuple[str, ...] = ()) -> Path:
    path = folder / "edits.json"
    path.write_bytes(write_edits(Edits(captions or {}, frozenset(excluded))))
    return path


def test_an_edited_caption_is_what_the_example_holds(pictures: Path) -> None:
    scan = scan_folder(pictures, edits=Edits({"01.png": "  a fern,\nnew​ words "}))
    captions = captions_of(scan)
    assert captions["01.png"] == "a fern, new words"
    assert captions["00.png"] == "a red apple, test style"
    assert {example.caption_source for example in scan.examples} == {"file"}


def test_the_trigger_word_goes_in_front_of_an_edited_caption_too(pictures: Path) -> None:
    scan = scan_folder(pictures, trigger="sks", edits=Edits({"01.png": "a fern", "02.png": "SKS fish"}))
    assert captions_of(scan)["01.png"] == "sks, a fern"
    assert captions_of(scan)["02.png"] == "SKS fish"


def test_an_edit_to_nothing_counts_as_an_empty_caption_file_and_is_said(pictures: Path) -> None:
    (pictures / "01.png").rename(pictures / "green fern.png")
    scan = scan_folder(pictures, edits=Edits({"green fern.png": " "}))
    assert captions_of(scan)["green fern.png"] == "green fern"
    assert "edited caption is empty" in told(scan, "green fern.png")


def test_a_caption_file_that_is_edited_is_not_read_and_not_called_left_over(pictures: Path) -> None:
    (pictures / "01.txt").write_bytes(b"\x00\x01\x02" * 100)
    scan = scan_folder(pictures, edits=Edits({"01.png": "a fern"}))
    assert captions_of(scan)["01.png"] == "a fern"
    assert told(scan, "01.txt") == ""


def test_excluded_pictures_are_left_out_and_named(pictures: Path) -> None:
    scan = scan_folder(pictures, edits=Edits(excluded=frozenset({"00.png", "05.png"})))
    assert sorted(captions_of(scan)) == ["01.png", "02.png", "03.png", "04.png"]
    assert "left out" in told(scan, "00.png") and "left out" in told(scan, "05.png")
    assert told(scan, "00.txt") == ""
    many = scan_folder(pictures, edits=Edits(excluded=frozenset(f"{number:02}.png" for number in range(5))))
    assert told(many, "").count("Excluded by you: 5 pictures (00.png, 01.png, 02.png, ...)") == 1


def test_with_every_picture_excluded_there_is_nothing_to_train_on(pictures: Path) -> None:
    names = frozenset(path.name for path in pictures.glob("*.png"))
    with pytest.raises(DatasetError, match="Excluded"):
        scan_folder(pictures, edits=Edits(excluded=names))


def test_pictures_in_sub_folders_are_edited_by_their_posix_path(pictures: Path) -> None:
    (pictures / "3_more").mkdir()
    (pictures / "01.png").rename(pictures / "3_more" / "01.png")
    scan = scan_folder(pictures, edits=Edits({"3_more/01.png": "a fern"}))
    assert captions_of(scan)["3_more/01.png"] == "a fern"


def test_an_edit_of_a_picture_that_is_not_there_is_said(pictures: Path) -> None:
    scan = scan_folder(pictures, edits=Edits({"gone.png": "x"}, frozenset({"../00.png"})))
    assert "no such picture" in told(scan, "gone.png") and "no such picture" in told(scan, "../00.png")
    assert len(scan.examples) == 6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "holds no names"),
        (b'{"00.png": "a cat"}', "unknown part '00.png'"),
        (b'{"captions": ["a"]}', "not text by name"),
        (b'{"captions": {"00.png": 5}}', "not text by name"),
        (b'{"excluded": "00.png"}', "not a list of names"),
        (b'{"excluded": [1]}', "not a list of names"),
        (b'{"crops": [1]}', "not two numbers"),
        (b'{"crops": {"00.png": [0.5]}}', "not two numbers"),
        (b'{"crops": {"00.png": [0.5, 1.5]}}', "not two numbers"),
        (b'{"crops": {"00.png": [NaN, true]}}', "not two numbers"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "edits.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=words) as refused:
        read_edits(path)
    assert refused.value.where == str(path) and refused.value.hint


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is missing"):
        read_edits(tmp_path / "gone.json")
    with pytest.raises(DatasetError, match="cannot be read"):
        read_edits(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(DatasetError, match="cannot be read"):
            read_edits(tmp_path / "pipe")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    edits = Edits({"ü/ß.png": "„quoted“ \U0001f98a", "a.png": ""}, frozenset({"b.png"}), {"ü/ß.png": (0.0, 0.125)})
    path = tmp_path / "edits.json"
    path.write_bytes(write_edits(edits))
    assert read_edits(path) == edits


def test_the_command_refuses_a_missing_file_before_it_makes_anything(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    missing = f"dataset.edits={tmp_path / 'no.json'}"
    assert impasto("train", pictures, "--base", tiny_base, "--output", tmp_path / "run", "--set", missing) == 2
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_the_whole_path_of_the_edits(
    pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = edit(tmp_path, {"00.png": "changed"})
    monkeypatch.chdir(tmp_path)
    given = {"base": {"model": str(tiny_base)}, "dataset": {"images": str(pictures)}}
    plan = plan_run("pocket", given, ["dataset.edits=edits.json", "adapter.rank=2"], force=True)
    (tmp_path / "config.toml").write_text(plan.toml(), encoding="utf-8")
    assert Path(read_config(tmp_path / "config.toml").dataset.edits) == path


def test_training_sees_edited_captions_and_the_manifest_tells_when_they_change(
    pictures: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """What the trainer hashes and holds is the edited text; the same text from another file is the same run."""
    from trainers.run_folder import RunFolder
    from trainers.setup import set_up

    before = contents(pictures)
    path = edit(tmp_path, {"00.png": "a yellow pear"}, excluded=("05.png",))
    config = tiny_config(tiny_base, pictures, f"dataset.edits={json.dumps(str(path))}")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    training = set_up(config, run, lambda event: None)
    held = {prepared.example.name: prepared.example.caption for prepared in training.data.training}
    assert held["00.png"] == "a yellow pear" and "05.png" not in held
    training.check_manifest()
    manifest = json.loads(run.manifest.read_text())
    assert "05.png" not in manifest["captions"] and "edits" not in manifest["settings"].get("dataset", {})
    moved = path.rename(tmp_path / "moved.json")
    config = tiny_config(tiny_base, pictures, f"dataset.edits={json.dumps(str(moved))}")
    assert captions_of(scan_images(config))["00.png"] == "a yellow pear"
    set_up(config, run, lambda event: None)  # the manifest finds nothing changed
    edit(tmp_path, {"00.png": "a green pear"}, excluded=("05.png",)).replace(moved)
    with pytest.raises(Exception, match=r"the caption of 00\.png has changed"):
        set_up(config, run, lambda event: None)
    assert contents(pictures) == before


def test_the_manifest_names_a_crop_that_has_moved(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    from trainers.run_folder import RunFolder
    from trainers.setup import set_up

    path = edit(tmp_path)
    config = tiny_config(tiny_base, pictures, f"dataset.edits={json.dumps(str(path))}")
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    set_up(config, run, lambda event: None).check_manifest()
    assert json.loads(run.manifest.read_text())["crops"] == {}
    path.write_bytes(write_edits(Edits(crops={"01.png": (0.25, 0.5)})))
    with pytest.raises(Exception, match=r"the crop of 01\.png is new"):
        set_up(config, run, lambda event: None)
