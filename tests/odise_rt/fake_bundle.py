"""A bundle of five tiny ONNX graphs that segments by colour: the whole runtime in milliseconds, without PyTorch.

Each graph has the inputs and outputs of the real one. Masks are where the image is red, green, blue or white; words
are embedded so that "red" is close to red masks, and so on. Two of the six masks are "no object".
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from odise_rt.specs import ModelFacts, StageSpec, stage_specs

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}
QUERIES = 6
D, P = 8, 5  # CLIP's and the classification embedding; the last channel of P is "no object"
WORDS = ["[UNK]", "a", "photo", "of", ".", *COLOURS, "crimson", "car", "sky"]
START, END = 62, 63


def make_facts(variant: str = "label", **changes: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "variant": variant,
        "window": 64,
        "size_divisor": 32,
        "clip_image_size": 16,
        "clip_embed_dim": D,
        "context_length": 12,
        "start_token": START,
        "end_token": END,
        "pad_token": 0,
        "null_text_length": 3,
        "null_text_dim": 4,
        "queries": QUERIES,
        "pyramid_channels": 4,
        "hidden_dim": 4,
        "classification_dim": P,
        "test_short_edge": 64,
        "test_long_edge": 160,
        "mask_logit_scale": 20.0,
        "clip_logit_scale": 30.0,
        "clip_weight_seen": 0.3,
        "clip_weight_unseen": 0.7,
        "mask_prompt": "{}" if variant == "label" else "a photo of a {}.",
        "clip_prompt": "a photo of a {}.",
    }
    return ModelFacts(**(values | changes))


class _Graph:
    """Collects nodes; every call gives a new name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def const(self, value: Any, dtype: type = np.float32) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def mean(self, value: str, axes: list[int], keepdims: int = 1) -> str:
        return self.op("ReduceMean", value, self.const(axes, np.int64), keepdims=keepdims)

    def save(self, path: Path, spec: StageSpec) -> None:
        types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

        def info(tensor: Any) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(tensor.name, types[tensor.dtype], list(tensor.shape))

        graph = helper.make_graph(
            self.nodes, spec.name, [info(t) for t in spec.inputs], [info(t) for t in spec.outputs], self.initializers
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString())


def _clip_image() -> _Graph:
    g = _Graph()
    colour = g.mean("windows", [2, 3], keepdims=0)  # (N, 3)
    g.op("MatMul", colour, g.const(np.eye(3, D)), output="image_embedding")
    return g


def _unet_tap() -> _Graph:
    g = _Graph()
    pooled = g.op("AveragePool", "windows", kernel_shape=[4, 4], strides=[4, 4])  # (N, 3, s/4, s/4)
    ones = g.op("Mul", g.mean(pooled, [1]), g.const(0.0))
    # A little of every other input, so that none can be dropped; it cancels out below rounding of the masks.
    caption = g.op("Unsqueeze", g.mean("image_embedding", [1]), g.const([2, 3], np.int64))
    constants = g.op("Add", g.mean("noise", [0, 1, 2, 3]), g.mean("null_text_embedding", [0, 1, 2], keepdims=0))
    extra = g.op("Mul", g.op("Add", caption, constants), g.const(1e-3))
    fourth = g.op("Add", g.op("Add", ones, g.const(1.0)), extra)
    g.op("Concat", pooled, fourth, output="s2", axis=1)  # (N, 4, s/4, s/4)
    for before, after in (("s2", "s3"), ("s3", "s4"), ("s4", "s5")):
        g.op("AveragePool", before, output=after, kernel_shape=[2, 2], strides=[2, 2])
    return g


def _mask_decoder(variant: str) -> _Graph:
    g = _Graph()
    # Rows: queries; columns: red, green, blue, constant.
    weight = 10.0 * np.array(
        [[1, -1, -1, -0.5], [-1, 1, -1, -0.5], [-1, -1, 1, -0.5], [1, 1, 1, -2.5], [0, 0, 0, -1], [0, 0, 0, 0.01]]
    )
    logits = g.op("Conv", "s2", g.const(weight[:, :, None, None]))
    others = g.op("Add", g.op("Add", g.mean("s3", [1, 2, 3]), g.mean("s4", [1, 2, 3])), g.mean("s5", [1, 2, 3]))
    g.op("Add", logits, g.op("Mul", others, g.const(1e-6)), output="mask_logits")
    pooled = _pool(g, "s2", "mask_logits")  # (1, Q, 4)
    project = np.zeros((4, P))
    project[:3, :3] = np.eye(3)
    no_object = np.zeros((QUERIES, P))
    no_object[4:, -1] = 50
    g.op("Add", g.op("MatMul", pooled, g.const(project)), g.const(no_object[None]), output="mask_embedding")
    if variant == "caption":
        objectness = np.array([[4.0, 0.0]] * 4 + [[0.0, 8.0]] * 2)
        scaled = g.op("Mul", g.mean(pooled, [2]), g.const(1e-6))
        g.op("Add", scaled, g.const(objectness[None]), output="object_logits")
    return g


