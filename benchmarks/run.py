"""Measure odise_rt and its peers on this machine and write everything as one JSON file.

    python -m benchmarks.run --out out/bench/run.json
    python -m benchmarks.run --quick --out out/bench/quick.json
    python -m benchmarks.run --config odise-sd1 --bundle BUNDLE --size 512 --repeats 3 --groups peers \\
        --variants official runtime --out out/bench/full-size.json
    python -m benchmarks.report out/bench/run.json --out out/bench/report

Suites: ``cpu`` compares implementations on this CPU, ``gpu`` does so on an NVIDIA GPU, ``kernels`` times the runtime's
own inner loops. A variant that fails or runs out of memory becomes a row of the result, not an end of the run. The file
is written after every group of results.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY
from benchmarks.machine import Rates, clocks, code_state, environment, gpu_facts, measure_gpu_rates, measure_rates
from benchmarks.measure_peers import measure_peers
from benchmarks.measure_scaling import measure_batches, measure_sizes, measure_words
from benchmarks.measure_startup import measure_cold_starts, measure_vocabulary_change
from benchmarks.plan import GROUPS, Bench, Plan
from benchmarks.preparation import (
    TINY_CHECKPOINT,
    Preparation,
    prepare_bundle,
    prepare_official,
    prepare_scenes,
)
from benchmarks.results import Result, Run
from benchmarks.stage_costs import with_roofline
from benchmarks.targets import targets_of
from benchmarks.variants import VARIANTS
from odise_rt.backends.select import MAX_THREADS
from odise_rt.command_line import MAX_SEED, CommandParser, command, whole_number
from odise_rt.errors import BackendError
from odise_rt.files import check_writable

SUITES = ("cpu", "gpu", "kernels")
GPU_VARIANTS = (
    *("official", "pruned", "compile", "compile-bf16", "ort-portable", "runtime", "runtime-again", "runtime-fp16"),
)
UNFINISHED = "The run was still going on, or was stopped, when this was written: later groups are not in it."

_GROUPS = {
    "peers": measure_peers,
    "sizes": measure_sizes,
    "batches": measure_batches,
    "words": measure_words,
    "cold": measure_cold_starts,
    "vocabulary": measure_vocabulary_change,
}


@command("what is measured is in --out, if one was given, up to the last group that was finished")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 also where a measurement failed, which its row tells of."""
    options = parse(argv)
    started = time.perf_counter()
    if options.out:
        check_writable(options.out)
    suites = SUITES if options.suite == "all" else (options.suite,)
    run = Run(options.suite, _command(options), options.quick, environment(options.threads))
    if options.suite == "gpu" and not gpu_facts():
        raise BackendError("the gpu suite needs an NVIDIA GPU and nvidia-smi finds none: use --suite cpu")
    run.clocks.append({"when": "start", **clocks()})
    run.rates.append(measure_rates(options.threads))
    if "gpu" in suites and gpu_facts():
        run.gpu_rates = _gpu_rates(run)

    def keep(run: Run) -> None:
        """Finish the results that there are, and write them."""
        run.results = [_with_roofline(result, run) for result in run.results]
        run.seconds = time.perf_counter() - started
        if options.out:
            run.save(options.out)

    def keep_so_far() -> None:
        keep(dataclasses.replace(run, notes=[*run.notes, UNFINISHED]))

    for suite in suites:
        print(f"suite {suite}", flush=True)
        if suite == "kernels":
            run.results += _kernels(options.quick)
            keep_so_far()
        elif suite == "gpu" and not gpu_facts():
            label = "all GPU measurements"
            run.results.append(Result.missing("gpu/all", label, "absent", "no NVIDIA GPU on this machine"))
        else:
            _measure(run, options, "cuda" if suite == "gpu" else "cpu", len(suites) > 1, keep_so_far)
    run.rates.append(measure_rates(options.threads))
    run.clocks.append({"when": "end", **clocks()})
    _note_changed_code(run)
    keep(run)
    print_summary(run)
    if options.out:
        print(f"written to {options.out} after {run.seconds:.0f} s")
    return int(any(result.status == "failed" for result in run.results))


