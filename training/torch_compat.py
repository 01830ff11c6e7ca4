"""The one place that mends the installed PyTorch before diffusers and open_clip are imported."""

from __future__ import annotations

import torch

_KEEP_ALIVE: list[torch.library.Library] = []

_OPERATOR_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def declare_missing_torchvision_operators() -> None:
    """Let ``import torchvision`` succeed where its compiled operators do not load.

    torchvision registers fake kernels for ``nms`` at import, which raises when the shared library that defines the
    operators was built against another torch (a CPU build of torch next to a CUDA build of torchvision). Nothing of
    ours calls them, so declaring their schemas is enough. Does nothing where torchvision is whole or absent.
    """
    try:
        import torchvision
    except ImportError:
        return
    except RuntimeError as exc:
        if "torchvision::nms" not in str(exc):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for schema in _OPERATOR_SCHEMAS.values():
            library.define(schema)
        _KEEP_ALIVE.append(library)
        import torchvision  # noqa: F401
