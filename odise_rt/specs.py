"""The five graphs of a bundle, as data: names, inputs, outputs, dtypes and symbolic dimensions.

Export, verification, TensorRT profiles and the runtime's own checks all derive from :func:`stage_specs`, so a graph
cannot drift from its description. Symbolic dimensions are single names (``"N"``) or a name divided by an integer
(``"H/4"``):

==========  ====================================================================================================
``N``       windows, 1 or more
``s``       side of the square windows in pixels, a multiple of 32 (``min(window, H, W)`` at run time)
``H, W``    padded canvas in pixels, multiples of 32 (of ``size_divisor`` at run time)
``h, w``    unpadded image at test size in pixels
``mh, mw``  mask logits: ``H/4``, ``W/4`` of the padded canvas
``Q``       masks, 1 or more
``L``       prompts (a class has one for each of its synonyms)
==========  ====================================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from odise_rt.errors import BackendError, BundleError
from odise_rt.typed_fields import FieldError, Range, check_fields, read_fields

Variant = Literal["label", "caption"]
DType = Literal["float32", "float16", "int64"]
Dim = int | str

STAGES: tuple[str, ...] = ("clip_image", "unet_tap", "mask_decoder", "clip_mask", "clip_text")
"""Names of the five graphs, in the order in which they run (``clip_text`` runs once for a vocabulary)."""
IMAGE_STAGES = tuple(stage for stage in STAGES if stage != "clip_text")
"""The stages that run for every image."""

LATENT_STRIDE = 8
"""Pixels to a latent of Stable Diffusion's first stage."""
LATENT_CHANNELS = 4
MAX_EDGE = 16_384
"""Most pixels of an image's edge inside the network."""
LEVELS: tuple[str, ...] = ("s2", "s3", "s4", "s5")
"""Feature pyramid levels; the digit is the log2 of the stride."""
LEVEL_STRIDES = (4, 8, 16, 32)
"""Pixels of the padded canvas to a cell of each level."""
MASK_STRIDE = LEVEL_STRIDES[0]
"""The same for mask logits, which have the size of the finest level."""

