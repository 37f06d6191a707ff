"""Trains on checkpoints of full size with random weights, and gives the LoRA to other programs: minutes and gigabytes.

`python -m tests.full_size [--family sd1] [--work FOLDER] [--sdcpp PYTHON]`

For each family: a single file as a stranger would bring it and its diffusers folder, whose latents and predictions must be
the same bits; two or three steps at 256 px by the command line on every layer that kohya's scripts adapt; the proof;
diffusers' own reader of the single file; and, for Stable Diffusion 1.5, stable-diffusion.cpp: PYTHON is an interpreter
that has the package stable-diffusion-cpp-python (0.4.7 was tried; it is no part of the project's own environment).
Of two families, each one's LoRA is refused by the other's base.

The work folder needs 5 GB (sd1), 6 GB (sd2) or 8 GB (sdxl, without the folder), and is removed at the end unless it was
named. Every step runs in a process of its own; what it took is printed as a JSON line, with the machine's load. On a
machine that does other work, OMP_NUM_THREADS=1 is many times as fast as two threads that wait for each other.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.command_line import ROOT, environment, read_events, result_of
from tests.full_size_models import make_checkpoint, write_configuration

STEPS = {"sd1": 3, "sd2": 2, "sdxl": 2}
LAYERS = {"sd1": 192 + 72, "sd2": 192 + 138, "sdxl": 722 + 66 + 192}
"""Modules of kohya's default set that can learn: of the denoiser, and of each text encoder as far as it is read."""
SETTINGS = (
    'adapter.targets=["attention","feed_forward","projections"]', "adapter.rank=16", "adapter.alpha=8",
    "dataset.resolution=256", "dataset.holdout=0", "samples.every=0", "schedule.type=constant",
    "optimizer.learning_rate=1e-3", "text_encoder.learning_rate=1e-3", "text_encoder.rank=16", "text_encoder.alpha=8",
)  # fmt: skip
"""A rate ten times the usual, so that three steps can be seen in a picture of 8 bits."""


def measured(what: str, work: Callable[[], Any]) -> Any:
    """Does `work` and prints how long it took, what it found, and how busy the machine was."""
    begun = time.monotonic()
    found = work()
    told = {"what": what, "seconds": round(time.monotonic() - begun, 1), "load": round(os.getloadavg()[0], 1)}
    print(json.dumps(told | (found if isinstance(found, dict) else {})), flush=True)
    return found


