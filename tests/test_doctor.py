"""The report: everything a developer asks for, nothing that tells of the person's disk, and no picture."""

from __future__ import annotations

import getpass
import io
import json
import socket
import zipfile
from pathlib import Path

import pytest

from tests.command_line import TINY, impasto
from trainers.doctor import make_report, shorten
from trainers.run_folder import RunFolder


def test_a_report_on_a_run(
    pictures: Path, tiny_base: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "ateliers-imac")
    monkeypatch.setattr(getpass, "getuser", lambda: "marianne")
    private = pictures.rename(pictures.with_name("marianne private"))
    run = tmp_path / "run"
    words = ("--base", tiny_base, *TINY, "--steps", 3, "--set", "samples.every=3")
    assert impasto("train", private, "--output", run, *words) == 0
    with (run / "trainer.log").open("a", encoding="utf-8") as file:
        file.write(f'  File "{private}/x.py", line 3, on ateliers-imac\n')
    output = tmp_path / "report.zip"
    assert impasto("doctor", run, "--output", output) == 0
    assert impasto("doctor", run, "--output", output) == 2, "nothing is written over"
    with zipfile.ZipFile(output) as archive:
        pieces = {name: archive.read(name).decode() for name in archive.namelist()}
    assert set(pieces) == {"about.json", "config.toml", "events.jsonl", "trainer.log", "manifest.json", "files.txt"}
    about = json.loads(pieces["about.json"])
    assert about["packages"]["torch"].startswith("2.") and about["torch"]["threads"] >= 1 and about["cores"]
    assert 'type = "adamw"' in pieces["config.toml"] and '"type": "finished"' in pieces["events.jsonl"]
    assert "samples/00000003_00.png" in pieces["files.txt"] and json.loads(pieces["manifest.json"])["images"] == 6
    whole = "".join(pieces.values())
    for secret in (str(tmp_path), str(pictures.parent), str(home), "ateliers-imac", "marianne/", str(tiny_base.parent)):
        assert secret not in whole, secret
    assert b"PNG\r\n" not in output.read_bytes()


def test_without_a_run_or_with_a_broken_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(make_report())) as archive:
        assert archive.namelist() == ["about.json"]
    with zipfile.ZipFile(io.BytesIO(make_report(RunFolder(tmp_path / "none")))) as archive:
        assert "cannot be read" in archive.read("config.toml").decode()


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ('open("/home/ada/pictures/cat.png")', 'open(".../cat.png")'),
        (r"C:\Users\Ada\pictures\cat.png is gone", ".../cat.png is gone"),
        ("https://example.org/some/page", "https://example.org/some/page"),
        ("3/4 of and/or it", "3/4 of and/or it"),
        ("GET /api is no path", "GET /api is no path"),
        ("ada was here, not adamw", "USER was here, not adamw"),
    ],
)
def test_paths_are_cut_to_their_last_name(text: str, short: str) -> None:
    assert shorten(text, {"ada": "USER"}) == short
