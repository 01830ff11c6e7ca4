"""What a user waits for before the first result, and after a change of words."""

from __future__ import annotations

import shutil
import time
from typing import Any

from benchmarks.plan import Bench
from benchmarks.preparation import Missing
from benchmarks.results import Result
from benchmarks.variants import VARIANTS
from benchmarks.worker import Worker, WorkerError

COLD = {
    "runtime": "odise_rt, words cached on disk",
    "runtime-new-words": "odise_rt, words to be encoded",
    "pruned": "our pruned structure, PyTorch eager",
    "official": "official structure, PyTorch eager",
}
"""Cold starts: a fresh process, from its start to the first segmented picture. Files are in the system's cache."""


def measure_cold_starts(bench: Bench) -> None:
    """Start processes one after the other; the torch.compile row is taken from the peers, where it happened once."""
    plan = bench.plan
    results = []
    for name, label in COLD.items():
        variant = "runtime" if name.startswith("runtime") else name
        if variant not in plan.variants:
            continue
        key = f"cold/{plan.size_text}/{name}"
        facts: dict[str, Any] = {"size": list(plan.size), "threads": plan.threads, "device": plan.device}
        cache = bench.scratch / f"words-{name}"
        job = bench.job(variant, cache_dir=cache if variant == "runtime" else None)
        if isinstance(job, Missing):
            results.append(Result.missing(key, label, job.status, job.reason, facts=facts))
            continue
        samples, loads = [], []
        try:
            if name == "runtime":
                Worker(job).close()  # leaves its words in the cache
            for _ in range(plan.cold_starts):
                if name != "runtime":
                    shutil.rmtree(cache, ignore_errors=True)
                start = time.perf_counter()
                with Worker(job) as worker:
                    answer = worker.run()
                    samples.append(time.perf_counter() - start)
                    loads.append(float(worker.ready["load_seconds"]))
        except WorkerError as exc:
            results.append(Result.missing(key, label, exc.status, str(exc), facts=facts))
            continue
        facts |= {k: answer[k] for k in ("engine", "precision", "bundle", "windows", "words")}
        facts["load_seconds"] = sorted(loads)[len(loads) // 2]
        bench.say(f"cold start {name:18} {sorted(samples)[len(samples) // 2]:7.2f} s")
        results.append(Result.measured(key, label, samples, facts=facts))
    compiled = next((r for r in bench.results if r.group == "peers" and r.variant == "compile"), None)
    if compiled is not None:
        key, label = f"cold/{plan.size_text}/compile", VARIANTS["compile"].label
        if compiled.status == "ok":
            seconds = float(compiled.facts["start_to_first_picture_seconds"])
            kept = ("size", "threads", "device", "engine", "precision", "windows", "words", "load_seconds")
            facts = {name: compiled.facts[name] for name in kept}
            results.append(Result.measured(key, label, [seconds], facts=facts))
        else:
            results.append(Result.missing(key, label, compiled.status, compiled.reason, facts=compiled.facts))
    bench.results += results


def measure_vocabulary_change(bench: Bench) -> None:
    """Seconds to embed words that were never seen, in a process that runs already."""
    plan = bench.plan
    repeats = max(2, plan.repeats // 4)
    for variant in ("runtime", "pruned"):
        if variant not in plan.variants:
            continue
        job = bench.job(variant)
        keys = {count: f"vocabulary/{count} new words/{variant}" for count in plan.new_words}
        labels = {count: f"{VARIANTS[variant].label}, {count:,} new words" for count in plan.new_words}
        facts: dict[str, Any] = {"threads": plan.threads, "device": plan.device}
        if isinstance(job, Missing):
            bench.results += [
                Result.missing(keys[c], labels[c], job.status, job.reason, facts=facts) for c in plan.new_words
            ]
            continue
        try:
            with Worker(job) as worker:
                worker.run()
                salt = 1
                for count in plan.new_words:
                    samples = []
                    for _ in range(repeats if count < 1000 else 2):
                        samples.append(float(worker.request("new_words", count=count, salt=salt)["seconds"]))
                        salt += 1
                    bench.say(f"{variant:10} {count:6,} new words {sorted(samples)[len(samples) // 2]:8.3f} s")
                    more = {"words": count, "precision": VARIANTS[variant].precision}
                    bench.results.append(Result.measured(keys[count], labels[count], samples, facts=facts | more))
        except WorkerError as exc:
            done = {result.key for result in bench.results}
            bench.results += [
                Result.missing(keys[c], labels[c], exc.status, str(exc), facts=facts)
                for c in plan.new_words
                if keys[c] not in done
            ]
