"""The released ODISE heads (``odise_label_coco_50e-*.pth``, ``odise_caption_coco_50e-*.pth``): official names and ours.

The files hold only what was trained, 28.1 M numbers at full size; Stable Diffusion and CLIP come from their own files.
"""

from __future__ import annotations

from pathlib import Path

from odise_rt.errors import CheckpointError
from training.checkpoints.key_table import KeyTable, load_strict
from training.checkpoints.report import PartReport
from training.checkpoints.tensor_files import read_tensors
from training.config import OdiseConfig
from training.models.odise import TRAINED, Odise

_ADVICE = "Expected a released ODISE checkpoint of this config's size, e.g. odise_label_coco_50e-b67d2efc.pth"
_TAPS = 8
_PYRAMID_INPUTS = 3

_CAPTIONER = {
    "alpha_cond": "caption_gate",
    "clip_project.positional_embedding": "caption_position",
    "clip_project.linear": "caption_projection",
    "alpha_cond_time_embed": "time_gate",
    "time_embed_project.positional_embedding": "time_position",
    "time_embed_project.linear": "time_projection",
}
_BOTTLENECK = {
    "conv1": "conv1",
    "conv1.norm": "norm1",
    "conv2": "conv2",
    "conv2.norm": "norm2",
    "conv3": "conv3",
    "conv3.norm": "norm3",
    "shortcut": "shortcut.0",
    "shortcut.norm": "shortcut.1",
}
_PIXEL_DECODER = {
    "transformer.level_embed": "level_embedding",
    "adapter_1": "lateral.0",
    "adapter_1.norm": "lateral.1",
    "layer_1": "output.0",
    "layer_1.norm": "output.1",
    "mask_features": "mask_features",
}
_PIXEL_DECODER_LAYER = {
    "self_attn.sampling_offsets": "attention.sampling_offsets",
    "self_attn.attention_weights": "attention.attention_weights",
    "self_attn.value_proj": "attention.value_projection",
    "self_attn.output_proj": "attention.output_projection",
    "norm1": "attention_norm",
    "linear1": "linear1",
    "linear2": "linear2",
    "norm2": "ffn_norm",
}
_MASK_DECODER = {
    "query_feat": "query_features",
    "query_embed": "query_positions",
    "level_embed": "level_embedding",
    "decoder_norm": "norm",
    "mask_embed": "mask_kernel",
    "class_embed": "object_classifier",
}
_MASK_DECODER_LAYER = {
    "transformer_cross_attention_layers.{}.multihead_attn": "cross_attention",
    "transformer_cross_attention_layers.{}.norm": "cross_norm",
    "transformer_self_attention_layers.{}.self_attn": "self_attention",
    "transformer_self_attention_layers.{}.norm": "self_norm",
    "transformer_ffn_layers.{}.linear1": "linear1",
    "transformer_ffn_layers.{}.linear2": "linear2",
    "transformer_ffn_layers.{}.norm": "ffn_norm",
}
_MASK_EMBEDDING = {
    "logit_scale": "log_logit_scale",
    "pool_proj.0": "pool_norm",
    "pool_proj.1": "pool_projection",
    "mask_embed.0": "norm",
    "mask_embed.1": "mlp",
}


def odise_key_table(config: OdiseConfig) -> KeyTable:
    """Official names of a variant's heads against those of :class:`training.models.odise.Odise`."""
    names: dict[str, str] = {}

    def under(theirs: str, ours: str, table: dict[str, str]) -> None:
        names.update({f"{theirs}.{their}": f"{ours}.{our}" for their, our in table.items()})

    under("backbone.feature_extractor", "implicit_captioner", _CAPTIONER)
    for tap in range(_TAPS):
        under(f"backbone.feature_projections.{tap}.0", f"feature_pyramid.projections.{tap}", _BOTTLENECK)

    theirs, ours = "sem_seg_head.pixel_decoder", "mask_generator.pixel_decoder"
    under(theirs, ours, _PIXEL_DECODER)
    under(f"{theirs}.input_proj", f"{ours}.input_projections", {str(i): str(i) for i in range(_PYRAMID_INPUTS)})
    for layer in range(config.head.pixel_decoder_layers):
        under(f"{theirs}.transformer.encoder.layers.{layer}", f"{ours}.layers.{layer}", _PIXEL_DECODER_LAYER)

    theirs, ours = "sem_seg_head.predictor", "mask_generator.mask_decoder"
    under(theirs, ours, _MASK_DECODER)
    for layer in range(config.head.mask_decoder_layers):
        table = {their.format(layer): our for their, our in _MASK_DECODER_LAYER.items()}
        under(theirs, f"{ours}.layers.{layer}", table)
    under(f"{theirs}.post_mask_embed", "mask_generator.mask_embedding", _MASK_EMBEDDING)

    if config.variant == "label":
        names["category_head.text_proj"] = "mask_classifier.text_projection"
        names["category_head.null_embed"] = "mask_classifier.no_object_embedding"
    else:
        names["word_head.text_proj"] = "mask_classifier.text_projection"
    return KeyTable(names, {"criterion": "class weights of the training loss"})


def load_odise_heads(path: Path, model: Odise) -> PartReport:
    """Fill the trained parts of a model in place.

    Raises:
        CheckpointError: the file is of another kind, variant or size, or incomplete.
    """
    config = model.config
    file = read_tensors(path)
    if not any(key.startswith("sem_seg_head.") for key in file.tensors):
        raise CheckpointError(f"{path} is {file.kind}, expected ODISE weights. {_ADVICE}")
    variant = "caption" if any(key.startswith("word_head.") for key in file.tensors) else "label"
    if variant != config.variant:
        raise CheckpointError(
            f"{path} was trained with {variant}s, config {config.name!r} is the {config.variant} variant: "
            f"take the {'-caption twin of that config' if variant == 'caption' else 'config without -caption'}"
        )
    expected = [key for key in model.state_dict() if key.split(".")[0] in TRAINED]
    return load_strict(
        model,
        file.tensors,
        odise_key_table(config),
        source=str(path),
        name="heads",
        advice=_ADVICE,
        expected=expected,
    )
