"""`impasto inspect FILE --verify`: the base is loaded, and what was trained is looked up in the run that the file lies in."""

from __future__ import annotations

import re
from pathlib import Path

from trainers.config import read_config
from trainers.device import choose_device
from trainers.errors import SettingError
from trainers.families import BaseOptions, denoiser_bytes, load_family, recognise_base
from trainers.formats.recognise import check_family
from trainers.run_folder import run_of
from trainers.verify import Proof, read_trained, verify


def verify_file(path: Path, base: str | None, options: BaseOptions) -> Proof:
    """Reads `path` back on its base. `base`: None takes that of the run folder in which the file lies.

    Raises SettingError where no base is known, BaseModelError for one that cannot be loaded, AdapterFileError for a file
    of another family.
    """
    run = run_of(path)
    config = read_config(run.config) if run else None
    if base is None and config is None:
        what = "Which base model the LoRA is for is not known, as it lies in no run folder"
        raise SettingError(what, str(path), "Name it with --base.")
    if base is None and config is not None:
        facts = recognise_base(config.base.model, config.base.options)
    else:
        facts = recognise_base(base or "", options)
    check_family(path, facts.family.name)
    device = choose_device(config.train.precision if config is not None else "auto", denoiser_bytes(facts))
    model = load_family(facts, device.dtype, device.device)
    trained = read_trained(run, config, model, _step_of(path)) if run is not None and config is not None else None
    prompt = config.dataset.trigger if config is not None else ""
    return verify(model, path, trained, prompt)


def _step_of(path: Path) -> int | None:
    """The step that a checkpoint's name ends with; None for a run's result, which is of the last one."""
    found = re.search(r"-(\d{8})$", path.stem)
    return int(found[1]) if found and path.parent.name == "checkpoints" else None
