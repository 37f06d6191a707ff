"""The house keeps its principles: one loop for all, imports one way, tables complete, every setting explained, files small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.command_line import ROOT, run_fresh
from trainers.config import TrainConfig
from trainers.settings import iterate_fields

PACKAGES = ("app", "trainers")
HEAVY = ("torch", "diffusers", "transformers", "gradio", "peft", "accelerate")
# What the window will use; it must open where torch is missing or broken.
LIGHT = (
    *("app.main", "app.server", "app.uploads", "app.routes", "app.ui"),
    *("trainers.cli", "trainers.config", "trainers.presets", "trainers.checks", "trainers.launch"),
    *("trainers.run_folder", "trainers.events", "trainers.errors", "trainers.settings", "trainers.samplers"),
    *("trainers.dataset.folder", "trainers.dataset.captions", "trainers.dataset.buckets", "trainers.dataset.plan"),
    *("trainers.dataset.prepare", "trainers.families", "trainers.adapters", "trainers.optimizers", "trainers.draw"),
)
# Folders with a table -> files in them that are no entry of it.
TABLES = {
    "families": {
        *("base", "targets", "facts", "settings", "locate", "configuration", "stored", "ckpt", "single_file", "ldm"),
        *("expected", "words"),
        *("parts", "lean", "tensor_files", "latent_diffusion"),
    },
    "adapters": {
        *("base", "settings", "plan", "layer", "lora_node", "dropout", "flat", "inject"),
        *("symmetric", "grow", "accumulated", "vectors"),
    },
    "optimizers": {"base"},
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, number of lines) of every function in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1


def test_the_loop_names_no_family_and_no_adapter() -> None:
    from trainers.adapters import ADAPTERS
    from trainers.families import FAMILIES

    text = (ROOT / "trainers" / "train.py").read_text(encoding="utf-8").lower()
    names = {*FAMILIES, *ADAPTERS, "pocket", "unet", "epsilon", "v_prediction", "stable diffusion"}
    assert [name for name in sorted(names) if re.search(rf"(?<![a-z]){name}", text)] == []


def test_the_training_step_fits_on_one_screen() -> None:
    lengths = dict(functions(ROOT / "trainers" / "train.py"))
    assert lengths["trainers/train.py:training_step"] <= 25


@pytest.mark.parametrize("name", ["family", "adapter", "sd1", "isinstance"])
def test_the_training_step_asks_nothing_about_kinds(name: str) -> None:
    tree = ast.parse((ROOT / "trainers" / "train.py").read_text(encoding="utf-8"))
    (step,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "training_step")
    assert not any(isinstance(node, ast.If | ast.IfExp | ast.Match) for node in ast.walk(step))
    assert name not in ast.unparse(step)


def test_no_file_is_over_300_lines() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in [*sources(*PACKAGES), ROOT / "run.py"]}
    assert {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 300} == {}


def test_no_function_is_over_60_lines() -> None:
    assert {name: length for path in sources(*PACKAGES) for name, length in functions(path) if length > 60} == {}


def test_every_file_opens_with_what_it_owns() -> None:
    without = [path for path in sources(*PACKAGES) if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert without == []


def test_every_public_function_says_what_it_does() -> None:
    without = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in sources(*PACKAGES)
        for node in _public(ast.parse(path.read_text(encoding="utf-8")))
        if not ast.get_docstring(node)
    ]
    assert without == []


def _public(tree: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """The public functions and classes of a file, and the public methods of these."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from _public(node)


def test_imports_are_absolute() -> None:
    relative = [
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_imports_go_one_way(tmp_path: Path) -> None:
    import logging

    from importlinter.cli import lint_imports

    ours = logging.getLogger("impasto").disabled
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), cache_dir=str(tmp_path)) == 0
    logging.getLogger("impasto").disabled = ours  # it sets up logging anew, for its own process as it thinks


def test_what_the_window_uses_loads_no_heavy_library() -> None:
    code = "import importlib, json, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    loaded = run_fresh(code + "print(json.dumps(list(sys.modules)))", *LIGHT)
    assert [name for name in HEAVY if name in loaded] == []


