"""The part of the REST API that is about runs: where they stand, what is asked of them, and the files they leave."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Query, Response
from fastapi.responses import FileResponse, PlainTextResponse

from app.answers import EmbeddingAnswer, FileAnswer, LogAnswer, MetadataAnswer, RunAnswer, RunsAnswer, StatusAnswer
from app.desk import TheDesk, TheRun
from app.processes import tail
from app.progress import PHASES
from app.refusals import NOT_FOUND, Refusal
from app.runs import Ask, Standing, find_lora, lora_files
from trainers import events
from trainers.container import open_file, read_header
from trainers.doctor import make_report
from trainers.formats.hashes import file_hashes

_PIECE = 1 << 20
"""Bytes of events in one answer; a page that asks for a long run gets it in several."""


def get_runs(desk: TheDesk) -> RunsAnswer:
    """All runs, the newest first."""
    return RunsAnswer(runs=[answer_run(standing) for standing in desk.runs.standings()])


def get_status(run: TheRun, desk: TheDesk, since: Annotated[int, Query(ge=0)] = 0) -> StatusAnswer:
    """Where a run stands, and its events after byte `since`, at most about 1 MB of them."""
    answer = answer_run(desk.runs.standing(run))
    size = run.events.stat().st_size if run.events.exists() else 0
    told, following = events.read_since(run.events, min(since, size), _PIECE)
    return StatusAnswer(**answer.model_dump(), events=told, next=following, more=bool(told) and following < size)


def _asks(what: Ask) -> Callable[..., RunAnswer]:
    def post_ask(run: TheRun, desk: TheDesk) -> RunAnswer:
        desk.runs.ask(run, what)
        return answer_run(desk.runs.standing(run))

    post_ask.__name__ = f"post_{what.replace('-', '_')}"
    post_ask.__doc__ = f"Asks a training to {what.replace('-', ' ')}, after the step it is at; 409 when it does not train."
    return post_ask


def post_resume(run: TheRun, desk: TheDesk) -> RunAnswer:
    """Goes on with a run that was paused, stopped, has failed or was killed; 409 while something trains."""
    desk.preflight.stop()
    desk.runs.resume(run)
    return answer_run(desk.runs.standing(run))


def post_resume_anyway(run: TheRun, desk: TheDesk) -> RunAnswer:
    """Goes on although base, pictures, captions or settings have changed since; 409 while something trains."""
    desk.preflight.stop()
    desk.runs.resume(run, force=True)
    return answer_run(desk.runs.standing(run))


def get_report(run: TheRun) -> Response:
    """A zip to attach to a report: versions, settings, events and log, with paths shortened, and no picture."""
    headers = {"Content-Disposition": 'attachment; filename="impasto-report.zip"'}
    return Response(make_report(run), media_type="application/zip", headers=headers)


def delete_run(run: TheRun, desk: TheDesk) -> Response:
    """Deletes a run and its LoRA; 409 while it trains."""
    desk.runs.delete(run)
    return Response(status_code=204)


def get_sample(name: str, run: TheRun) -> FileResponse:
    """A sample picture. Its name is looked up in the folder's list."""
    path = run.samples / name
    if not run.samples.is_dir() or name not in os.listdir(run.samples) or not name.endswith(".png") or path.is_symlink():
        raise Refusal("There is no such sample", name[:200], "Load the page again.", status=NOT_FOUND)
    keep = {"Cache-Control": "private, max-age=31536000, immutable"}  # drawn once for each step
    return FileResponse(path, media_type="image/png", headers=keep)


def get_download(run: TheRun, step: int | None = None) -> FileResponse:
    """A LoRA as a download, by default the finished one, else the newest. Read from its place; ranges are answered."""
    path = find_lora(run, step)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


def get_embedding(run: TheRun) -> FileResponse:
    """The finished vectors of the run's trigger word as a download."""
    path = run.embedding
    if path is None:
        raise Refusal("This run has no finished embedding", run.path.name, "adapter.type=pivotal makes one.", status=NOT_FOUND)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


def get_metadata(run: TheRun, step: int | None = None) -> MetadataAnswer:
    """Every metadata field inside a LoRA, with the file's size and hashes."""
    path = find_lora(run, step)
    with open_file(path) as handle:
        header = read_header(handle, path)
    hashes = file_hashes(path, header.data_start)
    known = next((known for known, file in lora_files(run) if file == path), None)
    return MetadataAnswer(
        name=path.name,
        size=header.size,
        step=known,
        sha256=hashes.whole,
        autov3=hashes.autov3,
        metadata=dict(sorted(header.metadata.items())),
    )


def get_config(run: TheRun) -> PlainTextResponse:
    """The run's complete settings as TOML, itself a valid recipe."""
    return PlainTextResponse(run.config.read_text(encoding="utf-8"), media_type="application/toml")


def get_log(run: TheRun) -> LogAnswer:
    """The last 200 lines that the process said."""
    return LogAnswer(lines=tail(run.log))


def answer_run(standing: Standing) -> RunAnswer:
    """Where a run stands, as it is sent."""
    progress, address = standing.progress, f"/api/runs/{quote(standing.id, safe='')}"
    sample = Path(progress.sample).name
    files = [
        FileAnswer(
            step=step,
            name=path.name,
            size=size,
            url=f"{address}/download" + ("" if step is None else f"?step={step}"),
        )
        for step, path in lora_files(standing.run)
        if (size := _size(path)) is not None
    ]
    beside = standing.run.embedding
    vectors = _size(beside) if beside else None
    return RunAnswer(
        id=standing.id,
        project=standing.project,
        state=standing.state,
        sentence=standing.sentence,
        phase=progress.phase,
        phase_words=PHASES.get(progress.phase, progress.phase),
        detail=progress.detail,
        done=progress.done,
        total=progress.total,
        step=progress.step,
        steps=progress.steps,
        seconds_left=progress.left_now() if standing.is_at_work else None,
        seconds_per_step=progress.seconds_per_step,
        loss=progress.loss,
        held_out_loss=progress.held_out_loss,
        memory=progress.memory,
        device=progress.device,
        asked=standing.asked,
        can=standing.can,
        saved_step=standing.saved_step,
        warnings=progress.warnings,
        sample=f"{address}/samples/{quote(sample, safe='')}" if sample else "",
        files=files,
        embedding=EmbeddingAnswer(name=beside.name, size=vectors, url=f"{address}/embedding") if beside and vectors else None,
    )


def _size(path: Path) -> int | None:
    """Bytes of a file; None when it has gone since it was listed, as while its run is deleted."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("GET", "/runs", get_runs),
    ("GET", "/runs/{run_id}/status", get_status),
    ("POST", "/runs/{run_id}/stop", _asks("stop")),
    ("POST", "/runs/{run_id}/pause", _asks("pause")),
    ("POST", "/runs/{run_id}/sample-now", _asks("sample-now")),
    ("POST", "/runs/{run_id}/save-now", _asks("save-now")),
    ("POST", "/runs/{run_id}/resume", post_resume),
    ("POST", "/runs/{run_id}/resume-anyway", post_resume_anyway),
    ("GET", "/runs/{run_id}/report", get_report),
    ("DELETE", "/runs/{run_id}", delete_run),
    ("GET", "/runs/{run_id}/samples/{name}", get_sample),
    ("GET", "/runs/{run_id}/download", get_download),
    ("GET", "/runs/{run_id}/embedding", get_embedding),
    ("GET", "/runs/{run_id}/metadata", get_metadata),
    ("GET", "/runs/{run_id}/config", get_config),
    ("GET", "/runs/{run_id}/log", get_log),
)
