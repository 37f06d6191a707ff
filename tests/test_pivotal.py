"""A trigger word's own vectors: the tokens that name them, their start, gradients, and what of the base stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_runs import exported, shake, tiny_config, tiny_training, update_from
from trainers.adapters.pivotal import LENGTH, VECTORS, lengths_of, start_vectors, vectors_of
from trainers.adapters.vectors import VectorTable
from trainers.checks import check_settings
from trainers.config import build_config, write_config
from trainers.embeddings import plan_vectors, trained_vectors
from trainers.engine import make_plain
from trainers.errors import SettingError
from trainers.families import recognise_base
from trainers.generate import Picture, RenderSettings, render_latents
from trainers.presets import resolve
from trainers.setup import Training

PIVOTAL = ("adapter.type=pivotal", "dataset.trigger=zwx")
ALONE = (*PIVOTAL, "adapter.lora=false")
WITH_TEXT = (*PIVOTAL, "text_encoder.learning_rate=0.01")
CAPTIONS = (
    "zwx, a red apple",
    "a photo of ZWX's house, zwx-like (zwx)",
    "zwx2 azwx zwxzwx zwx_",  # none of them is the word
    "a cat",
    "",
    "zwx",
    " ".join(["apple"] * 74 + ["zwx", "pear"]),  # cut between its vectors
    " ".join(["apple"] * 100 + ["zwx"]),
    "été zwx、本 1zwx zwx 2",
)
_STATES = {"hidden": (1, 77, 80), "pooled": (1, 48)}
bases = pytest.mark.parametrize("base_name", ["tiny_base", "tiny_sd2_base", "tiny_sdxl_base"])


@pytest.fixture
def training(base_name: str, request: pytest.FixtureRequest, pictures: Path, tmp_path: Path) -> Training:
    """With as many vectors as the trigger has tokens, before the first step."""
    return tiny_training(request.getfixturevalue(base_name), pictures, tmp_path / "run", *PIVOTAL)


@bases
def test_the_word_stands_in_a_prompt_where_its_own_tokens_stood(training: Training) -> None:
    model: Any = training.model
    for part in model.text_encoders:
        own = model.word_tokens(part, "zwx")
        assert len(own) == model.words["zwx"] == 2
        learned = model.token_ids(part, CAPTIONS)
        words, model.words = model.words, {}
        plain = model.token_ids(part, CAPTIONS)
        model.words = words
        assert learned.shape == plain.shape == (len(CAPTIONS), 77)
        assert torch.equal(torch.where(learned < 0, torch.tensor(own)[(-1 - learned).clamp_min(0)], learned), plain)
        assert (learned < 0).sum(1).tolist() == [2, 6, 0, 0, 0, 2, 1, 0, 4]


@pytest.mark.parametrize(
    ("trigger", "caption"), [("straße", "a STRASSE, Straße"), ("İst  x", "İst x, i"), ("(a+b)", "a (A+B) c")]
)
def test_any_trigger_is_found_as_the_captions_have_it(trigger: str, caption: str, start: Any) -> None:
    model = start("adapter.type=pivotal", f"dataset.trigger={trigger}").model
    assert int((model.token_ids("text_encoder", [caption]) < 0).sum()) == 2
    model.words = {"red": 1, "red apple": 2}
    assert [one for one in model.token_ids("text_encoder", ["RED apple, red"])[0].tolist() if one < 0] == [-2, -3, -1]


@bases
def test_step_zero_is_the_base_s_answer_to_the_words_it_starts_from_bit_for_bit(training: Training) -> None:
    model: Any = training.model
    learned = model.encode_captions(CAPTIONS)
    words, model.words = model.words, {}
    plain = model.encode_captions(CAPTIONS)
    model.words = words
    assert torch.equal(learned.hidden_states, plain.hidden_states)
    assert all(torch.equal(learned.extras[name], plain.extras[name]) for name in plain.extras)


def test_a_prompt_s_end_is_found_where_the_encoder_takes_the_highest_number_for_it(
    tiny_sdxl_base: Path, pictures: Path, tmp_path: Path
) -> None:
    model: Any = tiny_training(tiny_sdxl_base, pictures, tmp_path / "run", *PIVOTAL).model
    new = model.encode_captions(CAPTIONS).extras["pooled"]
    (end,) = (one for one in model.text_encoders["text_encoder_2"].modules() if "eos_token_id" in vars(one))
    end.eos_token_id = 2  # as SDXL's own configuration has it
    assert torch.equal(model.encode_captions(CAPTIONS).extras["pooled"], new)


def test_other_start_words_and_other_counts(start: Any) -> None:
    model = start(*PIVOTAL, "adapter.start_words=red apple").model
    with_words = model.encode_captions(["a zwx tree"]).hidden_states
    assert torch.equal(with_words, model.encode_captions(["a red apple tree"]).hidden_states)
    doubled = start(*PIVOTAL, "adapter.start_words=apple").model
    assert torch.equal(
        doubled.encode_captions(["a zwx tree"]).hidden_states, doubled.encode_captions(["a apple apple tree"]).hidden_states
    )
    table = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(start_vectors(table, (5, 1, 0), 1), table[[5, 1, 0]].mean(0, keepdim=True))
    assert torch.equal(start_vectors(table, (5, 1, 0, 2), 2), torch.stack([table[[5, 1]].mean(0), table[[0, 2]].mean(0)]))
    assert torch.equal(start_vectors(table, (5, 1, 0), 7), table[[5, 5, 5, 1, 1, 0, 0]])
    with pytest.raises(SettingError, match="needs a trigger word"):
        start("adapter.type=pivotal")


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "free"])
def test_gradients_are_those_of_finite_differences(keeps: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    frozen = nn.Embedding(7, 5).double().requires_grad_(False)
    table = VectorTable(frozen)
    vectors = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    constants = {LENGTH: lengths_of(vectors) * 1.3} if keeps else {}
    moved = (vectors + 0.3).requires_grad_()
    tokens, mix = (
        torch.tensor([[0, -1, -3, 6], [-2, -2, -1, 3]]),
        torch.randn(2, 4, 5, generator=generator, dtype=torch.float64),
    )

    def answer(own: torch.Tensor) -> torch.Tensor:
        table.words["zwx"] = {VECTORS: own, **constants}
        return (table(tokens) * mix).sin()

    assert torch.autograd.gradcheck(answer, (moved,))
    if keeps:
        assert torch.allclose(lengths_of(vectors_of({VECTORS: moved, **constants})), constants[LENGTH], atol=1e-14)


def test_gradients_come_through_both_text_encoders_as_finite_differences_have_them(
    tiny_sdxl_base: Path, pictures: Path, tmp_path: Path
) -> None:
    training = tiny_training(tiny_sdxl_base, pictures, tmp_path / "run", *ALONE)
    model: Any = training.model
    make_plain(model.parts(), training.undo)
    own = {part: encoder.double().get_input_embeddings() for part, encoder in model.text_encoders.items()}
    words = {part: {name: factor.detach().double() for name, factor in own[part].words["zwx"].items()} for part in own}
    generator = torch.Generator().manual_seed(4)
    mix = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in _STATES.items()}

    def answer() -> torch.Tensor:
        for part, table in own.items():
            table.words["zwx"] = words[part]
        read = model.encode_captions(["a zwx, zwx"])
        return (read.hidden_states * mix["hidden"]).sum() + (read.extras["pooled"] * mix["pooled"]).sum()

    for part, factors in words.items():
        begun = factors[VECTORS]
        factors[VECTORS] = begun.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(answer(), factors[VECTORS])
        way, at = torch.randn(begun.shape, generator=generator, dtype=torch.float64), []
        for move in (1e-5, -1e-5):
            factors[VECTORS] = begun + move * way
            at.append(float(answer()))
        factors[VECTORS] = begun
        assert float((gradient * way).sum()) == pytest.approx((at[0] - at[1]) / 2e-5, rel=1e-6), part


@pytest.mark.parametrize("settings", [PIVOTAL, ALONE, WITH_TEXT], ids=["lora", "alone", "text"])
def test_only_what_learns_moves_and_the_table_stays_to_the_byte(settings: tuple[str, ...], start: Any) -> None:
    training = start(*settings)
    frozen = {
        f"{part}.{name}": parameter.detach().clone()
        for part, module in training.model.parts().items()
        for name, parameter in module.named_parameters()
    }
    before, vectors = training.flat.weights.clone(), training.flat.groups["vectors"]
    table = training.model.parts()["text_encoder"].get_input_embeddings()
    after = update_from(training, 3)
    assert table.weight.shape == (49408, 32)
    assert all(bool(row.any()) for row in (after - before)[vectors].view(2, 32))
    others: dict[tuple[str, ...], set[str]] = {PIVOTAL: {"unet"}, ALONE: set(), WITH_TEXT: {"unet", "text_encoder"}}
    assert set(training.flat.groups) == {"vectors"} | others[settings]
    for part, module in training.model.parts().items():
        assert all(torch.equal(frozen[f"{part}.{name}"], own) for name, own in module.named_parameters())
    (kept,) = trained_vectors(training.flat, after).values()
    (plan,) = plan_vectors(training.config, training.model)
    assert torch.allclose(lengths_of(kept), lengths_of(table.weight[list(plan.tokens)]))
    training.take_out()
    assert training.model.parts()["text_encoder"].get_input_embeddings() is table.frozen and not training.model.words


def test_the_vectors_have_a_rate_of_their_own_and_are_recorded_as_they_are_computed(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = (update_from(start(*ALONE, f"adapter.vectors_learning_rate={rate}"), 1) for rate in (1e-4, 1e-3))
    begun = start(*ALONE).flat.weights
    assert torch.allclose((fast - begun), 10 * (slow - begun), atol=1e-6)
    monkeypatch.setattr("trainers.graph.ON_CPU", 1)
    by_both = [start(*PIVOTAL, "dataset.caption_dropout=0.5", f"train.recording={how}") for how in ("auto", "off")]
    recorded, plain = (update_from(training, 4) for training in by_both)
    assert by_both[0].runner._recorded
    assert torch.allclose(recorded, plain, atol=1e-6)


def test_without_the_word_in_a_caption_nothing_moves(start: Any) -> None:
    training = start(*ALONE, "dataset.caption_dropout=1.0")
    begun = training.flat.weights.clone()
    assert torch.equal(update_from(training, 2), begun)


def test_the_running_mean_is_what_samples_and_files_have(start: Any) -> None:
    training = start(*PIVOTAL, "train.ema=0.9")
    update_from(training, 3)
    (mean,) = trained_vectors(training.flat, training.exported).values()
    (last,) = trained_vectors(training.flat, training.flat.weights).values()
    assert not torch.equal(mean, last)


def test_the_strength_is_the_lora_s_alone(start: Any) -> None:
    training = start(*PIVOTAL, "adapter.keep_length=false")
    shake(training, 0.3)
    how = RenderSettings(32, 32, steps=2, guidance=1.0)

    def drawn(prompt: str, strength: float) -> torch.Tensor:
        return render_latents(training.model, [Picture(prompt, 0, {"trained": strength})], how)

    with_word, without, with_both = drawn("zwx", 0.0), drawn("a cat", 0.0), drawn("zwx", 1.0)
    assert not torch.equal(with_word, with_both)
    training.model.words.clear()
    assert torch.equal(drawn("a cat", 0.0), without) and not torch.equal(drawn("zwx", 0.0), with_word)


def test_the_lora_of_it_is_a_plain_one_and_alone_there_is_none(start: Any) -> None:
    assert {module.kind for module in exported(start(*PIVOTAL)).modules.values()} == {"lora"}
    assert exported(start(*ALONE, "text_encoder.learning_rate=0.01")).modules == {}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("adapter.rank=8", "adapter.rank can say nothing"),
        ('adapter.targets=["feed_forward"]', "adapter.targets"),
        ("adapter.rank_pattern={to_q=4}", "adapter.rank_pattern"),
        ("text_encoder.learning_rate=1e-4", "text_encoder.learning_rate"),
    ],
)
def test_what_is_said_of_a_lora_is_refused_where_none_is_trained(setting: str, said: str, tmp_path: Path) -> None:
    alone = ["adapter.type=pivotal", "adapter.lora=false", "text_encoder.learning_rate=0"]
    with pytest.raises(SettingError, match=said):
        resolve("character", {}, [*alone, setting])
    assert not resolve("character", {}, alone).adapter.changes_layers
    usual = resolve("character", {}).adapter.rank
    assert not resolve("character", {}, [*alone, f"adapter.rank={usual}"]).adapter.changes_layers, "what is so anyhow passes"
    assert resolve("character", {}, [alone[0], setting]).adapter.changes_layers
    own = tmp_path / "own.toml"
    own.write_text(write_config(resolve("character", {}, [alone[0], "adapter.alpha=3", setting])), encoding="utf-8")
    passed = resolve(str(own), {}, alone[1:2])
    assert not passed.adapter.changes_layers and passed.adapter.alpha == 3, "a preset's own settings pass"


def test_what_makes_no_sense_is_refused_in_words(tiny_base: Path, pictures: Path) -> None:
    base = recognise_base(str(tiny_base))

    def told(*settings: str) -> list[tuple[str, str]]:
        config = tiny_config(tiny_base, pictures, "adapter.type=pivotal", *settings)
        return [(one.severity, one.what) for one in check_settings(config, base) if one.where == "dataset.trigger"]

    assert told("dataset.trigger=zwx") == []
    (none,), (path,), (common,) = told(), told("dataset.trigger=a/b"), told("dataset.trigger=Cat")
    assert none[0] == path[0] == "error" and "needs a trigger word" in none[1] and "name a file" in path[1]
    assert common == ("warning", "Cat is a common word, and will mean what is learnt wherever the embedding is used")
    ((grave, like_a_checkpoint),) = told("dataset.trigger=sks-20240101")
    assert grave == "error" and "ends as the embedding of a checkpoint does" in like_a_checkpoint
    assert told("dataset.trigger=sks-2024") == []
    pocket = recognise_base("pocket")  # which ships merges alone
    config = tiny_config(tiny_base, pictures, "adapter.type=pivotal", "dataset.trigger=cat")
    assert any("cat is a common word" in one.what for one in check_settings(config, pocket))
    with pytest.raises(SettingError, match="one rate for all parts"):
        build_config({"adapter": {"type": "pivotal", "vectors_learning_rate": 0.5}, "optimizer": {"type": "prodigy"}})
    with pytest.raises(SettingError, match="start_from"):
        build_config({"adapter": {"type": "pivotal", "start_from": "old.safetensors"}})
    own = build_config({"adapter": {"type": "pivotal"}})
    assert own.text_encoder_rate == 0 and own.learns_text
