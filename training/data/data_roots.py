"""Finds a published data set below the folder that a user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

SPLITS = {"val": "validation", "train": "training"}
"""Names of the splits, short as in COCO and VOC and long as in ADE20K."""
PARENTS = ("", "ade/")
"""Folders under the root that may hold a data set's own folder; ODISE's authors keep both ADE20K in ``ade``."""


def find_paths(root: Path, relative: Sequence[str]) -> tuple[Path, ...] | None:
    """Where all of some files and folders are, or None.

    Args:
        root: the folder of data sets as detectron2 has it, the data set's own folder, or one between the two.
        relative: paths below the folder of data sets, in the spelling of the published layout. Those with a suffix
            are files.
    """
    found = [tuple(root / parent / path for path in relative) for parent in PARENTS]
    shared = min(len(PurePosixPath(path).parts) for path in relative) - 1
    for depth in range(1, shared + 1):
        if len({PurePosixPath(path).parts[:depth] for path in relative}) == 1:
            found.append(tuple(root.joinpath(*PurePosixPath(path).parts[depth:]) for path in relative))
    for paths in found:
        if all(path.is_file() if path.suffix else path.is_dir() for path in paths):
            return paths
    return None


def looked_for(root: Path, alternatives: Sequence[Sequence[str]]) -> str:
    """The part of an error message that says what :func:`find_paths` did not find."""
    sets = (
        " with ".join(f"{path}{'' if (root / path).exists() else ' (missing)'}" for path in relative)
        for relative in alternatives
    )
    return (
        f"looked for {'; or '.join(sets)}. The folders may also lie in {root / 'ade'}, and the folder named may be the "
        "data set's own"
    )