_Size = Annotated[int, Range(1, 2**31 - 1)]
_Edge = Annotated[int, Range(1, MAX_EDGE)]
_Token = Annotated[int, Range(0, 2**31 - 1)]
_Scale = Annotated[float, Range(0, 100)]
_Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class ModelFacts:
    """What the runtime must know of a model: sizes, prompts, scales and published defaults.

    What the graphs have built in (``clip_image_size``, ``hidden_dim``) is recorded for people: another value changes
    no result.
    """

    variant: Variant
    """Supervision in training; ``label`` has a learned "no object" embedding, ``caption`` object logits."""
    window: _Size
    """Largest side in pixels of the square windows that the diffusion network sees."""
    size_divisor: _Size
    """Images are zero-padded right and below to a multiple of this."""
    clip_image_size: _Size
    """Side in pixels of the square input of CLIP's image tower. For people: the graphs resize to it themselves."""
    clip_embed_dim: _Size
    """Channels D of CLIP's joint space."""
    context_length: _Size
    """Tokens T of a prompt for CLIP's text tower."""
    start_token: _Token
    end_token: _Token
    pad_token: _Token
    """Fills a prompt after its end token: 0 for open_clip's tokenizer."""
    null_text_length: _Size
    """Tokens of the diffusion model's embedding of "" (77 for Stable Diffusion 1.x)."""
    null_text_dim: _Size
    """Channels of the diffusion model's embedding of "" (768 for Stable Diffusion 1.x)."""
    queries: _Size
    """Mask proposals Q for an image."""
    pyramid_channels: _Size
    """Channels of the levels s2..s5."""
    hidden_dim: _Size
    """Channels of the mask features. For people: they stay inside ``mask_decoder``."""
    classification_dim: _Size
    """Channels P in which mask and word embeddings are compared."""
    test_short_edge: _Edge
    """Pixels of the shortest image edge after the test-time resize."""
    test_long_edge: _Edge
    """Upper bound in pixels on the longest edge after the test-time resize."""
    mask_logit_scale: _Scale
    """Factor on cosines of mask and word embeddings, already exponentiated and clamped at 100."""
    clip_logit_scale: _Scale
    """Factor on cosines of CLIP's mask embeddings and word embeddings, likewise exponentiated and clamped."""
    clip_weight_seen: _Share
    """Weight w of CLIP in p^(1-w) * p_clip^w for classes of the training vocabulary."""
    clip_weight_unseen: _Share
    """Weight w of CLIP for all other classes."""
    mask_prompt: str
    """Prompt template around a word for the mask classifier; "{}" is the word."""
    clip_prompt: str
    """Prompt template for CLIP's mask classifier."""
    object_mask_threshold: _Share = 0.0
    """Panoptic merge keeps masks with a score strictly above this."""
    overlap_threshold: _Share = 0.8
    """Panoptic merge drops a segment that keeps less than this share of its mask."""
    clip_visible_threshold: _Share = 0.5
    """A patch is visible to a mask token when some mask probability inside reaches this. ``clip_mask`` has it built in,
    and this version knows 0.5 alone."""
    instances_per_image: _Size = 100
    """Best pairs of mask and class that become instances."""
    level_strides: tuple[int, ...] = LEVEL_STRIDES
    """Pixels to a cell of s2..s5; this version knows these alone."""

    def __post_init__(self) -> None:
        try:
            check_fields(self)
        except FieldError as exc:
            raise BundleError(f"model facts: {exc}; export the bundle again") from exc
        checks = [
            (
                self.level_strides == LEVEL_STRIDES,
                f"level_strides is {self.level_strides}, this version knows {LEVEL_STRIDES}",
            ),
            (
                self.clip_visible_threshold == 0.5,
                f"clip_visible_threshold is {self.clip_visible_threshold}, this version knows 0.5",
            ),
            (self.size_divisor % 32 == 0, f"size_divisor {self.size_divisor} is not 32·k"),
            (
                self.window % self.size_divisor == 0,
                f"window {self.window} is not a multiple of size_divisor {self.size_divisor}",
            ),
            (
                self.test_short_edge <= self.test_long_edge,
                f"test_short_edge {self.test_short_edge} is above test_long_edge {self.test_long_edge}",
            ),
            (
                all("{}" in p and p.count("{") == 1 for p in (self.mask_prompt, self.clip_prompt)),
                "mask_prompt and clip_prompt must each hold one '{}' for the word",
            ),
            (self.context_length >= 3, f"context_length {self.context_length} has no room for start, word and end"),
        ]
        for ok, message in checks:
            if not ok:
                raise BundleError(f"model facts contradict themselves: {message}; export the bundle again")

    @property
    def latent_side(self) -> int:
        """Side h of a window's latent, and of the fixed noise."""
        return self.window // LATENT_STRIDE

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of :meth:`from_dict`."""
        data = dataclasses.asdict(self)
        data["level_strides"] = list(self.level_strides)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelFacts:
        """Rebuild from JSON.

        Raises:
            BundleError: a field is missing, unknown or of another type.
        """
        try:
            return read_fields(cls, data)
        except FieldError as exc:
            raise BundleError(
                f"model facts do not fit this version of odise_rt: {exc}; export the bundle again with this version"
            ) from exc


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph."""

    name: str
    dtype: DType
    shape: tuple[Dim, ...]
    """Integers are fixed; strings are symbolic, see the module's table."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of :meth:`from_dict`."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TensorSpec:
        """Rebuild from JSON; raises :class:`BundleError` when malformed."""
        try:
            name, dtype, shape = data["name"], data["dtype"], data["shape"]
        except (KeyError, TypeError) as exc:
            raise BundleError(f"tensor spec {data!r} lacks name, dtype or shape; export the bundle again") from exc
        if (
            not isinstance(name, str)
            or dtype not in ("float32", "float16", "int64")
            or not isinstance(shape, list | tuple)
            or not all(isinstance(d, int | str) and not isinstance(d, bool) for d in shape)
        ):
            raise BundleError(f"tensor spec {data!r} is malformed; export the bundle again")
        return cls(name, dtype, tuple(shape))

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape for values of the symbols.

        Args:
            dims: symbol to value, e.g. ``{"N": 6, "s": 512}``.

        Raises:
            KeyError: a symbol has no value.
            ValueError: a division leaves a remainder.
        """
        shape = []
        for dim in self.shape:
            if isinstance(dim, int):
                shape.append(dim)
                continue
            symbol, divisor = parse_dim(dim)
            value, rest = divmod(dims[symbol], divisor)
            if rest:
                raise ValueError(f"{self.name}: {symbol}={dims[symbol]} is not a multiple of {divisor}")
            shape.append(value)
        return tuple(shape)


