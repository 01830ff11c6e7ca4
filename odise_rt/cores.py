"""How many cores there are to use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROCESS = Path("/proc/self")
"""Where Linux tells of this process's control groups."""


def usable_cores() -> int:
    """Cores that this process may use, at least 1.

    That is its affinity, where the system has such a thing, or less where a CPU limit of its control group or of one
    around it, such as a container's, allows less; parts of a core count as a whole one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_limits()]))


def _limits() -> Iterator[int]:
    """The CPU limits of the process's control group and of those around it, in cores; what cannot be read is none."""
    for folder in _groups():
        with contextlib.suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()  # version 2
            yield from _cores(quota, period)
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            yield from _cores(quota, period)


def _cores(quota: str, period: str) -> Iterator[int]:
    """The whole cores of a quota ("max" or -1: no limit) of each period, both in microseconds."""
    if quota != "max" and int(quota) > 0 and int(period) > 0:
        yield -(-int(quota) // int(period))


def _groups() -> Iterator[Path]:
    """Folders of the control groups that limit CPU time: the process's own, then those around it up to the root."""
    mounts = list(_mounts())
    for line in _lines("cgroup"):
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        for kind, root, folder in mounts:
            if kind != ("cgroup" if controllers else "cgroup2"):
                continue
            if controllers and "cpu" not in controllers.split(","):
                continue
            # A container may see a part of the tree alone, whose root is its own group.
            group_path = PurePosixPath(path)
            seen = group_path.is_relative_to(root) and ".." not in group_path.parts
            relative = group_path.relative_to(root) if seen else PurePosixPath()
            for group in (relative, *relative.parents):
                yield folder / group


def _mounts() -> Iterator[tuple[str, str, Path]]:
    """Mounted trees of control groups: ``cgroup`` (those with ``cpu``) or ``cgroup2``, the group at the root, where."""
    for line in _lines("mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *more) = before.split(), after.split() or [""]
        if len(fields) < 5 or kind not in ("cgroup", "cgroup2"):
            continue
        if kind == "cgroup" and "cpu" not in ",".join(more[1:]).split(","):
            continue
        yield kind, fields[3], Path(fields[4])


def _lines(name: str) -> list[str]:
    with contextlib.suppress(OSError, ValueError):
        return (_PROCESS / name).read_text().splitlines()
    return []
