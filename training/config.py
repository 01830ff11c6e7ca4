"""Every number that defines an ODISE model, as frozen dataclasses, and the named presets.

``PRESETS`` holds ``odise-sd1`` (the published model on Stable Diffusion 1.x and CLIP ViT-L/14@336), ``odise-tiny``
(trainable on a laptop, the one that ships with this repository) and ``odise-reference`` (the shrunken model of the
parity fixtures). A config is written into every checkpoint and bundle, so weights never travel without their shape.
"""

from __future__ import annotations

import dataclasses
import reprlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from odise_rt.errors import ConfigError
from odise_rt.typed_fields import FieldError, Range, check_fields, read_fields

Variant = Literal["label", "caption"]
Conditioning = Literal["implicit", "empty", "caption"]
FeatureSource = Literal["diffusion", "clip"]

Size = Annotated[int, Range(1, 1 << 20)]
"""Channels, pixels, heads, tokens and so on."""
Depth = Annotated[int, Range(1, 1000)]
"""Layers of a network."""
TapDepth = Annotated[int, Range(2, 2)]
"""Residual blocks of a level of the diffusion networks: the taps are defined for two."""
TokenId = Annotated[int, Range(0, 1 << 20)]
Share = Annotated[float, Range(0, 1)]
Levels = tuple[Size, Size, Size, Size]
"""Channels of each resolution level, finest first; the taps are defined for four."""

_BEFORE_ABLATIONS = {"conditioning": "implicit", "features": "diffusion"}
"""Values of the fields that older checkpoints do not have."""


@dataclass(frozen=True)
class VaeConfig:
    """Stable Diffusion's first stage (diffusers ``AutoencoderKL``), eight pixels to a latent."""

    channels: Levels = (128, 256, 512, 512)
    layers_per_block: TapDepth = 2
    """Residual blocks of a level in the encoder; the decoder has one more."""
    norm_groups: Size = 32
    """Groups of every GroupNorm."""
    scaling_factor: Annotated[float, Range(1e-6, 1e6)] = 0.18215
    """Factor from posterior mean to latent."""


@dataclass(frozen=True)
class UnetConfig:
    """The denoising network (diffusers ``UNet2DConditionModel``)."""

    channels: Levels = (320, 640, 1280, 1280)
    """Every level but the last has cross-attention."""
    layers_per_block: TapDepth = 2
    """Residual blocks of a level on the way down; one more on the way up."""
    heads: Size = 8
    """Attention heads at every level."""
    context_dim: Size = 768
    """Channels of the text conditioning; equals ``SdTextConfig.width``."""
    norm_groups: Size = 32
    """Groups of every GroupNorm."""

    @property
    def time_dim(self) -> int:
        """Channels of the time embedding: four times the first level's."""
        return 4 * self.channels[0]


@dataclass(frozen=True)
class SdTextConfig:
    """The diffusion model's text encoder (transformers ``CLIPTextModel``); inference needs only its output for ""."""

    vocab_size: Size = 49408
    width: Size = 768
    layers: Depth = 12
    heads: Size = 12
    mlp_width: Size = 3072
    context_length: Size = 77
    """Tokens, padded with ``end_token`` as the Hugging Face tokenizer of SD 1.x does."""
    start_token: TokenId = 49406
    end_token: TokenId = 49407


@dataclass(frozen=True)
class ClipConfig:
    """An open_clip CLIP with a ViT image tower."""

    image_size: Size = 336
    """Side in pixels of the square input."""
    patch_size: Size = 14
    width: Size = 1024
    layers: Depth = 24
    head_width: Size = 64
    embed_dim: Size = 768
    """Channels of the joint image-text space."""
    text_width: Size = 768
    text_layers: Depth = 12
    text_heads: Size = 12
    vocab_size: Size = 49408
    context_length: Size = 77
    start_token: TokenId = 49406
    end_token: TokenId = 49407
    """Ends a text and is its pooled position; it must be the largest id, as open_clip pools at the largest."""
    quick_gelu: bool = True
    """True for OpenAI's weights: x * sigmoid(1.702 x)."""


