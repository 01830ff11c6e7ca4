"""ODISE (arXiv 2303.04803, figure 2): the composition of its boxes. Read this file first."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from odise_rt.windows import window_grid
from training.config import OdiseConfig
from training.models import frozen
from training.models.clip_image_encoder import ClipImageEncoder, ClipPixels
from training.models.diffusion_features import DiffusionFeatures, feature_taps, fixed_noise
from training.models.feature_pyramid import FeaturePyramid
from training.models.implicit_captioner import ImplicitCaptioner
from training.models.mask_classifier import MaskClassifier
from training.models.mask_clip import MaskClip
from training.models.mask_decoder import MaskGenerator, MaskPrediction
from training.models.text_encoder import TextEncoder
from training.models.windows import cut_windows, pad_to_multiple, stitch_levels

Structure = Literal["pruned", "official"]
TRAINED = ("implicit_captioner", "feature_pyramid", "mask_generator", "mask_classifier")
"""Submodules with trained weights; the others are frozen Stable Diffusion and CLIP."""


def trained_parts(config: OdiseConfig) -> tuple[str, ...]:
    """:data:`TRAINED`, without the captioner where the config has the UNet conditioned in another way."""
    return tuple(part for part in TRAINED if part != "implicit_captioner" or config.conditioning == "implicit")


class Odise(nn.Module):
    """The whole model. Its five stage methods are the five exported graphs, with the same names and shapes.

    Image flow::

        clip_image -> unet_tap -> (stitch) -> mask_decoder -> clip_mask

    Word flow: ``clip_text``. Classification and merging need no weights and live in :mod:`odise_rt`.
    """

    noise: Tensor
    null_text_embedding: Tensor

    def __init__(self, config: OdiseConfig) -> None:
        super().__init__()
        self.config = config
        self.structure: Structure = "pruned"
        """"official" computes all that the official code computes, window by window, as an honest baseline."""

        self.vae = frozen.build_vae(config.vae)
        self.unet = frozen.build_unet(config.unet, config.latent_side)
        self.sd_text: CLIPTextModel | None = frozen.build_sd_text(config.sd_text)
        self.clip = frozen.build_clip(config.clip)

        head, caption = config.head, config.variant == "caption"
        taps = feature_taps(config)
        self.implicit_captioner = ImplicitCaptioner(
            config.clip.embed_dim, config.sd_text.context_length, config.unet.context_dim, config.unet.time_dim
        )
        self.feature_pyramid = FeaturePyramid(taps, head.pyramid_channels, head.norm_groups)
        self.mask_generator = MaskGenerator(head, with_object_logits=caption)
        self.mask_classifier = MaskClassifier(
            config.clip.embed_dim, head.classification_dim, with_no_object=not caption
        )

        clip_pixels = ClipPixels(config.clip.image_size)
        self.clip_pixels = clip_pixels
        self.diffusion_features = DiffusionFeatures(self.vae, self.unet, config)
        self.clip_image_encoder = ClipImageEncoder(self.clip, clip_pixels, config.window)
        self.mask_clip = MaskClip(self.clip, clip_pixels, config.clip.patch_size)
        self.text_encoder = TextEncoder(self.clip)

        context_shape = (1, config.sd_text.context_length, config.sd_text.width)
        self.register_buffer("noise", fixed_noise(config), persistent=False)
        self.register_buffer("null_text_embedding", torch.zeros(context_shape))
        for module in (self.vae, self.unet, self.sd_text, self.clip):
            module.requires_grad_(False)
        self.implicit_captioner.requires_grad_("implicit_captioner" in trained_parts(config))

    # ------------------------------------------------------------------ frozen parts

    def refresh_null_text_embedding(self) -> None:
        """Recompute the embedding of "" after the text encoder's weights changed."""
        if self.sd_text is not None:
            self.null_text_embedding.copy_(frozen.null_text_embedding(self.sd_text, self.config.sd_text))

    def drop_sd_text(self) -> None:
        """Forget the diffusion text encoder: only its output for "" is ever used."""
        self.sd_text = None

    def train(self, mode: bool = True) -> Odise:
        """Training mode for the trained parts; the frozen networks stay in eval mode."""
        super().train(mode)
        for module in (self.vae, self.unet, self.sd_text, self.clip):
            if module is not None:
                module.eval()
        return self

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name to parameter of all that is trained (28.1 M at full size)."""
        parts = trained_parts(self.config)
        return {name: p for name, p in self.named_parameters() if name.split(".")[0] in parts}

    # ------------------------------------------------------------------ the five stages

    def clip_image(self, windows: Tensor) -> Tensor:
        """Windows ``(N, 3, s, s)`` in [0, 1] to CLIP embeddings ``(N, D)``, not normalised."""
        return self.clip_image_encoder(windows)

    def unet_tap(
        self, windows: Tensor, image_embedding: Tensor, noise: Tensor, null_text_embedding: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Diffusion features of windows, projected.

        Args:
            windows: ``(N, 3, s, s)`` in [0, 1].
            image_embedding: ``(N, D)`` from :meth:`clip_image`.
            noise: ``(1, 4, window / 8, window / 8)``.
            null_text_embedding: ``(1, T, context_dim)``.

        Returns:
            Levels s2, s3, s4, s5, each ``(N, pyramid_channels, s / stride, s / stride)``.
        """
        context, time_increment = self.implicit_captioner(image_embedding, null_text_embedding)
        taps = self.diffusion_features(windows, noise, context, time_increment)
        levels = self.feature_pyramid(taps, windows.shape[-1])
        return levels["s2"], levels["s3"], levels["s4"], levels["s5"]

    def decode_masks(self, s2: Tensor, s3: Tensor, s4: Tensor, s5: Tensor, aux: bool = False) -> MaskPrediction:
        """Masks from stitched levels ``(B, pyramid_channels, H / stride, W / stride)``."""
        prediction: MaskPrediction = self.mask_generator({"s2": s2, "s3": s3, "s4": s4, "s5": s5}, aux)
        return prediction

    def clip_mask(self, image: Tensor, mask_logits: Tensor) -> Tensor:
        """Unpadded image ``(B, 3, h, w)`` in [0, 1] and mask logits ``(B, Q, mh, mw)`` to ``(B, Q, D)``."""
        return self.mask_clip(image, mask_logits)

    def clip_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids int64 ``(L, T)`` to text embeddings ``(L, D)`` and their projections ``(L, P)``."""
        embedding = self.text_encoder(tokens)
        return embedding, self.mask_classifier.project_text(embedding)

    # ------------------------------------------------------------------ compositions

    def pyramid(self, images: Tensor) -> dict[str, Tensor]:
        """Stitched levels of padded images ``(B, 3, H, W)`` in [0, 1]; all windows run as one batch."""
        grid = window_grid(images.shape[2], images.shape[3], self.config.window)
        windows = cut_windows(images, grid)
        levels = self.unet_tap(windows, self.clip_image(windows), self.noise, self.null_text_embedding)
        return stitch_levels(dict(zip(("s2", "s3", "s4", "s5"), levels, strict=True)), grid)

    def forward(self, images: Tensor, aux: bool = False) -> MaskPrediction:
        """Padded images ``(B, 3, H, W)`` in [0, 1] to mask predictions; training and evaluation without words."""
        if self.structure == "official":
            from training.models.official_structure import official_forward

            return official_forward(self, images)
        return self.decode_masks(**self.pyramid(images), aux=aux)

    @torch.no_grad()
    def segment_features(self, image: Tensor) -> tuple[MaskPrediction, Tensor]:
        """All that the networks say about one unpadded image at test size.

        Args:
            image: ``(1, 3, h, w)`` in [0, 1].

        Returns:
            The mask prediction on the canvas padded to ``size_divisor``, and CLIP's mask embeddings ``(1, Q, D)``.
        """
        prediction = self(pad_to_multiple(image, self.config.size_divisor))
        if self.structure == "official":
            from training.models.official_structure import official_clip_mask

            return prediction, official_clip_mask(self, image, prediction.mask_logits)
        return prediction, self.clip_mask(image, prediction.mask_logits)
