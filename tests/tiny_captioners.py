"""Tiny models from pictures to text with random weights, saved as transformers saves them, with a vocabulary of a few words."""

from __future__ import annotations

from pathlib import Path

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "red", "blue", "cat", "house", "tree", "on", "photo", "of")


def _tokenizer(folder: Path) -> object:
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    return BertTokenizer(vocab=vocabulary, extra_special_tokens=["[DEC]"])


def save_tiny_blip(folder: Path) -> Path:
    """A BLIP of 2 layers a side; a prompt is the beginning of its caption."""
    import torch
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    tokenizer = _tokenizer(folder)
    text = {
        **{"vocab_size": len(WORDS), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128, "projection_dim": 16},
        **{"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "initializer_range": 1.0},
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16, "projection_dim": 16, "initializer_range": 0.5}
    torch.manual_seed(1)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def save_tiny_encoder_decoder(folder: Path) -> Path:
    """A ViT that a small GPT-2 reads; its folder holds an image processor and a tokenizer, and nothing that joins them."""
    import torch
    from transformers import GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig, ViTImageProcessor

    tokenizer = _tokenizer(folder)
    vision = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=1.0)
    torch.manual_seed(3)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    VisionEncoderDecoderModel(config=config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder
