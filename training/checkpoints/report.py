"""What a loaded checkpoint held: every tensor is either loaded, or ignored for a stated reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PartReport:
    """One module loaded from one file."""

    source: str
    """File it came from."""
    module: str
    """What was filled, e.g. ``unet``."""
    loaded: Mapping[str, Shape]
    """Name inside the module to shape."""
    ignored: Mapping[str, str] = field(default_factory=dict)
    """Name in the file to the reason why nothing of it is needed."""

    @property
    def parameters(self) -> int:
        """Numbers loaded."""
        return sum(_volume(shape) for shape in self.loaded.values())

    def ignored_by_reason(self) -> dict[str, int]:
        """Reason to number of tensors, most frequent first."""
        return dict(Counter(self.ignored.values()).most_common())


@dataclass(frozen=True)
class LoadReport:
    """A whole model, put together from one or more files."""

    parts: tuple[PartReport, ...]

    @property
    def loaded(self) -> dict[str, Shape]:
        """``module.name`` to shape over all parts."""
        return {f"{part.module}.{name}": shape for part in self.parts for name, shape in part.loaded.items()}

    @property
    def ignored(self) -> dict[str, str]:
        """``file: name`` to reason over all parts."""
        return {f"{part.source}: {name}": reason for part in self.parts for name, reason in part.ignored.items()}

    @property
    def parameters(self) -> int:
        """Numbers loaded."""
        return sum(part.parameters for part in self.parts)

    def __str__(self) -> str:
        lines = []
        for part in self.parts:
            lines.append(f"{part.module}: {len(part.loaded)} tensors, {part.parameters:,} numbers from {part.source}")
            lines += [f"    {count} ignored: {reason}" for reason, count in part.ignored_by_reason().items()]
        lines.append(f"together: {len(self.loaded)} tensors, {self.parameters:,} numbers, {len(self.ignored)} ignored")
        return "\n".join(lines)


def _volume(shape: Shape) -> int:
    volume = 1
    for side in shape:
        volume *= side
    return volume
