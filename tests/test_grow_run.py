"""Runs of a LoRA that grows: which layers do, a resume over a growth, the file's ranks in diffusers, what a run's end says."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from app.progress import Progress, in_a_sentence
from tests.command_line import TINY, impasto, read_events, result_of
from tests.tiny_runs import exported, tiny_training
from trainers import events
from trainers import train as loop
from trainers.adapters.grow import rank_in_use
from trainers.checks import check_pictures
from trainers.console import in_words
from trainers.eight_bit import Blocks, blocks_of, keep_zeros
from trainers.export import export_adapter
from trainers.formats import read_adapter
from trainers.optimizers.adamw8bit import AdamW8bitSettings
from trainers.recovery import StateKeeper, go_back, remember
from trainers.run_folder import RunFolder
from trainers.setup import Training
from trainers.train import update
from trainers.training_state import load_state
from trainers.turns import turn_if_due
from trainers.verify import verify

GROW = (
    *("adapter.rank=6", "adapter.rank_schedule=grow", "adapter.grow_from=2", "adapter.grow_every=3", "adapter.alpha=3"),
    "optimizer.learning_rate=1e-2",
)


def ranks(training: Training) -> dict[str, int]:
    return {name: rank_in_use(factors) for name, factors in training.flat.views.items()}


def in_use(training: Training) -> bool:
    """Whether all that lies beyond the ranks in use is zero, in the weights and in the optimizer's running means."""
    kept, states, found = [training.flat.weights], training.optimizer.state.values(), ranks(training)
    for name in ("exp_avg", "exp_avg_sq"):
        kept += [torch.cat([state[name].flatten() for state in states])] if any(name in state for state in states) else []
    beyond = [
        part
        for flat in kept
        for name, factors in training.flat.split(flat).items()
        for part in (factors["down"][found[name] :], factors["up"][:, found[name] :])
    ]
    return not any(bool(part.any()) for part in beyond)


def test_what_is_not_in_use_stays_zero_and_ranks_rise_up_to_the_most(start: Any) -> None:
    training, seen = start(*GROW, "optimizer.weight_decay=0.1"), []
    for _ in range(11):
        seen.append(set(ranks(training).values()))
        update(training)
        assert in_use(training)
    assert seen[:4] == [{2}] * 4 and max(seen[4]) == 4 and max(seen[7]) == 6 and max(max(each) for each in seen) == 6


