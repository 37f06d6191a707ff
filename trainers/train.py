"""train(run, emit): the stages of a run, the training step, and the one loop that serves every model."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from trainers import events
from trainers.allocator import give_back_at_once, keep_for_the_next_step
from trainers.condition import Condition
from trainers.config import read_config
from trainers.dataset.batches import Batch
from trainers.errors import DivergedError, is_out_of_memory
from trainers.families.base import DiffusionModel
from trainers.fit import ReloadBase, can_fit, fit_before_first_step, make_room
from trainers.memory import step_in_log
from trainers.objective import mean_of_squares
from trainers.outputs import Outputs, exported_weights
from trainers.recovery import StateKeeper, go_back, remember
from trainers.run_folder import RunFolder, home_folder
from trainers.schedule import rate_factor
from trainers.setup import Training, set_up
from trainers.training_state import load_state
from trainers.turns import rate_after_turn, turn_if_due
from trainers.watchdog import Watchdog


def training_step(model: DiffusionModel, batch: Batch, condition: Condition, min_snr_gamma: float | None) -> torch.Tensor:
    """The loss of one micro-batch: its share of the step's weighted mean of squared errors, a scalar."""
    # ------------------------------------------------------------------------------------------------
    objective = model.objective
    noisy_latents = objective.add_noise(batch.latents, batch.noise, batch.timesteps)
    prediction = model.predict(noisy_latents, batch.timesteps, condition(batch.captions), batch.framing)
    target = objective.target(batch.latents, batch.noise, batch.timesteps)
    weight = objective.weight(batch.timesteps, min_snr_gamma) * batch.weights
    return mean_of_squares(prediction, target, weight, batch.mask).sum()
    # ------------------------------------------------------------------------------------------------


def update(training: Training) -> tuple[float, float]:
    """One optimizer update. Returns the step's loss and the gradient's norm before clipping.

    Raises DivergedError, with the weights untouched, when either is not finite.
    """
    flat, settings = training.flat, training.config.train
    turn_if_due(training)
    loss, norm = fill_gradient(training)
    while math.isfinite(loss) and not math.isfinite(norm) and not training.loss_scale.lowest:
        training.loss_scale = training.loss_scale.lowered()
        loss, norm = fill_gradient(training)  # of the same pictures, noises and timesteps
    if not math.isfinite(norm) or not math.isfinite(loss):
        raise DivergedError(
            f"The {'gradient' if math.isfinite(loss) else 'loss'} is no longer a finite number",
            where=f"step {training.step + 1}",
            hint="Train anew with a lower optimizer.learning_rate or train.precision=fp32.",
        )
    if settings.max_grad_norm and norm > settings.max_grad_norm:
        flat.gradient.mul_(settings.max_grad_norm / norm)
    for group in training.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor_now(training)
    training.optimizer.step()
    if training.mean is not None:
        # A young mean follows faster, so that it is not held back by the start: min(decay, (1 + n) / (10 + n)).
        decay = min(settings.ema, (1 + training.step) / (10 + training.step))
        training.mean.lerp_(flat.weights, 1 - decay)
    training.loss_scale = training.loss_scale.after_good_step()
    training.step += 1
    return loss, norm


def fill_gradient(training: Training) -> tuple[float, float]:
    """Puts the gradient of the step that comes next into the flat buffer. Returns its loss and the gradient's norm."""
    gradient, device, scale = training.flat.gradient, training.device, training.loss_scale.factor
    gradient.zero_()
    loss, factor = torch.zeros((), device=device.device), torch.ones((), device=device.device) * scale
    for batch in training.batches.step(training.step):
        loss += training.runner(partial(learn, training), batch, training.condition, factor)
    training.batches.make_ready(training.step + 1)
    loss, asked = device.sum_step(gradient, loss, training.wish)
    if scale != 1:
        gradient.div_(scale)
    # The one time in a step that the host waits for a GPU.
    found, norm, asked_for = torch.stack([loss, gradient.norm(), asked]).tolist()
    training.asked = int(asked_for)
    return found, norm


def learn(training: Training, batch: Batch, condition: Condition, factor: torch.Tensor) -> torch.Tensor:
    """Adds the gradient of a micro-batch, times the loss scale `factor` (), to the flat buffer. Returns its loss ()."""
    with training.flat.working(training.device.dtype, batch.keys):
        part = training_step(training.model, batch, condition, training.config.train.min_snr_gamma or None)
        (part * factor).backward()  # type: ignore[no-untyped-call]
    return part.detach()


def factor_now(training: Training) -> float:
    """The schedule's factor on the learning rates of the next update, lower once the run had to go back."""
    schedule = training.config.schedule
    factor = rate_factor(schedule.type, schedule.warmup, schedule.floor, training.step, training.data.steps)
    return factor * training.recovery.rate * rate_after_turn(training)


@torch.no_grad()
def held_out_loss(training: Training) -> float | None:
    """Loss on the pictures kept aside, always with the same noise and timesteps, unweighted by SNR; None without any."""
    if not training.data.held_out:
        return None
    batches = training.batches.held_out(training.data.held_out)
    with exported_weights(training):
        parts = [training_step(training.model, batch, training.condition, None) for batch in batches]
    mine = float(torch.stack(parts).sum()) if parts else 0.0
    total, counted = training.device.sum_numbers(mine, len(parts))
    return total if counted else None  # none of them can be read any more


