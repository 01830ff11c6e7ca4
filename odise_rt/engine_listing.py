"""The engines of a bundle for people: what each is, and whether this machine can use it."""

from __future__ import annotations

from typing import Any

from odise_rt.backends.machine import this_machine
from odise_rt.bundle import Bundle
from odise_rt.engine_facts import TITLES
from odise_rt.engines import find_engines


def list_engines(bundle: Bundle) -> list[dict[str, Any]]:
    """Describe every engine.

    Args:
        bundle: opened.

    Returns:
        For each engine its ``name`` (the folder), ``stage``, ``engine``, ``precision``, ``built_for``, ``mib``,
        ``fits`` (usable on this machine), ``verified`` (compared on this GPU), and ``state``, a sentence. A broken one
        has ``name`` and ``state`` only, and ``fits`` false.
    """
    machine = this_machine()
    found = find_engines(bundle)
    entries: list[dict[str, Any]] = []
    for engine in found.found:
        facts = engine.facts
        mismatches = engine.mismatches(bundle, machine)
        if facts.engine == "ort-cuda" and not mismatches and "ort-cuda" not in machine.versions:
            state, fits = "needs onnxruntime-gpu, which is not installed", False
        elif mismatches:
            state, fits = "does not fit: " + "; ".join(str(m) for m in mismatches), False
        elif machine.gpu is None:
            state, fits = f"cannot run: {machine.no_gpu}", False
        else:
            verified = engine.is_verified_on(machine)
            state, fits = "fits" if verified else "fits, and is compared with its reference at the first load", True
        device = facts.gpu or (", ".join(facts.targets) if facts.targets else "any GPU")
        entries.append(
            {
                "name": engine.folder.name,
                "stage": facts.stage,
                "engine": TITLES[facts.engine],
                "precision": facts.precision,
                "built_for": device if facts.engine == "ort-cuda" else f"{device}, version {facts.engine_version}",
                "mib": round(sum((engine.folder / name).stat().st_size for name in engine.files) / 2**20, 1),
                "fits": fits,
                "verified": engine.is_verified_on(machine),
                "verified_on": [str(entry.get("gpu")) for entry in engine.verified],
                "state": state,
            }
        )
    entries += [{"name": name, "state": f"broken: {problem}", "fits": False} for name, problem in found.broken.items()]
    return entries


def engine_lines(entries: list[dict[str, Any]]) -> list[str]:
    """The list as lines of text; engines of one state are counted together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for entry in entries:
        if "stage" in entry:
            key = (entry["engine"], entry["precision"], entry["built_for"], entry["state"])
            groups.setdefault(key, []).append(entry["stage"])
    lines = [
        f"{engine} {precision} for {built_for}: {', '.join(stages)}: {state}"
        for (engine, precision, built_for, state), stages in groups.items()
    ]
    return lines + [f"{entry['name']}: {entry['state']}" for entry in entries if "stage" not in entry]
