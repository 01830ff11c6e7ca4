"""Weights that are a closed form of their names, written in the formats and under the names of the released files.

The recorded tensors were computed with these weights, so none need to be shipped. ``weight_rules.tsv.xz`` gives, for
each tensor of each file, its shape and rule; a rule is an offset and a scale applied to standard normal numbers that
NumPy's Philox generator draws for a key made from the tensor's name.
"""

from __future__ import annotations

import csv
import io
import lzma
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

RULES = Path(__file__).parents[1] / "fixtures" / "reference" / "weight_rules.tsv.xz"
SEED = 2
_GOLDEN = 0x9E3779B1

FILES = {
    "odise_label": "odise_label.pth",
    "odise_caption": "odise_caption.pth",
    "stable_diffusion": "sd-v1-3.ckpt",
    "clip": "ViT-L-14-336px.pt",
}
"""Table in the rule file to the file name in which the weights are published."""
_KEY_PREFIX = {"odise_label": "odise::", "odise_caption": "odise::", "stable_diffusion": "sd::", "clip": "clip::"}


@dataclass(frozen=True)
class Rule:
    """How one tensor is made."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """normal, zero_mean_rows, ring_offsets, object_bias, const, int or empty_weight."""
    offset: float
    scale: str
    """A product of numbers and of fan, rows, cols: 1/sqrt of all sides but the first, the first, and the last."""

    def factor(self) -> float:
        """The scale as a number."""
        sides = {
            "fan": math.prod(self.shape[1:]),
            "rows": self.shape[0] if self.shape else 1,
            "cols": self.shape[-1] if self.shape else 1,
        }
        product = 1.0
        for part in self.scale.split("*"):
            product *= float(sides[part]) ** -0.5 if part in sides else float(part)
        return product

    def tensor(self, prefix: str) -> torch.Tensor:
        """The tensor; ``prefix`` belongs to the file."""
        if self.kind == "const":
            return torch.full(self.shape, self.offset, dtype=torch.float32)
        if self.kind == "int":
            return torch.arange(math.prod(self.shape)).reshape(self.shape)
        if self.kind == "empty_weight":
            return torch.cat([torch.ones(self.shape[0] - 1), torch.full((1,), 0.1)])
        key = zlib.crc32(f"{prefix}{self.name}".encode()) ^ (SEED * _GOLDEN)
        generator = np.random.Generator(np.random.Philox(key=key))
        noise = torch.from_numpy(generator.standard_normal(size=self.shape, dtype=np.float32))
        if self.kind == "object_bias":
            return torch.tensor([1.0, -1.0]) + self.factor() * noise
        if self.kind == "ring_offsets":
            return _sampling_ring() + self.factor() * noise
        if self.kind == "zero_mean_rows":
            noise = noise - noise.mean(dim=1, keepdim=True)
        return self.offset + self.factor() * noise


def _sampling_ring(heads: int = 8, levels: int = 3, points: int = 4) -> torch.Tensor:
    """Where deformable attention samples before training: each head in its direction, each point one step further."""
    angle = torch.arange(heads, dtype=torch.float32) * (2.0 * np.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, points + 1)
    ring = direction[:, None, None, :] * steps[None, None, :, None]
    return ring.expand(heads, levels, points, 2).reshape(-1)


def read_rules() -> dict[str, list[Rule]]:
    """Table name to the rules of its tensors, in file order."""
    text = lzma.decompress(RULES.read_bytes()).decode()
    tables: dict[str, list[Rule]] = {}
    for row in csv.DictReader(io.StringIO(text), delimiter="\t"):
        shape = tuple(int(side) for side in row["shape"].split("x")) if row["shape"] else ()
        rule = Rule(row["name"], shape, row["rule"], float(row["offset"] or 0.0), row["scale"] or "1")
        tables.setdefault(row["table"], []).append(rule)
    return tables


def write_released_files(folder: Path) -> dict[str, Path]:
    """Write the shrunken twins of the released files; returns table name to path."""
    paths = {}
    for table, rules in read_rules().items():
        tensors = {rule.name: rule.tensor(_KEY_PREFIX[table]) for rule in rules}
        path = folder / FILES[table]
        if table == "stable_diffusion":
            torch.save({"state_dict": tensors}, path)
        elif table == "clip":
            # OpenAI's weights were trained in, and are published in, half precision.
            torch.save({name: tensor.half().float() for name, tensor in tensors.items()}, path)
        else:
            torch.save({"model": tensors}, path)
        paths[table] = path
    return paths
