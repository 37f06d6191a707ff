"""A folder of many pictures as a run meets it: scanned, planned, and stepped on once, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainers.bench.cases import find_case, recipe
from trainers.errors import TrainingError

_ROOT = Path(__file__).resolve().parents[2]


def measure_many(images: Path, work: Path) -> dict[str, Any]:
    """Starts this file on a folder. Raises TrainingError with the end of what it said when it fails."""
    python_path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": python_path, "PYTHONUTF8": "1"}
    words = [sys.executable, "-P", "-m", "trainers.bench.many", str(images), str(work)]
    done = subprocess.run(words, env=environment, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise TrainingError("Many pictures could not be measured", str(images), done.stderr.strip()[-500:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(images: Path, work: Path) -> dict[str, Any]:
    """Seconds of the scan and of the plan, and the most bytes that were held until after a step on pocket."""
    import tempfile

    from trainers.bench.apart import peak_of
    from trainers.dataset.prepare import prepare, scan_images
    from trainers.families import recognise_base
    from trainers.run_folder import RunFolder

    config = recipe(find_case("pocket"), "pocket", images, "fp32")
    base = recognise_base("pocket")
    begun = time.perf_counter()
    scan = scan_images(config)
    scanned = time.perf_counter()
    data = prepare(config, base, scan.examples, [])
    planned = time.perf_counter()
    from trainers.setup import set_up
    from trainers.train import update

    with tempfile.TemporaryDirectory(dir=work) as run:
        update(set_up(config, RunFolder(Path(run)), lambda event: None))
    return {
        "pictures": len(data.training), "scan_seconds": scanned - begun, "plan_seconds": planned - scanned,
        "peak_bytes": peak_of(os.getpid()),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))), flush=True)
