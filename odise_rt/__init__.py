"""Open-vocabulary panoptic segmentation at low latency: the ODISE runtime.

>>> from odise_rt import Segmenter, Vocabulary
>>> with Segmenter.load("out/odise-tiny") as segmenter:  # doctest: +SKIP
...     result = segmenter.segment("photo.jpg", Vocabulary.parse("black pickup truck, pickup truck; blue sky, sky"))
...     result.overlay("photo.jpg").save("overlay.png")

Nothing here imports PyTorch. Engines are extras of the package: ``pip install 'odise_rt[cpu]'``.
"""

from __future__ import annotations

from odise_rt.bundle import Bundle
from odise_rt.errors import (
    BackendError,
    BundleError,
    ImageError,
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
from odise_rt.version import __version__
from odise_rt.vocabulary import Vocabulary, VocabularyClass

__all__ = [
    "BackendError",
    "Bundle",
    "BundleError",
    "Candidate",
    "ImageError",
    "InputError",
    "Instance",
    "MaskProposals",
    "MissingPackageError",
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
    "__version__",
    "pipeline",
]
