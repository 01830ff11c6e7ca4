"""What is compared: the rows of the table, the training run behind each, and what the paper says of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from odise_rt.errors import OptionsError
from training.config import OdiseConfig, caption_variant
from training.experiment import Experiment

Classification = Literal["published", "diffusion", "clip"]
CLIP_WEIGHTS: dict[Classification, float | None] = {"published": None, "diffusion": 0.0, "clip": 1.0}
"""CLIP's weight for seen and unseen classes alike; None: the model's own two."""

RANDOM_UNET_SEED = 7


@dataclass(frozen=True)
class Row:
    """One row: a training run, and how its masks are classified."""

    group: str
    name: str
    title: str
    run: str
    """Key of :data:`RUNS`; rows that share a run share its training."""
    classification: Classification = "published"

    @property
    def id(self) -> str:
        """``group/name``."""
        return f"{self.group}/{self.name}"


@dataclass(frozen=True)
class Claim:
    """Something that the paper says: one row of a group does better than another."""

    group: str
    better: str
    worse: str
    metric: str
    """Key of :data:`METRICS`."""


METRICS = {"pq": "PQ", "pq_seen": "PQ seen", "pq_unseen": "PQ unseen", "miou": "mIoU", "ap": "mask AP"}
"""Metrics of every row, by their key, with their titles."""

GROUPS = {
    "conditioning": "What the UNet is told of the picture",
    "features": "Where the features come from",
    "classification": "What names the masks",
    "supervision": "What the heads learn from",
    "timestep": "At which diffusion step features are read",
}

ROWS = (
    Row("conditioning", "implicit", "implicit captioner", "base"),
    Row("conditioning", "empty", "empty caption", "empty_caption"),
    Row("conditioning", "caption", "the true caption", "true_caption"),
    Row("features", "diffusion", "diffusion", "base"),
    Row("features", "clip", "CLIP image tokens", "clip_features"),
    Row("features", "random_unet", "random UNet", "random_unet"),
    Row("classification", "diffusion", "diffusion only", "base", "diffusion"),
    Row("classification", "clip", "CLIP only", "base", "clip"),
    Row("classification", "both", "both", "base"),
    Row("supervision", "label", "labels", "base"),
    Row("supervision", "caption", "captions", "caption_supervision"),
    Row("timestep", "0", "t = 0", "base"),
    Row("timestep", "100", "t = 100", "t100"),
    Row("timestep", "300", "t = 300", "t300"),
)

CLAIMS = (
    Claim("conditioning", "implicit", "empty", "pq"),
    Claim("conditioning", "implicit", "caption", "pq"),
    Claim("features", "diffusion", "clip", "pq"),
    Claim("features", "diffusion", "random_unet", "pq"),
    Claim("classification", "both", "diffusion", "pq"),
    Claim("classification", "both", "clip", "pq"),
    Claim("supervision", "label", "caption", "pq_seen"),
    Claim("supervision", "caption", "label", "pq_unseen"),
    Claim("timestep", "0", "100", "pq"),
    Claim("timestep", "0", "300", "pq"),
)
"""The paper's captions (conditioning) are BLIP's; a random UNet is this repository's own control."""


def _model(experiment: Experiment, **changes: object) -> Experiment:
    model: OdiseConfig = dataclasses.replace(experiment.model, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(experiment, model=model)


RUNS: dict[str, Callable[[Experiment], Experiment]] = {
    "base": lambda base: base,
    "empty_caption": lambda base: _model(base, conditioning="empty"),
    "true_caption": lambda base: _model(base, conditioning="caption"),
    "clip_features": lambda base: _model(base, features="clip", conditioning="empty"),
    "random_unet": lambda base: dataclasses.replace(base, random_unet_seed=RANDOM_UNET_SEED),
    "caption_supervision": lambda base: dataclasses.replace(base, model=caption_variant(base.model)),
    "t100": lambda base: _model(base, timestep=100),
    "t300": lambda base: _model(base, timestep=300),
}
"""The trainings, as changes of the base experiment."""


def variant(base: Experiment, run: str, seed: int) -> Experiment:
    """The experiment of a run: the base with the run's one change, under names that say so."""
    changed = RUNS[run](base)
    model = dataclasses.replace(changed.model, name=f"{base.model.name} ({run})")
    return dataclasses.replace(changed, name=f"{base.name} ({run})", model=model, seed=seed)


def with_budget(experiment: Experiment, iterations: int) -> Experiment:
    """The experiment in ``iterations`` steps: phases keep their shares, and no more views are cached than are read.

    Views are those of the experiment's own seed, so that runs with other seeds share them; seeds then decide initial
    weights, the order of the batches, and the points at which losses are sampled.
    """
    count = len(experiment.phases)
    if iterations < count:
        raise OptionsError(f"--iterations is {iterations}: expected at least {count}, one for each phase")
    ends = [0]
    total = 0
    for index, phase in enumerate(experiment.phases):
        total += phase.iterations
        share = round(iterations * total / experiment.iterations)
        ends.append(min(max(share, ends[-1] + 1), iterations - (count - 1 - index)))
    phases = []
    for index, phase in enumerate(experiment.phases):
        steps = ends[index + 1] - ends[index]
        views = min(phase.cached_views, steps * phase.batch)
        view_seed = experiment.seed + 1000 * index if views else None
        phases.append(dataclasses.replace(phase, iterations=steps, cached_views=views, cached_view_seed=view_seed))
    return dataclasses.replace(
        experiment, phases=tuple(phases), save_every=min(experiment.save_every, max(1, iterations // 4))
    )


def chosen_rows(only: str | None) -> tuple[Row, ...]:
    """Rows by ``--only``: comma-separated groups or ids; None: all.

    Raises:
        OptionsError: a name that is neither.
    """
    if only is None:
        return ROWS
    wanted: Collection[str] = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in GROUPS and name not in {row.id for row in ROWS}]
    if unknown or not wanted:
        raise OptionsError(
            f"--only has {unknown or 'nothing'}: expected groups ({', '.join(GROUPS)}) or rows "
            f"({', '.join(row.id for row in ROWS)})"
        )
    return tuple(row for row in ROWS if row.group in wanted or row.id in wanted)
