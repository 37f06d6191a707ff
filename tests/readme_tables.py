"""The parts of the README that are derived: the file tree from the files' first lines, the settings from their fields.

`python -m tests.readme_tables` writes them anew; a test asserts that they are unchanged.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic_core import PydanticUndefined

from trainers.adapters import AdapterConfig
from trainers.config import TrainConfig
from trainers.optimizers import OptimizerConfig
from trainers.settings import iterate_fields

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
# Files and folders without a docstring of their own.
PHRASES = {
    "run.py": "",
    ".ci/run": "what continuous integration calls: the test command below",
    "pyproject.toml": "package, dependencies as ranges, settings of the checkers",
    "constraints.txt": "the exact versions that were tested",
    "presets/": "what people start from; partial settings, commented",
    "assets/pocket/": "the small base model that ships",
    "assets/families/": "configurations of the families, for checkpoints that are a single file",
    "assets/samples/": "three folders to try: blackcut, inkline, bluebot",
    "assets/licenses/": "licence texts of what ships",
    "assets/NOTICE.md": "where each asset comes from, and its licence",
    "assets/strip.webp": "the picture above",
    "assets/window/": "pictures of the window",
    "tests/": "mirrors app and trainers",
    "CHANGELOG.md": "what changed",
    "LICENSE": "Apache-2.0",
}


def first_line(path: Path) -> str:
    """The first line of a file's docstring, without its full stop."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].rstrip(".")


def file_tree() -> str:
    """Every source file with one phrase."""
    lines = ["impasto/"]
    names = [name for name in PHRASES if not name.endswith("/") or name == "presets/"]
    entries = {name: PHRASES[name] or first_line(ROOT / name) for name in names}
    for package in ("app", "trainers"):
        for path in sorted((ROOT / package).rglob("*.py"), key=lambda p: (p.parent.as_posix(), p.name)):
            entries[path.relative_to(ROOT).as_posix()] = first_line(path)
    entries |= {name: phrase for name, phrase in PHRASES.items() if name.endswith("/")}
    width = max(len(name) for name in entries) + 2
    return "\n".join(lines + [f"  {name:{width}}{phrase}" for name, phrase in entries.items()])


UNIONS = {"adapter": AdapterConfig, "optimizer": OptimizerConfig}


def settings_table() -> str:
    """Every setting with its default and its help."""
    rows = ["| setting | default | |", "| --- | --- | --- |"]
    for name, field in iterate_fields(TrainConfig):
        default = "" if field.default in (None, PydanticUndefined, "") else f"`{field.default}`"
        if field.default in ((), {}):
            default = ""
        choices = _choices(name, field)
        rows.append(f"| `{name}` | {default} | {field.description}{choices} |")
    return "\n".join(rows)


def _choices(name: str, field: Any) -> str:
    """The values a setting may take, where its help does not already name them."""
    group, _, last = name.rpartition(".")
    if last == "type" and group in UNIONS:
        values = [member.model_fields["type"].default for member in get_args(get_args(UNIONS[group])[0])]
    else:
        values = [value for value in get_args(field.annotation) if isinstance(value, str)]
    missing = [value for value in values if value not in (field.description or "")]
    return f" One of: {', '.join(f'`{value}`' for value in values)}." if missing else ""


def with_tables(readme: str) -> str:
    """The README's text with its derived parts made anew."""
    parts = {"tree": f"```text\n{file_tree()}\n```", "settings": settings_table()}
    for name, text in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(f"README.md has no part between <!-- {name} --> and <!-- /{name} -->")
        readme = pattern.sub(lambda found, text=text: found[1] + text + found[2], readme)  # type: ignore[misc]
    return readme


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(0)
