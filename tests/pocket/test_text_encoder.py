"""The text-encoder stage on 30 made-up pictures; neither MiniLM nor the picture judge is needed."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from assets.pocket.build import targets, text_encoder
from assets.pocket.build.pictures import Picture
from assets.pocket.build.stage import Budget
from trainers.families.vocabulary import write_words

TOKENIZER = Path(__file__).parents[2] / "assets" / "pocket" / "tokenizer"
LABELS = ("cat", "dog", "red apple", "castle", "boat", "owl", "lamp", "tree", "key", "tent")
PICTURES = [
    Picture(f"{style}/{label}.webp", style, label, ("thing", f"{label} tag"), "objects", label, "MIT")
    for style in ("noto", "twemoji", "fluent flat")
    for label in LABELS
]


def see(work: Path, base_set: Path, pictures: Sequence[Picture]) -> torch.Tensor:
    """Features that depend on the label alone."""
    rows = torch.randn(len(LABELS), 1280, generator=torch.Generator().manual_seed(0))
    return rows[[LABELS.index(picture.label) for picture in pictures]]


def embed(work: Path, texts: Sequence[str], batch: int = 256) -> torch.Tensor:
    return functional.normalize(torch.randn(len(texts), 384, generator=torch.Generator().manual_seed(len(texts))), dim=1)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(targets, "see", see)
    monkeypatch.setattr(targets, "embed", embed)
    shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    write_words(tmp_path / "tokenizer")
    return tmp_path


def test_architecture_is_the_shipped_one() -> None:
    shipped = text_encoder.CLIPTextConfig.from_pretrained(TOKENIZER.parent / "text_encoder").to_dict()
    made = text_encoder.new_text_encoder()
    told = made.config.to_dict()
    differ = {name for name in shipped if shipped[name] != told.get(name)}
    assert differ <= {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
    assert round(sum(weight.numel() for weight in made.parameters()) / 1e6, 1) == 11.3


def test_tiny_run_finishes_resumes_and_goes_on(work: Path) -> None:
    def run(folder: str, steps: int, start: text_encoder.CLIPTextModel | None = None) -> text_encoder.CLIPTextModel:
        budget = Budget(steps=steps)
        return text_encoder.train_text_encoder(work / folder, work, PICTURES, budget, start, table="random", batch=12)

    trained = run("text", 3)
    tokens = targets.load_tokenizer(work)(
        ["a cat, noto style"], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    states = trained(tokens).last_hidden_state
    assert states.shape == (1, 77, 192) and bool(states.isfinite().all())
    again = run("text", 3)
    assert all(torch.equal(one, two) for one, two in zip(trained.parameters(), again.parameters(), strict=True))
    before = trained.get_input_embeddings().weight.detach().clone()
    moved = run("more", 1, trained).get_input_embeddings().weight.detach() - before
    assert 0 < float(moved.abs().max()) < 0.01


def test_minilm_table_and_vectors(work: Path) -> None:
    tokenizer = targets.load_tokenizer(work)
    known = targets.gather(work, work, work, PICTURES, tokenizer, "minilm")
    assert {"elephant", "teapot"} < set(known.words) and len(known.words) > 20_000
    assert known.sentence_vectors.shape == (len(known.texts) + len(known.words), 384)
    assert set(known.texts) == {*LABELS, "thing", *(f"{label} tag" for label in LABELS)}
    table = targets.start_table(work, work, tokenizer, "minilm")
    assert table.shape == (49408, 192)
    assert float(table.pow(2).mean().sqrt()) == pytest.approx(0.35, rel=1e-3)
    drawn = text_encoder.draw_batch(known, 200, torch.Generator().manual_seed(0))
    assert len(drawn.captions) == len(drawn.styles) == len(drawn.sentences) == 200 and len(drawn.pictures) == 100
    for words, style in zip(drawn.captions, drawn.styles.tolist(), strict=True):
        assert words.endswith(f", {known.styles[style]} style") if style >= 0 else not words.endswith("noto style")


def test_strings_of_tokens(work: Path) -> None:
    tokenizer = targets.load_tokenizer(work)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    strings = targets.token_strings(tokenizer)
    assert len(strings) == 49408 and strings[2368] == "cat" and strings[49407] == "<|endoftext|>"


def test_kept_rows_are_made_once_for_the_same_names(tmp_path: Path) -> None:
    made = []

    def make() -> torch.Tensor:
        made.append(1)
        return torch.eye(2)

    for names in (["a", "b"], ["a", "b"], ["a", "c"]):
        assert torch.equal(targets.kept(tmp_path / "rows.pt", names, make), torch.eye(2))
    assert len(made) == 2


def test_end_tokens_take_places_of_their_own() -> None:
    first = torch.tensor([3, 10, 22, 23] * 10)
    positions = text_encoder.spread_positions(first, torch.Generator().manual_seed(0))
    assert positions.shape == (40, 24)
    assert bool((positions.diff(dim=1) > 0).all()) and int(positions.max()) == 76
    for row, end in zip(positions, first.tolist(), strict=True):
        assert row[: end + 1].tolist() == list(range(end + 1))


def test_same_subject_is_no_counter_example() -> None:
    shared = text_encoder.subjects_shared(["cat", "dog", "cat"])
    assert shared.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
