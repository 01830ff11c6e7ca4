"""An export as a whole."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from export import exporter
from export.exporter import ExportOptions, check_stages
from export.precision import Precision
from export.sources import Source
from tests.export.conftest import small_checkpoint


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_as_many_steps_are_done_as_were_announced(precision: Precision) -> None:
    told = io.StringIO()
    options = ExportOptions(precision, stages=("clip_text",), threads=1)
    check_stages(Source(small_checkpoint(), {}), options, Console(file=told))
    assert told.getvalue().count("✓") == exporter._steps(options)
