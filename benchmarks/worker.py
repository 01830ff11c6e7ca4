"""One implementation in a process of its own, driven over pipes: its memory and its caches are its own.

``python -m benchmarks.worker JOB`` with a JSON object of :class:`benchmarks.variants.Job`. It answers one JSON line
when it is ready and one for every request, a JSON line on its standard input; it ends with the input. :class:`Worker`
is the other end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.results import Status, without_places
from benchmarks.timed_picture import picture
from benchmarks.variants import VARIANTS, Job, open_segmenter

if TYPE_CHECKING:
    import numpy as np

    from odise_rt.options import SegmentOptions
    from odise_rt.results import PanopticResult
    from odise_rt.segmenter import Segmenter
    from odise_rt.vocabulary import Vocabulary

__all__ = ["VARIANTS", "Job", "Worker", "WorkerError", "word_list"]


class WorkerError(RuntimeError):
    """A worker ended, or a request to it failed."""

    def __init__(self, message: str, status: Status = "failed") -> None:
        super().__init__(message)
        self.status: Status = status


# ---- inside the process ----------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Serve one job."""
    job = Job(**json.loads((argv if argv is not None else sys.argv[1:])[0]))
    started = time.perf_counter()
    # What libraries print must not get between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        with open_segmenter(job) as segmenter:
            served = _Served(segmenter, job)
            served.prepare_words(job.words)
            load_peak = peak_rss()
            _reset_peak()
            answer({"ready": True, "load_seconds": time.perf_counter() - started, "load_peak_bytes": load_peak})
            for line in sys.stdin:
                request = json.loads(line)
                call: Callable[..., dict[str, Any]] = getattr(served, f"do_{request.pop('op')}")
                try:
                    answer(call(**request))
                except Exception as exc:  # becomes a row of the report; the worker goes on
                    answer(_failure(exc))
    except Exception as exc:
        answer(_failure(exc))
        return 1
    return 0


def _failure(exc: Exception) -> dict[str, Any]:
    from odise_rt.errors import is_out_of_memory

    message = without_places(f"{type(exc).__name__}: {' '.join(str(exc).split())}"[:600])
    return {"error": message, "status": "oom" if is_out_of_memory(exc) else "failed"}


class _Served:
    """The requests that a worker answers: one method each."""

    def __init__(self, segmenter: Segmenter, job: Job) -> None:
        self.segmenter = segmenter
        self.job = job
        self._vocabularies: dict[str, Vocabulary] = {}

    def prepare_words(self, words: str) -> None:
        """Embed a vocabulary and remember it."""
        self.segmenter.prepare(self._vocabulary(words))

    def do_run(
        self,
        height: int | None = None,
        width: int | None = None,
        words: str | None = None,
        own_peak: bool = False,
        windows_per_batch: int | None = None,
    ) -> dict[str, Any]:
        """Segment the picture once; with ``own_peak`` the peak of memory is that of this picture alone."""
        height, width = height or self.job.height, width or self.job.width
        vocabulary = self._vocabulary(words or self.job.words)
        image, options = picture(height, width), _unscaled(height, width, windows_per_batch)
        if own_peak:
            _reset_peak()
        start = time.perf_counter()
        result = self.segmenter.segment(image, vocabulary, options)
        seconds = time.perf_counter() - start
        facts = result.facts
        stages = {name: value for name, value in facts.seconds.items() if name != "total"}
        return {
            "seconds": seconds,
            "stages": stages,
            "engine": facts.engine,
            "bundle": facts.bundle_digest,
            "precision": facts.precision,
            "windows": facts.windows,
            "words": facts.words,
            "segments": len(result.segments),
            "peak_bytes": peak_rss(),
            "device_peak_bytes": _device_peak(self.job.device),
        }

    def do_outputs(self, keep: str) -> dict[str, Any]:
        """What the network says of the picture, and what becomes of it, into the file ``keep``; not timed."""
        import numpy as np

        height, width = self.job.height, self.job.width
        options = _unscaled(height, width)
        found = self.segmenter.find_masks(picture(height, width), options)
        result = self.segmenter.name_masks(found, self._vocabulary(self.job.words), options)
        np.savez(keep, mask_logits=found.mask_logits, mask_embedding=found.embeddings.mask, labels=_labels(result))
        return {}

    def do_new_words(self, count: int, salt: int) -> dict[str, Any]:
        """Embed words that were never seen before."""
        from odise_rt.vocabulary import Vocabulary

        vocabulary = Vocabulary.from_lists(word_list(count, salt))
        start = time.perf_counter()
        self.segmenter.prepare(vocabulary)
        return {"seconds": time.perf_counter() - start, "words": len(vocabulary.words)}

    def do_cached_words(self, count: int) -> dict[str, Any]:
        """Embed a vocabulary of that many words; later requests name it ``"#count"``."""
        start = time.perf_counter()
        self.prepare_words(f"#{count}")
        return {"seconds": time.perf_counter() - start}

    def do_evaluate(self, data: str, scenes: int, keep: str) -> dict[str, Any]:
        """Panoptic quality on the first scenes of a data set; labels of every pixel go to the file ``keep``."""
        import numpy as np

        from training.data.coco_panoptic import CocoPanoptic
        from training.evaluation import evaluate

        folder = CocoPanoptic.from_root(Path(data), "val", with_captions=False)
        labels: list[np.ndarray] = []

        class Labels:
            """Remembers what every picture was segmented into."""

            def wants(self, quality: float) -> bool:
                return True

            def __call__(self, quality: float, example: object, prediction: PanopticResult) -> None:
                labels.append(_labels(prediction))

        report = evaluate(self.segmenter, folder, range(min(scenes, len(folder))), ("pq",), keep=Labels())
        np.savez(keep, *labels)
        return {
            "scenes": report.pictures,
            "seconds_per_picture": report.seconds_per_picture,
            "pq": {
                name: scores["pq"]
                for name, scores in report.to_dict()["pq"].items()
                if name in ("all", "seen", "unseen")
            },
        }

    def do_costs(self, height: int, width: int) -> dict[str, Any]:
        """FLOPs and bytes of every stage of the PyTorch model, in both structures."""
        from benchmarks.stage_costs import stage_costs

        backend: Any = self.segmenter._backend
        return stage_costs(backend.model, self.segmenter.facts, height, width)

    def _vocabulary(self, words: str) -> Vocabulary:
        from odise_rt.vocabulary import Vocabulary

        if words not in self._vocabularies:
            built = (
                Vocabulary.from_lists(word_list(int(words[1:]), 0))
                if words.startswith("#")
                else Vocabulary.parse(words)
            )
            self._vocabularies[words] = built
        return self._vocabularies[words]


