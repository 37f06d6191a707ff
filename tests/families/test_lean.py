"""A training imports the models it needs and no more, and what was left out is all there once it is used."""

from __future__ import annotations

import json
from pathlib import Path

from tests.command_line import TINY, run_fresh
from trainers.run_folder import RunFolder

_TRAIN = """
import json, sys
from trainers.cli import cli, run_cli
code = run_cli(cli, sys.argv[1:])
print(json.dumps([code, list(sys.modules)]))
"""
_COMPILE = """
import json, torch
from trainers.families.lean import library
library()
apart = torch.compiler.disable(lambda x: x + 1)
parameter = torch.nn.Parameter(torch.ones(3))
parameter.grad = torch.ones(3)
optimizer = torch.optim.AdamW([parameter])
optimizer.step()
import diffusers, sys
from diffusers.models.attention import BasicTransformerBlock
early = "torch._dynamo.eval_frame" in sys.modules
block, states = BasicTransformerBlock(8, 2, 4), torch.randn(1, 4, 8)
same = torch.equal(torch.compile(block, backend="eager")(states), block(states))
marked = id(BasicTransformerBlock) in torch._dynamo.trace_rules._allowed_callable_ids
breaks = torch._dynamo.explain(lambda x: apart(x * 2) * 3)(states).graph_break_count
optimizer.step()
kind = type(sys.modules["torch._dynamo"]).__name__
print(json.dumps([early, same, marked, breaks, torch._dynamo.eval_frame.__name__, kind]))
"""
_SUBMODULE = """
import json
from trainers.families.lean import library
library()
from torch._dynamo.backends.registry import list_backends
import sys, torch._dynamo.backends.registry as registry
print(json.dumps(["eager" in list_backends(()), registry.__spec__.loader.__class__.__name__]))
"""
_REST = """
import json
from trainers.families.lean import library
library()
import diffusers, diffusers.hooks, diffusers.models.autoencoders, diffusers.models.unets
tiny = diffusers.models.autoencoders.AutoencoderTiny
import diffusers.loaders.lora_base as lora_base, torch
before = isinstance(torch.nn.Linear(2, 2), lora_base.BaseTunerLayer)
import peft
from peft.tuners.lora import Linear
adapted = Linear(torch.nn.Linear(2, 2), "a", config=peft.LoraConfig(), r=2)
print(json.dumps([
    diffusers.AutoencoderTiny is tiny, diffusers.AutoencoderKL is library().vae,
    diffusers.models.unets.UNet2DConditionModel is library().denoiser, callable(diffusers.hooks.apply_layerwise_casting),
    isinstance(adapted, lora_base.BaseTunerLayer), not before, not isinstance(torch.nn.Linear(2, 2), lora_base.BaseTunerLayer),
    hasattr(diffusers.models.autoencoders, "__path__"), not hasattr(diffusers.models.unets, "no_such_name"),
]))
"""


def test_a_training_loads_no_compiler_no_peft_and_no_other_models(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    code, loaded = run_fresh(_TRAIN, "train", pictures, "-o", tmp_path / "run", "--base", tiny_base, *TINY, "--steps", 2)
    assert code == 0
    unwanted = (*("peft", "gradio", "fastapi", "datasets", "torchvision"), *("torch._inductor", "torch._dynamo.eval_frame"))
    assert [name for name in unwanted if name in loaded] == []
    assert [name for name in loaded if name.startswith("diffusers.models.") and ("flux" in name or "tiny" in name)] == []
    assert "diffusers.models.unets.unet_2d_condition" in loaded and "transformers.models.clip.modeling_clip" in loaded


def test_torch_compiles_as_ever_and_knows_what_it_was_told_while_it_waited() -> None:
    early, same, marked, breaks, name, kind = run_fresh(_COMPILE)
    assert not early and same and marked and breaks > 0
    assert (name, kind) == ("torch._dynamo.eval_frame", "module")


def test_a_part_of_the_compiler_is_imported_after_the_whole() -> None:
    assert run_fresh(_SUBMODULE) == [True, "SourceFileLoader"]


def test_what_was_left_out_is_the_library_s_own_once_it_is_asked_for() -> None:
    assert all(run_fresh(_REST))


def test_the_proof_has_peft_after_all(pictures: Path, tiny_base: Path, tmp_path: Path) -> None:
    words = (*TINY, "--steps", 2, "--set", "output.verify=true")
    code, loaded = run_fresh(_TRAIN, "train", pictures, "-o", tmp_path / "run", "--base", tiny_base, *words)
    assert code == 0 and "peft.peft_model" in loaded
    assert json.loads(RunFolder(tmp_path / "run").proof.read_text(encoding="utf-8"))["ok"]


def test_no_tensors_spread_over_machines_and_no_algebra_are_imported() -> None:
    code = """
import json, sys
from trainers.families.lean import library
library()
from transformers.utils import is_torch_distributed_available
print(json.dumps([*(name in sys.modules for name in ("torch.distributed.tensor", "sympy")), is_torch_distributed_available()]))
"""
    *loaded, available = run_fresh(code)
    assert loaded == [False, False] and available, "transformers is told the truth again afterwards"
