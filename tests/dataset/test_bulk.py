"""Bulk edits of captions: each operation, tags in any case, patterns that never end or grow without end."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from trainers.dataset.bulk import Operation, change_caption, change_captions, count_tags, split_tags
from trainers.dataset.patterns import replace_pattern
from trainers.errors import DatasetError

CAPTIONS = {"a.png": "cat, red, Tree", "b.png": "dog, tree,, red , red", "c.png": ""}


def changed(kind: Any, text: str = "", **more: Any) -> dict[str, str]:
    return change_captions(CAPTIONS, Operation(kind, text, **more))


@pytest.mark.parametrize(
    ("kind", "text", "more", "wanted"),
    [
        ("prepend", "photo of", {}, ["photo of cat, red, Tree", "photo of dog, tree,, red , red", "photo of"]),
        ("append", ", ink", {}, ["cat, red, Tree, ink", "dog, tree,, red , red, ink", ", ink"]),
        ("append", "in rain", {}, ["cat, red, Tree in rain", "dog, tree,, red , red in rain", "in rain"]),
        ("replace", "tree", {"into": "bush"}, [None, "dog, bush,, red , red", None]),
        ("replace", "tree", {"into": r"\1", "match_case": False}, [r"cat, red, \1", r"dog, \1,, red , red", None]),
        ("replace", r"(\w+), (\w+)", {"into": r"\2 \1", "pattern": True}, ["red cat, Tree", "tree dog,, red , red", None]),
        ("replace", "TREE|DOG", {"into": "x", "pattern": True, "match_case": False}, ["cat, red, x", "x, x,, red , red", None]),
        ("add", "ink, RED", {}, ["cat, red, Tree, ink", "dog, tree, red, red, ink", "ink, RED"]),
        ("add", "ink, art", {"front": True}, ["ink, art, cat, red, Tree", "ink, art, dog, tree, red, red", "ink, art"]),
        ("remove", "tree,red", {}, ["cat", "dog", None]),
        ("sort", "", {}, [None, "dog, red, red, tree", None]),
        ("sort", "", {"by": "frequency"}, ["red, Tree, cat", "red, red, tree, dog", None]),
        ("sort", "", {"by": "frequency", "keep": 1}, [None, "dog, red, red, tree", None]),
        ("unique", "", {}, [None, "dog, tree, red", None]),
    ],
)
def test_an_operation_changes_what_it_says_and_names_only_that(kind: Any, text: str, more: Any, wanted: list[Any]) -> None:
    expected = {name: text for name, text in zip(CAPTIONS, wanted, strict=True) if text is not None}
    assert changed(kind, text, **more) == expected


def test_only_named_pictures_change_but_frequency_is_that_of_all() -> None:
    captions = {"a": "x, y", "b": "y", "c": "y"}
    assert change_captions(captions, Operation("sort", by="frequency"), ["a"]) == {"a": "y, x"}
    assert change_captions(captions, Operation("add", "z"), ["b", "b"]) == {"b": "y, z"}


def test_a_second_time_changes_nothing_where_the_first_was_complete() -> None:
    for operation in (Operation("add", "ink"), Operation("remove", "red"), Operation("sort"), Operation("unique")):
        now = {**CAPTIONS, **change_captions(CAPTIONS, operation)}
        assert change_captions(now, operation) == {}


def test_tags_are_counted_once_for_each_caption() -> None:
    assert count_tags(CAPTIONS.values()) == {"red": 2, "Tree": 2, "cat": 1, "dog": 1}
    assert split_tags(" a,, b ,") == ["a", "b"]
    assert change_caption("b, a", Operation("sort")) == "a, b"


@pytest.mark.parametrize("kind", ["prepend", "append", "replace", "add", "remove"])
def test_an_operation_without_its_text_is_refused(kind: Any) -> None:
    with pytest.raises(DatasetError, match="first"):
        changed(kind, "" if kind == "replace" else "  ")


def test_a_caption_that_grows_too_long_is_refused_by_name() -> None:
    with pytest.raises(DatasetError, match=r"longer than 64 KiB.*a\.png"):
        change_captions({"a.png": "x" * 60_000}, Operation("replace", "x", "xx"))
    with pytest.raises(DatasetError, match=r"longer than 64 KiB.*a\.png"):
        replace_pattern({"a.png": "x" * 60_000}, "(?=(.*))", r"\1" * 400)


@pytest.mark.parametrize(("pattern", "into"), [("(", ""), ("a" * 1001, ""), ("(a)", r"\2"), ("a", "\\")])
def test_what_is_no_pattern_is_told(pattern: str, into: str) -> None:
    with pytest.raises(DatasetError):
        replace_pattern({"a": "a a"}, pattern, into)


def test_a_pattern_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    wait = subprocess.Popen.communicate

    def noted(self: Any, *given: Any, **more: Any) -> Any:
        ended.append(self.pid)
        return wait(self, *given, **more)

    monkeypatch.setattr(subprocess.Popen, "communicate", noted)
    with pytest.raises(DatasetError, match="takes longer"):
        replace_pattern({"a": "a" * 60}, "(a+)+b", "", seconds=0.5)
    assert ended


def test_a_name_that_is_no_unicode_comes_back_as_it_was() -> None:
    assert replace_pattern({"\udcff.png": "käfer\n x"}, "ä", "ae") == {"\udcff.png": "kaefer\n x"}


def test_a_tag_that_is_there_twice_keeps_its_first_place() -> None:
    captions = {"a": "Zorbo, cat, red, zorbo"}
    assert change_captions(captions, Operation("unique")) == {"a": "Zorbo, cat, red"}
    assert change_captions({"a": "cat"}, Operation("add", "ink, art, Ink", front=True)) == {"a": "ink, art, cat"}