def test_training_loads_neither_the_window_nor_peft() -> None:
    named = {
        str(path.relative_to(ROOT)): module
        for path in sources("trainers")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for module in _imported(node)
        if module.split(".")[0] in ("app", "gradio", "fastapi", "peft")
    }
    assert named == {}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


@pytest.mark.parametrize("folder", TABLES)
def test_every_file_of_a_kind_stands_in_its_table(folder: str) -> None:
    files = {path.stem for path in (ROOT / "trainers" / folder).glob("*.py")} - {"__init__"} - TABLES[folder]
    tree = ast.parse((ROOT / "trainers" / folder / "__init__.py").read_text(encoding="utf-8"))
    named = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == f"trainers.{folder}":
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"trainers.{folder}."):
            named.add((node.module or "").split(".")[2])
    assert files and files == named - TABLES[folder]


def test_every_family_can_be_loaded() -> None:
    from trainers.families import FAMILIES

    files = {path.stem for path in (ROOT / "trainers" / "families").glob("*.py")}
    assert FAMILIES.keys() <= files


def test_every_setting_has_help_and_a_default() -> None:
    fields = dict(iterate_fields(TrainConfig))
    assert len(fields) > 60
    assert [name for name, field in fields.items() if not (field.description or "").strip().endswith(".")] == []
    assert [name for name, field in fields.items() if field.is_required()] == []


def test_every_group_of_settings_has_help() -> None:
    def groups(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield model
        for field in model.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from groups(field.annotation)

    assert [group.__name__ for group in groups(TrainConfig) if not group.__doc__] == []


def file_tree() -> dict[str, str]:
    """The README's file tree: the fenced block that begins with `impasto/`. Path -> phrase."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = [block.strip("\n") for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]
    (block,) = (block for block in blocks if block.startswith("impasto/\n"))
    lines = [line.strip().partition(" ") for line in block.splitlines()[1:]]
    return {name: phrase.strip() for name, _, phrase in lines}


def test_the_file_tree_in_the_readme_names_only_what_exists() -> None:
    assert [name for name in file_tree() if not (ROOT / name).exists()] == []
    assert [name for name in file_tree() if (ROOT / name).is_dir() != name.endswith("/")] == []


def test_the_file_tree_in_the_readme_names_every_file_or_its_folder_with_a_phrase() -> None:
    tree = file_tree()
    folders = tuple(name for name in tree if name.endswith("/"))
    files = [*sources(*PACKAGES, "tests"), *(path for path in (ROOT / "assets").rglob("*") if path.is_file())]
    files += [*(ROOT / "presets").iterdir(), *ROOT.glob("*.py"), *ROOT.glob("*.toml"), ROOT / ".ci" / "run"]
    names = [path.relative_to(ROOT).as_posix() for path in files]
    assert [name for name in names if name not in tree and not name.startswith(folders)] == []
    assert not any(folder.startswith(PACKAGES) for folder in folders)
    assert [name for name, phrase in tree.items() if not phrase] == []


def test_no_path_of_a_machine_stands_in_the_code() -> None:
    pattern = re.compile(r"/(?:home|root|Users|work|mnt|tmp)/\w|[A-Z]:\\\\?Users")
    files = [*sources(*PACKAGES), ROOT / "run.py", ROOT / "pyproject.toml", *(ROOT / "presets").glob("*.toml")]
    assert [str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_text(encoding="utf-8"))] == []


def test_the_code_names_no_server_but_where_python_and_torch_are_got() -> None:
    allowed = (
        "https://download.pytorch.org/whl/",
        "https://www.python.org/downloads/",
        "https://pypi.org/simple",
        "https://github.com/Stability-AI/generative-models",  # the word by which modelspec names SDXL's source
        "http://www.apache.org/licenses/",
        "https://creativecommons.org/",
    )
    named = {
        address
        for path in [*sources(*PACKAGES), ROOT / "run.py", *(ROOT / "presets").glob("*.toml")]
        for address in re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]+[^\s'\")]*", path.read_text(encoding="utf-8"))
    }
    assert [address for address in named if not address.startswith(allowed)] == []


def test_ruff_finds_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", *PACKAGES, "tests", "run.py"],
        cwd=ROOT, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_mypy_finds_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout
