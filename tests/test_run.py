"""run.py: which Python and which torch, when .venv is made anew, and that the program is started as it should be."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (ROOT / "run.py").read_text(encoding="utf-8")


@pytest.fixture
def run() -> ModuleType:
    """run.py as a fresh module, so that a test may point its paths elsewhere."""
    spec = importlib.util.spec_from_file_location("impasto_run", ROOT / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a space and an accent in its name that holds run.py and what its stamp depends on."""
    folder = tmp_path / "a place é"
    folder.mkdir()
    for name in ("run.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


def point_at(run: ModuleType, folder: Path) -> None:
    """Makes the loaded run.py work in another checkout."""
    run.ROOT, run.VENV = folder, folder / ".venv"
    run.PYTHON = run.VENV / run.PYTHON.relative_to(ROOT / ".venv")
    run.STAMP, run.LOG, run.LOCK = (run.VENV / name for name in ("setup.json", "setup.log", "setup.lock"))


def test_run_py_parses_on_python_3_6() -> None:
    ast.parse(SOURCE, feature_version=(3, 6))
    assert "from __future__ import annotations" not in SOURCE  # a SyntaxError before 3.7


def test_run_py_quotes_annotations_that_an_old_python_cannot_evaluate() -> None:
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.FunctionDef):
            annotations = [node.returns, *(argument.annotation for argument in node.args.args)]
            assert not any(isinstance(annotation, ast.Subscript | ast.BinOp) for annotation in annotations), node.name


def test_run_py_imports_only_the_standard_library() -> None:
    names = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module).partition(".")[0])
    assert names <= sys.stdlib_module_names


def test_an_old_python_is_refused_in_a_sentence_with_the_fix(run: ModuleType) -> None:
    sentence = run.refusal((3, 10, 13), 64, "/usr/bin/python3")
    assert "3.11 or newer" in sentence and "3.10.13" in sentence and "python.org" in sentence


def test_a_32_bit_python_is_refused_and_a_64_bit_one_taken(run: ModuleType) -> None:
    assert "64-bit" in run.refusal((3, 12, 0), 32, "python.exe")
    assert run.refusal((3, 11, 0), 64, "python3") == ""


@pytest.mark.parametrize(
    ("system", "nvidia", "own_sources", "asked", "build"),
    [
        ("Linux", False, False, "auto", "cpu"),
        ("Linux", True, False, "auto", "plain"),
        ("Linux", False, True, "auto", "plain"),
        ("Linux", True, True, "cpu", "cpu"),
        ("Linux", False, False, "cuda", "plain"),
        ("Darwin", False, False, "auto", "plain"),
        ("Darwin", False, False, "cpu", "plain"),
        ("Windows", False, False, "auto", "plain"),
        ("Windows", True, False, "auto", "cuda"),
        ("Windows", True, True, "auto", "plain"),
        ("Windows", True, False, "cpu", "plain"),
        ("Windows", False, False, "cuda", "cuda"),
    ],
)
def test_torch_is_chosen_by_system_driver_and_pip_sources(
    run: ModuleType, system: str, nvidia: bool, own_sources: bool, asked: str, build: str
) -> None:
    sources = {"cpu": ["--index-url", run.CPU_INDEX], "cuda": ["--index-url", run.CUDA_INDEX], "plain": []}
    assert run.choose_torch(system, nvidia, own_sources, asked) == (build, sources[build])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("global.timeout='60'\n:env:.no-input='1'", False),
        ("global.index-url='https://pypi.org/simple/'", False),
        (":env:.find-links=''", False),
        (":env:.find-links='/some/wheels'", True),
        ("global.extra-index-url='https://packages.example/simple'", True),
        ("install.extra_index_url='https://packages.example/simple'", True),
        ("user.index-url='https://packages.example/simple'", True),
        ("global.no-index='true'", True),
    ],
)
def test_pip_sources_of_the_user_are_seen(run: ModuleType, config: str, expected: bool) -> None:
    assert run.has_own_sources(config) is expected


