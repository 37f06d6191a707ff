"""The order of examples: what is held out, what an epoch shows, and finding any step without the ones before it."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import pytest

from trainers.dataset.plan import MAX_EPOCH, StepPlan, epoch_steps, split_holdout, steps_per_epoch
from trainers.errors import DatasetError, SettingError

SQUARE, WIDE, TALL = (64, 64), (32, 128), (128, 32)
BUCKETS = (SQUARE,) * 7 + (WIDE,) * 3 + (TALL,)
REPEATS = (1, 1, 2, 1, 1, 3, 1, 1, 2, 1, 1)


def contents(count: int, start: int = 0) -> list[str]:
    return [hashlib.sha256(str(number).encode()).hexdigest() for number in range(start, start + count)]


@pytest.mark.parametrize(
    ("count", "share", "held"), [(24, 0.1, 2), (100, 0.25, 25), (5, 0.1, 1), (4, 0.5, 0), (24, 0.0, 0), (0, 0.1, 0)]
)
def test_the_held_out_share_is_kept_aside(count: int, share: float, held: int) -> None:
    train, holdout = split_holdout(contents(count), share, seed=0)
    assert len(holdout) == held
    assert sorted(train + holdout) == list(range(count))
    assert train == sorted(train)


def test_the_choice_depends_on_content_and_seed_not_on_order() -> None:
    items = contents(40)
    held = {items[index] for index in split_holdout(items, 0.2, seed=1)[1]}
    backwards = items[::-1]
    assert {backwards[index] for index in split_holdout(backwards, 0.2, seed=1)[1]} == held
    assert {items[index] for index in split_holdout(items, 0.2, seed=2)[1]} != held


def test_a_picture_added_moves_at_most_one_other() -> None:
    items = contents(50)
    held = {items[index] for index in split_holdout(items, 0.1, seed=0)[1]}
    for extra in contents(20, start=1000):
        more = [*items, extra]
        now = {more[index] for index in split_holdout(more, 0.1, seed=0)[1]}
        assert len((held ^ now) - {extra}) <= 1


def test_equal_pictures_stay_on_one_side() -> None:
    items = contents(10) * 2
    for seed in range(10):
        train, holdout = split_holdout(items, 0.3, seed)
        assert not {items[index] for index in train} & {items[index] for index in holdout}


def test_copies_of_few_pictures_are_not_held_out() -> None:
    assert split_holdout(contents(2) * 10, 0.3, 0)[1] == []


def test_an_epoch_shows_every_example_as_often_as_it_repeats() -> None:
    steps = epoch_steps(BUCKETS, REPEATS, 2, seed=0, epoch=0)
    assert Counter(index for step in steps for index in step) == Counter(dict(enumerate(REPEATS)))


def test_a_step_holds_one_bucket_and_at_most_its_size() -> None:
    for step in epoch_steps(BUCKETS, REPEATS, 3, seed=0, epoch=0):
        assert len({BUCKETS[index] for index in step}) == 1
        assert 1 <= len(step) <= 3


@pytest.mark.parametrize("per_step", [1, 2, 3, 4, 7, 100])
def test_the_last_incomplete_step_of_each_bucket_is_kept(per_step: int) -> None:
    steps = epoch_steps(BUCKETS, REPEATS, per_step, seed=5, epoch=2)
    assert len(steps) == steps_per_epoch(BUCKETS, REPEATS, per_step)
    assert sum(map(len, steps)) == sum(REPEATS)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_steps(BUCKETS, REPEATS, 2, seed=0, epoch=0)
    assert epoch_steps(BUCKETS, REPEATS, 2, seed=0, epoch=0) == first
    assert epoch_steps(BUCKETS, REPEATS, 2, seed=0, epoch=1) != first
    assert epoch_steps(BUCKETS, REPEATS, 2, seed=1, epoch=0) != first


def test_the_order_is_the_same_on_every_machine_and_python() -> None:
    # Written down once: a change here changes every resumed run.
    assert epoch_steps((SQUARE,) * 4 + (WIDE,) * 2, (1,) * 6, 2, seed=0, epoch=0) == [(5, 4), (2, 1), (0, 3)]


def test_buckets_take_turns_within_an_epoch() -> None:
    buckets = (SQUARE,) * 30 + (WIDE,) * 30
    order = [buckets[step[0]] for step in epoch_steps(buckets, (1,) * 60, 2, seed=0, epoch=0)]
    assert sum(a != b for a, b in itertools.pairwise(order)) > 5


def test_any_step_is_found_without_those_before_it() -> None:
    plan = StepPlan(BUCKETS, REPEATS, per_step=2, seed=9)
    forwards = [plan.indices(step) for step in range(3 * plan.steps_per_epoch)]
    assert forwards == [step for epoch in range(3) for step in epoch_steps(BUCKETS, REPEATS, 2, 9, epoch)]
    fresh = StepPlan(BUCKETS, REPEATS, per_step=2, seed=9)
    assert [fresh.indices(step) for step in reversed(range(len(forwards)))] == forwards[::-1]


def test_only_one_epoch_is_kept_in_memory() -> None:
    plan = StepPlan(BUCKETS, REPEATS, per_step=2, seed=9)
    for step in range(0, 50 * plan.steps_per_epoch, 3):
        plan.indices(step)
    assert len(plan._epochs) == 1


def test_a_step_knows_its_epoch() -> None:
    plan = StepPlan(BUCKETS, REPEATS, per_step=2, seed=0)
    assert [plan.epoch_of(step) for step in (0, plan.steps_per_epoch - 1, plan.steps_per_epoch)] == [0, 0, 1]
    with pytest.raises(ValueError, match="below 0"):
        plan.indices(-1)


def test_a_plan_that_looked_at_a_step_equals_one_that_did_not() -> None:
    used, fresh = (StepPlan(BUCKETS, REPEATS, per_step=2, seed=0) for _ in range(2))
    used.indices(3)
    assert used == fresh


def test_a_plan_without_pictures_says_what_to_do() -> None:
    with pytest.raises(DatasetError, match="No picture is left to train on"):
        StepPlan((), (), per_step=1, seed=0)


def test_an_epoch_too_long_for_memory_is_refused_by_the_setting() -> None:
    with pytest.raises(SettingError, match=r"dataset\.repeats"):
        StepPlan((SQUARE,) * 2, (MAX_EPOCH, 1), per_step=1, seed=0)


@pytest.mark.parametrize(("repeats", "per_step"), [((1,), 1), ((1, 0), 1), ((1, 1), 0)])
def test_numbers_that_do_not_fit_together_are_refused(repeats: tuple[int, ...], per_step: int) -> None:
    with pytest.raises(ValueError, match="per example"):
        epoch_steps((SQUARE, SQUARE), repeats, per_step, seed=0, epoch=0)
