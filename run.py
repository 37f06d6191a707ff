"""Sets Impasto up in .venv/ beside this file and starts it. Standard library only; nothing has to be activated.

    python run.py demo           train a LoRA on a sample folder and draw its strength strip
    python run.py test           run the tests, two at a time; what follows goes to pytest, which then runs one at a time
    python run.py                open the window
    python run.py ANY ARGS       the same as: impasto ANY ARGS
    python run.py --cpu|--cuda ...   choose the build of torch by hand, as the first argument

It parses on Python 3.6, so that an old Python gets a sentence and not a SyntaxError: hence the quoted annotations.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Mapping

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

ROOT = Path(os.path.abspath(__file__)).parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP, LOG, LOCK = VENV / "setup.json", VENV / "setup.log", VENV / "setup.lock"
VERSION = "{}.{}".format(*sys.version_info)
TWO_AT_A_TIME = ["-n2", "--dist=worksteal"]  # what two cores carry, as a test has one thread
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Windows only, where the plain wheel has no CUDA. That cu130 holds 2.13.0 is known from others' set-ups, not tried by us.
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"
NO_VENV = "This Python cannot make virtual environments. On Debian or Ubuntu: sudo apt install python3-venv. Then start again."
# What a failed step prints -> what to do. Network before torch: without one, pip ends with "No matching distribution".
NETWORK = "connection broken|Failed to (establish|connect)|timed out|ProxyError|getaddrinfo failed|name resolution|unreachable"
CAUSES = {
    "No space left|Errno 28|not enough space on": "The disk is full. Impasto takes 2 GB, with CUDA 8 GB, and as much while pip"
    " unpacks in the folder for temporary files. Make room and start again.",
    "CERTIFICATE_VERIFY_FAILED": "The certificate of a company proxy was refused. Set PIP_CERT to its file.",
    NETWORK: "The package server cannot be reached. Check the network (or HTTPS_PROXY), start again; pip keeps downloads.",
    "Long Path": "A path is too long for Windows. Move Impasto to a short one, such as C:\\impasto, and start again.",
    "ensurepip": NO_VENV,
    "No matching distribution found for torch": "There is no such torch for Python {python} on {machine}, only for 64-bit Linux"
    " and Windows and Macs with an M chip. If yours is one of these, try Python 3.12.",
    "Permission denied|Access is denied|Read-only": "Close every running Impasto, check that {root} is yours, and start again.",
    "": "Start again. If it fails in the same place, delete the folder .venv and start once more.",
}


class SetupError(Exception):
    """Set-up cannot go on; the message says what happened and what to do."""


def refusal(version: "tuple[int, ...]", bits: int, executable: str) -> str:
    """Why this Python (version, pointer size in bits) cannot run Impasto, with the fix; '' if it can."""
    fix = "Get one from https://www.python.org/downloads/ and start run.py with it."
    if version[:2] < (3, 11):
        return f"Impasto needs Python 3.11 or newer, and this is {'.'.join(map(str, version))} ({executable}). {fix}"
    return "" if bits == 64 else f"Impasto needs a 64-bit Python, and {executable} has {bits} bits. {fix}"


def has_own_sources(config_list: str) -> bool:
    """Whether `pip config list` (files and PIP_* variables) says where packages come from, other than PyPI itself."""
    found = re.findall(r"\.(?:index-url|extra-index-url|find-links|no-index)=(.*)", config_list.replace("_", "-"))
    return any(value.strip("'\" /") not in ("", "https://pypi.org/simple") for value in found)


def choose_torch(system: str, nvidia: bool, own_sources: bool, asked: str) -> "tuple[str, list[str]]":
    """Which torch to install: (plain | cpu | cuda, extra arguments for pip). asked: auto, cpu or cuda.

    Plain is what pip finds by itself: CUDA on Linux, Metal on a Mac, CPU on Windows, or what the user's own sources hold.
    """
    if asked == "auto":
        asked = "plain" if own_sources else "cuda" if nvidia else "cpu"
    if system == "Linux" and asked == "cpu":
        return "cpu", ["--index-url", CPU_INDEX]  # 200 MB instead of 3 GB
    if system == "Windows" and asked == "cuda":
        return "cuda", ["--index-url", CUDA_INDEX]
    return "plain", []


def wanted_stamp(root: Path, asked: str, extras: "list[str]") -> "dict[str, object]":
    """The stamp of a .venv that is ready for this checkout, this Python and these extras."""
    files = (root / "pyproject.toml").read_bytes() + b"\0" + (root / "constraints.txt").read_bytes()
    requirements = hashlib.sha256(files).hexdigest()
    return dict(state="done", requirements=requirements, python=VERSION, root=str(root), asked=asked, extras=sorted(extras))


def is_ready(stamp: "dict[str, object]", wanted: "dict[str, object]") -> bool:
    """Whether the .venv with this stamp serves as it is. 'auto' is content with the torch that is there."""
    same = all(stamp.get(key) == wanted[key] for key in ("state", "requirements", "python", "root"))
    fits = wanted["asked"] in ("auto", stamp.get("asked"), stamp.get("torch"))
    return same and fits and set(wanted["extras"]) <= set(stamp.get("extras", []))


def reason_to_remake(stamp: "dict[str, object]", wanted: "dict[str, object]", usable: bool) -> str:
    """Why .venv must be made from nothing; '' if pip can bring it up to date. usable: its Python has our version and pip."""
    if stamp.get("state") == "unfinished":
        return "an earlier set-up was cut off"
    if stamp and stamp.get("root") != wanted["root"]:
        return "the folder was moved"
    return "" if usable else "its Python is missing, broken or of another version"


def explain(text: str) -> str:
    """What to do about a step that failed with this output."""
    advice = next(advice for pattern, advice in CAUSES.items() if re.search(pattern, text))
    return advice.format(root=ROOT, python=platform.python_version(), machine=f"{platform.system()} {platform.machine()}")


def clean_environment(environ: "Mapping[str, str]") -> "dict[str, str]":
    """The environment for all that is started from here: nothing in it makes Python or pip look or install elsewhere."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "__PYVENV_LAUNCHER__", "VIRTUAL_ENV", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
    return {key: value for key, value in environ.items() if key.upper() not in dropped}


