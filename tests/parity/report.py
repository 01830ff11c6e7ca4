"""Prints how close our model is to the recorded tensors of the official implementation, stage by stage.

python -m tests.parity.report                        # against the fixture
python -m tests.parity.report --recording FOLDER     # against recorded_{label,caption}.npz in full precision
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tests.parity.closed_form import write_released_files
from tests.parity.recorded import VARIANTS, from_fixture, from_npz
from tests.parity.reference_run import Run
from tests.parity.stages import STAGES, compare
from tests.parity.whole_image import Agreement, agreement, from_raw_image, from_recorded_masks
from training.checkpoints import load_released
from training.config import preset

COLUMNS = f"{'stage':22} {'tensor':30} {'compared':>9} {'max error':>10} {'mean error':>10} {'scale':>8} {'ratio':>9}"


def reference_runs(folder: Path, recording: Path | None = None) -> Iterator[Run]:
    """Both variants, their weights written to and read from a folder in the released formats."""
    files = write_released_files(folder)
    for variant in VARIANTS:
        config = preset("odise-reference" if variant == "label" else "odise-reference-caption")
        loaded = load_released(
            config, odise=files[f"odise_{variant}"], stable_diffusion=files["stable_diffusion"], clip=files["clip"]
        )
        recorded = from_fixture(variant) if recording is None else from_npz(recording, variant)
        yield Run(variant, loaded.model, recorded, loaded.tokenizer_json, folder)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recording", type=Path, help="Folder of the original recording; by default the fixture.")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for run in reference_runs(Path(folder), args.recording):
            print(f"\n{run.variant} variant\n{COLUMNS}")
            for stage in STAGES:
                for row in compare(run, stage):
                    print(
                        f"{row.stage:22} {row.key:30} {row.compared:9,} {row.max_error:10.2e} {row.mean_error:10.2e} "
                        f"{row.scale:8.3g} {row.ratio:9.2e}"
                    )
            _print_agreement("merges of recorded masks", agreement(run, from_recorded_masks(run)))
            _print_agreement("end to end from the raw image", agreement(run, from_raw_image(run)))


def _print_agreement(title: str, found: Agreement) -> None:
    same = "the same" if found.same_segments else "OTHER"
    print(
        f"{title}: panoptic {found.panoptic:.4%} of pixels, {same} {found.segments} segments; "
        f"semantic {found.semantic:.4%}; instances: {'same' if found.instance_classes else 'OTHER'} classes, "
        f"scores within {found.instance_error:.1e} of the largest"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
