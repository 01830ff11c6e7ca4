"""Draws what a model in training predicts for a few held-out pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from odise_rt.vocabulary import Vocabulary
from training.data.coco_panoptic import CocoPanoptic, PanopticExample
from training.distributed import rank
from training.evaluation import data_vocabulary
from training.models.odise import Odise
from training.picture_page import side_by_side
from training.torch_stages import torch_segmenter

PICTURES = 4
"""Pictures of a sheet, as far as there are so many."""


class ExamplePictures:
    """Writes one sheet of pictures, predictions and truths at a time."""

    def __init__(
        self,
        model: Odise,
        tokenizer_json: str,
        training_vocabulary: Sequence[str],
        data: CocoPanoptic,
        examples: Sequence[PanopticExample],
        folder: Path,
        classes: Vocabulary | None = None,
    ) -> None:
        """Prepare sheets of ``examples``, pictures of ``data``, named with all its classes, or other words for them."""
        self.model = model
        self.tokenizer_json = tokenizer_json
        self.training_vocabulary = tuple(training_vocabulary)
        self.data = data
        self.examples = examples
        self.vocabulary = data_vocabulary(data.categories, classes)
        self.folder = folder

    def __call__(self, step: int) -> Path:
        """Write ``FOLDER/STEP.jpg`` and leave the model in the mode it was in; returns the path.

        Processes that share a model call this together, and the first one writes.
        """
        training = self.model.training
        self.model.eval()
        rows = []
        with torch_segmenter(self.model, self.tokenizer_json, self.training_vocabulary) as segmenter:
            for example in self.examples:
                rows.append(side_by_side(example, segmenter.segment(example.image, self.vocabulary), self.data))
        self.model.train(training)
        sheet = Image.new("RGB", (max(r.width for r in rows), sum(r.height + 8 for r in rows)), "white")
        top = 0
        for row in rows:
            sheet.paste(row, (0, top))
            top += row.height + 8
        path = self.folder / f"{step:06d}.jpg"
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.save(path, quality=88)
        return path
