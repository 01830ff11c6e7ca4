"""Every number that defines an ODISE model, as frozen dataclasses, and the named presets.

``PRESETS`` holds ``odise-sd1`` (the published model on Stable Diffusion 1.x and CLIP ViT-L/14@336), ``odise-tiny``
(trainable on a laptop, the one that ships with this repository) and ``odise-reference`` (the shrunken model of the
parity fixtures). A config is written into every checkpoint and bundle, so weights never travel without their shape.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from odise_rt.errors import ConfigError

Variant = Literal["label", "caption"]
Conditioning = Literal["implicit", "empty", "caption"]
FeatureSource = Literal["diffusion", "clip"]


@dataclass(frozen=True)
class VaeConfig:
    """Stable Diffusion's first stage (diffusers ``AutoencoderKL``), eight pixels to a latent."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each resolution level, finest first."""
    layers_per_block: int = 2
    """Residual blocks of a level in the encoder; the decoder has one more."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""
    scaling_factor: float = 0.18215
    """Factor from posterior mean to latent."""


@dataclass(frozen=True)
class UnetConfig:
    """The denoising network (diffusers ``UNet2DConditionModel``)."""

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of each level, finest first; every level but the last has cross-attention."""
    layers_per_block: int = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    heads: int = 8
    """Attention heads at every level."""
    context_dim: int = 768
    """Channels of the text conditioning; equals ``SdTextConfig.width``."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""

    @property
    def time_dim(self) -> int:
        """Channels of the time embedding: four times the first level's."""
        return 4 * self.channels[0]


@dataclass(frozen=True)
class SdTextConfig:
    """The diffusion model's text encoder (transformers ``CLIPTextModel``); inference needs only its output for ""."""

    vocab_size: int = 49408
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    context_length: int = 77
    """Tokens, padded with ``end_token`` as the Hugging Face tokenizer of SD 1.x does."""
    start_token: int = 49406
    end_token: int = 49407


@dataclass(frozen=True)
class ClipConfig:
    """An open_clip CLIP with a ViT image tower."""

    image_size: int = 336
    """Side in pixels of the square input."""
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    head_width: int = 64
    embed_dim: int = 768
    """Channels of the joint image-text space."""
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    vocab_size: int = 49408
    context_length: int = 77
    start_token: int = 49406
    end_token: int = 49407
    """Ends a text and is its pooled position; it must be the largest id, as open_clip pools at the largest."""
    quick_gelu: bool = True
    """True for OpenAI's weights: x * sigmoid(1.702 x)."""


@dataclass(frozen=True)
class HeadConfig:
    """The trained part: feature pyramid, mask generator and classifiers (paper section 3.3)."""

    pyramid_channels: int = 512
    """Channels of the levels s2..s5."""
    hidden_dim: int = 256
    """Channels of pixel decoder, mask decoder and mask features."""
    queries: int = 100
    """Mask proposals for an image."""
    attention_heads: int = 8
    pixel_decoder_layers: int = 6
    pixel_decoder_ffn: int = 1024
    sampling_points: int = 4
    """Sampling points of deformable attention for each head and level."""
    mask_decoder_layers: int = 9
    mask_decoder_ffn: int = 2048
    classification_dim: int = 256
    """Channels in which mask and word embeddings are compared (``text_proj``)."""
    norm_groups: int = 32