def train(run: RunFolder, emit: events.Emit, interrupted: Callable[[], bool] = lambda: False, force: bool = False) -> bool:
    """Trains the run to its end, or goes on with it from its last training state. Returns False when it was stopped.

    Every file it makes lies in the run folder. With `force` it goes on although base, pictures or settings have changed.
    Raises TrainingError in words when it cannot go on; the last training state and checkpoints then stay as they are.
    """
    while True:
        give_back_at_once()
        with contextlib.suppress(ReloadBase):  # it is saved
            return train_from_state(run, emit, interrupted, force)
        gc.collect()  # the base, which is about to be read again, hangs in a circle


def train_from_state(run: RunFolder, emit: events.Emit, interrupted: Callable[[], bool], force: bool) -> bool:
    """As `train`. Raises ReloadBase, the state saved, when memory is short enough for the base to be read anew as int8."""

    def unwanted() -> bool:
        return interrupted() or run.stop_asked() is not None

    def warn(message: str) -> None:
        emit(events.Warned(message=message))

    before = load_state(run)
    training = set_up(read_config(run.config), run, emit, unwanted, home_folder() / "cache" / "latents", before, force)
    keeper = StateKeeper(run, training, before)
    if before is None and training.config.adapter.start_from:
        keeper.save()  # from here on the file that it starts from is not asked for again
    outputs = Outputs(run, training, emit, keeper.began)
    outputs.start()
    hold_pictures(training, emit)
    outputs.begin_training()
    steps = training.data.steps
    loss_due = training.config.samples.every or max(1, steps // 20)

    def flagged(name: str) -> bool:
        return training.device.is_main and run.take_flag(name)

    outputs.make_up()
    listen(training, run, interrupted)
    if before is None:
        with saved_if_reloaded(keeper):
            fit_before_first_step(training, warn, partial(loss_of, training))
    with Watchdog(warn).watching() as watchdog:
        while training.step < steps:
            if asked := stop_asked(training):
                keeper.save()
                outputs.stop(asked)
                return False
            remember(training)
            if training.step in training.recovery.skipped:
                training.step += 1
                continue
            tick, factor, encoding = time.monotonic(), factor_now(training), training.batches.seconds_encoding
            try:
                with watchdog.step(training.step + 1, training.median), saved_if_reloaded(keeper), step_in_log(training):
                    loss, norm = update_within_memory(training, warn)
            except DivergedError as error:
                recover(training, error, keeper, outputs)
                continue
            keep_for_the_next_step()
            training.durations.append(time.monotonic() - tick - (training.batches.seconds_encoding - encoding))
            due = training.step % loss_due == 0 or training.step == steps
            outputs.tell(loss, norm, factor, held_out_loss(training) if due else None)
            if outputs.sample_is_due() or flagged("sample-now"):
                keeper.save_if_older(outputs.sample_seconds)  # as nothing is saved while pictures are drawn
                outputs.sample()
            keep = flagged("save-now")
            if keep or outputs.checkpoint_is_due():
                outputs.checkpoint()
            keeper.save() if keep else keeper.save_if_older(training.median)  # as it would be after one more step
    keeper.save()
    outputs.finish(keeper.seconds)
    return True


def update_within_memory(training: Training, warn: Callable[[str], None]) -> tuple[float, float]:
    """As `update`; where memory is too small for it something is done about that, and told, and it is done again."""
    while True:
        try:
            return update(training)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not can_fit(training):
                raise
        # Out of the handler, as the error holds the frames, and they hold what has to go.
        make_room(training, warn, "Memory is too small for a step")


def loss_of(training: Training, batch: Batch) -> torch.Tensor:
    """A batch's loss, with its graph."""
    with training.flat.working(training.device.dtype, batch.keys):
        return training_step(training.model, batch, training.condition, training.config.train.min_snr_gamma or None)


@contextlib.contextmanager
def saved_if_reloaded(keeper: StateKeeper) -> Iterator[None]:
    """Saves the state on the way out with ReloadBase, which then goes on from it."""
    try:
        yield
    except ReloadBase:
        keeper.save()
        raise


def listen(training: Training, run: RunFolder, interrupted: Callable[[], bool]) -> None:
    """From now on every process hears its own signals, and the first one the file `stop`, so that no other takes it away.

    A wish is 0 to go on, 1 to pause, 2 to stop: in a sum over processes 1 is a pause, and more a stop.
    """

    def wish() -> int:
        asked = "stop" if interrupted() else run.stop_asked() if training.device.is_main else None
        return {None: 0, "pause": 1, "stop": 2}[asked]

    training.wish = wish
    training.asked = int(training.device.sum_numbers(wish())[0])


def stop_asked(training: Training) -> str | None:
    """ "stop", "pause" or None, the same in all processes: several go by what they were asked for during the last step."""
    wish = training.asked if training.device.count > 1 else training.wish()
    return (None, "pause", "stop")[min(wish, 2)]


def hold_pictures(training: Training, emit: events.Emit) -> None:
    """Makes sure of the pictures before the first step; each is encoded in the first step that wants it."""
    total = training.batches.hold_pictures(training.data.held_out)
    if total:
        emit(events.Stage(name="cache", detail=f"{total} pictures are encoded as they are first shown"))


def recover(training: Training, error: DivergedError, keeper: StateKeeper, outputs: Outputs) -> None:
    """Goes back to the last good state, saves it and tells. Raises DivergedError, that state exported, when in vain."""
    broke = training.step
    try:
        go_back(training, error)
    except DivergedError:
        keeper.save()
        path = outputs.checkpoint()
        times = training.recovery.attempts
        kept = f"The adapter of step {training.step}, the last good one, is kept as {path}"
        after = f", although the run went back {times} times with a lower rate" if times else ""
        raise DivergedError(f"{error.what}{after}", error.where, f"{kept}. {error.hint}") from error
    keeper.save()  # first, so that a run killed now does not go back again
    outputs.tell_recovery(error.what, broke)
