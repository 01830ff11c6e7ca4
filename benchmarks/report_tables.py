"""Tables of a run, as data: the report renders them as HTML and Markdown, README takes some of them."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness import TAIL_SAMPLES, Summary
from benchmarks.noise import SIGMAS, Difference, floor_of
from benchmarks.results import Result, Run
from benchmarks.steps import Step, steps_of
from benchmarks.targets import targets_of
from benchmarks.variants import HALF, PEERS, VARIANTS, WATERFALL

STAGE_NAMES = {
    "preprocess": "preprocess",
    "network": "pixels to masks on the GPU",
    "pixels_to_segments": "pixels to segments on the GPU",
    "clip_image": "CLIP of windows",
    "unet_tap": "VAE + UNet",
    "stitch": "stitch",
    "mask_decoder": "mask decoder",
    "clip_mask": "CLIP of masks",
    "words": "words",
    "classify": "classify",
    "name_masks": "masks to segments on the GPU",
    "panoptic": "panoptic merge",
}
"""Steps of a picture in their order, named for readers."""

GRAPH_STAGES = ("clip_image", "unet_tap", "mask_decoder", "clip_mask")


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is left-aligned, numbers are not."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def markdown(self) -> str:
        """A GitHub table, without the title."""
        lines = ["| " + " | ".join(_escape(c) for c in self.header) + " |"]
        lines.append("|---" + "|---:" * (len(self.header) - 1) + "|")
        lines += ["| " + " | ".join(_escape(c) for c in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """A table that scrolls sideways on its own where the window is narrow."""
        head = "".join(f"<th>{html.escape(c)}</th>" for c in self.header)
        rows = []
        for row in self.rows:
            reason = next((i for i, c in enumerate(row) if c.startswith(("FAILED", "OOM", "ABSENT"))), len(row))
            cells = "".join(f"<td>{html.escape(c)}</td>" for c in row[:reason])
            if reason < len(row):  # a reason may be long: it takes the place of the numbers that are not there
                cells += f"<td class=reason colspan={len(row) - reason}>{html.escape(row[reason])}</td>"
            rows.append(f"<tr{' class=bad' if reason < len(row) or 'missed' in row else ''}>{cells}</tr>")
        body = "\n".join(rows)
        return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n'


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# ---- numbers as text -------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """``"812 µs"``, ``"83.2 ms"``, ``"21.4 s"``: three digits that count."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        value = seconds * factor
        if abs(value) >= 1 or unit == "µs":
            return f"{_three(value)} {unit}"
    raise AssertionError