def test_a_growth_moves_the_loss_by_nothing(start: Any) -> None:
    """The first update of a period meets the loss that the run would have had without a growth."""
    grows, stays = start(*GROW), start(*GROW, "adapter.grow_every=1000")
    for _ in range(3):
        assert update(grows) == update(stays)
    (loss, norm), (other, other_norm) = update(grows), update(stays)
    assert max(ranks(grows).values()) == 4 and set(ranks(stays).values()) == {2}
    assert loss == other and norm > other_norm  # the new ranks learn


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy"])
def test_a_look_after_which_no_layer_grows_leaves_the_optimizer_alone(
    start: Any, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose running means have a form of their own, as in 8 bits."""
    rate = "optimizer.learning_rate=" + ("1" if optimizer == "prodigy" else "1e-2")
    training = start(*GROW[:-1], rate, f"optimizer.type={optimizer}", "adapter.grow_above=0.999")
    for _ in range(3):
        update(training)
    if optimizer == "adamw":
        monkeypatch.setattr(type(training.config.optimizer), "moments", {})
    before = copy.deepcopy(training.optimizer.state_dict())
    turn_if_due(training)
    after = training.optimizer.state_dict()
    assert training.turned == 1 and set(ranks(training).values()) == {2}
    assert str(after["param_groups"]) == str(before["param_groups"]) and after["state"]
    for number, state in before["state"].items():
        assert all(
            torch.equal(torch.as_tensor(after["state"][number][key]), torch.as_tensor(own)) for key, own in state.items()
        )


def packed(mean: torch.Tensor, levels: torch.Tensor) -> Blocks:
    zero = torch.full(mean.shape, int((levels == 0).nonzero()[0]), dtype=torch.uint8)
    blocks = Blocks(zero, levels, torch.zeros(-(-len(mean) // 256)))
    for place, new in blocks.pairs(mean):
        place.copy_(new)
    return blocks


def test_a_block_that_gets_another_largest_keeps_its_zeros() -> None:
    """bitsandbytes leaves any code in a block of zeros: 0 / 0 has no nearest level."""
    blocks = Blocks(torch.zeros(256, dtype=torch.uint8), torch.arange(-127, 128) / 127, torch.zeros(1))
    new = torch.zeros(256)
    new[::4] = 0.5
    for place, value in blocks.pairs(new):
        place.copy_(value)
    assert torch.allclose(blocks.mean(), new, atol=1e-3)


def test_means_in_eight_bits_are_kept_to_the_byte_but_for_the_new_ranks(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same look with the running means of AdamW in float32, and packed as bitsandbytes has them."""
    levels = {"1": torch.arange(-127, 128) / 127, "2": (torch.arange(256) / 255) ** 3}
    small, plain = start(*GROW), start(*GROW)
    for training in (small, plain):
        for _ in range(3):
            update(training)
    before = {}
    for (number, own), wide in zip(small.optimizer.state_dict()["state"].items(), plain.optimizer.state.values(), strict=True):
        parameter = small.optimizer.param_groups[number]["params"][0]
        state: dict[str, Any] = {"step": own["step"]}
        for which, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            blocks = packed(own[name], levels[which])
            assert (blocks.mean() - own[name]).abs().max() <= 0.012 * own[name].abs().max()
            state |= {f"state{which}": blocks.codes, f"qmap{which}": blocks.levels, f"absmax{which}": blocks.largest}
            wide[name].copy_(blocks.mean())
            before[number, which] = blocks.codes.clone(), blocks.mean()
        small.optimizer.state[parameter] = state
    turn_if_due(plain)
    for name in ("moments", "blocks"):
        monkeypatch.setattr(type(small.config.optimizer), name, getattr(AdamW8bitSettings, name))
    turn_if_due(small)
    assert torch.equal(small.flat.weights, plain.flat.weights) and max(ranks(small).values()) == 4
    grown = 0
    for number, wide in enumerate(plain.optimizer.state.values()):
        state = small.optimizer.state[small.optimizer.param_groups[number]["params"][0]]
        for which, name in (("1", "exp_avg"), ("2", "exp_avg_sq")):
            (codes, old), found = before[number, which], blocks_of(state, f"state{which}")
            assert found is not None
            same = wide[name] == old
            assert torch.equal(found.codes[same], codes[same]) and torch.equal(found.mean()[same], old[same])
            most = found.largest.repeat_interleave(256)[: len(old)]
            wanted = torch.minimum(wide[name], most)[~same]
            assert bool(((found.mean()[~same] - wanted).abs() <= 0.007 * most[~same]).all())
            grown += int((~same).sum())
    assert grown > 1000


def test_a_weight_of_zero_without_a_gradient_stays_zero_where_the_optimizer_would_move_it() -> None:
    weights = [torch.nn.Parameter(torch.tensor([0.0, 0.0, 1.0])) for _ in range(2)]
    for weight, careful in zip(weights, (False, True), strict=True):
        optimizer = torch.optim.AdamW([weight], lr=0.1)
        if careful:
            keep_zeros(optimizer)
        for gradient in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0]):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
            optimizer.state[weight]["exp_avg"][0] = 1e-3  # as a zero is rounded in 8 bits
    (plain, kept) = (weight.detach() for weight in weights)
    assert plain[0] != 0 and kept[0] == 0 and torch.equal(plain[1:], kept[1:])


def test_it_grows_with_means_in_eight_bits(start: Any) -> None:
    pytest.importorskip("bitsandbytes")
    words = (*GROW, "optimizer.type=adamw8bit", 'adapter.targets=["attention", "convolutions"]')
    grows, stays = start(*words), start(*words, "adapter.grow_every=1000")
    for _ in range(4):
        assert update(grows)[0] == update(stays)[0]
    assert max(ranks(grows).values()) == 4
    assert any("absmax2" in state for state in grows.optimizer.state.values())
    assert {int(state["step"]) for state in grows.optimizer.state.values()} == {4}, "it goes on"
    for _ in range(4):
        update(grows)
    assert max(ranks(grows).values()) == 6 and in_use(grows)


def test_a_run_that_ends_before_the_first_look_is_told(start: Any) -> None:
    training = start(*GROW, "adapter.grow_every=50", "train.steps=50")
    scan: Any = SimpleNamespace(problems=[])

    def told(data: Any) -> list[str]:
        return [one.where for one in check_pictures(training.config, training.model.facts, scan, data)]

    assert "adapter.grow_every" in told(training.data)
    assert "adapter.grow_every" not in told(start(*GROW, "train.steps=51").data)


def test_it_trains_with_components_of_its_rank_dropped(start: Any) -> None:
    training = start(*GROW, "adapter.rank_dropout=0.3")
    for _ in range(4):
        update(training)
    assert max(ranks(training).values()) == 4 and in_use(training)


