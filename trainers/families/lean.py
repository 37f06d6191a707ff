"""The classes of diffusers and transformers that a base is made of, imported without what they drag along.

Their packages import every model they have, peft and torch's compiler, which is most of the time until a first step. Here
such a package waits: its submodules can be imported, and its own code runs, as it stands, once a name is asked of it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Packages that import all models of their kind.
_PACKAGES = ("diffusers.models.autoencoders", "diffusers.models.unets", "diffusers.models.transformers", "diffusers.hooks")
_PEFT = "peft.tuners.tuners_utils"
_COMPILER = "torch._dynamo"
_APART = f"{_COMPILER}._trace_wrapped_higher_order_op"
"""A part of the compiler that transformers imports, and that uses nothing of the rest."""
_lock = threading.RLock()


@dataclass(frozen=True)
class Library:
    """Classes by what they make; Any, as the libraries are hardly typed."""

    denoiser: Any
    vae: Any
    text_config: Any
    text_encoder: Any
    text_encoder_with_projection: Any
    tokenizer: Any
    scheduler: Any


@functools.cache
def library() -> Library:
    """Imports the classes, once."""
    _await_compiler()
    _await_peft()
    for name in _PACKAGES:
        _await(name)
    with _without_sharded_tensors():
        return _import()


def _import() -> Library:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    return Library(
        UNet2DConditionModel, AutoencoderKL, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer,
        DDPMScheduler,
    )  # fmt: skip


@contextlib.contextmanager
def _without_sharded_tensors() -> Iterator[None]:
    """transformers is imported as on a torch that was built without `torch.distributed`, which it allows for.

    It would import tensors that are spread over several machines, and sympy for them; no base is spread here.
    """
    utils = importlib.import_module("transformers.utils")
    modules = (utils, importlib.import_module("transformers.utils.import_utils"))
    asked = getattr(utils, "is_torch_distributed_available", None)
    if asked is None:  # of another version, which imports what it likes
        yield
        return
    for module in modules:
        module.is_torch_distributed_available = lambda: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in modules:
            module.is_torch_distributed_available = asked  # type: ignore[attr-defined]


class _Waiting(types.ModuleType):
    """A package whose code has not run yet. It runs, in this very module, when a name is asked for that is not there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # for which the import system looks
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        with _lock:
            if self.__class__ is _Waiting:
                _run(self)
        return getattr(self, name)


def _run(module: _Waiting) -> None:
    """Makes a waiting package what it would have been without waiting."""
    inside = vars(module)
    module.__class__ = types.ModuleType  # type: ignore[assignment]
    for stand_in in inside.pop("_stand_ins_"):
        del inside[stand_in]
    spec, tell = module.__spec__, inside.pop("_afterwards_")
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except BaseException:
        sys.modules.pop(module.__name__, None)
        raise
    tell(module)


def _await(
    name: str, stand_ins: Mapping[str, Any] | None = None, afterwards: Callable[[Any], object] = lambda module: None
) -> None:
    """Puts a waiting package in the place of one that is not imported yet, with names that do not end its waiting.

    `afterwards` gets the package when its code has run.
    """
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Waiting
    vars(module).update({**(stand_ins or {}), "_stand_ins_": tuple(stand_ins or ()), "_afterwards_": afterwards})
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def _await_peft() -> None:
    """Lets peft wait, too: diffusers asks, in every call of a denoiser, only whether a layer is one of peft's."""
    if "peft" not in sys.modules and importlib.util.find_spec("peft") and _PEFT not in sys.modules:
        sys.modules[_PEFT] = _InPlaceOfPeft(_PEFT)
        sys.meta_path.insert(0, _PeftItself())


class _AsksPeft(type):
    """Answers `isinstance` as peft's base class of adapted layers would."""

    def __instancecheck__(cls, thing: object) -> bool:
        real = sys.modules.get(_PEFT)  # without it nothing can be of its making
        return real is not None and not isinstance(real, _InPlaceOfPeft) and isinstance(thing, real.BaseTunerLayer)


class _TunerLayer(metaclass=_AsksPeft):
    """Stands for peft's class of that name."""


class _InPlaceOfPeft(types.ModuleType):
    """The one module of peft that is asked for; gives way to peft when it is asked for more."""

    BaseTunerLayer = _TunerLayer

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # for which the import system looks
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        importlib.import_module("peft")
        return getattr(importlib.import_module(_PEFT), name)


class _PeftItself(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Takes the stand-in away before any code of peft runs; to be found alone, peft need not run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """peft's, to be loaded by this; None for all others."""
        if name != "peft":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def exec_module(self, module: Any) -> None:
        """Runs peft as if this had never been. It counts on tensors that transformers imports elsewhere."""
        import torch.distributed

        if torch.distributed.is_available():
            importlib.import_module("torch.distributed.tensor")
        if isinstance(sys.modules.get(_PEFT), _InPlaceOfPeft):
            del sys.modules[_PEFT]
        sys.meta_path.remove(self)
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)  # type: ignore[union-attr]


def _await_compiler() -> None:
    """Lets torch's compiler wait: optimizers and models only leave it remarks, which it gets when it is used at last."""
    marked: list[tuple[str, Any]] = []

    def remark(kind: str) -> Callable[[Any], Any]:
        def mark(thing: Any) -> Any:
            marked.append((kind, thing))
            return thing

        return mark

    def tell(compiler: Any) -> None:
        for kind, thing in marked:
            getattr(compiler, kind)(thing)

    kinds = ("allow_in_graph", "assume_constant_result")
    names = {"disable": _disable, "graph_break": lambda msg="": None, **{kind: remark(kind) for kind in kinds}}
    if _COMPILER not in sys.modules:
        _await(_COMPILER, names, tell)
        sys.meta_path.insert(0, _CompilerFirst())


class _CompilerFirst(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs the compiler's waiting package before any submodule of it is imported, of which some rely on it."""

    def __init__(self) -> None:
        self._spec: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """None, for the next finder to look, unless the package has imported the submodule by now."""
        if not name.startswith(f"{_COMPILER}.") or name == _APART:
            return None
        sys.meta_path.remove(self)
        package = sys.modules[_COMPILER]
        with _lock:
            if isinstance(package, _Waiting):
                _run(package)
        return importlib.machinery.ModuleSpec(name, self) if name in sys.modules else None

    def create_module(self, spec: Any) -> Any:
        """The submodule as it has been imported."""
        module = sys.modules[spec.name]
        self._spec = module.__spec__
        return module

    def exec_module(self, module: Any) -> None:
        """Has been done; the import system wrote over the module's own origin."""
        module.__spec__ = self._spec


def _disable(function: Any = None, recursive: bool = True, **how: Any) -> Any:
    """torch._dynamo.disable: the function as it is until there is a compiler, then kept away from it."""
    if function is None:
        return functools.partial(_disable, recursive=recursive, **how)

    @functools.wraps(function)
    def run(*given: Any, **named: Any) -> Any:
        compiler = sys.modules.get(_COMPILER)
        if compiler is None or isinstance(compiler, _Waiting):
            return function(*given, **named)
        return kept_away(compiler)(*given, **named)

    @functools.cache
    def kept_away(compiler: Any) -> Any:
        return compiler.disable(function, recursive, **how)

    return run
