"""What defines a training run, as frozen dataclasses. Experiments are Python files in :mod:`training.configs`."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import pkgutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import training.configs
from odise_rt.errors import ConfigError
from training.config import OdiseConfig
from training.data.transforms import JitterOptions
from training.losses import CriterionOptions

Precision = Literal["fp32", "bf16", "fp16"]
Decay = Literal["steps", "linear"]


def _check(what: str, *conditions: tuple[object, str]) -> None:
    for holds, message in conditions:
        if not holds:
            raise ConfigError(f"{what}: {message}")


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one kind of views."""

    iterations: int
    batch: int
    """Views of a step over all processes."""
    jitter: JitterOptions
    cached_views: int = 0
    """With N > 0, N views are drawn once and what the frozen networks compute of them is kept on disk; 0 augments anew
    at every step."""
    cached_view_seed: int | None = None
    """Seed of the views that are kept, for runs with different seeds to share them; None: the experiment's."""


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW with linear warm-up and two steps down (odise.md 7)."""

    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    """Not applied to norm layers and biases."""
    clip_norm: float = 0.01
    """Upper bound on the norm of the whole gradient."""
    warmup: float = 500 / 184375
    """Share of all iterations in which the rate rises linearly."""
    warmup_factor: float = 0.067
    """Share of the rate at the first iteration."""
    milestones: tuple[float, ...] = (163889 / 184375, 177546 / 184375)
    """Shares of all iterations after which the rate is divided by ten; of no meaning to linear decay."""
    decay: Decay = "steps"
    """How the rate falls: in steps at the milestones, as published, or "linear", from the warm-up to 0 at the end."""
    matrix_rate: float | None = None
    """With a rate, Muon (:mod:`training.muon`) moves the weight matrices, on the schedule of the other rate, and AdamW
    the rest; None: AdamW moves everything, as published."""

    def __post_init__(self) -> None:
        rates = [rate for rate in (self.learning_rate, self.matrix_rate) if rate is not None]
        _check(
            "optimizer",
            (self.decay in get_args(Decay), f"decay is {self.decay!r}: expected 'steps' or 'linear'"),
            (all(0 < rate < math.inf for rate in rates), f"rates are {rates}: expected above 0"),
            (0 <= self.weight_decay < math.inf, f"weight_decay is {self.weight_decay}: expected at least 0"),
            (0 < self.clip_norm < math.inf, f"clip_norm is {self.clip_norm}: expected above 0"),
            (0 <= self.warmup < 1, f"warmup is {self.warmup}: expected a share of all iterations, below 1"),
            (0 <= self.warmup_factor <= 1, f"warmup_factor is {self.warmup_factor}: expected 0 to 1"),
        )


@dataclass(frozen=True)
class Experiment:
    """A whole training run."""

    name: str
    model: OdiseConfig
    phases: tuple[Phase, ...]
    criterion: CriterionOptions = field(default_factory=CriterionOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    precision: Precision = "fp32"
    cropped_out_targets: bool = False
    """Segments of which a crop left nothing stay targets with empty masks, as published: a query learns the class of
    what it cannot see, and losses are divided by more masks. False: they are left out."""
    gradient_checkpointing: bool = False
    """Recompute UNet and feature projections in the backward pass instead of keeping their activations."""
    random_unet_seed: int | None = None
    """As an ablation, the UNet gets random weights of this seed in place of the frozen checkpoint's."""
    seed: int = 42
    save_every: int = 1000
    """Iterations between saved states."""
    picture_every: int = 1000
    """Iterations between pages of example predictions."""

    def __post_init__(self) -> None:
        title = f"experiment {self.name!r}"
        whole = self.phases and all(p.iterations >= 1 and p.batch >= 1 and p.cached_views >= 0 for p in self.phases)
        _check(
            title,
            (whole, "phases need at least one iteration and one view a batch"),
            (self.precision in get_args(Precision), f"precision is {self.precision!r}: expected fp32, bf16 or fp16"),
            (self.seed >= 0, f"seed is {self.seed}: expected at least 0"),
            (self.save_every >= 1, f"save_every is {self.save_every}: expected at least 1"),
            (self.picture_every >= 1, f"picture_every is {self.picture_every}: expected at least 1"),
        )
        divisor, window = self.model.size_divisor, self.model.window
        for crop, cached in ((phase.jitter.crop, phase.cached_views) for phase in self.phases):
            _check(
                title,
                (crop % divisor == 0, f"crop {crop} is no multiple of the model's size_divisor {divisor}"),
                (
                    not cached or crop % window == 0,
                    f"a cached phase needs crops that whole windows of {window} cover, not {crop}",
                ),
            )

    @property
    def iterations(self) -> int:
        """Iterations of all phases."""
        return sum(phase.iterations for phase in self.phases)

    def phase_at(self, step: int) -> tuple[int, int]:
        """Index of the phase of iteration ``step`` (from 0), and the iteration's number inside it."""
        for index, phase in enumerate(self.phases):
            if step < phase.iterations:
                return index, step
            step -= phase.iterations
        raise ConfigError(f"iteration {step} lies behind the last phase of experiment {self.name!r}")

    def learning_rate(self, step: int) -> float:
        """Rate of iteration ``step``."""
        options, share = self.optimizer, step / self.iterations
        rate = options.learning_rate
        if share < options.warmup:
            rate *= options.warmup_factor + (1 - options.warmup_factor) * share / options.warmup
        if options.decay == "linear":
            return rate * min(1.0, (1 - share) / (1 - options.warmup))
        return rate * 0.1 ** sum(share >= milestone for milestone in options.milestones)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, stored with every run."""
        return dataclasses.asdict(self)

    def is_described_by(self, stored: Any) -> bool:
        """Whether what :meth:`to_dict` once gave, read back from JSON, is this experiment.

        Fields that the stored description lacks are younger than it: they must have their default here.
        """
        return _describes(stored, self)


def _describes(stored: Any, value: Any) -> bool:
    if dataclasses.is_dataclass(value):
        fields = {item.name: item for item in dataclasses.fields(value)}
        if not isinstance(stored, dict) or not set(stored) <= set(fields):
            return False
        return all(
            _describes(stored[name], getattr(value, name)) if name in stored else getattr(value, name) == item.default
            for name, item in fields.items()
        )
    if isinstance(value, tuple):
        same_length = isinstance(stored, list) and len(stored) == len(value)
        return same_length and all(_describes(*pair) for pair in zip(stored, value, strict=True))
    return bool(stored == value)


def experiment(name: str) -> Experiment:
    """The experiment of ``training/configs/<name>.py``, or of a file of the caller's own whose path ends in ``.py``.

    The file is run: it is Python code, with a function ``experiment()`` as those in ``training/configs`` have.

    Raises:
        ConfigError: an unknown name, or a file that is missing or has no such function.
    """
    if name.endswith(".py"):
        return _experiment_of_file(Path(name))
    known = sorted(module.name for module in pkgutil.iter_modules(training.configs.__path__))
    if name not in known:
        raise ConfigError(f"unknown experiment {name!r}: expected one of {', '.join(known)}, or a file NAME.py")
    found: Experiment = importlib.import_module(f"training.configs.{name}").experiment()
    return found


def _experiment_of_file(path: Path) -> Experiment:
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: expected a Python file with a function experiment()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, "experiment", None)
    found = make() if callable(make) else None
    if not isinstance(found, Experiment):
        raise ConfigError(f"{path} has no function experiment() that returns an Experiment: see training/configs")
    return found


def changed(
    found: Experiment, iterations: int | None = None, batch: int | None = None, learning_rate: float | None = None
) -> Experiment:
    """An experiment with other numbers, where they are given.

    Raises:
        ConfigError: iterations or batch of an experiment of several phases, each of which has its own.
    """
    given = (("iterations", iterations), ("batch", batch))
    sizes: dict[str, Any] = {key: value for key, value in given if value is not None}
    if sizes and len(found.phases) > 1:
        raise ConfigError(
            f"experiment {found.name!r} has {len(found.phases)} phases, each with its own {' and '.join(sizes)}: "
            "write them into a file of your own"
        )
    phases = tuple(dataclasses.replace(phase, **sizes) for phase in found.phases)
    rate = found.optimizer.learning_rate if learning_rate is None else learning_rate
    optimizer = dataclasses.replace(found.optimizer, learning_rate=rate)
    return dataclasses.replace(found, phases=phases, optimizer=optimizer)
