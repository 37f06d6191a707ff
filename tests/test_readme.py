"""The README tells the truth: its derived parts are those of the code, its commands and files exist."""

from __future__ import annotations

import re

from tests.readme_tables import README, ROOT, with_tables


def test_the_derived_parts_of_the_readme_are_unchanged() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run: python -m tests.readme_tables"


def test_every_file_and_picture_that_the_readme_links_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []


def test_every_impasto_command_in_the_readme_exists() -> None:
    from app.main import cli

    known = {command.name or command.callback.__name__ for command in cli.registered_commands if command.callback}
    used = set(re.findall(r"^impasto ([a-z]+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert used
    assert used <= known
