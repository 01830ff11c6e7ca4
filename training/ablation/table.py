"""The result of an ablation as JSON and as a Markdown table: every row, and why it is missing where it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from odise_rt.files import atomic_writer, write_json
from training.ablation.measure import Places, read_evaluation, read_failure
from training.ablation.rows import CLAIMS, GROUPS, METRICS, ROWS, Claim, Row

_TITLES = {row.id: row.title for row in ROWS}


def measured(evaluation: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of :data:`METRICS`, in percent; None where a group has no class in the data."""
    metrics = evaluation["metrics"]
    return {
        "pq": metrics["pq"]["all"]["pq"],
        "pq_seen": metrics["pq"]["seen"]["pq"],
        "pq_unseen": metrics["pq"]["unseen"]["pq"],
        "miou": metrics["miou"]["all"]["miou"],
        "ap": metrics["ap"]["all"]["ap"],
    }


def collect(places: Places, setup: dict[str, Any], seeds: Sequence[int], asked: Collection[str]) -> dict[str, Any]:
    """All that is on disk, row by row.

    Args:
        places: the ablation's folders.
        setup: budget and data, for the record.
        seeds: seeds of this call.
        asked: ids of the rows that this call was asked for.
    """
    rows = [_row(row, places, seeds, row.id in asked) for row in ROWS]
    found = {row["id"]: row for row in rows}
    claims = [claim for claim in (_claim(claim, found) for claim in CLAIMS) if claim is not None]
    return {"setup": setup, "seeds": list(seeds), "rows": rows, "claims": claims}


def _row(row: Row, places: Places, seeds: Sequence[int], asked: bool) -> dict[str, Any]:
    results, missing = [], []
    for seed in seeds:
        evaluation = read_evaluation(places.evaluation(row.run, seed, row.classification))
        if evaluation is None:
            reason = read_failure(places.folder(row.run, seed))
            if reason is None:
                reason = "not yet: the same command goes on" if asked else "not asked for"
            missing.append({"seed": seed, "reason": reason})
            continue
        kept = ("command", "training_seconds", "evaluation_seconds", "trained_parameters", "environment")
        results.append({"seed": seed, **measured(evaluation), **{key: evaluation[key] for key in kept}})
    return {
        "id": row.id,
        "title": row.title,
        "run": row.run,
        "classification": row.classification,
        "mean": {key: _mean([result[key] for result in results]) for key in METRICS},
        "results": results,
        "not_run": missing,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _claim(claim: Claim, rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """How a claim of the paper fares, by the seeds that both rows have; None where there are none."""
    better, worse = (
        {result["seed"]: result[claim.metric] for result in rows[f"{claim.group}/{name}"]["results"]}
        for name in (claim.better, claim.worse)
    )
    pairs = [(better[s], worse[s]) for s in better if s in worse and better[s] is not None and worse[s] is not None]
    if not pairs:
        return None
    return {
        "group": claim.group,
        "better": f"{claim.group}/{claim.better}",
        "worse": f"{claim.group}/{claim.worse}",
        "metric": claim.metric,
        "mean_difference": mean(first - second for first, second in pairs),
        "seeds_that_agree": sum(first > second for first, second in pairs),
        "seeds_against": sum(first < second for first, second in pairs),
        "seeds": len(pairs),
    }


def markdown(table: dict[str, Any]) -> str:
    """The table as text."""
    setup = table["setup"]
    lines = [
        f"# Ablations of {setup['experiment']['model']['name']}",
        "",
        f"Every run: {setup['iterations']} iterations of the experiment `{setup['experiment']['name']}`, the same data "
        f"and budget; measured on {setup['scenes']} held-out scenes. In percent: mean over seeds (each seed: "
        f"{', '.join(map(str, table['seeds']))}). Seeds change initial weights, the order of batches and the points at "
        "which losses are sampled.",
    ]
    header = ["", *METRICS.values(), "trained", "training"]
    for group, title in GROUPS.items():
        rows = [row for row in table["rows"] if row["id"].startswith(f"{group}/")]
        lines += ["", f"## {title}", "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [_line(row) for row in rows]
        verdicts = [_verdict(claim) for claim in table["claims"] if claim["group"] == group]
        lines += ["", *verdicts] if verdicts else []
        notes = [f"- {row['title']}, seed {gap['seed']}: {gap['reason']}" for row in rows for gap in row["not_run"]]
        lines += ["", "Not run:", "", *notes] if notes else []
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    results = row["results"]
    if not results:
        return f"| {row['title']} | not run |{' |' * (len(METRICS) + 1)}"
    cells = [row["title"]]
    for key in METRICS:
        cells.append(_cell(row["mean"][key], [result[key] for result in results]))
    minutes = mean(result["training_seconds"] for result in results) / 60
    cells += [f"{results[0]['trained_parameters'] / 1e6:.2f} M", f"{minutes:.1f} min"]
    return f"| {' | '.join(cells)} |"


def _cell(average: float | None, values: Sequence[float | None]) -> str:
    each: Callable[[float | None], str] = lambda value: "–" if value is None else f"{value:.1f}"  # noqa: E731
    return each(average) if len(values) < 2 else f"{each(average)} ({', '.join(map(each, values))})"


def _verdict(claim: dict[str, Any]) -> str:
    agree, against, seeds = claim["seeds_that_agree"], claim["seeds_against"], claim["seeds"]
    verdict = "agrees" if agree == seeds else "does not agree" if against == seeds else "undecided"
    return (
        f"- Expected: {METRICS[claim['metric']]} of *{_TITLES[claim['better']]}* above *{_TITLES[claim['worse']]}*. "
        f"Measured: {claim['mean_difference']:+.1f}, above in {agree} and below in {against} of {seeds} seeds: "
        f"{verdict}."
    )


def write_table(out: Path, table: dict[str, Any]) -> None:
    """``OUT/ablation.json`` and ``OUT/ablation.md``, each written whole."""
    write_json(out / "ablation.json", table)
    with atomic_writer(out / "ablation.md") as file:
        file.write(markdown(table).encode())
