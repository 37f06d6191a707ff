"""The contestants do the same work: same layers, same losses; the limit is the engine without adapters; counts repeat."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainers.bench.agreement import agree
from trainers.bench.cases import find_case
from trainers.bench.contestants import Group, Plan, build_group, reference_for
from trainers.bench.counts import count
from trainers.bench.forms import FORMS, Adapted
from trainers.bench.growth import without_adapters
from trainers.bench.progress import Progress
from trainers.bench.synthetic import synthetic_base, synthetic_pictures
from trainers.graph import Eager
from trainers.train import fill_gradient


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("bench")
    case = find_case("smallest")
    images = synthetic_pictures(folder / "pictures", 3, case.resolution)
    return Plan(case, synthetic_base(case.base, folder), images, folder / "work", full=True)


@pytest.fixture(scope="module")
def group(plan: Plan) -> Group:
    return build_group(plan, "fp32", Progress())


def test_all_contestants_run(group: Group) -> None:
    assert list(group.steps) == [
        *("project fp32", "reference fp32", "reference-cached fp32", "limit fp32", "floor fp32", "full fp32"),
    ]
    for step in group.steps.values():
        step(0)
    assert group.floor.rates


def test_reference_and_project_adapt_the_same_layers(group: Group) -> None:
    theirs = {
        name.partition(".lora_A")[0] for name, _ in group.references["reference fp32"].unet.named_modules() if "lora_A" in name
    }
    assert theirs == {plan.name.removeprefix("unet.") for plan in group.project.plans}


def test_reference_and_project_agree_and_a_difference_would_be_found(group: Group) -> None:
    reference = group.references["reference fp32"]
    sound = agree(group.project, reference, "fp32")
    assert sound.holds
    assert len(set(sound.project)) == 10
    for module in reference.unet.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] *= 2
    broken = agree(group.project, reference, "fp32")
    for module in reference.unet.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] /= 2
    assert broken.worst > 100 * sound.worst


def test_counts_repeat_and_stand_in_their_order(group: Group) -> None:
    limit, project, reference = (group.counts[f"{name} fp32"] for name in ("limit", "project", "reference"))
    assert limit.operations < project.operations <= reference.operations
    assert 0.9 < group.counts["limit fp32, on no device"].flops / limit.flops <= 1.0
    assert limit.flops < reference.flops
    assert project.flops <= reference.flops
    assert project.saved_bytes <= reference.saved_bytes
    group.project.runner = Eager()  # what is recorded keeps nothing
    again = count(lambda: fill_gradient(group.project))
    assert (again.operations, again.flops) == (project.operations, project.flops)
    assert again.saved_bytes == pytest.approx(project.saved_bytes, rel=0.03), "a place in memory may be used twice"


def test_the_engine_without_adapters_does_the_work_of_the_limit(group: Group) -> None:
    group.project.runner = Eager()
    step = without_adapters(group.project)
    weights = group.project.flat.weights.clone()
    step(0)
    # Not all of it: some layers the engine computes with less arithmetic.
    assert 0.9 < count(lambda: step(0)).flops / group.counts["limit fp32"].flops <= 1.0
    assert float(group.project.flat.gradient.abs().max()) == 0.0
    fill_gradient(group.project)
    assert float(group.project.flat.gradient.abs().max()) > 0.0
    assert torch.equal(weights, group.project.flat.weights)


def test_a_batch_of_the_reference_is_encoded_together_and_kept_alike(plan: Plan, group: Group) -> None:
    parts = group.references["reference fp32"].parts
    plain, cached = (reference_for(replace(plan, batch=2), parts, cached) for cached in (False, True))
    moments, text, _ = plain.encode([1, 2])
    assert [one.shape[0] for one in (moments, text)] == [2, 2]
    for row, index in enumerate((1, 2)):
        kept_moments, kept_text, _ = cached.keep(index)
        torch.testing.assert_close(moments[row : row + 1], kept_moments, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(text[row : row + 1], kept_text, rtol=1e-4, atol=1e-5)
    for reference in (plain, cached):
        assert reference.inputs(0).latents.shape[0] == 2
        assert 0 < reference.step(0) < 100


def test_both_forms_of_adapters_compute_the_same(group: Group) -> None:
    reference = group.references["reference fp32"]
    inputs, parts = group.limit.inputs, reference.parts
    losses = []
    for form in FORMS:
        torch.manual_seed(0)
        adapted = Adapted(parts, [plan.name.removeprefix("unet.") for plan in group.project.plans], form, 4, inputs)
        for name, parameter in adapted.unet.named_parameters():
            if name.endswith(".up"):
                torch.nn.init.normal_(parameter, std=0.1)
        losses.append(float(adapted.loss().detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[0] / float(group.limit.loss().detach()) - 1) > 1e-3
