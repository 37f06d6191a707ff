"""A loaded Stable Diffusion of any family: what all have in common. Each family adds how captions become conditioning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainers.errors import BaseModelError
from trainers.families.base import Conditioning
from trainers.families.facts import BaseModelFacts
from trainers.families.lean import library
from trainers.families.parts import TOKENS, PartsReader, fingerprint_of, load_parts, load_tokenizer
from trainers.families.targets import trainable_paths
from trainers.families.words import plain_tokens, tokens_with_words, word_pattern
from trainers.objective import Objective

_LARGE_ENCODER = 10_000_000  # parameters; Stable Diffusion's have 34 million
Extras = Callable[[Conditioning, torch.Tensor], dict[str, Any]]
"""(conditioning, framing (B, 6)) -> further arguments of the denoiser."""


class LatentDiffusion:
    """See families.base.DiffusionModel for the meaning of each method."""

    def __init__(
        self,
        facts: BaseModelFacts,
        dtype: torch.dtype,
        device: torch.device,
        encode: Callable[[LatentDiffusion, Mapping[str, torch.Tensor]], Conditioning],
        extras: Extras = lambda conditioning, framing: {},
    ) -> None:
        self.facts, self.scheduler_config = facts, facts.configs["scheduler"]
        # The files are read while the libraries are imported; what is wrong with the small ones is told first all the same.
        with PartsReader(facts, dtype, device) as reader:
            self.tokenizers = {part: load_tokenizer(facts, part) for part in facts.family.text_encoders}
            alphas = _alphas_cumprod(facts)
            parts = load_parts(facts, reader, device)
        self.text_encoders: dict[str, Any] = {part: parts[part] for part in facts.family.text_encoders}
        self.unet, self.vae = parts["unet"], parts["vae"]
        self.words: dict[str, int] = {}
        self.objective = Objective(alphas.to(device), facts.prediction_type)  # type: ignore[arg-type]
        self._encode, self._extras = encode, extras
        # On a CPU a bf16 run encodes in bf16, too, in less than half the time; small ones would lose by the casts.
        large = sum(parameter.numel() for parameter in self.vae.encoder.parameters()) > _LARGE_ENCODER
        fast = dtype == torch.bfloat16 and device.type == "cpu" and large
        self.encodes_in = "bfloat16" if fast else "float32"
        vae_config: Any = self.vae.config
        self._factor, self._shift = float(vae_config.scaling_factor), float(vae_config.shift_factor or 0.0)
        self._fingerprints = {part: fingerprint_of(module, part, reader.digests) for part, module in parts.items()}

    def parts(self) -> dict[str, nn.Module]:
        """unet, text_encoder, and text_encoder_2 where the family has one."""
        return {"unet": self.unet, **self.text_encoders}

    def find_targets(self, part: str, targets: Sequence[str]) -> list[str]:
        """Paths of Linear and Conv2d layers inside the part, in module order; none that the family does not read."""
        return trainable_paths(self.facts, part, targets, [path for path, _ in self.parts()[part].named_modules()])

    def fingerprint(self, part: str) -> str:
        """SHA-256 over names, formats, shapes and contents of the part's own weights, as they were read."""
        return self._fingerprints[part]

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pixels -> mean, standard deviation of the unscaled latents, float32."""
        weights = next(self.vae.encoder.parameters())
        if self.encodes_in == "bfloat16" and weights.dtype == torch.float32:
            for half in (self.vae.encoder, self.vae.quant_conv):
                if half is not None:
                    half.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
            weights = next(self.vae.encoder.parameters())
        distribution = self.vae.encode(pixels.to(weights.device, weights.dtype)).latent_dist
        return distribution.mean.float(), distribution.std.float()

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """unscaled latents -> latents."""
        return (latents - self._shift) * self._factor

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """latents -> pixels float32 in [-1, 1]."""
        unscaled = latents / self._factor + self._shift
        pixels: torch.Tensor = self.vae.decode(unscaled.to(next(self.vae.decoder.parameters()).dtype)).sample
        return pixels.float().clamp(-1, 1)

    def encode_captions(self, captions: Sequence[str]) -> Conditioning:
        """captions -> text states (B, 77, width), cut at 75 words' tokens, and what else the family reads of them."""
        tokens = self.tokenise(captions)
        return self.encode_tokens({part: ids.to(self.text_encoders[part].device) for part, ids in tokens.items()})

    def tokenise(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """captions -> for each text encoder (B, 77) int64 on the CPU."""
        return {part: self.token_ids(part, captions) for part in self.text_encoders}

    def encode_tokens(self, tokens: Mapping[str, torch.Tensor]) -> Conditioning:
        """The rest of `encode_captions`, of tokens on the text encoders' device."""
        return self._encode(self, tokens)

    def word_tokens(self, part: str, text: str) -> tuple[int, ...]:
        """The tokens of some words, without marks."""
        return tuple(plain_tokens(self.tokenizers[part], text))

    def token_ids(self, part: str, captions: Sequence[str]) -> torch.Tensor:
        """captions -> (B, 77) int64 on the CPU, padded as the family pads; learned words in them as negative numbers."""
        if self.words and any(map(word_pattern(list(self.words)).search, captions)):
            return torch.tensor([tokens_with_words(self.tokenizers[part], one, self.words, TOKENS) for one in captions])
        ids: torch.Tensor = self.tokenizers[part](
            list(captions), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        return ids

    def predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, framing: torch.Tensor
    ) -> torch.Tensor:
        """noisy latents -> epsilon or v, float32."""
        dtype = next(self.unet.parameters()).dtype  # the module's own property walks all of them
        text_states = conditioning.hidden_states.to(noisy_latents.device, dtype)  # they may come from a cache on the CPU
        answer = self.unet(
            noisy_latents.to(dtype),
            timesteps,
            encoder_hidden_states=text_states,
            return_dict=False,
            **self._extras(conditioning, framing),
        )
        prediction: torch.Tensor = answer[0]
        return prediction.float()

    def enable_checkpointing(self) -> None:
        """Gradient checkpointing in the UNet, where nearly all activations are."""
        self.unet.enable_gradient_checkpointing(_recomputed)

    def pipeline(self) -> Any:
        """StableDiffusionPipeline or StableDiffusionXLPipeline, silent."""
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for logging in (diffusers_logging, transformers_logging):  # of packages and checkers that are not used here
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        import diffusers

        tokenizers = {part.replace("text_encoder", "tokenizer"): one for part, one in self.tokenizers.items()}
        extra = {} if "text_encoder_2" in self.text_encoders else {"safety_checker": None, "feature_extractor": None}
        made = getattr(diffusers, self.facts.family.pipeline)(
            unet=self.unet,
            vae=self.vae,
            scheduler=diffusers.DDIMScheduler.from_config(self.scheduler_config),
            **self.text_encoders,
            **tokenizers,
            **extra,
        )
        made.set_progress_bar_config(disable=True)
        return made


def encode_with_one_encoder(model: LatentDiffusion, tokens: Mapping[str, torch.Tensor]) -> Conditioning:
    """tokens -> the last hidden states (B, 77, width); with clip skip those of an earlier layer, through the last norm."""
    encoder, skip = model.text_encoders["text_encoder"], model.facts.clip_skip
    ids = tokens["text_encoder"]
    if skip == 1:
        return Conditioning(encoder(ids).last_hidden_state)
    states = encoder(ids, output_hidden_states=True).hidden_states[-skip]
    return Conditioning(encoder.final_layer_norm(states))


def _recomputed(module: nn.Module, *arguments: Any) -> Any:
    """Nothing in a frozen base draws random numbers: to read their state, as is usual, a GPU would be waited for each time."""
    return checkpoint(module.__call__, *arguments, use_reentrant=False, preserve_rng_state=False)


def _alphas_cumprod(facts: BaseModelFacts) -> torch.Tensor:
    """The noise schedule's cumulative alphas (T,), by diffusers' own scheduler so that every schedule it knows works.

    Raises BaseModelError for settings of which it makes none.
    """
    try:
        alphas: torch.Tensor = library().scheduler.from_config(facts.configs["scheduler"]).alphas_cumprod.float()
    except Exception as error:  # whatever a library makes of settings that it does not expect
        first = (str(error) or type(error).__name__).splitlines()[0][:200]
        what = f"No noise schedule can be built from the base's configuration: {first}"
        raise BaseModelError(what, where=str(facts.source), hint="Download scheduler_config.json again.") from error
    if not bool(((alphas >= 0) & (alphas <= 1)).all()):
        raise BaseModelError("The base's noise schedule does not go from 1 to 0", str(facts.source), "Download it again.")
    return alphas
