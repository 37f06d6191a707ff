"""How much of their rank the modules of a LoRA file use, as lines of text: one sentence, and a bar for each block."""

from __future__ import annotations

from collections.abc import Sequence

from trainers.adapters.plan import BLOCKS, block_of
from trainers.formats.names import canonical_of
from trainers.formats.ranks import RankSummary, UsedRank, summarise

WIDTH = 24
"""Characters of a bar whose ranks are all used."""


def rank_lines(modules: Sequence[tuple[str, UsedRank | None]], whole: RankSummary | None, family: str) -> list[str]:
    """`modules` by their key prefixes. Empty where nothing is known or changed; what was left out is counted."""
    if whole is None:
        return []
    unknown = sum(used is None for _, used in modules)
    left = f"; {unknown} modules left out" if unknown else ""
    lines = [f"used        {whole.sentence().removeprefix('uses ')} (effective rank, mean of the modules{left})"]
    blocks: dict[str, list[UsedRank | None]] = {}
    for name, used in modules:
        blocks.setdefault(_block(name, family), []).append(used)
    for block in sorted(blocks, key=BLOCKS.index):
        summary = summarise(blocks[block])
        if summary:
            bar = "#" * max(1, round(WIDTH * summary.effective / whole.most))
            lines.append(
                f"  {block:<8}  {bar:.<{WIDTH}}  {summary.effective:.1f} of {summary.most}, rank {summary.keeps} keeps 99 %"
            )
    return lines


def _block(prefix: str, family: str) -> str:
    name = canonical_of(prefix, family if family in ("sd2", "sdxl") else "sd1")
    return "other" if name is None else block_of(name)
