"""What training reads of a data set: augmented views, each a function of (seed, draw number) alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from odise_rt.errors import DatasetError
from training.data.picture_files import ImageId
from training.data.transforms import JitterOptions, large_scale_jitter
from training.losses.targets import SegmentTargets, collate_targets
from training.noun_phrases import caption_words

_SEED_STRIDE = 2_147_483_647
MAX_SEGMENTS = np.iinfo(np.uint16).max
"""Most segments of a view: :attr:`View.segment_index` cannot tell more apart."""


class SegmentLike(Protocol):
    """A segment of a panoptic annotation."""

    @property
    def id(self) -> int: ...
    @property
    def category_id(self) -> int: ...
    @property
    def iscrowd(self) -> bool: ...


class ExampleLike(Protocol):
    """An annotated picture as the readers in :mod:`training.data` give it."""

    @property
    def image_id(self) -> ImageId: ...
    @property
    def image(self) -> npt.NDArray[np.uint8]: ...
    @property
    def segment_map(self) -> npt.NDArray[np.int32]: ...
    @property
    def segments(self) -> Sequence[SegmentLike]: ...
    @property
    def captions(self) -> Sequence[str]: ...


class PanopticData(Protocol):
    """A panoptic data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> ExampleLike: ...


@dataclass(frozen=True)
class View:
    """One augmented picture."""

    image: npt.NDArray[np.uint8]
    """(S, S, 3) RGB."""
    segment_index: npt.NDArray[np.uint16]
    """(S, S): 0 = no segment, else 1 + index into ``labels``."""
    labels: tuple[int, ...]
    """Class index of each segment; one may have no pixel (``TrainingViews.cropped_out_targets``)."""
    words: tuple[str, ...]
    """Noun phrases of one caption, drawn with replacement; empty strings where there are none."""
    words_valid: bool
    image_id: ImageId


def draw_seed(seed: int, draw: int) -> int:
    """Seed of one draw's augmentation, words and loss points."""
    return (seed * _SEED_STRIDE + draw * 2_654_435_761) % 2**62


class EpochOrder:
    """Order of the pictures: a fresh permutation for each epoch, computed from seed and epoch alone.

    Stateless, so a resumed run continues exactly where the interrupted one stopped.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise DatasetError("the data set has no picture to train on")
        self.size = size
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def __call__(self, draw: int) -> int:
        """Index of the picture of draw number ``draw``."""
        epoch, position = divmod(draw, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(draw_seed(self.seed, epoch) + 1)
            self._order = torch.randperm(self.size, generator=generator)
            self._epoch = epoch
        return int(self._order[position])


class TrainingViews(torch.utils.data.Dataset[View]):
    """Views by draw number. Categories outside ``class_of`` and crowds become background."""

    def __init__(
        self,
        data: PanopticData,
        class_of: dict[int, int],
        jitter: JitterOptions,
        seed: int,
        cropped_out_targets: bool = False,
    ) -> None:
        """Wrap a data set.

        Args:
            data: annotated pictures.
            class_of: category id to training class index.
            jitter: augmentation.
            seed: of all random choices.
            cropped_out_targets: segments of which the crop left nothing are targets, too, with empty masks.
        """
        self.data = data
        self.class_of = class_of
        self.jitter = jitter
        self.seed = seed
        self.cropped_out_targets = cropped_out_targets
        self.order = EpochOrder(len(data), seed)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: int) -> View:
        """View number ``draw``, which may exceed the length: later draws are later epochs."""
        example = self.data[self.order(draw)]
        random_numbers = random.Random(draw_seed(self.seed, draw))
        image, ids = large_scale_jitter(example.image, example.segment_map, self.jitter, random_numbers)
        present = set(np.unique(ids).tolist())
        index = np.zeros(ids.shape, dtype=np.uint16)
        labels: list[int] = []
        for segment in example.segments:
            kept = self.cropped_out_targets or segment.id in present
            if kept and not segment.iscrowd and segment.category_id in self.class_of:
                if len(labels) == MAX_SEGMENTS:
                    raise DatasetError(
                        f"image id {example.image_id} has more than {MAX_SEGMENTS} segments in one view: at most "
                        "as many can be trained on"
                    )
                labels.append(self.class_of[segment.category_id])
                index[ids == segment.id] = len(labels)
        words, valid = caption_words(example.captions, random_numbers)
        return View(image, index, tuple(labels), tuple(words), valid, example.image_id)


@dataclass(frozen=True)
class ViewBatch:
    """Views of one step on this process."""

    images: Tensor
    """(B, 3, S, S) uint8."""
    targets: SegmentTargets
    words: tuple[tuple[str, ...], ...]
    words_valid: Tensor
    """(B,) bool."""
    draws: tuple[int, ...]

    def pin_memory(self) -> ViewBatch:
        """A copy in page-locked memory; PyTorch's data loader calls this."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())


def collate_views(views: Sequence[View], draws: Sequence[int], seed: int) -> ViewBatch:
    """Stack views of one size.

    Args:
        views: one for each draw.
        draws: draw numbers; they seed the loss points.
        seed: of the run.
    """
    images = torch.from_numpy(np.stack([view.image for view in views])).permute(0, 3, 1, 2)
    targets = collate_targets(
        [torch.from_numpy(view.segment_index.astype(np.int32)) for view in views],  # PyTorch compares no uint16
        [torch.tensor(view.labels, dtype=torch.int64) for view in views],
        [view.image_id for view in views],
        [draw_seed(seed, draw) for draw in draws],
    )
    valid = torch.tensor([view.words_valid for view in views])
    return ViewBatch(images, targets, tuple(view.words for view in views), valid, tuple(draws))