def apart(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """`function` in a process of its own, and the GiB that it held at the most."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found, held = pool.apply(_and_memory, (function, arguments))
    return {**found, "GiB": held}


def _and_memory(function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> tuple[dict[str, Any], float]:
    return function(*arguments), gibibytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def gibibytes(kilobytes: int) -> float:
    """Of what the system calls the largest resident set, on Linux."""
    return round(kilobytes / 2**20, 2)


def impasto(*words: object, code: int = 0) -> dict[str, Any]:
    """`impasto WORDS` as a person would call it; its words and the GiB that it held. Raises AssertionError for another exit."""
    command = [sys.executable, "-P", "-m", "app", *(str(word) for word in words)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, env=environment(), stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    assert process.returncode == code, text[-3000:]
    return {"GiB": gibibytes(usage.ru_maxrss), "said": text}


def make(family: str, work: Path) -> dict[str, Any]:
    """The checkpoint, the configuration for diffusers, and (but for SDXL, for the disk's sake) the checkpoint as a folder."""
    from trainers.families import recognise_base
    from trainers.formats.base_file import write_base

    make_checkpoint(family, work / "base.safetensors")
    write_configuration(family, work / "configuration")
    facts = recognise_base(str(work / "base.safetensors"))
    assert (facts.family.name, facts.checkpoint) == (family, work / "base.safetensors")
    begun = time.monotonic()
    if family != "sdxl":
        write_base(facts, work / "folder")
    return {
        "GB": round((work / "base.safetensors").stat().st_size / 1e9, 3),
        "folder written in": round(time.monotonic() - begun, 1),
    }


def train(family: str, work: Path, steps: int) -> dict[str, Any]:
    """`impasto train` on some pictures; the verification at its end must have passed."""
    pictures = work / "pictures"
    pictures.mkdir()
    for file in sorted((ROOT / "assets" / "samples" / "blackcut").glob("[a-c]*")):
        shutil.copyfile(file, pictures / file.name)
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    run = work / "run"
    words = (pictures, "--output", run, "--base", work / "base.safetensors", "--steps", steps, *options, "--json")
    told = impasto("train", *words)
    events = read_events(run)
    stages: dict[str, float] = {}
    for event in events:
        if event["type"] in ("stage", "started", "finished"):
            stages.setdefault(event.get("name", event["type"]), event["time"])
    proof = json.loads((run / "verification.json").read_text(encoding="utf-8"))
    assert proof["ok"] and proof["modules"] == proof["read_by_diffusers"] == proof["read_here"] == LAYERS[family], proof
    assert not any(proof["zero"].values()), proof["zero"]
    names = list(stages)
    return {
        "GiB": told["GiB"],
        "stages": {name: round(stages[after] - stages[name], 1) for name, after in itertools.pairwise(names)},
        "steps": [round(e["seconds_per_step"], 2) for e in events if e["type"] == "step"],
        "losses": [round(e["loss"], 4) for e in events if e["type"] == "step"],
        "MB": round(result_of(run).stat().st_size / 1e6, 2),
        "proof": {
            name: proof[name] for name in ("read_by_diffusers", "parts", "worst_error", "pixel_difference", "picture_error")
        },
    }


def inspect(work: Path) -> dict[str, Any]:
    """`impasto inspect --verify` on the finished file."""
    told = impasto("inspect", result_of(work / "run"), "--verify", "--base", work / "base.safetensors")
    return {"GiB": told["GiB"], "said": [line for line in told["said"].splitlines() if line.startswith(("loaded", "error"))]}


def answers(base: str) -> dict[str, Any]:
    """SHA-256 of every part's weights and of latents and a prediction, as this program loads `base`."""
    import hashlib

    import torch

    from trainers.families import load_family, recognise_base

    begun = time.monotonic()
    model = load_family(recognise_base(base), torch.bfloat16, torch.device("cpu"))
    loaded = time.monotonic() - begun
    found = {part: model.fingerprint(part)[:16] for part in (*model.parts(), "vae")}
    printed = time.monotonic() - begun - loaded
    draw = torch.Generator().manual_seed(5)
    pixels, noisy = torch.rand(1, 3, 64, 64, generator=draw) * 2 - 1, torch.randn(1, 4, 32, 32, generator=draw)
    with torch.no_grad():
        states = model.encode_captions(["a photo of a cat"])
        framing = torch.tensor([[256.0, 256.0, 0.0, 0.0, 256.0, 256.0]])
        results = {
            "states": states.hidden_states,
            "latents": model.encode_pixels(pixels)[0],
            "prediction": model.predict(noisy, torch.tensor([321]), states, framing),
        }
    for name, tensor in results.items():
        assert bool(tensor.isfinite().all()), name
        found[name] = hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()[:16]
        found[f"{name}' deviation"] = round(float(tensor.float().std()), 3)
    return {"found": found, "loaded in": round(loaded, 1), "fingerprints in": round(printed, 1)}


def by_diffusers(family: str, work: Path) -> dict[str, Any]:
    """diffusers' own reader of the single file: every number must be ours, and our LoRA load."""
    import diffusers
    import torch
    import transformers

    from trainers.families import recognise_base, stored_tensors
    from trainers.families.tensor_files import TensorFiles

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    facts = recognise_base(str(work / "base.safetensors"))
    pipeline = getattr(diffusers, facts.family.pipeline).from_single_file(
        str(facts.checkpoint), config=str(work / "configuration"), torch_dtype=torch.float16, local_files_only=True
    )
    same = 0
    with TensorFiles() as files:
        for part in (*facts.family.parts, "vae"):
            stored = stored_tensors(facts, part)
            for name, tensor in getattr(pipeline, part).state_dict().items():
                own = files.read(stored[name.removeprefix("text_model.")])
                assert torch.equal(own.reshape(tensor.shape), tensor), (part, name)
                same += 1
    lora = result_of(work / "run")
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, local_files_only=True)
    parts = [getattr(pipeline, part) for part in facts.family.parts]
    adapted = sum(hasattr(layer, "lora_A") for part in parts for layer in part.modules())
    assert adapted == LAYERS[family], adapted
    return {"tensors": same, "modules": adapted}


_SDCPP = """
import json, sys
from stable_diffusion_cpp import StableDiffusion
base, folder, name, side, steps = sys.argv[1:]
model = StableDiffusion(model_path=base, lora_model_dir=folder, n_threads=2)
pictures = []
for words in ("", f"<lora:{name}:0>", f"<lora:{name}:1>"):
    drawn = model.generate_image("a cat" + words, width=int(side), height=int(side), sample_steps=int(steps), cfg_scale=1.0,
                                 seed=1, sample_method="euler")
    pictures.append(drawn[0].convert("RGB").tobytes())
print(json.dumps({"same": pictures[0] == pictures[1],
                  "apart": max(abs(a - b) for a, b in zip(pictures[0], pictures[2]))}))
"""


def by_sdcpp(python: Path, work: Path) -> dict[str, Any]:
    """stable-diffusion.cpp finds every tensor of the LoRA; strength 0 draws what no LoRA draws, strength 1 another picture."""
    lora = result_of(work / "run")
    words = [work / "base.safetensors", lora.parent, lora.stem, 64, 2]
    command = [str(python), "-c", _SDCPP, *(str(word) for word in words)]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", env={**os.environ, "PYTHONPATH": ""}
    )
    (work / "sdcpp.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    applied = re.findall(r"\((\d+) / (\d+)\) LoRA tensors have been applied", done.stdout + done.stderr)
    tensors = str(3 * LAYERS["sd1"])  # up, down and alpha of each module
    assert applied and all(pair == (tensors, tensors) for pair in applied), applied
    assert found["same"] and found["apart"] > 0, found
    return {"tensors": applied[-1], "strength 0 as without": found["same"], "strength 1 apart by": found["apart"]}


def refused(what: str, words: str, *command: object) -> None:
    """`impasto COMMAND` must end with exit code 1 or 2 and a sentence in which `words` stand, and no traceback."""

    def work() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "app", *(str(word) for word in command)],
            env=environment(), capture_output=True, encoding="utf-8",
        )  # fmt: skip
        said = (done.stdout + done.stderr).strip()
        assert done.returncode in (1, 2) and words in said and "Traceback" not in said, (done.returncode, said[-2000:])
        return {"exit": done.returncode, "said": said.splitlines()[-1][:300]}

    measured(what, work)