def _note_changed_code(run: Run) -> None:
    """Call the code dirty if it is not what it was when the run began: processes of the run read it at any time."""
    now, then = code_state(), {key: run.environment[key] for key in ("commit", "dirty")}
    if now != then:
        run.environment["dirty"] = True
        run.notes.append(
            f"The code was changed while this was measured: at the end it was {(now['commit'] or 'unknown')[:12]}"
            f"{' with uncommitted changes' if now['dirty'] else ''}."
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = CommandParser(prog="python -m benchmarks.run", description=__doc__)
    plan = Plan()
    parser.add_argument("--suite", choices=(*SUITES, "all"), default="cpu", help="What to measure.")
    parser.add_argument("--quick", action="store_true", help="Fewer variants, rounds and sizes: about a minute.")
    parser.add_argument("--out", type=Path, help="JSON file to write. Default: only printed.")
    parser.add_argument("--config", default=plan.config, help="A preset; odise-tiny takes the shipped weights.")
    parser.add_argument("--checkpoint", type=Path, help="A checkpoint directory. Default: the preset's weights.")
    parser.add_argument(
        "--seed", type=whole_number(0, MAX_SEED), default=0, help="Seed of random weights, as given to the export."
    )
    parser.add_argument("--bundle", type=Path, help="Bundle of the same weights. Default: exported on the fly.")
    parser.add_argument(
        "--bundle-fp16",
        type=Path,
        help="Its mixed-precision twin. Default: exported on the fly for odise-tiny, else none.",
    )
    parser.add_argument(
        "--size",
        type=whole_number(64, 4096),
        nargs="+",
        default=list(plan.size),
        help="Image side, or height and width, in pixels.",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=list(VARIANTS),
        help="Implementations. Default: all that fit the model and device.",
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="Parts of the suite. Default: all.")
    parser.add_argument("--repeats", type=whole_number(1), default=plan.repeats, help="Measured rounds.")
    parser.add_argument("--warmup", type=whole_number(0), default=plan.warmup, help="Rounds before them.")
    parser.add_argument(
        "--threads", type=whole_number(1, MAX_THREADS), default=plan.threads, help="Threads of every implementation."
    )
    parser.add_argument(
        "--scenes",
        type=whole_number(0),
        help="Pictures for panoptic quality; 0: none. Default: 50 for odise-tiny, else 0.",
    )
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="End each process before the next one starts, for models of which two do not fit into memory. Without it "
        "as many stay loaded as fit.",
    )
    options = parser.parse_args(argv)
    if len(options.size) > 2:
        parser.error("--size takes one or two sides")
    return options


def plan_of(options: argparse.Namespace, device: str) -> Plan:
    """The plan that a command line asks for."""
    tiny = options.config == "odise-tiny" and options.checkpoint is None
    default = GPU_VARIANTS if device == "cuda" else tuple(VARIANTS)
    if not tiny:
        default = tuple(v for v in default if v in ("official", "pruned", "runtime"))
    plan = Plan(
        config=options.config if options.checkpoint is None else options.checkpoint.name,
        size=(options.size[0], options.size[-1]),
        device="cuda" if device == "cuda" else "cpu",
        variants=tuple(options.variants or default),
        groups=tuple(options.groups or (GROUPS if tiny else ("peers",))),
        threads=options.threads,
        repeats=options.repeats,
        warmup=options.warmup,
        scenes=(50 if tiny else 0) if options.scenes is None else options.scenes,
        one_at_a_time=options.one_at_a_time,
    )
    return plan.quick() if options.quick else plan


def _measure(run: Run, options: argparse.Namespace, device: str, prefix: bool, keep_so_far: Callable[[], None]) -> None:
    """One of the suites that compare implementations; ``keep_so_far`` is called after each of its groups."""
    plan = plan_of(options, device)
    source: dict[str, Any] = {"config": options.config, "seed": options.seed}
    if options.checkpoint is not None:
        source = {"checkpoint": options.checkpoint.resolve()}
    elif options.config == "odise-tiny":
        source = {"checkpoint": TINY_CHECKPOINT}
    prepared = Preparation(plan.config, source)
    wanted = [VARIANTS[v] for v in plan.variants]
    prepare_bundle(prepared, "fp32", options.bundle)
    if any(v.precision == "fp16" for v in wanted):
        prepare_bundle(prepared, "fp16", options.bundle_fp16)
    if any(v.graphs == "official" and v.family == "ort" for v in wanted):
        prepare_official(prepared, *plan.size)
    if plan.scenes:
        prepare_scenes(prepared, plan.scenes)
    with tempfile.TemporaryDirectory(prefix="odise-bench-") as scratch:
        bench = Bench(plan, prepared, Path(scratch), notes=run.notes, fits=run.fits)
        for group in plan.groups:
            print(f"{group}:", flush=True)
            done = len(bench.results)
            _GROUPS[group](bench)
            run.clocks.append({"when": f"after {group}", **clocks()})
            found = [dataclasses.replace(r, facts=_identity(run, prepared) | r.facts) for r in bench.results[done:]]
            run.results += [_prefixed(result, device) for result in found] if prefix else found
            run.model |= prepared.describe() | {"costs": bench.costs, "size": list(plan.size)}
            keep_so_far()