@dataclass(frozen=True)
class HeadConfig:
    """The trained part: feature pyramid, mask generator and classifiers (paper section 3.3)."""

    pyramid_channels: Size = 512
    """Channels of the levels s2..s5."""
    hidden_dim: Size = 256
    """Channels of pixel decoder, mask decoder and mask features."""
    queries: Size = 100
    """Mask proposals for an image."""
    attention_heads: Size = 8
    pixel_decoder_layers: Depth = 6
    pixel_decoder_ffn: Size = 1024
    sampling_points: Size = 4
    """Sampling points of deformable attention for each head and level."""
    mask_decoder_layers: Depth = 9
    mask_decoder_ffn: Size = 2048
    classification_dim: Size = 256
    """Channels in which mask and word embeddings are compared (``text_proj``)."""
    norm_groups: Size = 32


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
    window: Size = 512
    """Side in pixels of the square window that the diffusion network sees."""
    size_divisor: Size = 64
    """Images are zero-padded right and below to a multiple of this."""
    test_short_edge: Size = 1024
    """Pixels of the shortest image edge after the test-time resize."""
    test_long_edge: Size = 2560
    """Upper bound in pixels on the longest edge after it."""
    noise_seed: Annotated[int, Range(0, 2**63 - 1)] = 42
    """Seed of the fixed noise added at t = 0 (CPU torch.Generator, torch.randn)."""
    timestep: Annotated[int, Range(0, 999)] = 0
    """Diffusion step at which features are read, of 1000 (scaled-linear betas 0.00085 to 0.012)."""
    clip_weight_seen: Share = 0.3
    """Weight of CLIP's probability for classes in the training vocabulary: p^(1-w) * p_clip^w (paper eq. 6)."""
    clip_weight_unseen: Share = 0.7
    """Weight of CLIP's probability for classes outside it."""
    conditioning: Conditioning = "implicit"
    """What the UNet is told of a picture: the implicit captioner's words, nothing, or the picture's own caption. The
    latter two are ablations, and the captioner is not trained."""
    features: FeatureSource = "diffusion"
    """What the feature pyramid is made of: diffusion features, or, as an ablation, the image tokens of CLIP."""

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except FieldError as exc:
            raise ConfigError(f"config {reprlib.repr(self.name)}: {exc}") from exc
        vae, unet, sd_text, clip, head = self.vae, self.unet, self.sd_text, self.clip, self.head
        multiples = [
            ("window", self.window, "size_divisor", self.size_divisor),
            ("size_divisor", self.size_divisor, "the stride", 32),
            *(
                (f"vae.channels[{i}]", width, "vae.norm_groups", vae.norm_groups)
                for i, width in enumerate(vae.channels)
            ),
            *(
                (f"unet.channels[{i}]", width, f"unet.{name}", getattr(unet, name))
                for i, width in enumerate(unet.channels)
                for name in ("heads", "norm_groups")
            ),
            ("sd_text.width", sd_text.width, "sd_text.heads", sd_text.heads),
            ("clip.image_size", clip.image_size, "clip.patch_size", clip.patch_size),
            ("clip.width", clip.width, "clip.head_width", clip.head_width),
            ("clip.text_width", clip.text_width, "clip.text_heads", clip.text_heads),
            ("head.hidden_dim", head.hidden_dim, "head.attention_heads", head.attention_heads),
            ("head.hidden_dim", head.hidden_dim, "head.norm_groups", head.norm_groups),
            ("head.hidden_dim", head.hidden_dim, "the sines and cosines of two axes", 4),
            ("head.pyramid_channels", head.pyramid_channels, "4 * head.norm_groups =", 4 * head.norm_groups),
        ]
        checks = [
            (
                self.name.strip() and self.name.isprintable(),
                "a name needs a letter, and no character that is not printed",
            ),
            *((a % b == 0, f"{name} {a} must be a multiple of {divisor} {b}") for name, a, divisor, b in multiples),
            (
                unet.context_dim == sd_text.width,
                f"unet.context_dim {unet.context_dim} must equal sd_text.width {sd_text.width}",
            ),
            *(
                (
                    part.start_token != part.end_token and max(part.start_token, part.end_token) < part.vocab_size,
                    f"{name}.start_token {part.start_token} and end_token {part.end_token} must be two ids below its "
                    f"vocab_size {part.vocab_size}",
                )
                for name, part in (("sd_text", sd_text), ("clip", clip))
            ),
            (
                clip.end_token == clip.vocab_size - 1,
                f"clip.end_token {clip.end_token} must be the largest id, {clip.vocab_size - 1}",
            ),
            (
                clip.context_length >= 3,
                f"clip.context_length {clip.context_length} has no room for start, word and end",
            ),
            (
                self.test_short_edge <= self.test_long_edge,
                f"test_short_edge {self.test_short_edge} is above test_long_edge {self.test_long_edge}",
            ),
            (
                self.features == "diffusion" or self.conditioning == "empty",
                f"features is {self.features!r} with conditioning {self.conditioning!r}: expected 'diffusion', or "
                "'clip' with 'empty'",
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
        """Rebuild from JSON; raises :class:`ConfigError` naming a field that is missing, unknown or malformed."""
        try:
            return read_fields(cls, _BEFORE_ABLATIONS | data)
        except FieldError as exc:
            raise ConfigError(
                f"config does not fit this version of odise_rt: {exc}; save the checkpoint again with the version that "
                "wrote it"
            ) from exc


def caption_variant(config: OdiseConfig) -> OdiseConfig:
    """A model's config for caption supervision, with the published ensemble weights 0.35 / 0.65."""
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
