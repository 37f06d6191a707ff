"""The command line as other programs use it: refusals in words, exit codes, what is printed, what is written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.command_line import TINY, contents, impasto, read_events, result_of, run_fresh
from tests.conftest import make_pictures
from trainers.draw import parse_lora, parse_size, parse_strengths
from trainers.errors import AdapterFileError, SettingError

# name -> (what follows `train FOLDER --output RUN`, words that the refusal must contain)
REFUSED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "an unknown preset": (("--preset", "stile"), ("no preset 'stile'", "Did you mean style?")),
    "an unknown setting": (("--set", "adapter.rnk=4"), ("no setting 'adapter.rnk'", "Did you mean adapter.rank?")),
    "a setting of the wrong group": (("--set", "train.rank=4"), ("no setting 'train.rank'", "Did you mean adapter.rank?")),
    "an unknown group": (("--set", "nonsense.value=4"), ("no setting 'nonsense'",)),
    "a group given as a value": (("--set", "adapter=4"), ("adapter is a group",)),
    "a setting without a value": (("--set", "adapter.rank"), ("NAME=VALUE", "adapter.rank=16")),
    "a word for a number": (("--set", "adapter.rank=many"), ("adapter.rank = 'many'",)),
    "a learning rate of 5": (("--set", "optimizer.learning_rate=5"), ("optimizer.learning_rate = 5", "1e-4")),
    "a learning rate of 0": (("--set", "optimizer.learning_rate=0"), ("optimizer.learning_rate = 0", "1e-4")),
    "a learning rate below 0": (("--set", "optimizer.learning_rate=-1e-4"), ("optimizer.learning_rate",)),
    "a learning rate of nan": (("--set", "optimizer.learning_rate=nan"), ("optimizer.learning_rate",)),
    "a text encoder's rate of 5": (("--set", "text_encoder.learning_rate=5"), ("text_encoder.learning_rate = 5",)),
    "a rate for Prodigy that is none": (
        ("--set", "optimizer.type=prodigy", "--set", "optimizer.learning_rate=1e-4"),
        ("optimizer.learning_rate = 0.0001", "1 is right"),
    ),
    "an optimizer that is none": (("--set", "optimizer.type=sgdd"), ("optimizer", "adamw")),
    "a rank of 0": (("--set", "adapter.rank=0"), ("adapter.rank = 0", "greater than or equal to 1")),
    "an alpha of 0": (("--set", "adapter.alpha=0"), ("adapter.alpha = 0", "greater than 0")),
    "an alpha of nan": (("--set", "adapter.alpha=nan"), ("adapter.alpha", "finite")),
    "a gradient norm of nan": (("--set", "train.max_grad_norm=nan"), ("train.max_grad_norm", "finite")),
    "no steps": (("--steps", "0"), ("train.steps = 0",)),
    "a target that is none": (("--set", "adapter.targets=['atention']"), ("adapter.targets", "'attention'")),
    "no target": (("--set", "adapter.targets=[]"), ("adapter.targets", "at least one")),
    "a text rank of 0": (("--set", "text_encoder.rank=0"), ("text_encoder.rank = 0",)),
    "an unknown sampler": (("--set", "samples.scheduler=fast"), ("no sampler 'fast'", "dpm++")),
    "a name that leaves the run folder": (("--set", "output.name=../up"), ("output.name",)),
    "a resolution that this base draws double": (("--set", "dataset.resolution=2048"), ("2048 px", "--force")),
    "a missing base": (("--base", "no-such-folder"), ("no such base model (no-such-folder)", "pocket")),
    "a base that is some file": (("--base", "FILE"), ("Not a safetensors file", "again")),
    "a base that is no model": (("--base", "EMPTY"), ("has no unet/config.json",)),
    "a preset for another family": (("--preset", "sdxl_style"), ("Stable Diffusion XL", "preset without sdxl_")),
    "an optimizer whose package is missing": (("--set", "optimizer.type=adamw8bit"), ("bitsandbytes", "pip install")),
    "weights whose package is missing": (("--set", "train.base_weights=nf4"), ("bitsandbytes", "pip install")),
    "an option that is none": (("--rank", "4"), ("--rank",)),
}
# name -> (the folder given, words that the refusal must contain)
REFUSED_FOLDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "an empty folder": ("EMPTY", ("folder is empty", "Put pictures into it")),
    "a missing folder": ("MISSING", ("MISSING",)),
    "a file for a folder": ("FILE", ("FILE",)),
    "a folder without pictures": ("TEXTS", ("holds no picture", "Put pictures into it")),
    "a link that leads to itself": ("LOOP", ("LOOP",)),
}
REFUSE_ALL = """
import contextlib, io, json, sys, time
sys.modules["bitsandbytes"] = None
from app.main import cli
from trainers.cli import run_cli
told = {}
for name, words in json.load(open(sys.argv[1])).items():
    errors, begun = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = run_cli(cli, words)
    told[name] = [code, errors.getvalue(), time.monotonic() - begun]
