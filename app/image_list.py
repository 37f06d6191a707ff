"""A project's pictures as the window shows them: captions with their tokens, and the health of the folder."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import quote

from app.answers import HealthAnswer, ImageAnswer, ImagesAnswer, ProblemAnswer
from app.captions import LIMIT, TokenCount, count_tokens
from app.planning import base_of
from app.projects import Project
from app.scanning import Look
from trainers.dataset.captions import with_trigger
from trainers.dataset.folder import Example
from trainers.dataset.pictures import PICTURE_ENDINGS
from trainers.errors import Problem


def describe_images(project: Project, look: Look) -> ImagesAnswer:
    """All pictures of a project in the order of the scan, and what is to be said about them.

    Captions are counted with the project's trigger word in front. Raises TrainingError for a damaged vocabulary.
    """
    trained = [with_trigger(example.caption, project.trigger) for example in look.scan.examples]
    counts = count_tokens(trained, base_of(project))
    beside: dict[str, list[ProblemAnswer]] = {}
    for problem in look.scan.problems:
        beside.setdefault(problem.where, []).append(answer_problem(problem))
    images = [
        _image(project, look, example, text, count, beside.get(example.name, []))
        for example, text, count in zip(look.scan.examples, trained, counts, strict=True)
    ]
    return ImagesAnswer(source=project.source, images=images, health=_health(look, images))


def answer_problem(problem: Problem) -> ProblemAnswer:
    """A problem as it is sent."""
    return ProblemAnswer(severity=problem.severity, what=problem.what, where=problem.where, hint=problem.hint)


def _image(
    project: Project, look: Look, example: Example, trained: str, count: TokenCount, problems: list[ProblemAnswer]
) -> ImageAnswer:
    written = example.caption_source == "file"
    before = len(trained[: len(trained) - len(example.caption)].encode("utf-16-le", "surrogatepass")) // 2
    # The file's time in the address: a browser may then keep a thumbnail for good.
    version = example.path.stat().st_mtime_ns if example.path.exists() else 0
    return ImageAnswer(
        rel=example.name,
        width=example.width,
        height=example.height,
        caption=example.caption if written else "",
        fallback="" if written else example.caption,
        edited=example.name in look.edits.captions,
        tokens=count.tokens,
        cut=None if count.cut is None else max(0, count.cut - before),
        excluded=example.name in look.edits.excluded,
        repeats=example.repeats,
        problems=problems,
        thumb=f"/api/projects/{project.id}/thumb/{quote(example.name, errors='surrogatepass')}?v={version:x}",
    )


def _health(look: Look, images: list[ImageAnswer]) -> HealthAnswer:
    """The folder at a glance. Excluded pictures count only as such."""
    used = [image for image in images if not image.excluded]
    names = {image.rel for image in images}
    smallest = min(used, key=lambda image: min(image.width, image.height), default=None)
    others = [problem for problem in look.scan.problems if problem.where not in names]
    unreadable = [problem for problem in others if PurePosixPath(problem.where).suffix.lower() in PICTURE_ENDINGS]
    return HealthAnswer(
        count=len(used),
        excluded=len(images) - len(used),
        smallest=smallest.rel if smallest else "",
        smallest_side=min(smallest.width, smallest.height) if smallest else 0,
        no_caption=[image.rel for image in used if not image.caption],
        too_long=[image.rel for image in used if image.tokens > LIMIT],
        unreadable=[answer_problem(problem) for problem in unreadable],
        problems=[answer_problem(problem) for problem in others if problem not in unreadable],
    )
