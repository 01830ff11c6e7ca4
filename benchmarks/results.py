"""The one JSON format of every benchmark: a run, and its results with all that a reader needs to judge each number.

::

    RUN.json   schema, suite, environment, clocks, rates, model, notes, fits, results
    result     key, group, variant, label, status (ok | failed | oom | absent), reason
               samples in seconds and their summary, ratio to another result of the same round
               stages: seconds, FLOPs, bytes, share of the measured roofline
               facts: threads, precision, size, windows, words, engine, bundle hash, peak memory ...
               accuracy: panoptic quality and pixel agreement beside the speed

A result that failed stays in the list with the reason, so that a report cannot leave it out by accident.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.harness import Summary, paired_ratio, write_results
from benchmarks.machine import Rates
from odise_rt.errors import OdiseError

SCHEMA = 1
KIND = "odise_rt-benchmark"
MAX_BYTES = 64 << 20

Status = Literal["ok", "failed", "oom", "absent"]

_PATHS = re.compile(r"(?<![\w.])(?:/(?:[\w.@+-]+/)+[\w.@+-]*|[A-Za-z]:\\[^\s'\"]+)")
_URLS = re.compile(r"\b[a-z][a-z0-9+.-]*://\S+")


class ResultsError(OdiseError, ValueError):
    """A results file that is missing, of another kind, or contradicts itself."""


@dataclass(frozen=True)
class Ratio:
    """Time of one result over another's, paired by round."""

    to: str
    """Key of the other result."""
    summary: Summary
    """Order statistics of the ratios of samples of the same round."""


