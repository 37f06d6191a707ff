"""The drawn picture that a card of the library is shown with: a copy in HOME/loras/.pictures, as the drawn one is soon gone."""

from __future__ import annotations

import threading
from pathlib import Path

from trainers.errors import AdapterFileError
from trainers.files import write_atomically
from trainers.library import FOLDER, PICTURES, Card, change_card, find_card, read_said
from trainers.text import printable

_choosing = threading.Lock()
"""Held from the copy to its name in cards.toml, so that no copy is taken for one that nobody names."""


def choose_picture(home: Path, key: str, name: str, drawn: Path) -> Card:
    """Shows a card with the picture `name` of the folder `drawn`, of which a copy is kept; with "" as before any was chosen.

    The copy shown until now stays until the next choice, so that this one can be undone; what else no card names is deleted.
    Raises AdapterFileError for a key or a picture that is not there.
    """
    if name and (Path(name).name != name or not name.endswith(".png")):
        raise _no_picture(name)
    with _choosing:
        before = find_card(home, key).chosen
        kept = home / FOLDER / PICTURES / name
        if name and not kept.is_file():
            if not (drawn / name).is_file():
                raise _no_picture(name)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, (drawn / name).read_bytes())
        card = change_card(home, key, picture=name)
        # By what was said, not by the cards there are: a card that was removed may be taken back, with its picture.
        named = {said.get("picture") for said in read_said(home).values()} | {before.name if before else ""}
        for copy in (home / FOLDER / PICTURES).glob("*.png"):
            if copy.name not in named:
                copy.unlink(missing_ok=True)
    return card


def _no_picture(name: str) -> AdapterFileError:
    return AdapterFileError("There is no such picture any more", printable(name, 80), "Draw it again.")
