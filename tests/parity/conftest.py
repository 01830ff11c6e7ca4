"""The shrunken reference model of both variants, loaded once from files in the released formats."""

from __future__ import annotations

import pytest

from tests.parity.recorded import VARIANTS
from tests.parity.reference_run import Run
from tests.parity.report import reference_runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Variant to its run."""
    folder = tmp_path_factory.mktemp("released")
    return {run.variant: run for run in reference_runs(folder)}


@pytest.fixture(params=VARIANTS)
def run(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    """The run of one variant."""
    return runs[request.param]