@dataclass(frozen=True)
class StageSpec:
    """One graph of the bundle."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbolic names in the inputs, in order of appearance."""
        found: dict[str, None] = {}
        for tensor in self.inputs:
            for dim in tensor.shape:
                if isinstance(dim, str):
                    found[parse_dim(dim)[0]] = None
        return tuple(found)

    def input_shapes(self, **dims: int) -> dict[str, tuple[int, ...]]:
        """Concrete input shapes, e.g. ``spec.input_shapes(N=4, s=512)``: for profiles and verification."""
        return {t.name: t.resolve(dims) for t in self.inputs}

    def check(self, arrays: Mapping[str, Any]) -> dict[str, int]:
        """Compare arrays with the inputs of this stage.

        Args:
            arrays: input name to numpy's array, or to anything else with dtype, ndim and shape.

        Returns:
            The values that the arrays give to the symbols.

        Raises:
            BackendError: a name, dtype, rank or dimension that does not fit.
        """
        expected = {t.name: t for t in self.inputs}
        if set(arrays) != set(expected):
            raise BackendError(f"stage {self.name}: got inputs {sorted(arrays)}, expected {sorted(expected)}")
        dims: dict[str, int] = {}
        for name, tensor in expected.items():
            array = arrays[name]
            fits = array.dtype.name == tensor.dtype and array.ndim == len(tensor.shape)
            if fits:
                for size, dim in zip(array.shape, tensor.shape, strict=True):
                    if isinstance(dim, int):
                        fits = fits and size == dim
                    else:
                        symbol, divisor = parse_dim(dim)
                        fits = fits and size > 0 and dims.setdefault(symbol, size * divisor) == size * divisor
            if not fits:
                raise BackendError(
                    f"stage {self.name}: input {name} is {array.dtype} {array.shape}, "
                    f"expected {tensor.dtype} {tensor.shape} (so far {dims})"
                )
        return dims

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: ``{"inputs": [...], "outputs": [...]}``."""
        return {"inputs": [t.to_dict() for t in self.inputs], "outputs": [t.to_dict() for t in self.outputs]}

    @classmethod
    def from_dict(cls, name: str, data: Mapping[str, Any]) -> StageSpec:
        """Rebuild from a manifest's entry; keys other than ``inputs`` and ``outputs`` are left alone."""
        sides: list[tuple[TensorSpec, ...]] = []
        for side in ("inputs", "outputs"):
            tensors = data.get(side)
            if not isinstance(tensors, Sequence) or isinstance(tensors, str) or not tensors:
                raise BundleError(f"stage {name!r} has no list of {side} in the manifest; export the bundle again")
            sides.append(tuple(TensorSpec.from_dict(t) for t in tensors))
        return cls(name, sides[0], sides[1])


def parse_dim(dim: str) -> tuple[str, int]:
    """``"H/4"`` to ``("H", 4)``, ``"N"`` to ``("N", 1)``."""
    symbol, _, divisor = dim.partition("/")
    return symbol, int(divisor or 1)


def stage_specs(facts: ModelFacts) -> dict[str, StageSpec]:
    """The five graphs of a model, keyed by :data:`STAGES`.

    All tensors but tokens are float32 at the boundary, whatever the precision inside the graph.
    """
    cp, d, p, q = facts.pyramid_channels, facts.clip_embed_dim, facts.classification_dim, facts.queries
    levels = list(zip(LEVELS, facts.level_strides, strict=True))
    windows = TensorSpec("windows", "float32", ("N", 3, "s", "s"))
    image_embedding = TensorSpec("image_embedding", "float32", ("N", d))
    decoded = [
        TensorSpec("mask_logits", "float32", (1, q, f"H/{MASK_STRIDE}", f"W/{MASK_STRIDE}")),
        TensorSpec("mask_embedding", "float32", (1, q, p)),
    ]
    if facts.variant == "caption":
        decoded.append(TensorSpec("object_logits", "float32", (1, q, 2)))
    specs = [
        StageSpec("clip_image", (windows,), (image_embedding,)),
        StageSpec(
            "unet_tap",
            (
                windows,
                image_embedding,
                TensorSpec("noise", "float32", (1, LATENT_CHANNELS, facts.latent_side, facts.latent_side)),
                TensorSpec("null_text_embedding", "float32", (1, facts.null_text_length, facts.null_text_dim)),
            ),
            tuple(TensorSpec(name, "float32", ("N", cp, f"s/{k}", f"s/{k}")) for name, k in levels),
        ),
        StageSpec(
            "mask_decoder",
            tuple(TensorSpec(name, "float32", (1, cp, f"H/{k}", f"W/{k}")) for name, k in levels),
            tuple(decoded),
        ),
        StageSpec(
            "clip_mask",
            (
                TensorSpec("image", "float32", (1, 3, "h", "w")),
                TensorSpec("mask_logits", "float32", (1, "Q", "mh", "mw")),
            ),
            (TensorSpec("mask_clip_embedding", "float32", (1, "Q", d)),),
        ),
        StageSpec(
            "clip_text",
            (TensorSpec("tokens", "int64", ("L", facts.context_length)),),
            (
                TensorSpec("text_embedding", "float32", ("L", d)),
                TensorSpec("mask_text_embedding", "float32", ("L", p)),
            ),
        ),
    ]
    return {spec.name: spec for spec in specs}
