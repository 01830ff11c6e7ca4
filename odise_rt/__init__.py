"""Open-vocabulary panoptic segmentation at low latency: the ODISE runtime.

>>> from odise_rt import Segmenter, Vocabulary
>>> with Segmenter.load("out/odise-tiny") as segmenter:  # doctest: +SKIP
...     result = segmenter.segment("photo.jpg", Vocabulary.parse("black pickup truck, pickup truck; blue sky, sky"))
...     result.overlay("photo.jpg").save("overlay.png")

Nothing here imports PyTorch. Engines are extras of the package: ``pip install 'odise_rt[cpu]'``.

Names are imported when they are first used, so that the command line is there at once to obey Ctrl-C.
"""

from __future__ import annotations

from odise_rt.version import __version__

TYPE_CHECKING = False  # what checkers of types take for true; without the import of typing
if TYPE_CHECKING:
    from odise_rt.backends.window_batching import WindowBatching
    from odise_rt.bundle import Bundle
    from odise_rt.classification import Classification
    from odise_rt.errors import (
        BackendError,
        BundleError,
        ImageError,
        ImageTooLargeError,
        InputError,
        MissingPackageError,
        OdiseError,
        OptionsError,
        OutOfMemoryError,
        VideoError,
        VocabularyError,
    )
    from odise_rt.image_run import MaskProposals
    from odise_rt.options import SegmentOptions
    from odise_rt.pipelines import pipeline
    from odise_rt.results import Candidate, Instance, PanopticResult, RunFacts, Segment
    from odise_rt.segmenter import Segmenter
    from odise_rt.specs import ModelFacts
    from odise_rt.vocabulary import Vocabulary, VocabularyClass

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "Candidate",
    "Classification",
    "ImageError",
    "ImageTooLargeError",
    "InputError",
    "Instance",
    "MaskProposals",
    "MissingPackageError",
    "ModelFacts",
    "OdiseError",
    "OptionsError",
    "OutOfMemoryError",
    "PanopticResult",
    "RunFacts",
    "Segment",
    "SegmentOptions",
    "Segmenter",
    "VideoError",
    "Vocabulary",
    "VocabularyClass",
    "VocabularyError",
    "WindowBatching",
    "__version__",
    "pipeline",
]

if not TYPE_CHECKING:
    _HOMES = {
        "backends.window_batching": ("WindowBatching",),
        "bundle": ("Bundle",),
        "classification": ("Classification",),
        "errors": (
            "BackendError",
            "BundleError",
            "ImageError",
            "ImageTooLargeError",
            "InputError",
            "MissingPackageError",
            "OdiseError",
            "OptionsError",
            "OutOfMemoryError",
            "VideoError",
            "VocabularyError",
        ),
        "image_run": ("MaskProposals",),
        "options": ("SegmentOptions",),
        "pipelines": ("pipeline",),
        "results": ("Candidate", "Instance", "PanopticResult", "RunFacts", "Segment"),
        "segmenter": ("Segmenter",),
        "specs": ("ModelFacts",),
        "vocabulary": ("Vocabulary", "VocabularyClass"),
    }

    def __getattr__(name: str) -> object:
        import importlib

        for home, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"{__name__}.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return __all__
