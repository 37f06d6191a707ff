"""The protocol: interleaved rounds, ratios round by round, no verdict from a restless machine. Times are injected."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from trainers.bench.bench import conclude
from trainers.bench.cases import find_case
from trainers.bench.report import judge
from trainers.bench.rounds import WARM_UP, Rounds, Spread, Took, run_rounds
from trainers.errors import SettingError


class Clock:
    """Goes on only when a step says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, seconds: Iterator[float]) -> Callable[[int], object]:
        def run(number: int) -> float:
            self.now += next(seconds)
            return 1000.0  # a loss, which is not a time

        return run


def test_every_round_has_every_contestant_in_turn_and_the_first_rounds_do_not_count() -> None:
    ran: list[tuple[str, int]] = []
    steps = {name: lambda number, name=name: ran.append((name, number)) for name in "ab"}
    found = run_rounds(steps, 3)
    assert ran == [(name, number) for number in range(WARM_UP + 3) for name in "ab"]
    assert {name: len(seconds.values) for name, seconds in found.seconds.items()} == {"a": 3, "b": 3}
    assert len(found.loads) == 1 + WARM_UP + 3


def test_a_steps_seconds_are_what_the_clock_says_unless_it_says_so_itself() -> None:
    clock = Clock()
    steps = {"clock": clock.step(iter([9, 9, 1, 2, 3])), "own": lambda number: Took(0.5)}
    found = run_rounds(steps, 3, clock=clock, load=lambda: 0.0)
    assert found.seconds["clock"].values == (1, 2, 3)
    assert found.seconds["own"].values == (0.5, 0.5, 0.5)


def test_a_ratio_is_taken_round_by_round() -> None:
    rounds = Rounds({"a": Spread((1.0, 10.0, 3.0)), "b": Spread((2.0, 5.0, 3.0))}, (0.0,))
    assert rounds.ratio("a", "b").values == (0.5, 2.0, 1.0)
    assert rounds.ratio("a", "b").median == 1.0


@pytest.mark.parametrize(
    ("seconds", "loads", "doubts"),
    [
        ((1.0, 1.1, 1.2), (0.5, 2.3), 0),
        ((1.0, 1.1, 1.4), (0.5, 2.0), 1),
        ((1.0, 1.0, 1.0), (2.1, 2.1), 1),
        ((1.0, 1.0, 1.0), (0.1, 2.6), 1),
        ((1.0, 1.1, 1.4), (2.1, 2.0), 2),
    ],
)
def test_spread_and_load_leave_doubts(seconds: tuple[float, ...], loads: tuple[float, ...], doubts: int) -> None:
    assert len(Rounds({"a": Spread(seconds)}, loads).doubts(cores=2)) == doubts


def facts(ratio: float, doubts: list[str]) -> dict[str, object]:
    case = find_case("sd15-256")
    name = "reference fp32 / project fp32"
    ratios = {name: judge(name, ratio, case), "reference fp32 / limit fp32": judge("", 1.49, case)}
    agreement = {"fp32": {"project": [1.0], "reference": [1.0], "worst": 0.0, "tolerance": 1e-4, "holds": True}}
    return {"case": case.name, "ratios": ratios, "agreement": agreement, "remarks": [], "doubts": doubts}


@pytest.mark.parametrize(("ratio", "verdict"), [(2.5, True), (2.0, True), (1.9, False)])
def test_the_verdict_is_whether_every_goal_is_met(ratio: float, verdict: bool) -> None:
    found = facts(ratio, [])
    conclude(found)
    assert found["verdict"] is verdict


def test_a_restless_machine_gives_no_verdict_and_says_why() -> None:
    found = facts(2.5, ["a spreads by 80%"])
    conclude(found)
    assert found["verdict"] is None
    assert "no verdict: a spreads by 80%" in found["remarks"]


def test_losses_that_differ_spoil_the_verdict() -> None:
    found = facts(2.5, [])
    found["agreement"]["fp32"] |= {"worst": 0.1, "holds": False}  # type: ignore[index]
    conclude(found)
    assert found["verdict"] is False
    assert any("DO NOT AGREE" in remark for remark in found["remarks"])  # type: ignore[attr-defined]


def test_a_reference_that_is_not_the_usual_loop_is_told() -> None:
    found = facts(2.5, [])
    found["ratios"]["reference fp32 / limit fp32"]["ratio"] = 2.0  # type: ignore[index]
    conclude(found)
    assert any("reference is off" in remark for remark in found["remarks"])  # type: ignore[attr-defined]


def test_an_unknown_case_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(SettingError, match="sd15-256"):
        find_case("sd3")
