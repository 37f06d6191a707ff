"""TrainConfig: everything a training run is told. Importable without torch; a preset is a part of it as TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from trainers.adapters import AdapterConfig
from trainers.adapters.lora import LoraSettings
from trainers.dataset_settings import DatasetSettings, PriorSettings
from trainers.errors import SettingError
from trainers.families.settings import BaseSettings
from trainers.optimizers import OptimizerConfig
from trainers.optimizers.adamw import AdamWSettings
from trainers.settings import Settings, explain, iterate_fields

Strength = Annotated[float, Field(ge=-4, le=4)]
TextTarget = Literal["attention", "mlp"]


class TextEncoderSettings(Settings):
    """The LoRA on the text encoder."""

    rank: int | None = Field(default=None, ge=1, le=1024)
    """Rank in the text encoder. Unset: the adapter's."""
    alpha: float | None = Field(default=None, gt=0, le=4096)
    """Alpha in the text encoder. Unset: the adapter's; unset there too, it equals the rank."""
    learning_rate: float | None = Field(default=None, ge=0)
    """Learning rate in the text encoder. 0: nothing is injected or exported there. Unset: the optimizer's; 0 for pivotal."""
    targets: tuple[TextTarget, ...] = ("attention", "mlp")
    """Which layers learn: `attention` (q, k, v, out) and `mlp` (fc1, fc2)."""

    @field_validator("targets")
    @classmethod
    def _some_target(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("name at least one target, or set text_encoder.learning_rate to 0")
        return value


class ScheduleSettings(Settings):
    """How the learning rate moves over the run."""

    type: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up: constant, linear or cosine down to the floor."""
    warmup: int = Field(default=0, ge=0, le=100_000)
    """Steps in which the rate rises from zero."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Share of the rate that is left at the end."""


class TrainSettings(Settings):
    """Length, batch, precision and the loss."""

    steps: int | None = Field(default=None, ge=1, le=10_000_000)
    """Optimizer updates. Unset: as many as `train.epochs` asks for."""
    epochs: int = Field(default=10, ge=1, le=100_000)
    """Passes over the pictures, used when `train.steps` is unset."""
    batch_size: int = Field(default=1, ge=1, le=4096)
    """Pictures in one forward and backward pass."""
    accumulation: int = Field(default=1, ge=1, le=4096)
    """Micro-batches added up to one step: the same result as a larger batch, with less memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format that the frozen base computes in. The adapter and its optimizer are always float32."""
    base_weights: Literal["full", "int8", "nf4"] = "full"
    """How the frozen base's weights are kept: in full, in 8 bit, or in 4 bit (NVIDIA, package bitsandbytes). Fewer: slower."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Everything random comes from this number, the step and the picture."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """The gradient is scaled down to this norm. 0: never."""
    min_snr_gamma: float = Field(default=5.0, ge=0, le=1000)
    """Min-SNR weighting of the loss (arXiv 2303.09556). 0: none."""
    noise_offset: float = Field(default=0.0, ge=0, le=1)
    """Adds this much of a constant per channel to the noise, for darker darks and lighter lights."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a running mean of the adapter that is exported instead of its last value. 0: off."""
    recoveries: int = Field(default=3, ge=0, le=100)
    """How often a run may go back to its last good state, at half the rate, when its numbers are not finite."""
    checkpointing: bool = False
    """Gradient checkpointing: less memory, about a third more time."""
    fit: bool = True
    """When memory is too small for a step, save some: checkpointing, fewer pictures at once, an int8 base. Told."""
    compile: Literal["off", "on"] = "off"
    """Have torch.compile fuse repeated blocks: a minute or more at the first start, slower on a CPU, other last digits."""
    recording: Literal["auto", "off"] = "auto"
    """On an NVIDIA GPU, and for a small base on a CPU: record a step of each size once, and do it again as a whole."""
    save_state_seconds: float = Field(default=30.0, ge=0, le=30)
    """Longest time between two training states on disk."""


class SampleSettings(Settings):
    """Sample images drawn while training."""

    every: int = Field(default=100, ge=0)
    """Steps between samples; also drawn at step 0 and at the end. 0: none."""
    prompts: tuple[str, ...] = ()
    """Prompts to draw. None: the first two captions."""
    negative: str = ""
    """What samples should not show."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Noise that every sample starts from, the same at each step so that they can be compared."""
    steps: int = Field(default=12, ge=1, le=200)
    """Sampling steps. 12 show what was learnt; for pictures to keep take 20 and more."""
    guidance: float = Field(default=5.0, ge=0, le=30)
    """How hard the prompt is followed (classifier-free guidance). 1 and below: off."""
    strength: Strength = 1.0
    """Strength of the LoRA in samples."""
    scheduler: str = "dpm++"
    """Sampler: one of `impasto generate --help`."""


class CheckpointSettings(Settings):
    """Exported adapters along the way."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints. 0: only the result."""
    keep: int = Field(default=3, ge=1)
    """How many of the newest checkpoints are kept."""


class OutputSettings(Settings):
    """The file that comes out."""

    name: str = ""
    """File name without ending. Empty: folder, base and rank, as in blackcut-pocket-r16."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Number format of the exported file."""
    form: Literal["kohya", "peft"] = "kohya"
    """Names in the file: `kohya`, which every program reads, or `peft`, diffusers' own, which few others do."""
    kind: Literal["plain", "native"] = "plain"
    """`plain`: a LoRA, which every program reads, whatever was trained; `native`: as it is, a sum of periods as `diff`."""
    most_rank: int = Field(default=64, ge=1, le=1024)
    """Highest rank of a plain file of what has no low rank itself; a lower one is taken where it comes within 1 %."""
    verify: bool = True
    """Read the finished file back, through diffusers too, and compare it with what was trained; a difference is an error."""
    author: str = ""
    """Author written into the file's metadata."""
    description: str = ""
    """Description written into the file's metadata."""
    caption_words: bool = False
    """Write how often each caption part occurs into the file, as some galleries show. It tells your captions to everyone."""

    @field_validator("name")
    @classmethod
    def _stays_in_its_folder(cls, value: str) -> str:
        plain = value.isprintable() and not value.startswith(".") and not set(value) & set('/\\:*?"<>|')
        if not plain or len(value.encode("utf-8", "replace")) > 150:
            raise ValueError('must be a plain file name of at most 150 bytes, without folders or any of / \\ : * ? " < > |')
        return value


class TrainConfig(Settings):
    """A complete training run."""

    base: BaseSettings = BaseSettings()
    dataset: DatasetSettings = DatasetSettings()
    prior: PriorSettings = PriorSettings()
    adapter: AdapterConfig = LoraSettings()
    text_encoder: TextEncoderSettings = TextEncoderSettings()
    optimizer: OptimizerConfig = AdamWSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    train: TrainSettings = TrainSettings()
    samples: SampleSettings = SampleSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    output: OutputSettings = OutputSettings()

    @model_validator(mode="before")
    @classmethod
    def _a_group_without_type_is_the_usual_one(cls, values: Any) -> Any:
        for group, usual in (("optimizer", "adamw"), ("adapter", "lora")):
            given = values.get(group) if isinstance(values, dict) else None
            if isinstance(given, dict) and "type" not in given:
                values = {**values, group: {"type": usual, **given}}
        return values

    @model_validator(mode="after")
    def _text_encoder_rate_fits_the_optimizer(self) -> TrainConfig:
        vectors_rate = getattr(self.adapter, "vectors_learning_rate", None)
        rates = {"text_encoder.learning_rate": self.text_encoder.learning_rate, "adapter.vectors_learning_rate": vectors_rate}
        for name, rate in ((name, rate) for name, rate in rates.items() if rate):
            try:
                self.optimizer.check_rate(rate)
            except ValueError as error:
                raise ValueError(f"{name} = {rate:g}: {error}") from error
            if self.optimizer.one_rate and rate != self.optimizer.learning_rate:
                allowed = "0 or " if name.startswith("text") else ""
                one, why = f"{self.optimizer.learning_rate:g}", f"{self.optimizer.type} finds one rate for all parts"
                raise ValueError(f"{name} = {rate:g} must be {allowed}optimizer.learning_rate = {one}. {why}.")
        return self

    @model_validator(mode="after")
    def _a_mean_of_factors_outlives_no_turn(self) -> TrainConfig:
        every = getattr(self.adapter.trained, "every", 0)
        if self.train.ema and every:
            grows = getattr(self.adapter, "rank_schedule", "fixed") == "grow"
            which = "rank_schedule = grow" if grows else f"type = {self.adapter.type}"
            what = f"train.ema = {self.train.ema:g} must be 0 with adapter.{which}"
            raise ValueError(f"{what}: it would be a running mean of factors that are replaced every {every} steps")
        return self

    @model_validator(mode="after")
    def _rates_of_the_up_side_fit_the_optimizer(self) -> TrainConfig:
        ratio = self.adapter.loraplus_lr_ratio
        if ratio != 1 and self.optimizer.one_rate:
            why = f"{self.optimizer.type} finds one rate for all parts"
            raise ValueError(f"adapter.loraplus_lr_ratio = {ratio:g} must be 1: {why}")
        for rate in {self.optimizer.learning_rate, self.text_encoder_rate} - {0.0}:
            try:
                self.optimizer.check_rate(rate * ratio)
            except ValueError as error:
                what = f"adapter.loraplus_lr_ratio = {ratio:g} makes a learning rate of {rate:g} one of {rate * ratio:g}"
                raise ValueError(f"{what} for the up side: {error}") from error
        return self

    @property
    def text_encoder_rate(self) -> float:
        """The text encoder's learning rate, resolved; 0 means that it is frozen."""
        rate = self.text_encoder.learning_rate
        if rate is None:
            rate = 0.0 if self.adapter.trigger_vectors else self.optimizer.learning_rate
        return rate if self.adapter.changes_layers else 0.0

    @property
    def learns_text(self) -> bool:
        """Whether what the denoiser reads of a caption changes from step to step."""
        return self.text_encoder_rate > 0 or self.adapter.trigger_vectors > 0

    def rate_of(self, group: str) -> float:
        """The learning rate of a group that learns: unet, text_encoder, of either its ups (see adapters.flat), vectors."""
        part, _, side = group.partition(" ")
        usual = self.optimizer.learning_rate
        vectors = getattr(self.adapter, "vectors_learning_rate", None) or (usual if self.optimizer.one_rate else 1e-3)
        rate = {"unet": usual, "text_encoder": self.text_encoder_rate, "vectors": vectors}[part]
        return rate * self.adapter.loraplus_lr_ratio if side else rate

    @property
    def text_encoder_rank(self) -> int:
        """The text encoder's rank, resolved."""
        return self.text_encoder.rank or self.adapter.rank

    @property
    def text_encoder_alpha(self) -> float:
        """The text encoder's alpha, resolved: its own, else the adapter's; unset in both it equals its rank (scale 1)."""
        own = self.text_encoder.alpha if self.text_encoder.alpha is not None else self.adapter.alpha
        return float(self.text_encoder_rank) if own is None else own

    @property
    def examples_per_step(self) -> int:
        """Pictures that one optimizer update sees."""
        return self.train.batch_size * self.train.accumulation


def known_settings() -> list[str]:
    """Dotted names of all settings."""
    return [name for name, _ in iterate_fields(TrainConfig)]


def build_config(values: dict[str, Any]) -> TrainConfig:
    """Validates nested values into a TrainConfig. Raises SettingError that names the dotted setting."""
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, known_settings()) from error


def parse_override(text: str) -> dict[str, Any]:
    """`adapter.rank=16` -> {'adapter': {'rank': 16}}. The value is TOML, or else taken as text. Raises SettingError."""
    import tomllib

    name, equals, raw = text.partition("=")
    if not equals or not name.strip():
        raise SettingError(f"--set {text!r} is not NAME=VALUE", hint="For example --set adapter.rank=16")
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    nested: Any = value
    for part in reversed(name.strip().split(".")):
        nested = {part: nested}
    return dict(nested)


def write_config(config: TrainConfig) -> str:
    """The complete settings as TOML text; unset settings are left out, so the text is itself a valid preset."""
    import tomlkit

    return tomlkit.dumps(config.model_dump(mode="json", exclude_none=True))


def read_config(path: Path) -> TrainConfig:
    """Reads a config.toml. Raises SettingError when it is not TOML or not a valid configuration."""
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"Not readable as TOML: {error}", where=str(path), hint="Correct that line.") from error
    return build_config(values)
