"""FLOPs and bytes of every stage, and what share of the measured roofline a stage reached.

The roofline of a stage is the larger of its FLOPs over the machine's matmul rate and its least bytes (weights, inputs
and outputs, each once) over the machine's copy bandwidth, both measured in the same run. FLOPs are those of direct
products and convolutions: a stage that runs Winograd's convolution computes fewer, so its share may exceed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.machine import Rates

if TYPE_CHECKING:
    from odise_rt.specs import ModelFacts
    from training.models.odise import Odise

WHOLE_NETWORK = "network"
"""Step of a result that holds everything from pixels to masks: an image that stayed on the GPU."""
PIXELS_TO_SEGMENTS = "pixels_to_segments"
"""Steps of the whole way from pixels to segments."""


def stage_costs(model: Odise, facts: ModelFacts, height: int, width: int) -> dict[str, Any]:
    """Work of every stage for one image of a size inside the network, by structure; needs PyTorch."""
    from export.flops import count_work
    from odise_rt.preprocessing import padded_size

    height, width = padded_size((height, width), facts.size_divisor)
    work = count_work(model, facts, height, width)
    return {
        structure: {
            name: dataclasses.asdict(stage) | {"least_bytes": stage.least_bytes} for name, stage in stages.items()
        }
        for structure, stages in work.items()
    }


def with_roofline(
    seconds: Mapping[str, float], costs: Mapping[str, Mapping[str, float]], rates: Rates
) -> dict[str, dict[str, float]]:
    """Stages with their work and their share of the roofline.

    Args:
        seconds: stage or step to median seconds.
        costs: stage to its work, from :func:`stage_costs`; steps without an entry only get their seconds.
        rates: of the machine in the same run.
    """
    stages: dict[str, dict[str, float]] = {}
    for name, value in seconds.items():
        entry: dict[str, float] = {"seconds": value}
        work = costs.get(name)
        if work is not None:
            floor = rates.floor_seconds(work["flops"], work["least_bytes"])
            entry |= {
                "flops": work["flops"],
                "bytes": work["least_bytes"],
                "moved_bytes": work["moved_bytes"],
                "gflops": work["flops"] / value / 1e9,
                "roofline_share": floor / value,
            }
        stages[name] = entry
    return stages


def outside_share(seconds: Mapping[str, float], total: float) -> float:
    """Share of a segmentation that was spent outside of the network: everything but the five graphs.

    Where an image stays on a GPU, its graphs and what lies between and behind them are one step,
    :data:`PIXELS_TO_SEGMENTS`, or :data:`WHOLE_NETWORK` for masks without names.
    """
    from odise_rt.specs import STAGES

    inside = (*STAGES, WHOLE_NETWORK, PIXELS_TO_SEGMENTS)
    return 1.0 - sum(value for name, value in seconds.items() if name in inside) / total