def _three(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def size(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def percent(share: float, digits: int = 1) -> str:
    """A share as per cent."""
    return f"{100 * share:.{digits}f} %"


def failure(result: Result) -> str:
    """``"FAILED: reason"`` for a result without samples."""
    return f"{result.status.upper()}: {result.reason}"


def _summary(result: Result) -> Summary:
    assert result.summary is not None
    return result.summary


def _spread(result: Result) -> str:
    return f"{duration(_summary(result).p10)} – {duration(_summary(result).p90)}"


def _ratio(result: Result) -> str:
    return "" if result.ratio is None else f"{result.ratio.summary.median:.2f} ×"


def described_commit(run: Run) -> str:
    """Which code was measured."""
    commit = (run.environment["commit"] or "unknown")[:12]
    return f"{commit}{' with uncommitted changes' if run.environment['dirty'] else ''}"


# ---- tables ----------------------------------------------------------------------------------------------------------


def machine_table(run: Run) -> Table:
    """Where and how it was measured."""
    env, rates = run.environment, run.best_rates
    packages = ", ".join(f"{n} {v}" for n, v in env["packages"].items() if v)
    gpus = "; ".join(f"{g.get('name')}, driver {g.get('driver_version')}" for g in env["gpus"]) or "none"
    matmul = ", ".join(f"{n} {v:.0f}" for n, v in rates.matmul_gflops.items())
    readings = [(c["when"], c["cpu_mhz"], c["load_average_1min"]) for c in run.clocks]
    mhz = sorted({value for _, values, _ in readings for value in values})
    loads = [load for _, _, load in readings if load is not None]
    bundles = ", ".join(f"{p} {b['digest'][:12]}" for p, b in run.model.get("bundles", {}).items()) or "none"
    rows = [
        ("command", run.command),
        ("commit", described_commit(run)),
        ("processor", f"{env['cpu']}, {env['cores']} cores, {' '.join(env['cpu_features'])}"),
        ("threads, memory", f"{env['threads']} threads, {env['memory_gib']} GiB"),
        ("GPU", gpus),
        ("clocks as read", f"CPU {mhz[0]}–{mhz[-1]} MHz" if mhz else "not readable"),
        ("load average", f"{min(loads)} to {max(loads)} in the run" if loads else "not readable"),
        ("matmul rate", f"{matmul} GFLOP/s (float32, 2048²)"),
        ("copy bandwidth", f"{rates.copy_gbps:.1f} GB/s read and written"),
        ("model", f"{run.model.get('config', 'none')}, weights: {run.model.get('weights', 'none')}"),
        ("bundles", bundles),
        ("versions", f"Python {env['python']}, {packages}"),
        ("took", f"{run.seconds:.0f} s"),
    ]
    return Table("Machine and settings", ("", ""), tuple(rows))


def targets_table(run: Run) -> Table:
    """What this project wanted to reach."""
    rows = []
    for target in targets_of(run):
        sign = "at most" if target.at_most else "at least"
        value = "" if target.value is None else f"{target.value:.3f}"
        noise = f"±{percent(target.noise)}" if target.noise else ""
        rows.append((target.what, f"{sign} {target.bound:g}", value, noise, target.verdict))
    caption = "Undecided: the measured ratio is within its noise bound of what is wanted."
    return Table("Targets", ("ratio in this run", "wanted", "measured", "noise bound", ""), tuple(rows), caption)


def peers_table(run: Run) -> Table:
    """Every implementation that a user could run instead, with its accuracy."""
    return _variants_table(run, [r for r in run.group("peers") if r.variant in PEERS], "What else one could run")


def all_variants_table(run: Run) -> Table:
    """Every implementation that was measured, steps and controls included."""
    return _variants_table(run, run.group("peers"), "Every implementation measured")


def _variants_table(run: Run, results: Sequence[Result], title: str) -> Table:
    measured = [r for r in results if r.status == "ok"]
    scenes = max((r.accuracy["scenes"] for r in measured if "pq" in r.accuracy), default=None)
    enough = all(len(r.samples) >= TAIL_SAMPLES for r in measured)
    columns: dict[str, Callable[[Result], str]] = {
        "median": lambda r: duration(r.seconds),
        "p10 – p90": _spread,
        "p99" if enough else "slowest": lambda r: duration(_summary(r).tail),
        "time ratio": _ratio,
        "PQ": lambda r: f"{r.accuracy['pq']['all']:.2f}" if "pq" in r.accuracy else r.accuracy.get("failed", ""),
        "seen / unseen": lambda r: "{seen:.1f} / {unseen:.1f}".format(**r.accuracy["pq"]) if "pq" in r.accuracy else "",
        "same class as PyTorch": lambda r: _share_of_same_class(r, on_scenes=scenes is not None),
        "mask logits off by": lambda r: _on_picture(r, "mask_logits_error", lambda value: percent(value, 4)),
        "cosine of mask embeddings": lambda r: _on_picture(r, "mask_embedding_cosine", lambda value: f"{value:.5f}"),
        "peak memory": lambda r: size(r.facts["peak_bytes"]),
        "load": lambda r: duration(r.facts["load_seconds"]),
    }
    header, rows = _filled(columns, results)
    return Table(title, header, rows, _variants_caption(measured, scenes) if measured else "")


def _filled(
    columns: Mapping[str, Callable[[Result], str]], results: Sequence[Result]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows of a table of implementations, without columns that none of them fills."""
    measured = [r for r in results if r.status == "ok"]
    columns = {name: cell for name, cell in columns.items() if any(cell(r) for r in measured)} or {"median": failure}
    rows = [
        (r.label, *(cell(r) for cell in columns.values()))
        if r.status == "ok"
        else (r.label, failure(r), *[""] * (len(columns) - 1))
        for r in results
    ]
    return ("implementation", *columns), tuple(rows)


def _share_of_same_class(result: Result, on_scenes: bool) -> str:
    where = result.accuracy if on_scenes else result.accuracy.get("picture", {})
    return percent(where["class_agreement"], 2) if "class_agreement" in where else ""


def _on_picture(result: Result, what: str, show: Callable[[float], str]) -> str:
    found = result.accuracy.get("picture", {})
    return show(found[what]) if what in found else ""


def _variants_caption(measured: Sequence[Result], scenes: int | None) -> str:
    base = next((r.ratio.to.rsplit("/", 1)[-1] for r in measured if r.ratio is not None), "")
    first = next((r for r in measured if r.variant == base), measured[0])
    facts = first.facts
    parts = [
        f"One picture of {facts['size'][0]} × {facts['size'][1]} pixels, {facts['windows']} windows, "
        f"{facts['words']} words cached, {facts['threads']} threads, {len(first.samples)} interleaved rounds, each "
        f"implementation in a process of its own. Segments in the picture: {facts['segments']} ({first.label}).",
        f"Time ratio: median over rounds, to {VARIANTS[base].label if base else 'nothing'}.",
    ]
    if scenes:
        parts.append(
            f"PQ and same class: panoptic quality, and share of pixels, on {scenes} held-out scenes of Sticker World."
        )
    elif any(_share_of_same_class(r, on_scenes=False) for r in measured):
        parts.append("Same class: share of the picture's pixels.")
    if any("picture" in r.accuracy for r in measured):
        parts.append(
            "Mask logits and embeddings of the picture, beside those of PyTorch in float32: root mean square of the "
            "difference over the standard deviation, and mean cosine."
        )
    return " ".join(parts)


def short_peers_table(run: Run) -> Table:
    """The peers in few columns, for README."""
    results = [r for r in run.group("peers") if r.variant in PEERS]
    on_scenes = any("pq" in r.accuracy for r in results)
    columns: dict[str, Callable[[Result], str]] = {
        "median": lambda r: duration(r.seconds),
        "time ratio": _ratio,
        "PQ": lambda r: f"{r.accuracy['pq']['all']:.1f}" if "pq" in r.accuracy else "",
        "same class as PyTorch": lambda r: _share_of_same_class(r, on_scenes),
        "peak memory": lambda r: size(r.facts["peak_bytes"]),
    }
    scenes = max((r.accuracy["scenes"] for r in results if "pq" in r.accuracy), default=0)
    caption = f"PQ and same class: on {scenes} held-out scenes of Sticker World." if scenes else ""
    header, rows = _filled(columns, results)
    return Table("Peers", header, rows, caption)


def steps_table(run: Run) -> Table:
    """What each step buys: every row adds one to the row above."""
    rows: list[tuple[str, ...]] = []
    for step in steps_of(run, (*WATERFALL, HALF)):
        if not isinstance(step, Step):
            name, result = step
            rows.append((name, failure(result), "", "", "", ""))
            continue
        compared = ("", "", "")
        if step.before is not None:
            saved = "within noise" if step.is_noise else duration(step.saved)
            compared = (f"{step.of_before.median:.2f} ×", f"±{percent(step.bound)}", saved)
        rows.append((step.name, duration(step.result.seconds), *compared, f"{step.of_first.median:.2f} ×"))
    header = ("step", "then a picture takes", "of the step before", "noise bound", "saved", "of the first")
    caption = (
        "Ratios are medians over rounds; saved is that share of the step before, unless the ratio is within the noise "
        "bound of 1."
    )
    return Table("What each step buys", header, tuple(rows), caption)


def stages_table(run: Run) -> Table:
    """Where the time goes."""
    shown = [r for r in run.group("peers") if r.status == "ok" and r.variant != "runtime-again"]
    rows = []
    for stage, name in STAGE_NAMES.items():
        if any(stage in r.stages for r in shown):
            values = [duration(r.stages[stage]["seconds"]) if stage in r.stages else "" for r in shown]
            rows.append((name, *values))
    rows.append(("outside the graphs", *(percent(r.facts["outside_share"]) for r in shown)))
    return Table("Where the time goes", ("step", *(r.variant for r in shown)), tuple(rows))


def roofline_table(run: Run) -> Table:
    """Work of every stage, and how close it came to what the machine can do."""
    rows = []
    for variant in ("official", "pruned", "ort-official", "ort-portable", "runtime"):
        result = next((r for r in run.group("peers") if r.variant == variant and r.status == "ok"), None)
        for stage in GRAPH_STAGES if result is not None else ():
            assert result is not None
            entry = result.stages.get(stage, {})
            if "flops" in entry:
                rows.append(
                    (
                        f"{variant}: {STAGE_NAMES[stage]}",
                        f"{entry['flops'] / 1e9:,.2f}",
                        f"{entry['bytes'] / 1e6:,.1f}",
                        f"{entry['moved_bytes'] / 1e6:,.0f}",
                        duration(entry["seconds"]),
                        f"{entry['gflops']:,.0f}",
                        percent(entry["roofline_share"], 0),
                    )
                )
    header = ("stage", "GFLOP", "least MB", "MB by operations", "time", "GFLOP/s", "of the roofline")
    caption = (
        "GFLOP of products and convolutions as written (Winograd's form needs fewer, so its share can pass 100 %). "
        "Least "
        "MB: weights, inputs and outputs once each, which the roofline uses. MB by operations: what moves when every "
        "operation reads and writes memory, as eager execution does."
    )
    return Table("Work and roofline", header, tuple(rows), caption)


def sizes_table(run: Run) -> Table:
    """Cost by picture size."""
    rows = []
    for result in run.group("sizes"):
        if result.status != "ok":
            rows.append((result.variant, failure(result), "", "", "", ""))
            continue
        facts = result.facts
        side, per_window = facts["size"], result.seconds / facts["windows"]
        peak = size(facts["peak_bytes"])
        outside = percent(facts["outside_share"])
        rows.append(
            (
                f"{side[0]} × {side[1]}",
                str(facts["windows"]),
                duration(result.seconds),
                duration(per_window),
                outside,
                peak,
            )
        )
    fit = run.fits.get("sizes")
    caption = ""
    if fit:
        line = f"{duration(fit['intercept'])} + {duration(fit['slope'])} a window"
        caption = f"Line through all points: {line}, R² {fit['r2']:.4f}."
        if "exponent" in fit:
            caption += f" From 4 windows on, time grows with windows to the power {fit['exponent']:.2f}."
    header = ("pixels", "windows", "median", "a window", "outside the graphs", "peak memory")
    return Table("Picture size", header, tuple(rows), caption)


def batches_table(run: Run) -> Table:
    """Cost by windows that run at a time."""
    rows = []
    for result in run.group("batches"):
        if result.status != "ok":
            rows.append((result.variant, failure(result), "", ""))
            continue
        peak = size(result.facts["peak_bytes"])
        rows.append((result.variant.removesuffix(" windows"), duration(result.seconds), _ratio(result), peak))
    measured = next((r.facts for r in run.group("batches") if r.status == "ok"), None)
    caption = ""
    if measured:
        height, width = measured["size"]
        caption = f"A picture of {height} × {width} pixels, {measured['windows']} windows in all."
    header = ("windows at a time", "median", "of one at a time", "peak memory")
    return Table("Batches of windows", header, tuple(rows), caption)


def words_table(run: Run) -> Table:
    """Cost by number of cached words."""
    rows = []
    for result in run.group("words"):
        if result.status != "ok":
            rows.append((result.variant, failure(result), "", ""))
            continue
        classify = result.stages.get("classify", {}).get("seconds", 0.0) + result.stages["words"]["seconds"]
        rows.append((f"{result.facts['words']:,}", duration(result.seconds), _ratio(result), duration(classify)))
    header = ("cached words", "median", "of 100 words", "of it for words")
    return Table("Vocabulary size", header, tuple(rows))


def cold_table(run: Run) -> Table:
    """From the start of a process to its first result."""
    rows = [
        (r.label, failure(r), "")
        if r.status != "ok"
        else (r.label, duration(r.seconds), duration(float(r.facts["load_seconds"])))
        for r in run.group("cold")
    ]
    return Table("Cold start", ("fresh process", "until the first picture", "of it imports and loading"), tuple(rows))


def vocabulary_table(run: Run) -> Table:
    """New words in a running process."""
    rows = []
    for r in run.group("vocabulary"):
        if r.status != "ok":
            rows.append((r.label, failure(r), ""))
        else:
            rows.append((r.label, duration(r.seconds), duration(r.seconds / r.facts["words"])))
    return Table("Change of words", ("words never seen before", "to embed them", "a word"), tuple(rows))


def kernels_table(run: Run) -> Table:
    """The runtime's own inner loops."""
    rows = [
        (r.label, failure(r), "") if r.status != "ok" else (r.label, duration(r.seconds), _spread(r))
        for r in run.group("kernels")
    ]
    return Table("Inner loops", ("what", "median", "p10 – p90"), tuple(rows))


def other_groups(run: Run) -> list[Table]:
    """Groups without a table of their own: GPU results, and whatever a newer version adds."""
    known = {"peers", "sizes", "batches", "words", "cold", "vocabulary", "kernels"}
    tables = []
    for group in dict.fromkeys(r.group for r in run.results if r.group not in known):
        rows = [
            (r.label, failure(r), "", "") if r.status != "ok" else (r.label, duration(r.seconds), _spread(r), _ratio(r))
            for r in run.group(group)
        ]
        tables.append(Table(group, ("what", "median", "p10 – p90", "time ratio"), tuple(rows)))
    return tables


def comparison_table(differences: Sequence[Difference], base: Run, run: Run) -> Table:
    """Two runs beside each other."""
    rows = []
    for d in differences:
        show: Callable[[float], str] = (lambda v: f"{v:.3f} ×") if d.kind == "ratio" else duration
        rows.append(
            (
                d.key,
                d.kind,
                "" if d.before is None else show(d.before),
                "" if d.after is None else show(d.after),
                "" if d.change is None else f"{100 * d.change:+.1f} %",
                "" if d.bound is None else f"±{100 * d.bound:.1f} %",
                d.verdict + (f" ({d.note})" if d.note else ""),
            )
        )
    caption = (
        f"A change counts beyond its noise bound: {percent(floor_of(base, run))} (the floor, or what two identical "
        f"variants "
        f"of these runs differ by) plus {SIGMAS:g} standard errors of both medians, plus the difference of the "
        f"machine's "
        "matmul rate for absolute times. Ratios are to another variant of the same rounds, so the machine cancels."
    )
    header = ("result", "compared", "base", "now", "change", "noise bound", "verdict")
    return Table("Comparison with the base run", header, tuple(rows), caption)


TABLES: dict[str, Callable[[Run], Table]] = {
    "machine": machine_table,
    "targets": targets_table,
    "peers": peers_table,
    "peers-short": short_peers_table,
    "variants": all_variants_table,
    "steps": steps_table,
    "stages": stages_table,
    "roofline": roofline_table,
    "sizes": sizes_table,
    "batches": batches_table,
    "words": words_table,
    "cold": cold_table,
    "vocabulary": vocabulary_table,
    "kernels": kernels_table,
}
"""Tables that a marked region of README or docs may name."""
