"""Plots of a run as SVG text. Each is readable without knowing the code and says what is better."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.noise import Difference
from benchmarks.report_tables import GRAPH_STAGES, STAGE_NAMES, duration
from benchmarks.results import Result, Run
from benchmarks.steps import Step, steps_of
from benchmarks.variants import PEERS
from odise_rt.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e7eb"
OURS, OTHER, GOOD, BAD, ACCENT = "#0b7a75", "#9aa8b5", "#2f8f5b", "#c0392b", "#d98324"
STAGE_COLOURS = {
    "preprocess": "#4e5d6c",
    "network": "#12857f",
    "pixels_to_segments": "#0f6b80",
    "clip_image": "#5b8db8",
    "unet_tap": "#0b7a75",
    "stitch": "#8d6e97",
    "mask_decoder": "#d98324",
    "clip_mask": "#8fb8de",
    "words": "#b0b7bf",
    "classify": "#c0392b",
    "name_masks": "#a93226",
    "panoptic": "#e0b04c",
}
SHORT_LABELS = {
    "official": "official structure\nPyTorch eager",
    "pruned": "our pruned structure\nPyTorch eager",
    "compile": "our pruned structure\ntorch.compile",
    "compile-bf16": "our pruned structure\ntorch.compile, bf16",
    "ort-official": "official structure\nONNX Runtime",
    "ort-portable": "portable graphs\nONNX Runtime",
    "ort-settings": "portable graphs\nour settings",
    "runtime": "odise_rt",
    "runtime-fp16": "odise_rt\nfp16 graphs",
    "runtime-openvino": "odise_rt\nOpenVINO",
    "runtime-openvino-bf16": "odise_rt\nOpenVINO, bf16",
    "step-pruning": "no dead compute\nPyTorch eager",
    "step-batching": "windows in batches\nPyTorch eager",
}
_WIDTH = 8.6


@dataclass(frozen=True)
class Plot:
    """One picture of the report."""

    name: str
    title: str
    """Also the text for those who do not see it, with :attr:`reading`."""
    reading: str
    """How to read it, in a sentence or two."""
    svg: str


def plots_of(run: Run) -> list[Plot]:
    """All plots for which the run has results."""
    makers: list[Callable[[Run], Plot | None]] = [
        peers_plot,
        waterfall_plot,
        stages_plot,
        roofline_plot,
        sizes_plot,
        words_plot,
        waiting_plot,
    ]
    return [plot for plot in (make(run) for make in makers) if plot is not None]


def _figure(height: float) -> tuple[Figure, Axes]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise MissingPackageError("plots need matplotlib: pip install 'matplotlib>=3.8'") from exc
    with rc_context({"font.size": 11}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=INK, labelsize=11, length=0)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The same figure gives the same text: no date, no random identifiers."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "odise_rt", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    return buffer.getvalue()


def _measured(run: Run, group: str, variants: Sequence[str] | None = None) -> list[Result]:
    results = run.group(group)
    if variants is not None:
        by_name = {r.variant: r for r in results}
        results = [by_name[v] for v in variants if v in by_name]
    return results


def peers_plot(run: Run) -> Plot | None:
    """Time of every peer, with failures as rows."""
    shown = _measured(run, "peers", [*PEERS, "runtime-fp16"])
    if not any(r.status == "ok" for r in shown):
        return None
    figure, axes = _figure(0.9 + 0.62 * len(shown))
    longest = max(r.summary.p90 for r in shown if r.summary is not None) * 1e3
    for row, result in enumerate(shown):
        y = len(shown) - 1 - row
        if result.summary is None:
            axes.text(longest * 0.01, y, f"{result.status.upper()}: see the table", va="center", color=BAD, fontsize=11)
            continue
        s = result.summary
        ours = result.variant.startswith("runtime")
        axes.barh(y, s.median * 1e3, color=OURS if ours else OTHER, height=0.62)
        axes.plot([s.p10 * 1e3, s.p90 * 1e3], [y, y], color=INK, linewidth=1.5, solid_capstyle="butt")
        text = duration(s.median)
        pq = result.accuracy.get("pq")
        if pq:
            text += f"   PQ {pq['all']:.1f}"
        axes.text(s.p90 * 1e3 + longest * 0.015, y, text, va="center", color=INK, fontsize=11)
    axes.set_yticks(range(len(shown)), [SHORT_LABELS.get(r.variant, r.variant) for r in reversed(shown)])
    axes.set_xlim(0, longest * 1.28)
    axes.set_xlabel("milliseconds a picture (shorter is better)", color=MUTED)
    axes.grid(axis="x", color=GRID)
    return Plot(
        "peers",
        "Time for one picture",
        "Bars are medians, the dark line on each runs from the 10th to the 90th percentile. PQ is panoptic quality on "
        "held-out scenes: the same quality is what makes times comparable.",
        _svg(figure),
    )


def waterfall_plot(run: Run) -> Plot | None:
    """From the official structure to the runtime, one step at a time."""
    steps = [step for step in steps_of(run) if isinstance(step, Step)]
    if len(steps) < 3:
        return None
    figure, axes = _figure(3.9)
    times = [step.result.seconds * 1e3 for step in steps]
    span = max(times)
    axes.bar(0, times[0], color=OTHER, width=0.62)
    axes.text(0, times[0] + span * 0.015, duration(times[0] / 1e3), ha="center", color=INK, fontsize=10.5)
    for x in range(1, len(steps)):
        before, saved = times[x - 1], steps[x].saved * 1e3
        colour = OTHER if steps[x].is_noise else GOOD if saved > 0 else BAD
        axes.bar(x, abs(saved), bottom=min(before, before - saved), color=colour, width=0.62)
        axes.plot([x - 0.69, x + 0.31], [before, before], color=MUTED, linewidth=0.8)
        amount = f"{'−' if saved > 0 else '+'}{duration(abs(saved) / 1e3)}"
        top = max(before, before - saved) + span * 0.015
        axes.text(x, top, "noise" if steps[x].is_noise else amount, ha="center", fontsize=10.5)
    axes.bar(len(steps), times[-1], color=OURS, width=0.62)
    axes.text(len(steps), times[-1] + span * 0.015, duration(times[-1] / 1e3), ha="center", color=INK, fontsize=10.5)
    names = [step.name for step in steps]
    labels = [
        names[0],
        *(f"+ {name}" for name in names[1:]),
        "odise_rt" if steps[-1].result.variant == "runtime" else "end",
    ]
    axes.set_xticks(range(len(labels)), [_wrap(label) for label in labels])
    axes.tick_params(axis="x", labelsize=9.5)
    axes.set_ylim(0, span * 1.1)
    axes.set_ylabel("milliseconds a picture", color=MUTED)
    axes.grid(axis="y", color=GRID)
    return Plot(
        "waterfall",
        "What each step buys",
        "Left the official structure, right odise_rt; every bar between is what one step saves (green) or costs "
        "(red) on top of the steps to its left, by the median ratio of the same rounds; grey is within "
        "noise. The order matters: another order would share the gain differently.",
        _svg(figure),
    )


def _wrap(label: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(label, 11, break_long_words=False))


def stages_plot(run: Run) -> Plot | None:
    """Where the time goes, for each implementation."""
    measured = _measured(
        run,
        "peers",
        (
            *("official", "pruned", "compile", "compile-bf16", "ort-official", "ort-portable"),
            *("runtime-fp16", "runtime", "runtime-openvino", "runtime-openvino-bf16"),
        ),
    )
    shown = [r for r in measured if r.status == "ok"]
    if not shown:
        return None
    figure, axes = _figure(1.7 + 0.56 * len(shown))
    for row, result in enumerate(reversed(shown)):
        left = 0.0
        for stage, colour in STAGE_COLOURS.items():
            width = result.stages.get(stage, {}).get("seconds", 0.0) * 1e3
            axes.barh(row, width, left=left, color=colour, height=0.66, edgecolor="white", linewidth=0.4)
            left += width
        axes.text(left, row, f"  {duration(left / 1e3)}", va="center", fontsize=10.5, color=INK)
    axes.set_yticks(range(len(shown)), [SHORT_LABELS.get(r.variant, r.variant) for r in reversed(shown)])
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds a picture", color=MUTED)
    axes.grid(axis="x", color=GRID)
    present = [s for s in STAGE_COLOURS if any(s in r.stages for r in shown)]
    _stage_legend(figure, present)
    return Plot(
        "stages",
        "Where the time goes",
        "Steps from left to right in the order in which they run. Everything but the two CLIPs, VAE + UNet and mask "
        "decoder happens outside the exported graphs.",
        _svg(figure),
    )


def _stage_legend(figure: Figure, stages: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=STAGE_COLOURS[s], label=STAGE_NAMES[s]) for s in stages]
    figure.legend(handles=handles, loc="outside upper center", ncols=5, frameon=False, fontsize=10)


def roofline_plot(run: Run) -> Plot | None:
    """Every stage under the machine's two limits."""
    by_name = {r.variant: r for r in run.group("peers") if r.status == "ok"}
    shown = [(v, by_name[v]) for v in ("pruned", "runtime") if v in by_name]
    points = [
        (variant, stage, result.stages[stage])
        for variant, result in shown
        for stage in GRAPH_STAGES
        if "flops" in result.stages.get(stage, {})
    ]
    if not points:
        return None
    rates = run.best_rates
    figure, axes = _figure(4.3)
    xs = [entry["flops"] / entry["bytes"] for _, _, entry in points]
    ridge = rates.peak_gflops / rates.copy_gbps
    low, high = min(*xs, ridge) / 2.5, max(*xs, ridge) * 3
    line = [low, ridge, high]
    axes.plot(line, [min(x * rates.copy_gbps, rates.peak_gflops) for x in line], color=INK, linewidth=1.8)
    axes.text(
        high, rates.peak_gflops * 1.06, f"matmul {rates.peak_gflops:.0f} GFLOP/s", ha="right", fontsize=10, color=INK
    )
    axes.text(low * 1.1, low * rates.copy_gbps * 1.6, f"copy {rates.copy_gbps:.0f} GB/s", fontsize=10, color=INK)
    for variant, stage, entry in points:
        filled = variant == "runtime"
        axes.plot(
            entry["flops"] / entry["bytes"],
            entry["gflops"],
            marker="o",
            markersize=9,
            color=STAGE_COLOURS[stage],
            markerfacecolor=STAGE_COLOURS[stage] if filled else "white",
            markeredgewidth=2,
            linestyle="none",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_xlabel("FLOP for each byte that must move (weights, inputs, outputs once)", color=MUTED)
    axes.set_ylabel("GFLOP/s reached", color=MUTED)
    axes.grid(color=GRID, which="major")
    axes.minorticks_off()
    from matplotlib.lines import Line2D

    handles: list[Any] = [
        Line2D([], [], marker="o", linestyle="none", markersize=8, color=STAGE_COLOURS[s], label=STAGE_NAMES[s])
        for s in dict.fromkeys(stage for _, stage, _ in points)
    ]
    for variant, label in (("runtime", "odise_rt"), ("pruned", "PyTorch eager")):
        if any(v == variant for v, _, _ in points):
            face = MUTED if variant == "runtime" else "white"
            handles.append(
                Line2D(
                    [], [], marker="o", linestyle="none", color=MUTED, markerfacecolor=face, markersize=8, label=label
                )
            )
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=10)
    return Plot(
        "roofline",
        "How close to what the machine can do",
        "The dark line is the most that this machine did in the same run: the slope is its copy bandwidth, the "
        "flat part "
        "its matmul rate. Higher is better; a filled point above the line is convolution done with fewer "
        "operations than "
        "counted.",
        _svg(figure),
    )


