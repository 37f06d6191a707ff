"""Routing: 20 prompts with a trigger word bring the right LoRA in, 20 without bring none."""

from __future__ import annotations

import pytest

from trainers.routing_words import Routed, route, trigger_words

TRIGGERS = {
    "zorbo": ("zorbo",),
    "blackcut": ("blackcut", "black cut, flat"),
    "cat": ("mina the cat",),
    "cat at night": ("mina the cat at night",),
    "ink": ("sumi-e ink", "inkwash"),
    "woman": ("ohwx woman",),
    "käthe": ("KätheStil",),
    "number": ("sks2",),
    "round": ("zorbo (round)",),
}
WITH = [
    ("zorbo", "zorbo"),
    ("a photo of Zorbo on a table", "zorbo"),
    ("ZORBO, red", "zorbo"),
    ("(zorbo:1.2), a hat", "zorbo"),
    ("zorbo's hat", "zorbo"),
    ("a hat\nzorbo", "zorbo"),
    ("blackcut, a wolf", "blackcut"),
    ("a wolf, [blackcut]", "blackcut"),
    ("a wolf, black cut, flat", "blackcut"),
    ("a BLACK  CUT, flat wolf", "blackcut"),
    ("mina the cat sleeps", "cat"),
    ("mina the cat at noon", "cat"),
    ("Mina The Cat At Night, rain", "cat at night"),
    ("sumi-e ink of a crane", "ink"),
    ("a crane, inkwash", "ink"),
    ("ohwx woman in a park", "woman"),
    ("an ohwx\twoman", "woman"),
    ("ein Haus, käthestil", "käthe"),
    ("sks2!", "number"),
    ("a zorbo (round) toy", "round"),
]
WITHOUT = [
    "",
    "a photo of a table",
    "zorbos",
    "azorbo",
    "non-zorbo",
    "zorbo-like",
    "zorbo_style",
    "zorb o",
    "black cut",
    "a black wolf, cut, flat",
    "black-cut",
    "mina, the cat",
    "the cat mina",
    "mina the caterpillar",
    "sumi e ink",
    "ink",
    "inkwashed",
    "woman",
    "sks",
    "sks23",
]


@pytest.mark.parametrize(("prompt", "key"), WITH)
def test_a_prompt_with_a_trigger_word_brings_its_lora_in(prompt: str, key: str) -> None:
    assert [routed.key for routed in route(prompt, TRIGGERS)] == [key]


@pytest.mark.parametrize("prompt", WITHOUT)
def test_a_prompt_without_brings_none_in(prompt: str) -> None:
    assert route(prompt, TRIGGERS) == []


def test_there_are_twenty_of_each() -> None:
    assert len(WITH) == len(WITHOUT) == 20


def test_several_come_in_the_order_of_the_prompt_each_once() -> None:
    found = route("a Zorbo and an ohwx woman, zorbo", TRIGGERS)
    assert found == [Routed("zorbo", "Zorbo"), Routed("woman", "ohwx woman")]


def test_of_loras_with_one_word_the_first_comes() -> None:
    assert route("zorbo", {"new": ("Zorbo",), "old": ("zorbo",)}) == [Routed("new", "zorbo")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ()),
        ("zorbo", ("zorbo",)),
        ('zorbo, "black cut, flat" , a', ("black cut, flat", "zorbo")),
        ("  two  words ; zorbo, zorbo", ("two words", "zorbo")),
        ('"", ,“in quotes”', ("in quotes",)),
        ("?!, x", ()),
    ],
)
def test_trigger_words_are_parted_by_commas_and_quotes_keep_a_phrase(text: str, words: tuple[str, ...]) -> None:
    assert trigger_words(text) == words