heavy = sorted({"torch", "diffusers", "transformers", "gradio", "peft"} & set(sys.modules))
print(json.dumps([told, heavy]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the refused commands name."""
    folder = tmp_path_factory.mktemp("refusals")
    make_pictures(folder / "pictures")
    for name in ("EMPTY", "TEXTS"):
        (folder / name).mkdir()
    (folder / "TEXTS" / "a.txt").write_text("words", encoding="utf-8")
    (folder / "FILE").write_bytes(b"x")
    os.symlink(folder / "LOOP", folder / "LOOP")
    return folder


@pytest.fixture(scope="module")
def refusals(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, tuple[int, str, float]], list[str]]:
    """All refused commands in one fresh interpreter: name -> (exit code, stderr, seconds), and the heavy modules loaded."""
    names = ("EMPTY", "MISSING", "FILE", "TEXTS", "LOOP")
    commands = {}
    for name, (words, _) in REFUSED.items():
        full = [str(place / word) if word in names else word for word in words]
        commands[name] = ["train", str(place / "pictures"), "--output", str(place / "RUN"), "--steps", "1", *full]
    for name, (images, _) in REFUSED_FOLDERS.items():
        commands[name] = ["train", str(place / images), "--output", str(place / "RUN")]
    listed = tmp_path_factory.mktemp("commands") / "commands.json"
    listed.write_text(json.dumps(commands), encoding="utf-8")
    told, heavy = run_fresh(REFUSE_ALL, listed)
    return told, heavy


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_FOLDERS])
def test_is_refused_with_exit_code_2_in_words_and_at_once(
    name: str, refusals: tuple[dict[str, tuple[int, str, float]], list[str]]
) -> None:
    code, said, seconds = refusals[0][name]
    expected = {**REFUSED, **REFUSED_FOLDERS}[name][1]
    assert code == 2, said
    assert [word for word in expected if word not in " ".join(said.split())] == [], said
    assert "Traceback" not in said and seconds < 2


def test_a_refusal_loads_no_heavy_library(refusals: tuple[dict[str, Any], list[str]]) -> None:
    assert refusals[1] == []


def test_a_refusal_writes_nothing(refusals: object, place: Path) -> None:
    assert {path.name for path in place.iterdir()} == {"pictures", "EMPTY", "TEXTS", "FILE", "LOOP"}


def test_an_sdxl_base_is_refused_by_an_sd1_preset_before_a_run_folder_is_made(
    tiny_sdxl_base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = ("--preset", "style", "--force")
    assert impasto("train", pictures, "--output", tmp_path / "run", "--base", tiny_sdxl_base, *family) == 2
    said = capsys.readouterr().err
    assert "Stable Diffusion XL" in said and "sdxl_style" in said
    assert not (tmp_path / "run").exists()


def plan_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert impasto("check", "--no-measure", *words) == 0
    return capsys.readouterr().out


def test_prodigy_over_the_pocket_preset_takes_its_own_rate_for_both_parts(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = plan_of(capsys, pictures, "--set", "optimizer.type=prodigy")
    assert "prodigy, rate 1," in told
    assert "rate 1\n" in told.split("text ", 1)[1]


def test_the_text_encoder_follows_the_adapters_rank_and_alpha(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = plan_of(capsys, pictures, "--set", "adapter.rank=6", "--set", "adapter.alpha=3")
    assert "rank 6, effective scale 0.5, on attention" in told
    assert "text        rank 6, effective scale 0.5" in told


def test_the_text_encoder_takes_its_own_rank_and_alpha_where_set(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = plan_of(capsys, pictures, "--set", "text_encoder.rank=2", "--set", "text_encoder.alpha=8")
    assert "text        rank 2, effective scale 4" in told


def test_the_plan_shows_pictures_repeats_epochs_batch_and_steps(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (pictures, "--steps", 10, "--set", "dataset.repeats=4", "--set", "train.batch_size=2")
    told = plan_of(capsys, *words, "--set", "prior.prompts=[]")
    assert "5 pictures x 4 repeats = 20 an epoch, x 1 epochs / 2 a step = 10 steps; each picture is seen 4 times" in told
    told = plan_of(capsys, *words, "--set", 'prior.prompts=["a lamp", "a door"]', "--set", "prior.repeats=10")
    assert "5 pictures x 4 repeats + 20 prior = 40 an epoch, x 0.5 epochs / 2 a step = 10 steps" in told


def test_force_passes_advice(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--output", tmp_path / "run", "--set", "dataset.resolution=256", "--dry-run")
    assert impasto("train", pictures, *words) == 2
    assert impasto("train", pictures, *words, "--force") == 0


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    pictures: Path, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(pictures)
    assert impasto("train", pictures, "--output", tmp_path / "run", "--dry-run") == 0
    assert "steps" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and list(home.iterdir()) == []
    assert contents(pictures) == before


def test_check_tells_time_and_memory_and_leaves_no_run(
    pictures: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(pictures)
    assert impasto("check", pictures, "--base", tiny_base, *TINY, "--steps", 50) == 0
    told = capsys.readouterr().out
    assert re.search(r"time +about \d+ .* in all; \d\.\d\d s a step", told)
    assert re.search(r"memory +\d\.\d GB of \d+\.\d GB by two real steps", told)
    assert contents(pictures) == before


def test_json_prints_the_events_and_nothing_else(
    pictures: Path, tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert impasto("train", pictures, "--output", run, "--base", tiny_base, *TINY, "--steps", 2, "--json") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == read_events(run)
    assert impasto("resume", run, "--json") == 0
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == read_events(run)[-1:]


def test_a_run_that_fails_says_so_by_event_and_exit_code_1(
    pictures: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the roof fell in")

    monkeypatch.setattr("trainers.train.training_step", broken)
    assert impasto("train", pictures, "--output", tmp_path / "run", "--base", tiny_base, *TINY, "--steps", 2) == 1
    last = read_events(tmp_path / "run")[-1]
    assert last["type"] == "failed" and "the roof fell in" in last["message"] and "trainer.log" in last["message"]
    assert "Traceback" in (tmp_path / "run" / "trainer.log").read_text(encoding="utf-8")
    monkeypatch.undo()
    assert impasto("resume", tmp_path / "run") == 0


@pytest.mark.parametrize("command", ["train", "resume", "generate", "check", "inspect", "convert", "presets", "ui", "demo"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert impasto(command, "--help") == 0
    assert "Usage: impasto" in capsys.readouterr().out


def test_an_unknown_command_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert impasto("trian") == 2
    assert "trian" in capsys.readouterr().err


def test_without_a_command_it_opens_the_window(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("app.server.serve", lambda *given: asked.append(given))
    monkeypatch.setattr("sys.argv", ["impasto", "--home", str(tmp_path), "--port", "7901", "--no-browser"])
    from app.main import main

    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code and asked == [(tmp_path, 7901, "127.0.0.1", "none", None)]


def test_presets_lists_every_preset_with_a_line_for_whom(capsys: pytest.CaptureFixture[str]) -> None:
    from trainers.presets import list_presets

    assert impasto("presets") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list_presets()
    assert all(len(line.split()) > 4 for line in lines)


def test_presets_shows_one_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert impasto("presets", "style") == 0
    assert "# For whom" in capsys.readouterr().out


def test_resume_of_a_folder_without_a_run_is_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert impasto("resume", tmp_path / "none") == 2
    assert "no run in this folder" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"x" * 40, b"\x10\0\0\0\0\0\0\0{}"])
def test_inspect_of_a_broken_file_is_wrong_use_in_words(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.safetensors").write_bytes(content)
    assert impasto("inspect", tmp_path / "broken.safetensors") == 2
    assert "broken.safetensors" in capsys.readouterr().err


def test_inspect_of_a_cut_file_is_wrong_use(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert impasto("train", pictures, "--output", tmp_path / "run", "--base", tiny_base, *TINY, "--steps", 1) == 0
    data = result_of(tmp_path / "run").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    assert impasto("inspect", tmp_path / "cut.safetensors") == 2


class TestStrengths:
    """How --lora, --strengths and --size are read."""

    @pytest.mark.parametrize(
        ("typed", "path", "strength"),
        [
            ("style.safetensors", "style.safetensors", 1.0),
            ("style.safetensors:0.5", "style.safetensors", 0.5),
            ("style.safetensors:-1", "style.safetensors", -1.0),
            (r"C:\x.safetensors", r"C:\x.safetensors", 1.0),
            (r"C:\x.safetensors:0.5", r"C:\x.safetensors", 0.5),
            ("C:/loras/x.safetensors:2", "C:/loras/x.safetensors", 2.0),
            ("a:b/style.safetensors", "a:b/style.safetensors", 1.0),
        ],
    )
    def test_a_drives_colon_is_no_strength(
        self, typed: str, path: str, strength: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Path, "is_file", lambda self: str(self) == str(Path(path)))
        assert parse_lora(typed) == (Path(path), strength)

    def test_a_file_whose_name_ends_like_a_strength_is_that_file(self, tmp_path: Path) -> None:
        (tmp_path / "style:0.5").write_bytes(b"x")
        assert parse_lora(f"{tmp_path}/style:0.5") == (tmp_path / "style:0.5", 1.0)

    @pytest.mark.parametrize("typed", ["FILE:lots", "FILE:", "FILE:nan", "FILE:9"])
    def test_a_strength_that_is_none_is_refused(self, typed: str, tmp_path: Path) -> None:
        (tmp_path / "FILE").write_bytes(b"x")
        with pytest.raises(SettingError):
            parse_lora(f"{tmp_path}/{typed}")

    def test_a_missing_file_is_named(self) -> None:
        with pytest.raises(AdapterFileError, match="gone"):
            parse_lora("gone.safetensors:0.5")

    @pytest.mark.parametrize("typed", ["", "a", "0,,1", "0;1", "nan", "inf", "5", "0,-4.5"])
    def test_nonsense_strengths_are_refused(self, typed: str) -> None:
        with pytest.raises(SettingError, match=r"usual|no list of numbers"):
            parse_strengths(typed)

    def test_strengths_are_read_in_their_order(self) -> None:
        assert parse_strengths("1, 0,0.5,-1") == (1.0, 0.0, 0.5, -1.0)

    @pytest.mark.parametrize("typed", ["512", "512x", "x512", "512*512", "0x0x0", "-64x64"])
    def test_nonsense_sizes_are_refused(self, typed: str) -> None:
        with pytest.raises(SettingError, match="WIDTHxHEIGHT"):
            parse_size(typed)


@pytest.mark.parametrize(
    "words",
    [
        ("--strengths", "lots"),
        ("--size", "63x63"),
        ("--scheduler", "fast"),
        ("--steps", "0"),
        ("--lora", "gone.safetensors"),
        ("--strengths", "1,1.001", "--output", "FOLDER/"),
        ("--output", "picture.jpg"),
    ],
)
def test_generate_refuses_wrong_use_before_it_draws(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert impasto("generate", "--prompt", "a cat", "--output", "out.png", *words) == 2
    assert capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_output_with_a_slash_at_its_end_is_a_folder(tiny_base: Path, tmp_path: Path) -> None:
    words = ("--base", tiny_base, "--prompt", "a cat", "--steps", 1)
    assert impasto("generate", *words, "--output", f"{tmp_path}/v1.0/") == 0
    assert [path.name for path in (tmp_path / "v1.0").iterdir()] == ["000_s1.00.png"]


def test_one_prompt_at_one_strength_is_one_plain_picture_of_the_size_asked(tiny_base: Path, tmp_path: Path) -> None:
    words = ("--base", tiny_base, "--prompt", "a cat", "--steps", 1, "--size", "48x64")
    assert impasto("generate", *words, "--output", tmp_path / "cat.png") == 0
    with Image.open(tmp_path / "cat.png") as image:
        assert image.size == (48, 64)