def test_a_failing_torch_index_falls_back_to_what_pip_finds(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fail_on_an_index(title: str, command: list[str], held: object) -> None:
        commands.append(command)
        if "--index-url" in command:
            raise run.SetupError("no such index")

    monkeypatch.setattr(run, "run_step", fail_on_an_index)
    monkeypatch.setattr(run, "output_of", lambda *command: "")
    monkeypatch.setattr(run.platform, "system", lambda: "Linux")
    assert run.install_torch("auto", None, None) == "plain"
    assert [command[-1] for command in commands] == ["torch==2.13.0", "torch==2.13.0"]
    assert "--index-url" in commands[0] and "--index-url" not in commands[1]


@pytest.mark.parametrize(("installed", "forced"), [(None, False), ("cpu", False), ("plain", True)])
def test_another_build_of_torch_replaces_the_installed_one(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, installed: str | None, forced: bool
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(run, "run_step", lambda title, command, held: commands.append(command))
    monkeypatch.setattr(run, "output_of", lambda *command: "")
    monkeypatch.setattr(run.platform, "system", lambda: "Linux")
    assert run.install_torch("cpu", installed, None) == "cpu"
    assert ("--force-reinstall" in commands[0]) is forced


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_the_stamp_changes_with_the_requirements(run: ModuleType, checkout: Path, changed: str) -> None:
    before = run.wanted_stamp(checkout, "auto", [])
    assert run.is_ready(before, run.wanted_stamp(checkout, "auto", []))
    (checkout / changed).write_text("# other requirements\n", encoding="utf-8")
    after = run.wanted_stamp(checkout, "auto", [])
    assert not run.is_ready(before, after)
    assert run.reason_to_remake(before, after, usable=True) == ""  # pip brings it up to date


def test_the_stamp_of_the_tests_serves_the_program_but_not_the_other_way_round(run: ModuleType, checkout: Path) -> None:
    program, tests = (run.wanted_stamp(checkout, "auto", extras) for extras in ([], ["test"]))
    assert run.is_ready(tests, program)
    assert not run.is_ready(program, tests)


def test_a_build_of_torch_asked_for_by_hand_is_kept_until_another_is_asked_for(run: ModuleType, checkout: Path) -> None:
    stamp = {**run.wanted_stamp(checkout, "cpu", []), "torch": "cpu"}
    assert run.is_ready(stamp, run.wanted_stamp(checkout, "auto", []))
    assert run.is_ready(stamp, run.wanted_stamp(checkout, "cpu", []))
    assert not run.is_ready(stamp, run.wanted_stamp(checkout, "cuda", []))


@pytest.mark.parametrize(
    ("change", "usable", "words"),
    [
        ({"state": "unfinished"}, True, "cut off"),
        ({"root": "/elsewhere"}, True, "moved"),
        ({}, False, "Python"),
    ],
)
def test_a_half_made_moved_or_broken_venv_is_made_anew(
    run: ModuleType, checkout: Path, change: dict[str, str], usable: bool, words: str
) -> None:
    wanted = run.wanted_stamp(checkout, "auto", [])
    reason = run.reason_to_remake({**wanted, **change}, wanted, usable)
    assert words in reason


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("after connection broken by 'X'\nERROR: No matching distribution found for torch==2.13.0", "network"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no such torch"),
        ("The virtual environment was not created successfully because ensurepip is not available.", "python3-venv"),
        ("HINT: this system does not have Windows Long Path support enabled", "too long"),
        ("something nobody has seen", "delete the folder .venv"),
    ],
)
def test_a_failed_step_ends_with_what_to_do(run: ModuleType, output: str, words: str) -> None:
    assert words in run.explain(output)


def test_a_failed_step_shows_the_end_of_its_output(run: ModuleType, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point_at(run, checkout)
    run.VENV.mkdir()
    run.LOG.write_text("an earlier step\n", encoding="utf-8")
    command = [sys.executable, "-c", "print('[Errno 28] no room'); raise SystemExit(1)"]
    with run.LOCK.open("a+") as held, pytest.raises(run.SetupError) as failure:
        run.run_step("[1/1] Trying", command, held)
    assert "no room" in str(failure.value) and "disk is full" in str(failure.value) and "earlier" not in str(failure.value)
    assert capsys.readouterr().err == "[1/1] Trying: failed\n"


def test_a_python_without_ensurepip_is_told_what_to_install(
    run: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(run, checkout)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(run.SetupError, match="sudo apt install python3-venv"):
        run.set_up("auto", [])
    assert not run.STAMP.exists()


def test_a_venv_of_somebody_else_is_never_deleted(run: ModuleType, checkout: Path) -> None:
    point_at(run, checkout)
    venv.create(run.VENV, with_pip=False)
    with pytest.raises(run.SetupError, match="not made by"):
        run.set_up("auto", [])
    assert run.PYTHON.exists() and not run.STAMP.exists()


@pytest.mark.parametrize(("output", "state"), [("connection broken", "outdated"), ("half unpacked", "unfinished")])
def test_an_update_without_network_keeps_venv_and_any_other_failure_remakes_it(
    run: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch, output: str, state: str
) -> None:
    point_at(run, checkout)
    run.VENV.mkdir()
    run.write_stamp({**run.wanted_stamp(checkout, "auto", []), "requirements": "older", "torch": "cpu"})

    def fail(title: str, command: list[str], held: object) -> None:
        run.LOG.write_text(output, encoding="utf-8")
        raise run.SetupError(output)

    monkeypatch.setattr(run, "run_step", fail)
    monkeypatch.setattr(run, "output_of", lambda *command: run.VERSION)
    with pytest.raises(run.SetupError):
        run.set_up("auto", [])
    assert run.read_stamp()["state"] == state


def test_a_second_set_up_at_the_same_time_has_to_wait(run: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "setup.lock"
    with path.open("a+") as first, path.open("a+") as second:
        assert run.lock(first)
        assert not run.lock(second)
    with path.open("a+") as third:
        assert run.lock(third)


def test_children_do_not_see_the_users_python_settings(run: ModuleType) -> None:
    environment = {"PATH": "/bin", "PYTHONPATH": "/x", "PYTHONHOME": "/y", "VIRTUAL_ENV": "/z", "PIP_TARGET": "/t", "LANG": "C"}
    assert run.clean_environment(environment) == {"PATH": "/bin", "LANG": "C"}


@pytest.fixture
def ready_checkout(run: ModuleType, checkout: Path) -> Path:
    """A checkout whose .venv is finished; its `app` prints what it was given as JSON and ends with exit code 3."""
    point_at(run, checkout)
    venv.create(run.VENV, with_pip=False, symlinks=sys.platform != "win32")
    run.write_stamp({**run.wanted_stamp(checkout, "auto", []), "torch": "plain"})
    told = "[__name__, sys.argv[1:], os.getcwd(), 'PYTHONPATH' in os.environ]"
    tell = f"import json, os, sys\nprint(json.dumps({told}))\nsys.exit(3)\n"
    packages = next(run.VENV.rglob("site-packages"))
    for name in ("app.py", "trainers.py"):
        (packages / name).write_text(tell, encoding="utf-8")
    return checkout


def start(checkout: Path, folder: Path, *arguments: str) -> tuple[int, Any, str]:
    """Starts run.py from a folder: (exit code, what `app` or `trainers` told, stderr)."""
    command = [sys.executable, str(checkout / "run.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_finished_venv_starts_the_program_silently_and_passes_its_exit_code(ready_checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("raise SystemExit('a stray file of the working folder was run')", encoding="utf-8")
    code, told, error = start(ready_checkout, tmp_path, "train", "my pictures", "--seed", "1")
    assert (code, error) == (3, "")
    assert told == ["__main__", ["train", "my pictures", "--seed", "1"], str(tmp_path), False]


@pytest.mark.parametrize(
    ("asked", "given"),
    [([], ["-n2", "--dist=worksteal"]), (["tests/test_run.py"], ["tests/test_run.py"]), (["-x", "-n4"], ["-x", "-n4"])],
)
def test_the_whole_suite_runs_two_at_a_time_and_chosen_tests_as_asked(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: list[str], given: list[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(run, "set_up", lambda *_: None)
    monkeypatch.setattr(run, "start", lambda arguments: arguments)
    assert run.main(["test", *asked]) == ["-m", "pytest", *given]


def test_demo_writes_beside_run_py_whatever_the_working_folder(ready_checkout: Path, tmp_path: Path) -> None:
    code, told, _ = start(ready_checkout, tmp_path, "demo", "--seed", "2")
    assert code == 3
    assert told[1] == ["demo", "--output", str(ready_checkout / "demo"), "--seed", "2"]