def _gpu_rates(run: Run) -> Rates | None:
    try:
        return measure_gpu_rates()
    except (OSError, subprocess.CalledProcessError) as exc:
        run.notes.append(f"No roofline of the GPU: PyTorch could not measure its rates ({type(exc).__name__})")
        return None


def _identity(run: Run, prepared: Preparation) -> dict[str, Any]:
    """What every single result carries, so that none can be quoted without it."""
    return {"commit": run.environment["commit"], "model": prepared.config}


def _prefixed(result: Result, device: str) -> Result:
    if device == "cpu":
        return result
    ratio = result.ratio
    if ratio is not None:
        ratio = dataclasses.replace(ratio, to=f"gpu-{ratio.to}")
    return dataclasses.replace(result, key=f"gpu-{result.key}", group=f"gpu-{result.group}", ratio=ratio)


def _with_roofline(result: Result, run: Run) -> Result:
    """The result with work and roofline share of its stages, against the rates of the device that it ran on."""
    device, costs = result.facts.get("device"), run.model.get("costs", {})
    if result.status != "ok" or not result.group.endswith("peers"):
        return result
    rates = run.best_rates
    if device == "cuda":
        if run.gpu_rates is None:
            return result
        rate = run.gpu_rates.matmul_gflops.get(result.facts["precision"])
        if rate is None:
            return result
        rates = dataclasses.replace(run.gpu_rates, matmul_gflops={"torch": rate})
    theirs = VARIANTS[result.variant].official_work
    work = {name: costs["official" if name in theirs else "pruned"][name] for name in costs.get("pruned", {})}
    seconds = {name: entry["seconds"] for name, entry in result.stages.items()}
    return dataclasses.replace(result, stages=with_roofline(seconds, work, rates))


def _kernels(quick: bool) -> list[Result]:
    """The micro-benchmarks, through pytest."""
    with tempfile.TemporaryDirectory(prefix="odise-bench-") as folder:
        out = Path(folder) / "kernels.json"
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "--run-json", str(out), "-p", "no:cacheprovider"]
        if quick:
            command += ["--benchmark-max-time", "0.2", "--benchmark-min-rounds", "5"]
        done = subprocess.run(command, cwd=REPOSITORY, check=False)
        if not out.is_file():
            reason = f"pytest benchmarks ended with status {done.returncode} and left no results"
            return [Result.missing("kernels/all", "the runtime's inner loops", "failed", reason)]
        return Run.load(out).results


def _command(options: argparse.Namespace) -> str:
    """The command without places: what a reader would type."""
    parts = ["python -m benchmarks.run", f"--suite {options.suite}", "--quick" if options.quick else ""]
    parts += [f"--config {options.config}" if options.checkpoint is None else f"--checkpoint {options.checkpoint.name}"]
    parts += ["--bundle BUNDLE" if options.bundle else "", f"--size {' '.join(map(str, options.size))}"]
    parts += ["--bundle-fp16 BUNDLE" if options.bundle_fp16 else "", f"--seed {options.seed}" if options.seed else ""]
    parts += [f"--repeats {options.repeats} --warmup {options.warmup} --threads {options.threads}"]
    parts += [f"--scenes {options.scenes}" if options.scenes is not None else ""]
    parts += [f"--groups {' '.join(options.groups)}" if options.groups else ""]
    parts += [f"--variants {' '.join(options.variants)}" if options.variants else ""]
    parts += ["--one-at-a-time" if options.one_at_a_time else ""]
    return " ".join(part for part in parts if part)


def print_summary(run: Run) -> None:
    """The main table and the targets."""
    print()
    for result in run.results:
        if result.status != "ok":
            print(f"{result.key:42} {result.status.upper()}: {result.reason}")
            continue
        ratio = (
            "" if result.ratio is None else f"{result.ratio.summary.median:7.3f} x {result.ratio.to.rsplit('/', 1)[-1]}"
        )
        print(f"{result.key:42} {result.seconds:10.5f} s  {ratio}")
    for name, fit in run.fits.items():
        print(f"{name}: {fit}")
    for target in targets_of(run):
        sign = "<=" if target.at_most else ">="
        value = "" if target.value is None else f"{target.value:.3f} "
        noise = f"±{100 * target.noise:.1f} % " if target.noise else ""
        print(f"target: {target.what} {sign} {target.bound:g}: {value}{noise}{target.verdict}")


if __name__ == "__main__":
    raise SystemExit(main())