def job(family: str, work: Path, sdcpp: Path | None) -> None:
    """All that is shown of one family. Raises AssertionError for the first thing that is not as it should be."""
    measured(f"{family}: checkpoint and folder made", lambda: apart(make, family, work))
    one = measured(f"{family}: loaded from the single file", lambda: apart(answers, str(work / "base.safetensors")))
    if (work / "folder").is_dir():
        other = measured(f"{family}: loaded from the folder", lambda: apart(answers, str(work / "folder")))
        assert one["found"] == other["found"], "single file and folder differ"
        shutil.rmtree(work / "folder")
    measured(f"{family}: trained", lambda: train(family, work, STEPS[family]))
    measured(f"{family}: inspect --verify", lambda: inspect(work))
    measured(f"{family}: diffusers' from_single_file", lambda: apart(by_diffusers, family, work))
    if sdcpp is not None and family == "sd1":
        measured(f"{family}: stable-diffusion.cpp", lambda: by_sdcpp(sdcpp, work))


def cross(loras: dict[str, Path], bases: dict[str, Path]) -> None:
    """A LoRA of one family on the other's base."""
    for family, lora in loras.items():
        for other, base in bases.items():
            if other != family:
                refused(
                    f"{family}'s LoRA on {other}",
                    "made for",
                    "generate",
                    "--lora",
                    lora,
                    "--base",
                    base,
                    "-p",
                    "x",
                    "-o",
                    "x.png",
                )
                refused(f"{family}'s LoRA verified on {other}", "made for", "inspect", lora, "--verify", "--base", base)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(LAYERS), action="append", help="sd1 unless given; may be repeated")
    parser.add_argument("--work", type=Path, help="an empty or new folder; what is made stays there")
    parser.add_argument("--sdcpp", type=Path, metavar="PYTHON", help="an interpreter with stable-diffusion-cpp-python")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="impasto-full-size-"))
    work = work.absolute()
    os.environ["IMPASTO_HOME"] = str(work / "home")
    families = given.family or ["sd1"]
    try:
        for family in families:
            (work / family).mkdir(parents=True)
            job(family, work / family, given.sdcpp)
        cross({f: result_of(work / f / "run") for f in families}, {f: work / f / "base.safetensors" for f in families})
    finally:
        if given.work is None:
            shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
