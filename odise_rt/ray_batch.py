"""A batch on a Ray cluster through Ray Data: one process a GPU, or as many CPU processes as asked for (extra ``ray``).

Each process (an actor) loads the bundle once and segments one input after the other. It writes the result files itself,
so the folder must be on a file system that all nodes share; records come back to the driver, which alone writes the
log. What was finished but not logged when the driver was killed is done again, as in a run without Ray.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odise_rt.batch import Job, Record, segment_input
from odise_rt.cores import usable_cores
from odise_rt.errors import BackendError, MissingPackageError
from odise_rt.inputs import Input

if TYPE_CHECKING:
    from odise_rt.segmenter import Segmenter

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10


class SegmentActor:
    """One process of the run."""

    def __init__(self, load: Callable[..., Segmenter], job: Job, threads: int | None, neighbours: int) -> None:
        """See :func:`segment_on_ray`; ``neighbours`` share the cores of this machine, the actor itself included."""
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None  # as in a run without Ray: the job's bound counts
        self._segmenter = load(threads=threads or max(1, usable_cores() // neighbours))
        self._job = job
        self._segmenter.prepare(job.vocabulary)

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> Iterator[dict[str, list[str]]]:
        """Inputs as JSON in the column ``input``; records as JSON in the column ``record``, each as it comes."""
        for text in batch["input"]:
            given = json.loads(text)
            item = Input(Path(given["path"]), given["name"], given["file_name"])
            for record in segment_input(self._segmenter, self._job, item, given["key"]):
                yield {"record": [json.dumps(record)]}


def segment_on_ray(
    load: Callable[..., Segmenter],
    job: Job,
    inputs: Sequence[Input],
    keys: Mapping[str, str],
    address: str,
    actors: int | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> Iterator[Record]:
    """Segment inputs on a cluster, in whatever order they are finished.

    Args:
        load: makes the segmenter of a process from its ``threads``; it must be picklable, and its bundle readable on
            every node.
        job: what to do.
        inputs: the images and videos.
        keys: name to key of each.
        address: ``"local"`` for a new cluster on this machine, else what ``ray.init`` takes.
        actors: processes; ``None``: as many as the cluster has GPUs, or one if it has none.
        device: ``"cpu"`` keeps the processes off GPUs.
        threads: of each process; ``None``: its share of the cores of its node.

    Yields:
        The records of :func:`odise_rt.batch.segment_input`.

    Raises:
        MissingPackageError: Ray is not installed.
        BackendError: the cluster cannot be reached, or a process failed.
    """
    ray = _import_ray()
    _check_address(address)
    job = replace(job, folder=job.folder.resolve())
    rows = [{"input": json.dumps(_sent(item, keys[item.name]))} for item in inputs]
    given = {i.name: str(i.path) for i in inputs}
    started, on_sigterm = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    try:
        if started:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            if threading.current_thread() is threading.main_thread():  # Ray has put its own in its place
                signal.signal(signal.SIGTERM, on_sigterm)
        gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
        count = min(actors or gpus or 1, len(inputs))
        neighbours = -(-count // sum(node["Alive"] for node in ray.nodes()))  # Ray Data spreads them over the nodes
        logger.info("Ray: %d processes, %s", count, "a GPU each" if gpus else "on CPUs")
        ray.data.DataContext.get_current().enable_progress_bars = False
        records = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            SegmentActor,
            fn_constructor_args=(load, job, threads, neighbours),
            batch_size=1,
            batch_format="numpy",
            concurrency=count,
            num_gpus=1 if gpus else 0,
            num_cpus=1,
        )
        for row in records.iter_rows():
            record: Record = json.loads(row["record"])
            if record["name"] in given:  # as the caller named it
                record["image"] = given[record["name"]]
            yield record
    except (ray.exceptions.RayError, ConnectionError) as exc:
        cause = getattr(exc, "cause", None) or exc
        lines = [line for line in str(cause).strip().splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else type(exc).__name__
        raise BackendError(
            f"the Ray cluster {address!r} failed ({reason}): see its logs, or run without --ray"
        ) from exc
    finally:
        if started:
            ray.shutdown()


def _sent(item: Input, key: str) -> dict[str, str]:
    return {"path": str(item.path.resolve()), "name": item.name, "file_name": item.file_name, "key": key}


def _check_address(address: str) -> None:
    """Refuse a host that does not answer at once: Ray itself would try for minutes, and may end the process."""
    match = re.fullmatch(r"(?:ray://)?(?P<host>[^/:]+):(?P<port>\d+)", address)
    if match is None:  # "local", "auto", or for Ray to judge
        return
    try:
        socket.create_connection((match["host"], int(match["port"])), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as exc:
        raise BackendError(
            f"the Ray cluster {address!r} does not answer ({exc}): check the address and that the cluster runs, or "
            "leave the address out for a new one here"
        ) from exc


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as exc:
        raise MissingPackageError("--ray needs Ray Data: pip install 'odise_rt[ray]'") from exc
    return ray
