"""Frozen models in miniature: a byte-pair tokenizer, a CLIP and a text-to-image diffusion model for Sticker World."""