@dataclass(frozen=True)
class Result:
    """One measurement, or the reason why there is none."""

    key: str
    """Identity across runs, e.g. ``"peers/256x256/runtime"``."""
    group: str
    """Which table and plot it belongs to."""
    variant: str
    label: str
    """What was measured, in words for readers who do not know the code."""
    status: Status = "ok"
    reason: str = ""
    """Why there are no samples; without paths."""
    samples: tuple[float, ...] = ()
    """Seconds; for other units see ``facts["unit"]``."""
    summary: Summary | None = None
    ratio: Ratio | None = None
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage to median seconds and, where known, flops, bytes and roofline share."""
    facts: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ResultsError(f"{self.key}: status is {self.status!r}, expected one of {get_args(Status)}")
        if (self.status == "ok") != (self.summary is not None):
            raise ResultsError(f"{self.key}: a result has a summary exactly if its status is ok, not {self.status!r}")
        if self.status != "ok" and not self.reason:
            raise ResultsError(f"{self.key}: a result without samples needs a reason")

    @property
    def seconds(self) -> float:
        """The median; only of a result that is ok."""
        assert self.summary is not None, self.key
        return self.summary.median

    @classmethod
    def measured(cls, key: str, label: str, samples: Sequence[float], **parts: Any) -> Result:
        """A result that has samples; group and variant are the first and last part of its key."""
        group, variant = key.split("/", 1)[0], key.rsplit("/", 1)[-1]
        return cls(key, group, variant, label, samples=tuple(samples), summary=Summary.of(samples), **parts)

    @classmethod
    def missing(cls, key: str, label: str, status: Status, reason: str, **parts: Any) -> Result:
        """A result that has none; paths in the reason are cut out."""
        group, variant = key.split("/", 1)[0], key.rsplit("/", 1)[-1]
        return cls(key, group, variant, label, status=status, reason=without_places(reason), **parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of :meth:`from_dict`."""
        data = dataclasses.asdict(self)
        data["samples"] = [float(f"{s:.6g}") for s in self.samples]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Rebuild from JSON; raises :class:`ResultsError` when malformed."""
        try:
            values = dict(data)
            values["samples"] = tuple(float(s) for s in values["samples"])
            if values["summary"] is not None:
                values["summary"] = Summary.from_dict(values["summary"])
            if values["ratio"] is not None:
                values["ratio"] = Ratio(values["ratio"]["to"], Summary.from_dict(values["ratio"]["summary"]))
            return cls(**values)
        except (KeyError, TypeError, ValueError) as exc:
            raise ResultsError(f"a result is malformed ({exc}): measure again with python -m benchmarks.run") from exc


@dataclass
class Run:
    """All results of one command."""

    suite: str
    command: str
    """The command as one would type it in a clone, without paths."""
    quick: bool
    environment: dict[str, Any]
    rates: list[Rates] = field(default_factory=list)
    """Rates of the CPU, measured at the start and at the end."""
    gpu_rates: Rates | None = None
    """Rates of the GPU, where a precision stands in place of a library."""
    clocks: list[dict[str, Any]] = field(default_factory=list)
    """Clock rates and load, as read at the start, between groups and at the end."""
    model: dict[str, Any] = field(default_factory=dict)
    """Configuration, source of the weights, bundles with their hashes, and costs of each structure's stages."""
    fits: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name to slope, intercept and R² of a straight line through a group's medians."""
    notes: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    """What the whole command took."""

    @property
    def best_rates(self) -> Rates:
        """The best of all rates of the run: the highest roofline, hence the smallest shares."""
        if not self.rates:
            raise ResultsError("the run has no rates of the machine: measure again with python -m benchmarks.run")
        libraries = {name for rate in self.rates for name in rate.matmul_gflops}
        matmul = {name: max(r.matmul_gflops.get(name, 0.0) for r in self.rates) for name in sorted(libraries)}
        return Rates(matmul, max(r.copy_gbps for r in self.rates))

    def group(self, name: str) -> list[Result]:
        """The results of one group, in order."""
        return [result for result in self.results if result.group == name]

    def find(self, key: str) -> Result | None:
        """The result of that key, if any."""
        return next((result for result in self.results if result.key == key), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the inverse of :meth:`from_dict`."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["rates"] = [rate.to_dict() for rate in self.rates]
        data["gpu_rates"] = None if self.gpu_rates is None else self.gpu_rates.to_dict()
        data["results"] = [result.to_dict() for result in self.results]
        return {"schema": SCHEMA, "kind": KIND, **data}

    @classmethod
    def from_dict(cls, data: Any, name: str = "the run") -> Run:
        """Rebuild from JSON.

        Raises:
            ResultsError: it is no run, is of another version, or is malformed.
        """
        if not isinstance(data, Mapping) or data.get("kind") != KIND:
            raise ResultsError(f"{name} is no benchmark run: expected JSON written by python -m benchmarks.run")
        if data.get("schema") != SCHEMA:
            raise ResultsError(
                f"{name} has schema {data.get('schema')!r}, this version reads {SCHEMA}: measure again, or use the "
                "version that wrote it"
            )
        values = {key: value for key, value in data.items() if key not in ("schema", "kind")}
        try:
            values["rates"] = [Rates(**rate) for rate in values["rates"]]
            values["gpu_rates"] = None if values["gpu_rates"] is None else Rates(**values["gpu_rates"])
            values["results"] = [Result.from_dict(result) for result in values["results"]]
            run = cls(**values)
        except (KeyError, TypeError) as exc:
            raise ResultsError(f"{name} is malformed ({exc}): measure again with python -m benchmarks.run") from exc
        keys = [result.key for result in run.results]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ResultsError(f"{name} holds {twice} more than once: one of them would be lost in a comparison")
        return run

    def save(self, path: Path) -> None:
        """Write beside and rename."""
        write_results(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a file; raises :class:`ResultsError`."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ResultsError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not a benchmark run")
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise ResultsError(f"cannot read {path} ({exc.strerror}): check the path") from exc
        except (ValueError, RecursionError) as exc:
            raise ResultsError(f"{path} is not valid JSON ({exc}): measure again") from exc
        return cls.from_dict(data, str(path))


def add_ratios(results: Iterable[Result], base: str) -> list[Result]:
    """The results with their paired ratio to the result of the key ``base``, where both have as many samples."""
    results = list(results)
    reference = next((r for r in results if r.key == base and r.status == "ok"), None)
    if reference is None:
        return results

    def with_ratio(result: Result) -> Result:
        if result.status != "ok" or len(result.samples) != len(reference.samples):
            return result
        return dataclasses.replace(result, ratio=Ratio(base, paired_ratio(result.samples, reference.samples)))

    return [with_ratio(result) for result in results]


def without_places(text: str) -> str:
    """Text with folders and addresses cut out: of a path its last part stays."""
    text = _URLS.sub("<address>", text)
    return _PATHS.sub(lambda match: re.split(r"[/\\]", match.group(0).rstrip("/\\"))[-1], text).strip()
