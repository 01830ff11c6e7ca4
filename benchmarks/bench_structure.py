"""The official structure, our pruned PyTorch and the runtime, interleaved: the shortest comparison of whole pictures.

The same as ``python -m benchmarks.run --groups peers`` with these three variants, and the same JSON.

    python -m benchmarks.bench_structure --config odise-tiny --size 256
    python -m benchmarks.bench_structure --config odise-sd1 --bundle BUNDLE --size 512 --repeats 3 --one-at-a-time
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import run

VARIANTS = ("official", "pruned", "runtime")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
    if "--variants" not in arguments:
        arguments += ["--variants", *VARIANTS]
    return run.main(["--groups", "peers", *arguments])


if __name__ == "__main__":
    raise SystemExit(main())
