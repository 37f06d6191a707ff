"""What a file says about its run: complete, deterministic, and nothing about the person's disk."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from trainers.errors import AdapterFileError, SettingError
from trainers.formats.metadata import RunFacts, build_metadata

FACTS = RunFacts(
    output_name="blackcut",
    base_name="pocket",
    rank=16,
    alpha=8.0,
    resolution=(64, 64),
    started_at=1_700_000_000.5,
    seed=7,
    steps=300,
    base_hash_old="01234567",
    base_hash_new="ab" * 32,
    text_encoder_rank=16,
    text_encoder_alpha=8.0,
    network_args={"targets": ["attention"]},
    buckets=((64, 64, 20), (96, 32, 4)),
    dataset_dirs={"10_cats": (10, 24)},
    tag_frequency=None,
    learning_rate=1e-3,
    text_encoder_learning_rate=3e-4,
    optimizer="adamw",
    scheduler="cosine",
    epochs=13,
    batch_size=4,
    accumulation=2,
    num_images=24,
    noise_offset=0.05,
    min_snr_gamma=5.0,
    precision="fp32",
    trigger="blackcut style",
    title="Black cut",
    author="A. Person",
    description="Ink on white.",
)
MINIMUM = [
    "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args",
    "ss_output_name", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_training_started_at",
    "ss_bucket_info", "ss_dataset_dirs", "ss_resolution", "ss_learning_rate", "ss_num_train_images", "ss_num_epochs",
    "ss_steps", "ss_max_train_steps", "ss_optimizer", "ss_lr_scheduler", "ss_seed", "ss_session_id", "ss_training_comment",
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.title",
    "modelspec.resolution", "modelspec.description", "modelspec.author", "modelspec.date", "modelspec.trigger_phrase",
    "modelspec.prediction_type",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)


def changed(**values: Any) -> dict[str, str]:
    return build_metadata(dataclasses.replace(FACTS, **values))


def test_every_name_that_readers_ask_for_is_there_as_text() -> None:
    metadata = build_metadata(FACTS)
    assert [key for key in MINIMUM if key not in metadata] == []
    assert all(isinstance(value, str) and value for value in metadata.values())


def test_values_have_the_spelling_that_readers_parse() -> None:
    metadata = build_metadata(FACTS)
    assert metadata["ss_v2"] == "False" and metadata["ss_base_model_version"] == "sd_v1"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("16", "8.0")
    assert float(metadata["ss_training_started_at"]) == 1_700_000_000.5
    assert metadata["ss_resolution"] == "(64, 64)" and metadata["modelspec.resolution"] == "64x64"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.date"] == "2023-11-14T22:13:20Z"
    assert json.loads(metadata["ss_dataset_dirs"]) == {"10_cats": {"n_repeats": 10, "img_count": 24}}
    assert json.loads(metadata["ss_bucket_info"])["buckets"]["1"] == {"resolution": [96, 32], "count": 4}
    assert json.loads(metadata["ss_network_args"]) == {"targets": ["attention"]}


def test_parts_that_differ_are_dynamic() -> None:
    metadata = changed(text_encoder_rank=4, text_encoder_alpha=2.0)
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"


def test_a_frozen_text_encoder_leaves_the_unets_numbers() -> None:
    assert changed(text_encoder_rank=None, text_encoder_alpha=None)["ss_network_dim"] == "16"


def test_what_is_not_known_is_left_out() -> None:
    metadata = changed(clip_skip=None, author="", tag_frequency=None, min_snr_gamma=None)
    absent = ("ss_clip_skip", "modelspec.author", "ss_tag_frequency", "ss_min_snr_gamma", "modelspec.usage_hint")
    assert not set(absent) & metadata.keys()


def test_caption_words_are_written_only_when_given() -> None:
    metadata = changed(tag_frequency={"10_cats": {"a cat": 3}})
    assert json.loads(metadata["ss_tag_frequency"]) == {"10_cats": {"a cat": 3}}


def test_folders_of_the_disk_are_cut_off() -> None:
    metadata = changed(
        output_name="/home/me/secret/blackcut",
        base_name="C:\\Users\\me\\secret\\base",
        dataset_dirs={"/home/me/secret/10_cats/": (10, 2), "/srv/secret/10_cats": (10, 3)},
        tag_frequency={"/home/me/secret/10_cats": {"a": 1}, "/srv/secret/10_cats": {"a": 2}},
    )
    assert "secret" not in json.dumps(metadata)
    assert metadata["ss_sd_model_name"] == "base" and metadata["ss_output_name"] == "blackcut"
    assert sum(folder["img_count"] for folder in json.loads(metadata["ss_dataset_dirs"]).values()) == 5
    assert json.loads(metadata["ss_tag_frequency"]) == {"10_cats": {"a": 3}}


def test_source_date_epoch_goes_before_the_runs_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    first, second = changed(started_at=1.0), changed(started_at=2e9)
    assert list(first.items()) == list(second.items())
    assert first["ss_training_started_at"] == "1600000000.0" and first["modelspec.date"] == "2020-09-13T12:26:40Z"


def test_a_source_date_epoch_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(SettingError, match="yesterday"):
        build_metadata(FACTS)


def test_v_prediction_and_clip_skip_are_said_where_people_read_them() -> None:
    metadata = changed(prediction_type="v_prediction", clip_skip=2)
    assert metadata["modelspec.prediction_type"] == "v" and metadata["ss_clip_skip"] == "2"
    assert "v-prediction" in metadata["modelspec.usage_hint"] and "clip skip 2" in metadata["modelspec.usage_hint"]


def test_each_base_version_has_its_architecture() -> None:
    assert changed(base_version="sd_v2")["modelspec.architecture"] == "stable-diffusion-v2-512/lora"
    v_prediction = changed(base_version="sd_v2", prediction_type="v_prediction")
    assert v_prediction["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert changed(base_version="sdxl_base_v1-0")["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    with pytest.raises(AdapterFileError, match="no modelspec architecture"):
        changed(base_version="sd_v9")


def test_every_family_has_a_version_that_programs_know_it_by() -> None:
    from trainers.families import FAMILIES
    from trainers.formats.metadata import ARCHITECTURES

    assert {family.base_version for family in FAMILIES.values()} <= ARCHITECTURES.keys()