def sizes_plot(run: Run) -> Plot | None:
    """Time over windows, with the fitted line."""
    shown = [r for r in run.group("sizes") if r.status == "ok"]
    if len(shown) < 2:
        return None
    figure, axes = _figure(3.9)
    windows = [r.facts["windows"] for r in shown]
    fit = run.fits.get("sizes")
    if fit:
        line = [windows[0] * (windows[-1] / windows[0]) ** (i / 60) for i in range(61)]
        label = f"{duration(fit['intercept'])} + {duration(fit['slope'])} a window, R² {fit['r2']:.4f}"
        axes.plot(line, [fit["intercept"] + fit["slope"] * w for w in line], color=ACCENT, linewidth=1.6, label=label)
    axes.plot(windows, [r.seconds for r in shown], "o", color=OURS, markersize=7, label="odise_rt, median")
    for result, count in zip(shown, windows, strict=True):
        side = result.facts["size"]
        axes.annotate(
            f"{side[0]}²",
            (count, result.seconds),
            xytext=(7, -11),
            textcoords="offset points",
            fontsize=9.5,
            color=MUTED,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(windows, [str(w) for w in windows])
    axes.minorticks_off()
    axes.set_xlabel("windows", color=MUTED)
    axes.set_ylabel("seconds a picture", color=MUTED)
    axes.grid(color=GRID)
    axes.legend(frameon=False, loc="upper left", fontsize=10.5)
    return Plot(
        "sizes",
        "Cost by picture size",
        "Both axes are logarithmic; the curve is a straight line in windows. Points on it mean that twice the "
        "pixels cost "
        "twice the time.",
        _svg(figure),
    )


def words_plot(run: Run) -> Plot | None:
    """Time over cached words."""
    shown = [r for r in run.group("words") if r.status == "ok"]
    if len(shown) < 2:
        return None
    figure, axes = _figure(3.1)
    for x, result in enumerate(shown):
        words = sum(result.stages.get(s, {}).get("seconds", 0.0) for s in ("words", "classify")) * 1e3
        rest = result.seconds * 1e3 - words
        axes.bar(x, rest, color=OURS, width=0.6, label="everything else" if x == 0 else None)
        axes.bar(
            x, words, bottom=rest, color=BAD, width=0.6, label="looking words up and classifying" if x == 0 else None
        )
        ratio = "" if result.ratio is None else f"\n{result.ratio.summary.median:.2f} ×"
        axes.text(x, rest + words, f"{duration(result.seconds)}{ratio}", ha="center", va="bottom", fontsize=10)
    axes.set_xticks(range(len(shown)), [f"{r.facts['words']:,}" for r in shown])
    axes.margins(y=0.28)
    axes.set_xlabel("cached words in the vocabulary", color=MUTED)
    axes.set_ylabel("milliseconds a picture", color=MUTED)
    axes.grid(axis="y", color=GRID)
    figure.legend(frameon=False, loc="outside upper center", ncols=2, fontsize=10)
    return Plot(
        "words",
        "Cost by number of words",
        "The same picture with vocabularies of different size whose embeddings are in memory. The factor is to 100 "
        "words.",
        _svg(figure),
    )


def waiting_plot(run: Run) -> Plot | None:
    """Cold start and change of words."""
    cold = [r for r in run.group("cold") if r.status == "ok"]
    change = [r for r in run.group("vocabulary") if r.status == "ok"]
    shown = cold + change
    if not shown:
        return None
    figure, axes = _figure(1.0 + 0.42 * len(shown))
    for row, result in enumerate(reversed(shown)):
        ours = result.variant.startswith("runtime")
        axes.barh(row, result.seconds, color=OURS if ours else OTHER, height=0.62)
        axes.text(result.seconds, row, f"  {duration(result.seconds)}", va="center", fontsize=10.5)
    labels = [f"first picture: {_short(r)}" for r in cold]
    labels += [f"{r.facts['words']:,} new words: {_short(r)}" for r in change]
    axes.set_yticks(range(len(shown)), labels[::-1])
    axes.set_xscale("log")
    axes.margins(x=0.16)
    axes.set_xlabel("seconds, logarithmic (shorter is better)", color=MUTED)
    axes.grid(axis="x", color=GRID)
    return Plot(
        "waiting",
        "What one waits for",
        "First picture: from the start of a process to its first result. New words: embedding words never seen "
        "before in a "
        "process that runs already.",
        _svg(figure),
    )


def _short(result: Result) -> str:
    names = {
        "runtime": "odise_rt",
        "runtime-new-words": "odise_rt, new words",
        "pruned": "PyTorch eager",
        "official": "official, eager",
        "compile": "torch.compile",
    }
    return names.get(result.variant, result.variant)


def comparison_plot(differences: Sequence[Difference]) -> Plot | None:
    """Change of every result against its noise bound."""
    shown = [d for d in differences if d.change is not None and d.bound is not None]
    if not shown:
        return None
    figure, axes = _figure(1.1 + 0.27 * len(shown))
    colours = {"slower": BAD, "faster": GOOD}
    for row, d in enumerate(reversed(shown)):
        assert d.change is not None
        assert d.bound is not None
        axes.barh(row, 200 * d.bound, left=-100 * d.bound, color=GRID, height=0.7)
        axes.plot(100 * d.change, row, "o", color=colours.get(d.verdict, MUTED), markersize=6)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_yticks(range(len(shown)), [d.key for d in reversed(shown)])
    axes.tick_params(axis="y", labelsize=8.5)
    axes.set_xlabel("change in per cent (left is faster)", color=MUTED)
    return Plot(
        "comparison",
        "Changes against the base run",
        "Grey: the noise bound of each result. A red or green point outside of it is a difference, a grey point "
        "inside is "
        "not.",
        _svg(figure),
    )
