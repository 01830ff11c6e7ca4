"""Puts the compiled CUDA kernels into the wheel, if ``make kernels`` has built them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface):  # type: ignore[misc, unused-ignore]  # hatchling is there only while it builds
    """Fatbins are data: the wheel stays one for every platform, and a GPU is looked for when it is used."""

    PLUGIN_NAME = "kernels"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files; those of other sources end the build."""
        root = Path(self.root)
        folder = root / "build" / "kernels"
        if version == "editable":  # the loader finds them there
            return
        built = sorted((*folder.glob("*.fatbin"), *folder.glob("*.ptx")))
        if not built:
            self.app.display_info("The wheel has no CUDA kernels: run `make kernels` first to put them in.")
            return
        path = root / "odise_rt" / "kernels" / "sources.py"
        spec = importlib.util.spec_from_file_location("odise_rt_kernel_sources", path)
        assert spec is not None
        assert spec.loader is not None
        sources = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sources)
        if (reason := sources.why_stale(folder)) is not None:
            self.app.abort(f"The CUDA kernels in {folder} do not go into the wheel: {reason}. Run `make kernels`.")
        for file in (*built, folder / sources.STAMP):
            build_data["force_include"][str(file)] = f"odise_rt/kernels/{file.name}"