def _unscaled(height: int, width: int, windows_per_batch: int | None = None) -> SegmentOptions:
    from odise_rt.options import SegmentOptions

    return SegmentOptions(
        short_edge=min(height, width),
        long_edge=max(height, width),
        overlap_threshold=0.0,
        windows_per_batch=windows_per_batch,
    )


def _labels(result: PanopticResult) -> np.ndarray:
    """int16 (2, h, w): segment map, and class of each pixel (-1: none)."""
    import numpy as np

    lookup = np.full(len(result.segments) + 1, -1, np.int32)
    for segment in result.segments:
        lookup[segment.id] = segment.class_index
    return np.stack([result.segment_map, lookup[result.segment_map]]).astype(np.int16)


def word_list(count: int, salt: int) -> list[str]:
    """``count`` different words of two parts; lists of different ``salt`` share none."""
    from odise_rt.vocabulary import Vocabulary

    nouns = Vocabulary.builtin("lvis").names
    return [f"{nouns[i % len(nouns)]} no {salt} {i // len(nouns)}" for i in range(count)]


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


def _device_peak(device: str) -> int | None:
    """Bytes on the GPU that the driver says are this process's, the CUDA context's included; ``None`` on a CPU.

    It is the peak, too: no engine here gives memory back between pictures, and all are asked in the same way.
    """
    if device != "cuda":
        return None
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        rows = [line.split(", ") for line in done.stdout.splitlines()]
        return sum(int(used) << 20 for pid, used in rows if int(pid) == os.getpid()) or None
    return None


# ---- outside ---------------------------------------------------------------------------------------------------------


class Worker:
    """The other end of the pipe. Use it as a context manager, or call :meth:`close`."""

    def __init__(self, job: Job, environment: dict[str, str] | None = None) -> None:
        """Start the process and wait until its model is loaded and its words are embedded.

        Raises:
            WorkerError: it could not; ``status`` says whether memory ran out.
        """
        variables = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self.job = job
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(dataclasses.asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | variables | (environment or {}),
        )
        try:
            self.ready = self._read()
        except BaseException:
            self.close()
            raise

    def request(self, op: str, **arguments: Any) -> dict[str, Any]:
        """One request; see the methods ``do_*`` of the worker.

        Raises:
            WorkerError: it failed, or the process died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # the process is gone: reading says why
        return self._read()

    def run(self) -> dict[str, Any]:
        """One image; the answer as the worker gave it."""
        return self.request("run")

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            if status == -signal.SIGKILL:
                raise WorkerError("the process was killed (SIGKILL), as the system does when memory runs out", "oom")
            raise WorkerError(f"the process ended with status {status}: see its message above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], answer["status"])
        return answer


if __name__ == "__main__":
    raise SystemExit(main())
