"""One implementation in a process of its own, driven over pipes: its memory and its caches are its own.

``python -m benchmarks.worker JOB`` with a JSON object of :class:`Job`. It answers one JSON line when it is ready and
one for every line that it reads from standard input; it ends with the input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIANTS = {
    "official": "official structure, PyTorch eager",
    "pruned": "our pruned structure, PyTorch eager",
    "runtime": "odise_rt, ONNX Runtime",
}


class WorkerError(RuntimeError):
    """A worker ended or answered something else than a result."""


@dataclass(frozen=True)
class Job:
    """What a worker runs."""

    variant: str
    """A key of :data:`VARIANTS`."""
    source: dict[str, Any]
    """``{"checkpoint": DIR}`` or ``{"config": NAME, "seed": N}`` for PyTorch, ``{"bundle": DIR}`` for the runtime."""
    height: int
    width: int
    """Pixels of the image; it is not resized further."""
    words: str
    """Vocabulary; its embeddings are cached before the first measurement."""
    threads: int


def main(argv: list[str] | None = None) -> int:
    """Serve one job."""
    job = Job(**json.loads((argv if argv is not None else sys.argv[1:])[0]))
    os.environ["OMP_NUM_THREADS"] = str(job.threads)
    started = time.perf_counter()
    with _segmenter(job) as segmenter:
        from odise_rt.options import SegmentOptions
        from odise_rt.vocabulary import Vocabulary

        words = Vocabulary.parse(job.words)
        segmenter.prepare(words)
        image = picture(job.height, job.width)
        options = SegmentOptions(
            short_edge=min(job.height, job.width), long_edge=max(job.height, job.width), overlap_threshold=0.0
        )
        load_peak = peak_rss()
        _reset_peak()
        _answer({"ready": True, "load_seconds": time.perf_counter() - started, "load_peak_bytes": load_peak})
        for _line in sys.stdin:
            start = time.perf_counter()
            result = segmenter.segment(image, words, options)
            seconds = time.perf_counter() - start
            _answer(
                {
                    "seconds": seconds,
                    "stages": result.facts.seconds,
                    "engine": result.facts.engine,
                    "windows": result.facts.windows,
                    "segments": [[s.label, s.area] for s in result.segments],
                    "peak_bytes": peak_rss(),
                }
            )
    return 0


def picture(height: int, width: int) -> Any:
    """A smooth, colourful image that every variant sees: uint8 ``(height, width, 3)``."""
    import numpy as np

    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phases = np.random.default_rng(7).uniform(0.0, 6.28, (3, 4))
    scales = np.random.default_rng(8).uniform(0.005, 0.06, (3, 4, 2))
    channels = [
        sum(np.sin(a * y + b * x + p) for (a, b), p in zip(scale, phase, strict=True))
        for scale, phase in zip(scales, phases, strict=True)
    ]
    return np.clip(np.stack(channels, axis=2) * 32.0 + 128.0, 0, 255).astype(np.uint8)


@contextlib.contextmanager
def _segmenter(job: Job) -> Iterator[Any]:
    if job.variant == "runtime":
        from odise_rt.segmenter import Segmenter

        with Segmenter.load(job.source["bundle"], device="cpu", threads=job.threads) as segmenter:
            yield segmenter
        return
    import torch

    from training.checkpoints import load_checkpoint
    from training.initialization import random_checkpoint
    from training.torch_stages import torch_segmenter

    torch.set_num_threads(job.threads)
    if "checkpoint" in job.source:
        loaded = load_checkpoint(Path(job.source["checkpoint"]))
    else:
        loaded = random_checkpoint(job.source["config"], job.source["seed"])
    if job.variant == "official":
        loaded.model.structure = "official"
    else:
        loaded.model.drop_sd_text()
    with torch_segmenter(loaded.model, loaded.tokenizer_json, loaded.training_vocabulary) as segmenter:
        yield segmenter


def peak_rss() -> int:
    """Largest resident size of this process in bytes since it was last reset."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # elsewhere than on Linux the peak includes loading
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _answer(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


class Worker:
    """The other end of the pipe."""

    def __init__(self, job: Job) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(job.threads)}
        self.job = job
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(dataclasses.asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ready = self._read()

    def run(self) -> dict[str, Any]:
        """One image; the answer as the worker gave it."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(
                f"the worker for {self.job.variant!r} ended with status {self._process.wait()}: see its message above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


if __name__ == "__main__":
    raise SystemExit(main())