def say(text: str, end: str = "\n") -> None:
    """Speaks on stderr, so that `python run.py train --json | ...` is clean even on the first start."""
    print(text, end=end, file=sys.stderr, flush=True)


def read_stamp() -> "dict[str, object]":
    """The stamp in .venv, {} if there is none."""
    try:
        return dict(json.loads(STAMP.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_stamp(stamp: "dict[str, object]") -> None:
    """Replaces the stamp in one piece."""
    STAMP.with_suffix(".new").write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    os.replace(str(STAMP.with_suffix(".new")), str(STAMP))


def lock(file: "object") -> bool:
    """Takes the lock, which ends with the last process that has the file open; False while another set-up holds it."""
    try:
        if fcntl is None:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a POSIX file system without locks: go on without one
        return fcntl is not None and not isinstance(error, BlockingIOError)
    return True


def output_of(*command: str) -> str:
    """What a command prints; '' if it cannot be started, fails, or takes over 30 s."""
    options = dict(stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30, encoding="utf-8", errors="replace")
    try:
        return subprocess.check_output(command, env=clean_environment(os.environ), **options).strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def run_step(title: str, command: "list[str]", held: "object") -> None:
    """Runs one step, its output in the log, and prints one line: what, and how many seconds. Raises SetupError."""
    environment = clean_environment(os.environ)
    environment.update(PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONUTF8="1")
    # The child inherits the lock, so that the next run.py waits even for a pip that has outlived this one.
    streams = dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, pass_fds=[held.fileno()] if fcntl else [])
    started, live, offset = time.monotonic(), sys.stderr.isatty(), LOG.stat().st_size
    say(title, end="")
    with open(str(LOG), "ab") as log:
        process = subprocess.Popen(command, cwd=str(ROOT), env=environment, stdout=log, **streams)
        while process.poll() is None:
            time.sleep(0.2)
            say(f"\r{title}: {time.monotonic() - started:.0f} s" if live else "", end="")
    end = f"{time.monotonic() - started:.0f} s" if process.returncode == 0 else "failed"
    say(f"\r{title}: {end}" if live else f": {end}")
    if process.returncode != 0:
        text = LOG.read_bytes()[offset:].decode("utf-8", "replace")
        tail = "\n".join("    " + line[:200] for line in text.strip().splitlines()[-8:])
        raise SetupError(f"{tail}\n{explain(text)}\nThe whole log: {LOG}")


def install_torch(asked: str, installed: "object", held: "object") -> str:
    """Installs the torch that constraints.txt pins and returns its build; its libraries come with the next step."""
    pip = [str(PYTHON), "-m", "pip", "install", "--no-deps"]
    own_sources = has_own_sources(output_of(str(PYTHON), "-m", "pip", "config", "list"))
    build, source = choose_torch(platform.system(), "GPU" in output_of("nvidia-smi", "-L"), own_sources, asked)
    # A local build such as 2.13.0+cpu satisfies torch==2.13.0; to pip, any other build of it is installed already.
    pin = re.findall("^torch==.*", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[0]
    pip += ["--force-reinstall"] if installed not in (None, build) else []
    where = {"cpu": "for the CPU, 200 MB", "cuda": "with CUDA, 2 GB"}.get(build, "the build pip finds, 0.2 to 3 GB")
    try:
        run_step(f"[2/3] Installing {pin} ({where})", [*pip, *source, pin], held)
    except SetupError as error:
        if not source:
            raise
        say(f"{error}\n      {source[1]} failed; taking the build that pip finds by itself.")
        run_step(f"[2/3] Installing {pin}", [*pip, pin], held)
        build = "plain"
    return build


def set_up(asked: str, extras: "list[str]") -> None:
    """Brings .venv into the wanted state or raises SetupError; silent and quick if it is in it already."""
    wanted = wanted_stamp(ROOT, asked, extras)
    if is_ready(read_stamp(), wanted) and PYTHON.exists():
        return
    VENV.mkdir(exist_ok=True)
    with open(str(LOCK), "a+") as held:
        if not lock(held):
            say("Another run.py is setting up this folder; waiting for it.")
            while not lock(held):
                time.sleep(0.5)
        stamp, started = read_stamp(), time.monotonic()
        if is_ready(stamp, wanted) and PYTHON.exists():  # the other run.py has done it
            return
        say(f"Setting up Impasto in {VENV}; the log is setup.log there.")
        usable = output_of(str(PYTHON), "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])") == VERSION
        reason = reason_to_remake(stamp, wanted, usable)
        asked = stamp.get("asked", "auto") if asked == "auto" else asked
        wanted.update(asked=asked, extras=sorted({*extras, *stamp.get("extras", [])}))
        if reason and stamp:
            say(f"Making .venv anew: {reason}.")
        elif reason and PYTHON.exists():
            raise SetupError(
                f"{VENV} was not made by run.py and does not fit: {reason}. Rename or delete it, then start again."
            )
        if reason and not (importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv")):
            raise SetupError(NO_VENV)
        write_stamp({**wanted, "state": "unfinished"})
        try:
            build_venv(reason != "", None if reason else stamp.get("torch"), wanted, held)
        except SetupError:
            # pip downloads all before it installs any: without a network nothing got broken.
            if not reason and re.search(NETWORK, LOG.read_text(encoding="utf-8", errors="replace")):
                write_stamp({**wanted, **stamp, "state": "outdated"})
            raise
        say(f"Ready after {time.monotonic() - started:.0f} s.")


def build_venv(anew: bool, torch: "object", wanted: "dict[str, object]", held: "object") -> None:
    """The three steps, and the stamp that says so. torch: the build that .venv holds, None if it holds none of ours."""
    LOG.write_bytes(b"")
    if anew:
        for entry in VENV.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(str(entry))
            elif entry not in (LOCK, LOG, STAMP):
                entry.unlink()
        base = getattr(sys, "_base_executable", None) or sys.executable  # we may run on the .venv that was just emptied
        run_step(f"[1/3] Making .venv with Python {platform.python_version()}", [base, "-m", "venv", str(VENV)], held)
    build = install_torch(str(wanted["asked"]), torch, held)
    # "." and not the folder's path, whose brackets pip would read as extras.
    target = ".[{}]".format(",".join(wanted["extras"])) if wanted["extras"] else "."
    command = [str(PYTHON), "-m", "pip", "install", "--constraint", "constraints.txt", "--editable", target]
    run_step("[3/3] Installing Impasto and its libraries", command, held)
    write_stamp({**wanted, "torch": build})


def start(arguments: "list[str]") -> int:
    """Becomes the program (POSIX), so that signals reach it itself, or waits for it (Windows) and returns its exit code."""
    command = [str(PYTHON), "-P", *arguments]  # -P: a stray trainers.py in the working folder must not run instead
    if os.name != "nt":
        os.execve(command[0], command, clean_environment(os.environ))
    process = subprocess.Popen(command, env=clean_environment(os.environ))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the program got it too, and says how to go on
            continue


def main(arguments: "list[str]") -> int:
    """Set-up, then the program. Exit code 1 if set-up failed, 130 if it was stopped, else the program's own."""
    problem = refusal(tuple(sys.version_info[:3]), 64 if sys.maxsize > 2**32 else 32, sys.executable)
    if problem:
        sys.exit(problem)  # on stderr, exit code 1
    sys.stderr.reconfigure(errors="replace")
    asked = arguments.pop(0)[2:] if arguments[:1] in (["--cpu"], ["--cuda"]) else "auto"
    name, rest = "".join(arguments[:1]), arguments[1:]
    try:
        set_up(asked, ["test"] if name == "test" else [])
    except (SetupError, OSError) as error:
        say(f"Set-up did not finish.\n{error if isinstance(error, SetupError) else f'{error}. {explain(str(error))}'}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped. The same command sets up from what pip has downloaded.")
        return 130
    if name == "test":
        os.chdir(str(ROOT))
        return start(["-m", "pytest", *(rest or TWO_AT_A_TIME)])
    demo = ["-m", "trainers", "demo", "--output", str(ROOT / "demo"), *rest]
    return start(demo if name == "demo" else ["-m", "app", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