@dataclass(frozen=True)
class OdiseConfig:
    """A whole model."""

    name: str = "odise-sd1"
    variant: Variant = "label"
    """Supervision it was trained with: category labels or image captions (paper section 3.4)."""
    vae: VaeConfig = field(default_factory=VaeConfig)
    unet: UnetConfig = field(default_factory=UnetConfig)
    sd_text: SdTextConfig = field(default_factory=SdTextConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    window: int = 512
    """Side in pixels of the square window that the diffusion network sees."""
    size_divisor: int = 64
    """Images are zero-padded right and below to a multiple of this."""
    test_short_edge: int = 1024
    """Pixels of the shortest image edge after the test-time resize."""
    test_long_edge: int = 2560
    """Upper bound in pixels on the longest edge after it."""
    noise_seed: int = 42
    """Seed of the fixed noise added at t = 0 (CPU torch.Generator, torch.randn)."""
    timestep: int = 0
    """Diffusion step at which features are read, of 1000 (scaled-linear betas 0.00085 to 0.012)."""
    clip_weight_seen: float = 0.3
    """Weight of CLIP's probability for classes in the training vocabulary: p^(1-w) * p_clip^w (paper eq. 6)."""
    clip_weight_unseen: float = 0.7
    """The same for classes outside it."""
    conditioning: Conditioning = "implicit"
    """What the UNet is told of a picture: the implicit captioner's words, nothing, or the picture's own caption. The
    latter two are ablations, and the captioner is not trained."""
    features: FeatureSource = "diffusion"
    """What the feature pyramid is made of: diffusion features, or, as an ablation, the image tokens of CLIP."""

    def __post_init__(self) -> None:
        latent_factor = 2 ** (len(self.vae.channels) - 1)
        checks = [
            (self.variant in ("label", "caption"), f"variant is {self.variant!r}: expected 'label' or 'caption'"),
            (self.window % self.size_divisor == 0, f"window {self.window} must be a multiple of {self.size_divisor}"),
            (self.size_divisor % 32 == 0, f"size_divisor {self.size_divisor} must be a multiple of the stride 32"),
            (latent_factor == 8, f"vae.channels has {len(self.vae.channels)} levels: the taps are defined for 4"),
            (len(self.unet.channels) == 4, f"unet.channels has {len(self.unet.channels)} levels, expected 4"),
            (
                self.unet.context_dim == self.sd_text.width,
                f"unet.context_dim {self.unet.context_dim} must equal sd_text.width {self.sd_text.width}",
            ),
            (
                self.clip.image_size % self.clip.patch_size == 0,
                f"clip.image_size {self.clip.image_size} must be a multiple of patch_size {self.clip.patch_size}",
            ),
            (
                self.head.hidden_dim % self.head.attention_heads == 0,
                f"head.hidden_dim {self.head.hidden_dim} must be a multiple of {self.head.attention_heads} heads",
            ),
            (0 <= self.timestep < 1000, f"timestep is {self.timestep}: expected 0 to 999"),
            (
                self.conditioning in ("implicit", "empty", "caption"),
                f"conditioning is {self.conditioning!r}: expected 'implicit', 'empty' or 'caption'",
            ),
            (
                self.features == "diffusion" or (self.features == "clip" and self.conditioning == "empty"),
                f"features is {self.features!r} with conditioning {self.conditioning!r}: expected 'diffusion', or "
                "'clip' with 'empty'",
            ),
            (
                0 <= self.clip_weight_seen <= 1 and 0 <= self.clip_weight_unseen <= 1,
                "clip_weight_seen and clip_weight_unseen must lie in [0, 1]",
            ),
        ]
        for ok, message in checks:
            if not ok:
                raise ConfigError(f"config {self.name!r}: {message}")

    @property
    def latent_side(self) -> int:
        """Side of a window's latent in latent pixels."""
        return self.window // 8

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OdiseConfig:
        """Rebuild from JSON; raises :class:`ConfigError` for an unknown or missing field."""
        parts = {
            "vae": VaeConfig,
            "unet": UnetConfig,
            "sd_text": SdTextConfig,
            "clip": ClipConfig,
            "head": HeadConfig,
        }
        try:
            values = dict(data)
            for key, part in parts.items():
                section = {k: tuple(v) if isinstance(v, list) else v for k, v in values[key].items()}
                values[key] = part(**section)
            return cls(**values)
        except (TypeError, KeyError, AttributeError) as exc:
            raise ConfigError(
                f"config does not fit this version of odise_rt ({exc}): expected the fields of "
                "training.config.OdiseConfig; re-save the checkpoint with the version that wrote it"
            ) from exc


def caption_variant(config: OdiseConfig) -> OdiseConfig:
    """The same model for caption supervision, with its published ensemble weights 0.35 / 0.65."""
    return dataclasses.replace(config, variant="caption", clip_weight_seen=0.35, clip_weight_unseen=0.65)


ODISE_SD1 = OdiseConfig()

ODISE_TINY = OdiseConfig(
    name="odise-tiny",
    vae=VaeConfig(channels=(16, 32, 64, 64), norm_groups=8),
    unet=UnetConfig(channels=(32, 48, 56, 64), heads=4, context_dim=64, norm_groups=8),
    sd_text=SdTextConfig(
        vocab_size=4096, width=64, layers=2, heads=4, mlp_width=256, context_length=32, start_token=4094, end_token=4095
    ),
    clip=ClipConfig(
        image_size=128,
        patch_size=8,
        width=128,
        layers=5,
        head_width=32,
        embed_dim=128,
        text_width=128,
        text_layers=3,
        text_heads=4,
        vocab_size=4096,
        context_length=32,
        start_token=4094,
        end_token=4095,
    ),
    head=HeadConfig(
        pyramid_channels=128,
        hidden_dim=96,
        queries=30,
        pixel_decoder_layers=3,
        pixel_decoder_ffn=256,
        mask_decoder_layers=4,
        mask_decoder_ffn=384,
        classification_dim=96,
        norm_groups=8,
    ),
    window=128,
    test_short_edge=256,
    test_long_edge=640,
    # Fitted on scenes of their own (see the model card).
    clip_weight_seen=0.5,
    clip_weight_unseen=0.7,
)

ODISE_REFERENCE = OdiseConfig(
    name="odise-reference",
    vae=VaeConfig(channels=(32, 64, 128, 128)),
    unet=UnetConfig(channels=(64, 128, 256, 256), context_dim=64),
    sd_text=SdTextConfig(width=64, layers=2, heads=1, mlp_width=256),
    clip=ClipConfig(
        image_size=112,
        patch_size=14,
        width=128,
        layers=2,
        head_width=64,
        embed_dim=64,
        text_width=64,
        text_layers=2,
        text_heads=1,
    ),
    head=HeadConfig(
        pyramid_channels=128,
        hidden_dim=64,
        queries=20,
        pixel_decoder_layers=2,
        pixel_decoder_ffn=128,
        mask_decoder_layers=3,
        mask_decoder_ffn=128,
        classification_dim=64,
    ),
    window=128,
    clip_weight_seen=0.35,
    clip_weight_unseen=0.65,
)

PRESETS: dict[str, OdiseConfig] = {
    "odise-sd1": ODISE_SD1,
    "odise-sd1-caption": caption_variant(ODISE_SD1),
    "odise-tiny": ODISE_TINY,
    "odise-tiny-caption": caption_variant(ODISE_TINY),
    "odise-reference": ODISE_REFERENCE,
    "odise-reference-caption": caption_variant(ODISE_REFERENCE),
}


def preset(name: str) -> OdiseConfig:
    """Look a preset up by name; raises :class:`ConfigError` with the known names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"unknown config {name!r}: expected one of {', '.join(PRESETS)}") from None