def test_only_layers_that_learn_grow(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start(*GROW)
    still = next(name for name in training.flat.views if name.endswith("to_v"))
    fill = loop.fill_gradient

    def without(given: Training) -> tuple[float, float]:
        told = fill(given)
        for _, place, _ in given.flat.shapes[still].values():
            given.flat.gradient[place] = 0
        return told

    monkeypatch.setattr(loop, "fill_gradient", without)
    for _ in range(7):
        update(training)
    found = ranks(training)
    assert found[still] == 2 and sum(rank > 2 for rank in found.values()) > len(found) / 2
    assert exported(training).modules[still].rank == 2


@pytest.mark.parametrize(("saved", "optimizer"), [(2, "adamw"), (3, "adamw"), (5, "adamw"), (3, "adafactor"), (4, "prodigy")])
def test_a_resume_over_a_growth_gives_the_same_bits(start: Any, tmp_path: Path, saved: int, optimizer: str) -> None:
    """Saved before a growth, right before one, and after it."""
    fast = "optimizer.growth=1000" if optimizer == "prodigy" else "optimizer.learning_rate=1e-2"
    settings = (*GROW[:-1], f"optimizer.type={optimizer}", fast)
    unbroken, run = start(*settings), RunFolder(tmp_path / "run")
    for _ in range(saved):
        update(unbroken)
    StateKeeper(run, unbroken, None).save()
    resumed = start(*settings)
    StateKeeper(run, resumed, load_state(run))
    assert ranks(resumed) == ranks(unbroken)
    for _ in range(5):
        assert update(resumed) == update(unbroken)
    assert torch.equal(resumed.flat.weights, unbroken.flat.weights) and max(ranks(resumed).values()) > 2
    assert in_use(resumed)


def test_a_run_that_goes_back_takes_its_ranks_back(start: Any) -> None:
    training = start(*GROW)
    update(training)
    training.good = None
    remember(training)
    before = training.flat.weights.clone()
    for _ in range(4):
        update(training)
    assert max(ranks(training).values()) == 4
    go_back(training, loop.DivergedError("broken"))
    assert torch.equal(training.flat.weights, before) and set(ranks(training).values()) == {2}
    for _ in range(4):
        update(training)
    assert max(ranks(training).values()) == 4  # the growth is done again


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_the_file_has_each_layer_at_its_own_rank_and_diffusers_reads_it_all(
    form: str, tiny_base: Path, pictures: Path, tmp_path: Path
) -> None:
    more = ("text_encoder.learning_rate=0.01", "text_encoder.rank=4", f"output.form={form}", "output.dtype=fp32")
    training = tiny_training(tiny_base, pictures, tmp_path / "run", *GROW, *more)
    for number, name in enumerate(training.flat.views):  # every third layer uses one rank alone, and stays
        if number % 3 == 0:
            with torch.no_grad():
                training.flat.views[name]["down"][1] = training.flat.views[name]["down"][0]
    for _ in range(7):
        update(training)
    found, held = ranks(training), exported(training)
    assert len(set(found.values())) > 1 and {name: module.rank for name, module in held.modules.items()} == found
    assert {round(module.scale, 6) for name, module in held.modules.items() if name.startswith("unet")} == {0.5}
    path = tmp_path / "x.safetensors"
    export_adapter(path, held, training.config, {})
    file = read_adapter(path, held.modules)
    assert {name: module.rank for name, module in file.modules.items()} == found
    for name, module in file.modules.items():
        torch.testing.assert_close(module.delta(), held.modules[name].delta(), rtol=1e-5, atol=1e-8)
    training.take_out()
    proof = verify(training.model, path, held.modules, "a cat")
    assert proof.problems == () and proof.read_by_diffusers == proof.read_here == len(found)
    assert proof.pixel_difference is not None and proof.pixel_difference <= 1


def test_a_runs_end_says_how_much_of_its_ranks_it_uses(
    pictures: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for setting in GROW for word in ("--set", setting)]
    assert impasto("train", pictures, "-o", tmp_path / "run", "--base", tiny_base, *TINY, *words, "--steps", 5) == 0
    told = read_events(tmp_path / "run")[-1]["ranks"]
    assert told.startswith("The LoRA uses ") and "would keep 99 % of it. Its layers have ranks " in told
    assert told in " ".join(capsys.readouterr().out.split())
    assert impasto("inspect", result_of(tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert told.removeprefix("The LoRA uses ").partition(". Its")[0].partition("; ")[2] in said and "rank_schedule" in said


def test_a_recorded_step_goes_on_with_the_new_ranks(start: Any) -> None:
    """Recorded after its eighth batch, at rank 2: the growth that follows is part of what it does again."""
    settings = (*GROW, "adapter.grow_every=10", "train.batch_size=6")
    recorded, plain = start(*settings), start(*settings, "train.recording=off")
    for _ in range(13):
        assert update(recorded) == update(plain)
    assert torch.equal(recorded.flat.weights, plain.flat.weights) and max(ranks(recorded).values()) == 4
    assert recorded.runner._recorded


def test_the_terminal_and_the_window_say_it_at_a_runs_end(tmp_path: Path) -> None:
    said = "The LoRA uses 8.1 of 16 ranks; rank 11 would keep 99 % of it."
    event = events.Finished(step=10, path="a.safetensors", seconds=9.0, proof="It is read alike.", ranks=said)
    assert in_words(event, RunFolder(tmp_path)).splitlines()[1:] == [said, "It is read alike."]
    progress = Progress()
    progress.apply({"type": event.type, **vars(event)})
    assert in_a_sentence("finished", progress, 0).endswith(f". {said} It is read alike.")