def _clip_mask() -> _Graph:
    g = _Graph()
    shape = g.op("Shape", "mask_logits")
    size = g.op("Slice", shape, g.const([2], np.int64), g.const([4], np.int64))
    batch = g.op("Concat", g.const([1, 3], np.int64), size, axis=0)
    small = g.op("Resize", "image", "", "", batch, mode="linear", coordinate_transformation_mode="half_pixel")
    pooled = _pool(g, small, "mask_logits")  # (1, Q, 3)
    g.op("MatMul", pooled, g.const(np.eye(3, D)), output="mask_clip_embedding")
    return g


def _clip_text() -> _Graph:
    g = _Graph()
    table = np.zeros((64, D))
    for word, colour in COLOURS.items():
        table[WORDS.index(word), :3] = colour
    table[WORDS.index("crimson"), :3] = (0.95, 0.1, 0.1)
    table[WORDS.index("car"), 3] = table[WORDS.index("sky"), 4] = table[0, 5] = 1
    table[START, 7] = 0.05  # keeps the embedding of a prompt without known words away from zero
    looked_up = g.op("Gather", g.const(table), "tokens")  # (L, T, D)
    g.op("ReduceSum", looked_up, g.const([1], np.int64), output="text_embedding", keepdims=0)
    g.op("MatMul", "text_embedding", g.const(np.eye(D, P)), output="mask_text_embedding")
    return g


def _pool(g: _Graph, features: str, logits: str) -> str:
    """Mean of features (1, C, H, W) under each mask (1, Q, H, W): (1, Q, C)."""
    flat = g.const([0, 0, -1], np.int64)
    masks = g.op("Reshape", g.op("Sigmoid", logits), flat)
    values = g.op("Transpose", g.op("Reshape", features, flat), perm=[0, 2, 1])
    area = g.op("Add", g.op("ReduceSum", masks, g.const([2], np.int64)), g.const(1e-6))
    return g.op("Div", g.op("MatMul", masks, values), area)


def write_bundle(root: Path, variant: str = "label", **changes: Any) -> Path:
    """Write the bundle and return its folder; ``changes`` replace facts of the model."""
    facts = make_facts(variant, **changes)
    (root / "onnx").mkdir(parents=True)
    graphs = {
        "clip_image": _clip_image(),
        "unet_tap": _unet_tap(),
        "mask_decoder": _mask_decoder(variant),
        "clip_mask": _clip_mask(),
        "clip_text": _clip_text(),
    }
    stages = {}
    for name, spec in stage_specs(facts).items():
        path = root / "onnx" / f"{name}.onnx"
        graphs[name].save(path, spec)
        stages[name] = {"file": f"onnx/{name}.onnx", "sha256": digest(path), "parameters": 10, **spec.to_dict()}
    noise = np.random.default_rng(42).standard_normal((1, 4, facts.latent_side, facts.latent_side), np.float32)
    constants = {"noise": noise, "null_text_embedding": np.ones((1, 3, 4), np.float32)}
    if variant == "label":
        constants["no_object_embedding"] = np.eye(P, dtype=np.float32)[-1]
    np.savez(root / "constants.npz", **constants)  # type: ignore[arg-type]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(root / "tokenizer.json"))
    manifest = {
        "schema_version": 1,
        "name": f"fake-{variant}",
        "producer": {"odise_rt": "0"},
        "precision": "fp32",
        "model": facts.to_dict(),
        "stages": stages,
        "files": {name: digest(root / name) for name in ("constants.npz", "tokenizer.json")},
        "training_vocabulary": ["red", "green", "car"],
    }
    write_manifest(root, manifest)
    return root


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_manifest(root: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((root / "bundle.json").read_text())
    return manifest


def write_manifest(root: Path, manifest: Any) -> None:
    (root / "bundle.json").write_text(json.dumps(manifest))


def colour_image(height: int = 64, width: int = 96) -> np.ndarray:
    """Red left third, green middle, blue right, with a white square: uint8 (h, w, 3)."""
    image = np.zeros((height, width, 3), np.uint8)
    third = width // 3
    image[:, :third, 0] = 255
    image[:, third : 2 * third, 1] = 255
    image[:, 2 * third :, 2] = 255
    image[height // 4 : height // 2, third // 4 : third // 2 + third // 4] = 255
    return image
