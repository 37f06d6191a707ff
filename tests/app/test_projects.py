"""Projects as folders: ids, sources, edits kept by source, recipes; and that a typed folder is never written to."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from app import projects
from app.captions import count_tokens, save_captions
from app.image_list import describe_images
from app.projects import Project, change_edits, create_project, load_edits, read_project, set_source
from app.refusals import Refusal
from app.scanning import Scanner
from tests.command_line import contents
from trainers.errors import DatasetError, SettingError
from trainers.families.vocabulary import write_words


@pytest.fixture
def typed(home: Path, pictures: Path) -> Project:
    return set_source(create_project(home, "Typed"), str(pictures))


def captions(project: Project, scanner: Scanner | None = None) -> dict[str, str]:
    return {name: example.caption for name, example in (scanner or Scanner()).look(project).examples.items()}


def own_with(home: Path, pictures: Path) -> Project:
    project = create_project(home, "Own")
    for path in pictures.iterdir():
        (project.images / path.name).write_bytes(path.read_bytes())
    return project


def test_ids_are_plain_and_never_taken_twice(home: Path) -> None:
    made = [create_project(home, name).id for name in ("Süße Katze!", "susse katze", "日本", "../../etc", "日本")]
    assert made == ["susse-katze", "susse-katze-2", "project", "etc", "project-2"]
    assert {path.name for path in projects.projects_folder(home).iterdir()} == set(made)


def test_a_long_name_still_gives_a_short_id(home: Path) -> None:
    assert len(create_project(home, "x" * 80).id) <= 64


@pytest.mark.parametrize("name", ["", "   ", "x" * 81, "a\x00b", "\u200b"])
def test_a_name_that_is_none_is_refused(home: Path, name: str) -> None:
    with pytest.raises(Refusal, match="name"):
        create_project(home, name)
    assert projects.list_projects(home) == []


@pytest.mark.parametrize("name", ["..", ".", "", "Typed", "a/b", "nothing", "-x", "x" * 65])
def test_what_is_no_id_of_a_project_is_not_found(home: Path, name: str) -> None:
    create_project(home, "typed")
    with pytest.raises(Refusal, match="no such project") as refusal:
        read_project(home, name)
    assert refusal.value.status == 404


def test_what_was_written_is_read_again(home: Path) -> None:
    project = create_project(home, 'Anna "the cat" \\ ü')
    projects.change_project(project, trigger=" sks  cat ", preset="style")
    projects.add_run(project, "2026_a")
    projects.add_run(project, "2026_b")
    again = read_project(home, project.id)
    assert (again.name, again.trigger, again.preset, again.runs) == (project.name, "sks cat", "style", ("2026_a", "2026_b"))
    assert again.created == project.created


def test_a_damaged_project_is_named_and_hides_no_other(home: Path) -> None:
    broken = create_project(home, "broken")
    create_project(home, "good")
    (broken.folder / "project.toml").write_text("name = ", encoding="utf-8")
    with pytest.raises(Refusal, match="damaged"):
        read_project(home, "broken")
    assert [project.id for project in projects.list_projects(home)] == ["good"]


@pytest.mark.parametrize("folder", ["relative/folder", "/", "~", "/no/such/folder"])
def test_a_source_that_cannot_be_is_refused(home: Path, folder: str) -> None:
    project = create_project(home, "p")
    with pytest.raises((Refusal, DatasetError)):
        set_source(project, folder)
    assert read_project(home, "p").is_own


def test_a_file_is_no_source(home: Path, pictures: Path) -> None:
    with pytest.raises(DatasetError, match="not a folder"):
        set_source(create_project(home, "p"), str(pictures / "00.png"))


def test_a_path_pasted_in_quotes_is_taken(home: Path, pictures: Path) -> None:
    assert set_source(create_project(home, "p"), f' "{pictures}" ').images == pictures


def test_captions_of_a_typed_folder_go_into_the_project_and_nothing_into_the_folder(typed: Project, pictures: Path) -> None:
    before, scanner = contents(pictures), Scanner()
    save_captions(typed, scanner.look(typed), {"00.png": " a pear\n ", "05.png": ""})
    change_edits(typed, {}, {"01.png": True, "02.png": True})
    change_edits(typed, {}, {"01.png": False})
    found = captions(typed, scanner)
    assert found["00.png"] == "a pear" and found["03.png"] == "a golden coin, test style"
    assert load_edits(typed).excluded == {"02.png"}
    assert contents(pictures) == before
    images = {image.rel: image for image in describe_images(typed, scanner.look(typed)).images}
    assert images["02.png"].excluded and not images["01.png"].excluded  # excluded ones are still shown
    assert images["00.png"].edited and images["05.png"].caption == ""


def test_captions_of_own_pictures_go_beside_them(home: Path, pictures: Path) -> None:
    project, scanner = own_with(home, pictures), Scanner()
    (project.images / "01.txt").rename(project.images / "01.caption")
    save_captions(project, scanner.look(project), {"00.png": "a pear", "01.png": "a fern"})
    assert (project.images / "00.txt").read_text() == "a pear\n"
    assert (project.images / "01.caption").read_text() == "a fern\n" and not (project.images / "01.txt").exists()
    assert captions(project, scanner)["01.png"] == "a fern"
    assert not project.edits_file.exists()


def test_two_pictures_that_share_a_caption_file_are_edited_apart(home: Path, pictures: Path) -> None:
    project, scanner = own_with(home, pictures), Scanner()
    (project.images / "00.jpg").write_bytes((project.images / "01.png").read_bytes())
    save_captions(project, scanner.look(project), {"00.jpg": "only the jpg"})
    found = captions(project, scanner)
    assert found["00.jpg"] == "only the jpg" and found["00.png"] == "a red apple, test style"
    (project.images / "00.png").unlink()
    save_captions(project, scanner.look(project), {"00.jpg": "alone now"})
    assert captions(project, scanner)["00.jpg"] == "alone now" and load_edits(project).captions == {}


def test_a_caption_for_a_picture_that_is_not_there_saves_nothing(typed: Project) -> None:
    look = Scanner().look(typed)
    with pytest.raises(Refusal, match="no such picture"):
        save_captions(typed, look, {"00.png": "changed", "../../00.png": "x"})
    with pytest.raises(Refusal, match="longer"):
        save_captions(typed, look, {"00.png": "changed", "01.png": "x" * 70_000})
    assert load_edits(typed).captions == {}


def test_edits_stay_with_their_source(home: Path, typed: Project, pictures: Path, tmp_path: Path) -> None:
    scanner = Scanner()
    save_captions(typed, scanner.look(typed), {"00.png": "a pear"})
    other = tmp_path / "other"
    other.mkdir()
    (other / "00.png").write_bytes((pictures / "03.png").read_bytes())
    moved = set_source(typed, str(other))
    assert load_edits(moved).captions == {}
    back = set_source(moved, str(pictures))
    assert captions(back, scanner)["00.png"] == "a pear"


def test_health_names_what_cannot_be_used(home: Path, pictures: Path) -> None:
    (pictures / "torn.png").write_bytes((pictures / "00.png").read_bytes()[:60])
    (pictures / "notes.pdf").write_bytes(b"x")
    (pictures / "02.txt").unlink()
    (pictures / "03.txt").write_text("word " * 80)
    project = set_source(create_project(home, "p"), str(pictures))
    health = describe_images(project, Scanner().look(project)).health
    assert (health.count, health.smallest, health.smallest_side) == (6, "04.png", 32)
    assert [problem.where for problem in health.unreadable] == ["torn.png"]
    assert health.no_caption == ["02.png"] and health.too_long == ["03.png"]
    assert "pdf" in " ".join(problem.what for problem in health.problems)


def test_a_folder_of_damaged_pictures_only_is_told_file_by_file(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(b"no picture")
    project = set_source(create_project(home, "p"), str(folder))
    found = describe_images(project, Scanner().look(project))
    assert found.images == [] and len(found.health.unreadable) == 5
    assert any(problem.severity == "error" for problem in found.health.problems)


def test_an_empty_project_is_no_error(home: Path) -> None:
    project = create_project(home, "p")
    found = describe_images(project, Scanner().look(project))
    assert found.images == [] and "empty" in found.health.problems[0].what


def test_a_file_is_read_again_only_when_it_changed(typed: Project, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app import scanning

    read: list[str] = []
    real = scanning.read_picture
    monkeypatch.setattr(scanning, "read_picture", lambda path, decode: (read.append(path.name), real(path, decode=decode))[1])
    scanner = Scanner()
    assert len(scanner.look(typed).examples) == 6 and len(read) == 6
    (pictures / "00.txt").write_text("changed")
    assert scanner.look(typed).examples["00.png"].caption == "changed" and len(read) == 6
    (pictures / "01.png").write_bytes((pictures / "05.png").read_bytes())
    scanner.look(typed)
    assert read[6:] == ["01.png"]


def test_the_recipe_keeps_comments_and_refuses_what_is_no_setting(home: Path) -> None:
    project = create_project(home, "p")
    text = "# mine\n[adapter]\nrank = 8  # small\n"
    assert projects.write_recipe(project, text) == {"adapter": {"rank": 8}}
    for wrong in ("[adapter]\nrank = 0\n", "[nothing]\nx = 1\n", "adapter = 3\n", "[adapter"):
        with pytest.raises((Refusal, SettingError)):
            projects.write_recipe(project, wrong)
    assert projects.recipe_text(project) == text
    projects.write_recipe(project, {"adapter": {"rank": 4, "alpha": None}})
    assert projects.read_recipe(project) == {"adapter": {"rank": 4}}


def test_deleting_a_project_leaves_the_persons_folder(home: Path, typed: Project, pictures: Path) -> None:
    before = contents(pictures)
    projects.delete_project(typed)
    assert not typed.folder.exists() and contents(pictures) == before


CAPTIONS = (
    "a red apple, test style",
    "",
    "it's O'Brien's 3d-printed \u00c9tude — 日本語 \U0001f98a\U0001f98a x1234!!",
    "Cafe\u0301 " + "supercalifragilistic " * 30,
    "<|endoftext|> in the middle <|startoftext|>",
    "\U0001f98a " * 90,
)


def test_tokens_are_those_of_the_trainers_tokenizer(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    from trainers.families import ASSETS

    shutil.copytree(ASSETS / "pocket" / "tokenizer", tmp_path, dirs_exist_ok=True)
    write_words(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    for text, count in zip(CAPTIONS, count_tokens(CAPTIONS), strict=True):
        assert count.tokens == len(tokenizer(text).input_ids) - 2, text
        assert (count.cut is None) == (count.tokens <= 75)


def test_what_stands_before_the_cut_is_exactly_what_is_read() -> None:
    # Words of one token: a word that is cut in its middle would be counted anew.
    for text in ("Cafe\u0301 " + "apple " * 90, "\U0001f98a an apple " * 30):
        (count,) = count_tokens([text])
        assert count.cut is not None
        kept = text.encode("utf-16-le")[: 2 * count.cut].decode("utf-16-le")  # as JavaScript's slice(0, cut)
        (short,) = count_tokens([kept])
        assert short.cut is None and 74 <= short.tokens <= 75
