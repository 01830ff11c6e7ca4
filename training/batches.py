"""Sources of the batches of a phase: a feature cache, or pictures augmented on the fly by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from odise_rt.errors import DatasetError, OdiseError
from training.data.views import EpochOrder, TrainingViews, View, ViewBatch, collate_views
from training.feature_cache import FeatureCache
from training.training_step import StepInput
from training.words import WordEmbedder


class BatchSource(Protocol):
    """Yields the batches for a sequence of draw lists."""

    def batches(self, draws: Sequence[Sequence[int]]) -> Iterator[StepInput]:
        """One input for each list of draw numbers."""
        ...


def with_words(batch: ViewBatch, step: StepInput, embedder: WordEmbedder | None) -> StepInput:
    """Add the caption words' text embeddings, for the caption variant."""
    if embedder is None:
        return step
    count = len(batch.words[0])
    flat = embedder([word for words in batch.words for word in words])
    return StepInput(
        step.side, step.targets, step.images, step.features, flat.unflatten(0, (-1, count)), batch.words_valid
    )


class CachedBatches:
    """Batches out of a :class:`FeatureCache`, in shuffled epochs over its views."""

    def __init__(self, cache: FeatureCache, side: int, seed: int, embedder: WordEmbedder | None) -> None:
        self.cache = cache
        self.side = side
        self.seed = seed
        self.embedder = embedder
        self.order = EpochOrder(len(cache), seed)

    def batches(self, draws: Sequence[Sequence[int]]) -> Iterator[StepInput]:
        """One input for each list of draw numbers."""
        for numbers in draws:
            indices = [self.order(draw) for draw in numbers]
            views = [self.cache.view(index) for index in indices]
            batch = collate_views(views, numbers, self.seed)
            step = StepInput(self.side, batch.targets, features=self.cache.features(indices))
            yield with_words(batch, step, self.embedder)


class _Draws(Dataset[tuple[int, View] | OdiseError]):
    """Gives the draw number along with its view, so that the order of arrival does not matter.

    An error of the data set is a result, too: one that a worker process raises arrives with a traceback as its message.
    """

    def __init__(self, views: TrainingViews) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, draw: int) -> tuple[int, View] | OdiseError:
        try:
            return draw, self.views[draw]
        except OdiseError as exc:
            return exc


class LiveBatches:
    """Batches augmented at every step, by worker processes where asked for."""

    def __init__(self, views: TrainingViews, side: int, embedder: WordEmbedder | None, workers: int) -> None:
        self.views = views
        self.side = side
        self.embedder = embedder
        self.workers = workers

    def batches(self, draws: Sequence[Sequence[int]]) -> Iterator[StepInput]:
        """One input for each list of draw numbers.

        Raises:
            DatasetError: a picture or annotation is broken, or a worker process was killed.
        """
        loader: DataLoader[ViewBatch | OdiseError] = DataLoader(
            _Draws(self.views),
            batch_sampler=[list(numbers) for numbers in draws],
            num_workers=self.workers,
            collate_fn=_Collate(self.views.seed),
            persistent_workers=False,
            pin_memory=torch.cuda.is_available(),
        )
        try:
            for batch in loader:
                if isinstance(batch, OdiseError):
                    raise batch
                yield with_words(batch, StepInput(self.side, batch.targets, images=batch.images), self.embedder)
        except RuntimeError as exc:
            if "DataLoader worker" not in str(exc):
                raise
            raise DatasetError(
                f"a data worker died ({exc}): often the machine ran out of memory; use fewer --workers and --resume"
            ) from exc


class _Collate:
    """Picklable collation with the run's seed; a batch with errors becomes the first of them."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, items: Sequence[tuple[int, View] | OdiseError]) -> ViewBatch | OdiseError:
        good = [item for item in items if not isinstance(item, OdiseError)]
        if len(good) < len(items):
            return next(item for item in items if isinstance(item, OdiseError))
        return collate_views([view for _, view in good], [draw for draw, _ in good], self.seed)
