"""The recipe's form: every setting, with the limits that the settings themselves have."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.form import describe_settings
from tests.app_client import make_client, ok
from trainers.config import TrainConfig, build_config, known_settings
from trainers.errors import SettingError
from trainers.presets import list_presets
from trainers.settings import merge

NUMBERS = [one for one in describe_settings() if one.kind in ("whole", "number")]


def nested(name: str, value: object) -> dict[str, dict[str, object]]:
    group, last = name.split(".")
    return {group: {last: value}}


def test_every_setting_of_the_default_optimizer_and_more_is_there_with_help() -> None:
    described = {one.name for one in describe_settings()}
    assert set(known_settings()) == described
    assert all(one.help and one.label for one in describe_settings())


@pytest.mark.parametrize("one", NUMBERS, ids=lambda one: one.name)
def test_a_limit_in_the_form_is_a_limit_of_the_setting(one: object) -> None:
    setting = NUMBERS[NUMBERS.index(one)]  # type: ignore[arg-type]
    wrong = [
        value
        for value in (
            None if setting.least is None else setting.least - 1,
            None if setting.most is None else setting.most * 2 + 1,
            setting.above,
            setting.below,
        )
        if value is not None
    ]
    for value in wrong:
        with pytest.raises(SettingError):
            build_config(nested(setting.name, int(value) if setting.kind == "whole" else value))


def test_a_choice_in_the_form_is_one_that_the_setting_takes() -> None:
    for one in describe_settings():
        for choice in one.choices:
            value = [choice] if one.kind == "choices" else choice
            assert build_config(nested(one.name, value))


def test_unset_is_offered_only_where_it_is_taken() -> None:
    base = TrainConfig().model_dump(mode="json")
    for one in describe_settings():
        if one.optional and one.name.split(".")[-1] in base[one.name.split(".")[0]]:
            assert build_config(merge(base, nested(one.name, None)))


def test_the_route_tells_settings_presets_and_the_bases_used_so_far(tmp_path: Path) -> None:
    client = make_client(tmp_path)
    made = ok(client.post("/api/projects", json={"name": "One"}))["id"]
    ok(client.patch(f"/api/projects/{made}", json={"recipe": {"base": {"model": "someone/model"}}}))
    told = ok(client.get("/api/settings"))
    assert told["bases"] == ["pocket", "someone/model"]
    assert [one["name"] for one in told["presets"]] == list_presets()
    assert all(one["summary"] for one in told["presets"])
    assert {one["name"] for one in told["presets"] if one["family"] == "sdxl"} == {
        name for name in list_presets() if name.startswith("sdxl_")
    }
