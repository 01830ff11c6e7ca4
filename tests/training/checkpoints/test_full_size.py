"""The published heads at full size: our model takes exactly their keys and shapes (on the meta device)."""

from __future__ import annotations

import csv
import io
import lzma
import math
from pathlib import Path

import pytest
import torch

from training.checkpoints.key_table import KeyTable, rename
from training.checkpoints.odise_heads import odise_key_table
from training.checkpoints.stable_diffusion import unet_names, vae_names
from training.config import preset
from training.models.odise import Odise

KEYS = Path(__file__).parents[2] / "fixtures" / "reference" / "state_dict_keys.tsv.xz"


def published_shapes(variant: str) -> dict[str, tuple[int, ...]]:
    rows = csv.DictReader(io.StringIO(lzma.decompress(KEYS.read_bytes()).decode()), delimiter="\t")
    return {
        row["key"]: tuple(int(side) for side in row["shape"].split("x")) if row["shape"] else ()
        for row in rows
        if row["variant"] == variant
    }


@pytest.mark.parametrize(
    ("variant", "name", "keys", "values", "trained"),
    [
        ("label", "odise-sd1", 399, 28_067_143, 28_067_009),
        ("caption", "odise-sd1-caption", 400, 28_066_757, 28_066_755),
    ],
)
def test_published_heads_fit_exactly(variant: str, name: str, keys: int, values: int, trained: int) -> None:
    shapes = published_shapes(variant)
    assert len(shapes) == keys
    assert sum(math.prod(shape) for shape in shapes.values()) == values
    with torch.device("meta"):
        model = Odise(preset(name))
        tensors = {key: torch.empty(shape) for key, shape in shapes.items()}
    found, ignored, unknown = rename(tensors, odise_key_table(model.config))
    assert unknown == []
    assert list(ignored) == ["criterion.empty_weight"]
    ours = {key: parameter.shape for key, parameter in model.trained_parameters().items()}
    assert {key: tensor.shape for key, tensor in found.items()} == ours
    assert sum(shape.numel() for shape in ours.values()) == trained


def test_stable_diffusion_tables_reach_every_module_once() -> None:
    """Every tensor of the full-size UNet and VAE has one CompVis name, and that name leads back to it."""
    with torch.device("meta"):
        model = Odise(preset("odise-sd1"))
    for module, names in ((model.unet, unet_names(2)), (model.vae, vae_names(2))):
        table = KeyTable(names)
        keys = list(module.state_dict())
        theirs = [table.theirs(key) for key in keys]
        assert len(set(theirs)) == len(keys)
        assert [table.ours(key) for key in theirs] == keys
    assert len(model.unet.state_dict()) == 686
    assert len(model.vae.state_dict()) == 248
