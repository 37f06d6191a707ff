"""What a run of a project would be: its recipe over a preset, checked before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from app.projects import OWN, Project, read_recipe
from app.refusals import Refusal, refuse_settings, setting_problems
from app.scanning import Scanner
from trainers.config import TrainConfig
from trainers.dataset.edits import Edits
from trainers.errors import Problem, TrainingError
from trainers.families import BaseModelFacts
from trainers.launch import RunPlan, plan_run, recognise_given
from trainers.presets import default_preset, list_presets, resolve
from trainers.settings import merge


def base_of(project: Project) -> str:
    """The base model that the recipe names, else pocket."""
    try:
        base = read_recipe(project).get("base", {})
    except Refusal:  # told where the recipe itself is asked for
        return "pocket"
    return str(base.get("model", "pocket")) if isinstance(base, dict) else "pocket"


def take_edits(project: Project, scanner: Scanner) -> Edits:
    """Every caption that a run is to train on, the excluded pictures and the crops, as they are at this moment.

    A run keeps them in its own folder, so that captions may be edited on while it goes on or is paused.
    """
    look = scanner.look(project)
    captions = {
        name: example.caption
        for name, example in look.examples.items()
        if name not in look.edits.excluded and example.caption_source == "file"
    }
    crops = {name: crop for name, crop in look.edits.crops.items() if name in look.examples}
    return Edits(captions, look.edits.excluded & look.examples.keys(), crops)


def plan_project(
    project: Project,
    scanner: Scanner,
    settings: dict[str, Any],
    edits: Edits,
    edits_file: Path,
    preset: str | None = None,
    force: bool = False,
) -> RunPlan:
    """The project's recipe with `settings` over it, resolved and checked. `edits_file` is where the edits will lie.

    Raises Refusal whose problems name the settings: what can never pass, and without `force` also what is not advisable.
    """
    try:
        values = _over(read_recipe(project), settings)
        own = {"images": str(project.images), "edits": str(edits_file)}
        values = merge(values, {"dataset": own | ({"trigger": project.trigger} if project.trigger else {})})

        def look(config: TrainConfig) -> Any:
            return scanner.scan_for_run(config, edits)

        plan = plan_run(chosen_preset(project, preset), {"base": {}, **values}, [], force=True, look=look, read=scanner.read)
    except TrainingError as error:
        raise refuse_settings(setting_problems(error)) from error
    advice = [problem for problem in plan.problems if problem.severity == "advice"]
    if advice and not force:
        raise refuse_settings(advice)
    return _named(plan, project)


def chosen_preset(project: Project, preset: str | None = None) -> str | None:
    """The preset that was asked for, else the project's. Raises Refusal for one that does not ship.

    On the command line a preset may be a file; here that would read any .toml of the disk for whoever asks.
    """
    name = preset or project.preset or None
    if name is not None and name not in list_presets():
        hint = f"There are: {', '.join(list_presets())}."
        raise refuse_settings([Problem("error", f"There is no preset {name[:80]!r}", "preset", hint)])
    return name


def settings_of(project: Project, settings: dict[str, Any], preset: str | None) -> tuple[str, dict[str, Any], str]:
    """(preset, complete settings, the base's family) of a recipe that may not lead to a run; empty when unknown."""
    try:
        values = _over(read_recipe(project), settings)
        base = recognise_given(values.get("base", {}))
        name = chosen_preset(project, preset) or default_preset(base)
        return name, resolve(name, values).model_dump(mode="json"), base.family.name
    except TrainingError:
        return "", {}, ""


def config_of(project: Project) -> tuple[TrainConfig, BaseModelFacts] | None:
    """The settings and the base of the recipe as it is; None while it leads to no run."""
    try:
        values = _over(read_recipe(project), {})
        base = recognise_given(values.get("base", {}))
        return resolve(chosen_preset(project) or default_preset(base), values), base
    except TrainingError:
        return None


def _over(recipe: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One layer of settings over another, where each is a group of groups."""
    wrong = [name for layer in (recipe, settings) for name, group in layer.items() if not isinstance(group, dict)]
    if wrong:
        what = f"{wrong[0][:80]} is a group of settings, not a value"
        raise refuse_settings([Problem("error", what, wrong[0][:80], f'For example {{"{wrong[0][:80]}": {{...}}}}.')])
    return merge(recipe, settings)


def _named(plan: RunPlan, project: Project) -> RunPlan:
    """The file named after the project where the person has not named it: the folder is called "images" in all of them."""
    output = plan.config.output
    if output.name or project.source != OWN:
        return plan
    kept = "".join(" " if character in '/\\:*?"<>|' else character for character in project.name)
    name = f"{' '.join(kept.split()).lstrip('.')[:40] or project.id}-{plan.base.name[:40]}-r{plan.config.adapter.rank}"
    return replace(plan, config=plan.config.model_copy(update={"output": output.model_copy(update={"name": name})}))
