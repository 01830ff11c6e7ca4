"""Every implementation on the same weights and picture, interleaved in one run, with its accuracy beside its speed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Summary, interleave
from benchmarks.plan import Bench
from benchmarks.pool import WorkerPool
from benchmarks.preparation import Missing
from benchmarks.results import Result, add_ratios
from benchmarks.stage_costs import outside_share
from benchmarks.variants import PEERS, VARIANTS, Job
from benchmarks.worker import WorkerError
from odise_rt.text_embeddings import normalise

BASE = "pruned"
"""The variant that others are given as ratios to; where it was left out, the first one that was measured."""
OUTPUTS = ("mask_logits", "mask_embedding", "labels")
"""What is compared on the timed picture."""
SCORED = (*PEERS, "ort-portable", "runtime-fp16")
"""Variants that get a panoptic quality."""
STEP_SCENES = 10
SCORED_AS = {"runtime-again": "runtime"}
"""Variants that need no evaluation of their own."""


def measure_peers(bench: Bench) -> None:
    """Add one result for every variant of the plan."""
    plan = bench.plan
    jobs: dict[str, Job] = {}
    failed: dict[str, Missing] = {}
    for variant in plan.variants:
        job = bench.job(variant)
        if isinstance(job, Missing):
            failed[variant] = job
        else:
            jobs[variant] = job
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    first: dict[str, dict[str, float]] = {}
    outputs: dict[str, dict[str, np.ndarray]] = {}
    warmup = 0 if plan.one_at_a_time else plan.warmup
    with bench.pool(jobs) as pool:
        for name in jobs if not plan.one_at_a_time else ():
            try:
                first[name] = _first_picture(pool, name)
            except WorkerError as exc:
                failed[name] = Missing(str(exc), exc.status)
                pool.end(name)
                bench.say(f"{name}: {exc}")

        def runner(name: str) -> Any:
            def run() -> float:
                starts = pool.starts[name]
                worker = pool.get(name)
                cold = pool.starts[name] != starts  # a process that was just started
                if name not in first:
                    first[name] = _first_picture(pool, name)
                elif cold:
                    worker.run()
                if cold and plan.device == "cuda":
                    worker.run()  # captures CUDA graphs
                answer = worker.run()
                pool.learn(name, int(answer["peak_bytes"]))
                answers[name].append(answer)
                if len(answers[name]) == warmup + plan.repeats:  # now, as its process may be ended for the next one
                    outputs[name] = _outputs(bench, pool, name)
                return float(answer["seconds"])

            return run

        def progress(name: str, index: int, seconds: float) -> None:
            phase = f"round {index + 1}/{plan.repeats}" if index >= 0 else "warm-up"
            bench.say(f"{phase:12} {name:14} {seconds:9.4f} s")

        def on_failure(name: str, exc: Exception) -> None:
            if not isinstance(exc, WorkerError):
                raise exc
            failed[name] = Missing(str(exc), exc.status)
            pool.end(name)
            bench.say(f"{name}: {exc}")

        runners = {name: runner(name) for name in jobs if name not in failed}
        samples = interleave(runners, plan.repeats, warmup, progress, on_failure)
        accuracy = _accuracy(bench, pool, list(samples)) if plan.scenes else {}
        bench.costs = _costs(bench, pool, list(samples))

    on_picture = picture_accuracy(outputs)
    results = []
    for variant in plan.variants:
        key, label = f"peers/{plan.size_text}/{variant}", VARIANTS[variant].label
        facts: dict[str, Any] = {"size": list(plan.size), "threads": plan.threads, "device": plan.device}
        if variant not in samples:
            problem = failed[variant]
            results.append(Result.missing(key, label, problem.status, problem.reason, facts=facts))
            continue
        measured = answers[variant][-plan.repeats :]
        last = measured[-1]
        stages = {name: Summary.of([a["stages"][name] for a in measured]).median for name in last["stages"]}
        total = Summary.of(samples[variant]).median
        facts |= {
            "engine": last["engine"],
            "precision": VARIANTS[variant].precision,
            "bundle": last["bundle"] or None,
            "windows": last["windows"],
            "words": last["words"],
            "segments": last["segments"],
            "official_stages": list(VARIANTS[variant].official_work),
            "outside_share": outside_share(stages, sum(stages.values())),
            "outside_seconds": total * outside_share(stages, sum(stages.values())),
            # Of loading, too: some engines compile then, others with the first picture.
            "peak_bytes": max(
                pool.ready[variant]["load_peak_bytes"], *(int(a["peak_bytes"]) for a in answers[variant])
            ),
            "device_peak_bytes": last["device_peak_bytes"],
            "load_peak_bytes": pool.ready[variant]["load_peak_bytes"],
            "load_seconds": pool.ready[variant]["load_seconds"],
            "first_picture_seconds": first[variant]["seconds"],
            "start_to_first_picture_seconds": pool.ready[variant]["spawn_seconds"] + first[variant]["seconds"],
            "processes": pool.starts[variant],
        }
        results.append(
            Result.measured(
                key,
                label,
                samples[variant],
                stages={name: {"seconds": seconds} for name, seconds in stages.items()},
                facts=facts,
                accuracy=accuracy.get(variant, {}) | on_picture.get(variant, {}),
            )
        )
    bench.results += add_ratios(results, base_key(results, plan.size_text))


def base_key(results: list[Result], size_text: str) -> str:
    """Key of the result that the others are given as ratios to."""
    wanted = f"peers/{size_text}/{BASE}"
    ok = [result.key for result in results if result.status == "ok"]
    return wanted if wanted in ok or not ok else ok[0]


def _first_picture(pool: WorkerPool, name: str) -> dict[str, float]:
    worker = pool.get(name)
    answer = worker.run()
    pool.learn(name, int(answer["peak_bytes"]))
    return answer


def _costs(bench: Bench, pool: WorkerPool, names: list[str]) -> dict[str, Any]:
    """Counted by whichever PyTorch worker can be had."""
    for name in sorted((n for n in names if VARIANTS[n].family == "torch"), key=lambda n: n != BASE):
        try:
            return pool.get(name).request("costs", height=bench.plan.size[0], width=bench.plan.size[1])
        except WorkerError as exc:
            bench.notes.append(f"FLOPs and bytes were not counted: {exc}")
            return {}
    bench.notes.append("FLOPs and bytes were not counted: no PyTorch variant was measured")
    return {}


# ---- accuracy --------------------------------------------------------------------------------------------------------


def reference_of(names: Iterable[str]) -> str | None:
    """The implementation that the others are held to: PyTorch in float32, :data:`BASE` if it is there."""
    exact = [name for name in names if VARIANTS[name].family == "torch" and VARIANTS[name].precision == "fp32"]
    return BASE if BASE in exact else next(iter(exact), None)


def _outputs(bench: Bench, pool: WorkerPool, name: str) -> dict[str, np.ndarray]:
    """:data:`OUTPUTS` of the timed picture; the times stand without them."""
    keep = bench.scratch / f"outputs-{name}.npz"
    try:
        pool.get(name).request("outputs", keep=str(keep))
    except WorkerError as exc:
        bench.notes.append(f"{name} was not compared on the timed picture: {exc}")
        return {}
    with np.load(keep, allow_pickle=False) as stored:
        return {output: stored[output] for output in OUTPUTS}


def picture_accuracy(outputs: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """How far each implementation is from PyTorch on the timed picture, before and after words.

    Args:
        outputs: implementation to :data:`OUTPUTS`; empty where they could not be had.

    Returns:
        For each that was compared, ``{"picture": ...}`` with ``mask_logits_error``, the root mean square of what the
        mask logits differ by over their standard deviation; ``mask_embedding_cosine``, the mean over masks; and
        ``class_agreement``, as :func:`agreement` has it, unless no pixel has a class, as is so with random weights.
    """
    there = {name: found for name, found in outputs.items() if found}
    reference = reference_of(there)
    if reference is None:
        return {}
    wanted = there[reference]
    spread = max(float(wanted["mask_logits"].std(dtype=np.float64)), 1e-30)
    accuracy = {}
    for name, found in there.items():
        difference = found["mask_logits"].astype(np.float64) - wanted["mask_logits"]
        cosines = (normalise(found["mask_embedding"]) * normalise(wanted["mask_embedding"])).sum(axis=1)
        compared = {
            "compared_with": reference,
            "mask_logits_error": float(np.sqrt((difference**2).mean())) / spread,
            "mask_embedding_cosine": float(cosines.mean()),
        }
        if (np.stack([wanted["labels"][1], found["labels"][1]]) >= 0).any():
            compared["class_agreement"] = agreement([wanted["labels"]], [found["labels"]])["class_agreement"]
        accuracy[name] = {"picture": compared}
    return accuracy


def _accuracy(bench: Bench, pool: WorkerPool, names: list[str]) -> dict[str, dict[str, Any]]:
    """Panoptic quality and agreement with PyTorch of every variant."""
    scenes = bench.prepared.scenes
    if isinstance(scenes, Missing):
        bench.notes.append(f"No panoptic quality: {scenes.reason}")
        return {}
    found: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    for name in names:
        if name in SCORED_AS:
            continue
        keep = bench.scratch / f"labels-{name}.npz"
        # Steps between two implementations compute what these do: a few scenes show that they agree.
        count = bench.plan.scenes if name in SCORED else min(bench.plan.scenes, STEP_SCENES)
        bench.say(f"panoptic quality of {name} on {count} scenes ...")
        try:
            answer = pool.get(name).request("evaluate", data=str(scenes), scenes=count, keep=str(keep))
        except WorkerError as exc:
            found[name] = {"failed": str(exc)}
            continue
        found[name] = {"data": "Sticker World, held-out scenes", "scenes": answer["scenes"]}
        if name in SCORED:
            found[name]["pq"] = answer["pq"]
        files[name] = keep
    reference = reference_of(name for name in files if name in SCORED)
    if reference is not None:
        wanted = load_labels(files[reference])
        for name, path in files.items():
            labels = load_labels(path)
            found[name] |= agreement(wanted[: len(labels)], labels)
            if "pq" in found[name]:
                found[name]["pq_difference"] = found[name]["pq"]["all"] - found[reference]["pq"]["all"]
            found[name]["agreement_with"] = reference
    return found | {name: found[other] for name, other in SCORED_AS.items() if name in names and other in found}


def load_labels(path: Path) -> list[np.ndarray]:
    """int16 (2, h, w) of each picture: segment map, and class of each pixel (-1: none)."""
    with np.load(path, allow_pickle=False) as stored:
        return [stored[f"arr_{index}"] for index in range(len(stored.files))]


def agreement(reference: list[np.ndarray], found: list[np.ndarray]) -> dict[str, float]:
    """How far two sets of results of the same pictures are the same.

    Args:
        reference: from :func:`load_labels`.
        found: likewise.

    Returns:
        ``class_agreement``, the share of pixels of the same class or of none in both, and ``panoptic_agreement``, the
        share of pixels in the same segment: same class, and the segment that overlaps most, each taken once.
    """
    same_class = same_segment = pixels = 0
    for expected, ours in zip(reference, found, strict=True):
        same_class += int((expected[1] == ours[1]).sum())
        same_segment += _pixels_in_same_segment(expected, ours)
        pixels += expected[0].size
    return {"class_agreement": same_class / pixels, "panoptic_agreement": same_segment / pixels}


def _pixels_in_same_segment(expected: np.ndarray, ours: np.ndarray) -> int:
    stacked = np.stack([expected[0].ravel(), ours[0].ravel(), expected[1].ravel(), ours[1].ravel()])
    pairs, counts = np.unique(stacked, axis=1, return_counts=True)
    agreeing, taken_theirs, taken_ours = 0, set(), set()
    for index in np.argsort(-counts, kind="stable"):
        theirs, our, their_class, our_class = (int(v) for v in pairs[:, index])
        if their_class == our_class and theirs not in taken_theirs and our not in taken_ours:
            taken_theirs.add(theirs)
            taken_ours.add(our)
            agreeing += int(counts[index])
    return agreeing
