"""Check the dependencies of this environment: every installed package is pinned, and none has a known vulnerability.

    python .ci/audit.py [--constraints constraints.txt]

Advisories come from pip-audit where it is installed and reaches its database. Elsewhere the pins alone are checked,
which is said: what was reviewed is what runs, and a changed or added package does not slip in. Exit code 1 for a
package that is not pinned or has another version, for a pin that is no pin, and for a known vulnerability.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

NOT_PINNED = frozenset({"pip", "setuptools", "wheel", "odise-rt"})
"""The installer, which comes with the interpreter, and this project."""
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)")


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(lines: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Exact versions by canonical name, and what is wrong with the file."""
    pins: dict[str, str] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _PIN.fullmatch(text)
        if match is None:
            problems.append(f"line {number}: {text!r} is no exact pin: expected NAME==VERSION")
        elif canonical(match[1]) in pins:
            problems.append(f"line {number}: {match[1]} is pinned twice: keep one")
        else:
            pins[canonical(match[1])] = match[2]
    return pins, problems


def unpinned(installed: Mapping[str, str], pins: Mapping[str, str]) -> list[str]:
    """Installed packages without a pin, or with another version than theirs. Local parts (+cpu) do not count."""
    problems = []
    for name, version in sorted(installed.items()):
        if name in NOT_PINNED:
            continue
        pin = pins.get(name)
        if pin is None:
            problems.append(f"{name} {version} is installed but not pinned: add {name}=={version}")
        elif pin != version and pin != version.partition("+")[0]:
            problems.append(f"{name} {version} is installed, {pin} is pinned: install with -c constraints.txt")
    return problems


def installed_packages() -> dict[str, str]:
    """Canonical name to version of every package of this environment."""
    return {canonical(d.metadata["Name"]): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}


def advisories(constraints: Path) -> tuple[list[str], str]:
    """Known vulnerabilities of the pinned versions, and in words what was asked."""
    if importlib.util.find_spec("pip_audit") is None:
        return [], "pip-audit is not installed: only the pins were checked"
    command = [sys.executable, "-m", "pip_audit", "-r", str(constraints), "--no-deps", "--disable-pip", "-f", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return read_advisories(done.stdout)


def read_advisories(output: str) -> tuple[list[str], str]:
    """What pip-audit's JSON says; anything else means that it did not reach its database."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return [], "pip-audit did not reach its database: only the pins were checked"
    found = []
    for package in packages:
        for entry in package.get("vulns", ()):
            fixed = ", ".join(entry.get("fix_versions", ())) or "no version yet"
            found.append(f"{package['name']} {package['version']} has {entry['id']}: fixed in {fixed}")
    return found, f"pip-audit looked at {len(packages)} packages"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, default=Path(__file__).parents[1] / "constraints.txt")
    args = parser.parse_args(argv)
    try:
        lines = args.constraints.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        print(f"audit: cannot read {args.constraints} ({exc.strerror})", file=sys.stderr)
        return 1
    pins, problems = read_pins(lines)
    installed = installed_packages()
    problems += unpinned(installed, pins)
    found, asked = advisories(args.constraints)
    problems += found
    for problem in problems:
        print(f"audit: {problem}", file=sys.stderr)
    print(f"{len(installed)} packages installed, {len(pins)} pinned; {asked}; {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
