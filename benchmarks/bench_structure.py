"""The whole way from pixels to named segments: official structure, our pruned PyTorch, and the runtime.

Same weights, same image, words cached, interleaved in one run; each in a process of its own. Prints a table and, with
--out, writes everything as JSON.

    python -m benchmarks.bench_structure --config odise-tiny --size 256
    python -m benchmarks.bench_structure --config odise-sd1 --bundle BUNDLE --size 512 --repeats 3
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import REPOSITORY, Summary, environment, interleave, matmul_gflops, paired_ratio, write_json
from benchmarks.worker import VARIANTS, Job, Worker

WORDS = "person; dog, puppy; red car, automobile; stuff: sky; stuff: grass, lawn; wooden chair; stuff: road"
TINY_CHECKPOINT = REPOSITORY / "training" / "pretrained" / "odise-tiny"


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    options = parse(argv)
    source: dict[str, Any] = {"checkpoint": str(options.checkpoint)}
    if options.checkpoint is None:
        source = {"config": options.config, "seed": options.seed}
        if options.config == "odise-tiny":
            source = {"checkpoint": str(TINY_CHECKPOINT)}
    with tempfile.TemporaryDirectory() as scratch:
        bundle = options.bundle or export_bundle(source, Path(scratch) / "bundle")
        report = compare(options, source, bundle)
    print_table(report)
    if options.out:
        write_json(options.out, report)
        print(f"written to {options.out}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_structure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="odise-tiny", help="A preset; odise-tiny takes the shipped weights.")
    parser.add_argument("--checkpoint", type=Path, help="A checkpoint directory instead of the preset's weights.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of random weights, as given to the export.")
    parser.add_argument("--bundle", type=Path, help="Bundle of the same weights; exported on the fly without it.")
    parser.add_argument(
        "--size", type=int, nargs="+", default=[256], help="Image side, or height and width, in pixels."
    )
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=20, help="Measured rounds.")
    parser.add_argument("--warmup", type=int, default=2, help="Rounds before them.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of every variant.")
    parser.add_argument("--out", type=Path, help="JSON file to write.")
    options = parser.parse_args(argv)
    if len(options.size) > 2 or min(options.size) < 64 or options.repeats < 1:
        parser.error("--size takes one or two sides of at least 64 pixels, --repeats at least 1")
    return options


def export_bundle(source: dict[str, Any], out: Path) -> Path:
    """Export the weights that are measured."""
    command = [sys.executable, "-m", "export.build_engines", "--out", str(out)]
    if "checkpoint" in source:
        command += ["--checkpoint", source["checkpoint"]]
    else:
        command += ["--config", source["config"], "--init", "random", "--seed", str(source["seed"])]
    subprocess.run(command, check=True)
    return out


def compare(options: argparse.Namespace, source: dict[str, Any], bundle: Path) -> dict[str, Any]:
    """Measure all variants."""
    height, width = options.size[0], options.size[-1]
    workers: dict[str, Worker] = {}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    try:
        for name in options.variants:
            job_source = {"bundle": str(bundle)} if name == "runtime" else source
            print(f"loading {name} ...", flush=True)
            workers[name] = Worker(Job(name, job_source, height, width, WORDS, options.threads))

        def runner(name: str) -> Any:
            def run() -> float:
                answer = workers[name].run()
                answers[name].append(answer)
                return float(answer["seconds"])

            return run

        def progress(name: str, index: int, seconds: float) -> None:
            phase = f"round {index + 1}/{options.repeats}" if index >= 0 else "warm-up"
            print(f"  {phase:14} {name:10} {seconds:9.3f} s", flush=True)

        rate = matmul_gflops(options.threads)
        samples = interleave({n: runner(n) for n in options.variants}, options.repeats, options.warmup, progress)
    finally:
        for worker in workers.values():
            worker.close()
    results = {}
    for name in options.variants:
        measured = answers[name][options.warmup :]
        stages = {key: Summary.of([a["stages"][key] for a in measured]).median for key in measured[0]["stages"]}
        results[name] = {
            "what": VARIANTS[name],
            "engine": measured[0]["engine"],
            "seconds": Summary.of(samples[name]),
            "samples": samples[name],
            "stages": stages,
            "peak_bytes": max(a["peak_bytes"] for a in answers[name]),
            "load_seconds": workers[name].ready["load_seconds"],
            "load_peak_bytes": workers[name].ready["load_peak_bytes"],
            "segments": measured[-1]["segments"],
            "windows": measured[-1]["windows"],
        }
    first = options.variants[0]
    ratios = {
        f"{name}/{base}": paired_ratio(samples[name], samples[base])
        for name in options.variants
        for base in options.variants
        if name != base
    }
    return {
        "benchmark": "structure",
        "source": {key: Path(str(value)).name if key == "checkpoint" else value for key, value in source.items()},
        "size": [height, width],
        "words": WORDS,
        "environment": environment(options.threads),
        "matmul_gflops": rate,
        "baseline": first,
        "results": results,
        "ratios": ratios,
    }


def print_table(report: dict[str, Any]) -> None:
    """A Markdown table of the report."""
    base = report["results"][report["baseline"]]
    print(
        f"\n{report['size'][0]}x{report['size'][1]}, {base['windows']} windows, {report['environment']['cpu']}, ",
        end="",
    )
    print(f"{report['environment']['threads']} threads, matmul {report['matmul_gflops']:.0f} GFLOP/s\n")
    print("| variant | median s | p10-p90 | time ratio | peak GiB | memory ratio | load s |")
    print("|---|---|---|---|---|---|---|")
    for name, result in report["results"].items():
        ratio = report["ratios"].get(f"{name}/{report['baseline']}")
        seconds: Summary = result["seconds"]
        print(
            f"| {result['what']} | {seconds.median:.3f} | {seconds.p10:.3f}-{seconds.p90:.3f} "
            f"| {1.0 if ratio is None else ratio.median:.2f} | {result['peak_bytes'] / 2**30:.2f} "
            f"| {result['peak_bytes'] / base['peak_bytes']:.2f} | {result['load_seconds']:.1f} |"
        )
    stages = list(dict.fromkeys(key for result in report["results"].values() for key in result["stages"]))
    print("\n| stage | " + " | ".join(report["results"]) + " |")
    print("|---" * (len(report["results"]) + 1) + "|")
    for stage in stages:
        cells = [f"{result['stages'].get(stage, 0.0):.4f}" for result in report["results"].values()]
        print(f"| {stage} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    raise SystemExit(main())
