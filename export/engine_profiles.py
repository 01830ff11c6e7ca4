"""The shapes that engines are built for: optimisation profiles, derived from the specs of the stages.

A profile is a range for every input with one shape that the engine is tuned for. Window batches get one profile for
each listed count, which also serves the counts below it down to the next one. Images get one profile for each listed
size, and two that take every other size within the model's test edges, one for each orientation.

TensorRT-RTX specialises its kernels for the shape when it meets one, and stores what it needs for each profile anew: it
gets only the profiles that take any count or size.
"""

from __future__ import annotations

from dataclasses import dataclass

from odise_rt.engine_facts import Profile, ShapeRange
from odise_rt.errors import OptionsError
from odise_rt.specs import MASK_STRIDE, ModelFacts, StageSpec
from odise_rt.text_embeddings import BATCH as PROMPT_BATCH
from odise_rt.windows import window_grid

WINDOW_COUNTS = (1, 2, 4, 6, 9)
"""Windows of a batch: 1 for 512 x 512, 4 for 1024 x 1024, 6 for 1024 x 1408, 9 as the largest batch."""
LONG_EDGE_RATIO = 1.375
"""1408 over 1024: a 640 x 480 photograph of COCO at test size, padded."""


@dataclass(frozen=True)
class EngineShapes:
    """What engines are built for."""

    window_counts: tuple[int, ...]
    """Ascending."""
    window_sides: tuple[int, ...]
    """Pixels of a window's side; more than the model's own only for images with a shorter edge."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of padded images."""
    short_edge: int
    long_edge: int
    """Largest edges of the profiles that take any size."""


def engine_shapes(
    facts: ModelFacts, sizes: tuple[tuple[int, int], ...] = (), windows: tuple[int, ...] = WINDOW_COUNTS
) -> EngineShapes:
    """The shapes for a model.

    Args:
        facts: of the model; they give one window, the square at test size, and the usual photograph at test size in
            both orientations.
        sizes: further heights and widths of images inside the network.
        windows: counts of windows in a batch.

    Raises:
        OptionsError: a size or count is out of range.
    """
    if not windows or any(count < 1 or count > 64 for count in windows):
        raise OptionsError(f"window counts are {windows}: expected some numbers from 1 to 64")
    for height, width in sizes:
        if not (facts.size_divisor <= min(height, width) and max(height, width) <= 16_384):
            raise OptionsError(f"size {height}x{width}: expected edges from {facts.size_divisor} to 16384 pixels")
    short = facts.test_short_edge
    long = round(short * LONG_EDGE_RATIO)
    wanted = [(facts.window, facts.window), (short, short), (short, long), (long, short), *sizes]
    padded = list(dict.fromkeys(_padded(h, w, facts.size_divisor) for h, w in wanted))
    sides = {window_grid(h, w, facts.window).side for h, w in padded}
    largest = _padded(short, facts.test_long_edge, facts.size_divisor)
    return EngineShapes(
        window_counts=tuple(sorted(set(windows))),
        window_sides=tuple(sorted(sides, reverse=True)),
        sizes=tuple(padded),
        short_edge=max(largest[0], *(min(size) for size in padded)),
        long_edge=max(largest[1], *(max(size) for size in padded)),
    )


def stage_profiles(spec: StageSpec, facts: ModelFacts, shapes: EngineShapes, few: bool = False) -> tuple[Profile, ...]:
    """The profiles of one stage; every one has a range for every input.

    Args:
        spec: of the stage.
        facts: of the model.
        shapes: what the engines are built for.
        few: only as many profiles as are needed to take every shape.

    Raises:
        OptionsError: the stage has a symbolic dimension that is unknown here.
    """
    symbols = set(spec.symbols)
    if symbols <= {"N", "s"}:
        return _window_profiles(spec, shapes, few)
    if symbols <= {"L"}:
        return (_profile(spec, {"L": 1}, {"L": PROMPT_BATCH}, {"L": PROMPT_BATCH}),)
    if symbols <= {"H", "W", "h", "w", "mh", "mw", "Q"}:
        return _image_profiles(spec, facts, shapes, few)
    raise OptionsError(f"stage {spec.name} has dimensions {sorted(symbols)}, for which no profile is defined")


def _window_profiles(spec: StageSpec, shapes: EngineShapes, few: bool) -> tuple[Profile, ...]:
    profiles = []
    for side in shapes.window_sides:
        if few:
            counts = shapes.window_counts
            low, usual, high = ({"N": n, "s": side} for n in (1, counts[len(counts) // 2], counts[-1]))
            profiles.append(_profile(spec, low, usual, high))
            continue
        below = 0
        for count in shapes.window_counts:
            low, high = {"N": below + 1, "s": side}, {"N": count, "s": side}
            profiles.append(_profile(spec, low, high, high))
            below = count
    return tuple(profiles)


def _image_profiles(spec: StageSpec, facts: ModelFacts, shapes: EngineShapes, few: bool) -> tuple[Profile, ...]:
    divisor = facts.size_divisor

    def dims(height: int, width: int, unpadded: tuple[int, int]) -> dict[str, int]:
        return {
            "H": height,
            "W": width,
            "h": unpadded[0],
            "w": unpadded[1],
            "mh": height // MASK_STRIDE,
            "mw": width // MASK_STRIDE,
            "Q": facts.queries,
        }

    profiles = []
    for height, width in () if few else shapes.sizes:
        # Before padding an image may be smaller by less than the divisor.
        low = dims(height, width, (height - divisor + 1, width - divisor + 1))
        high = dims(height, width, (height, width))
        profiles.append(_profile(spec, low, high, high))
    low = dims(divisor, divisor, (1, 1))
    for height, width in ((shapes.short_edge, shapes.long_edge), (shapes.long_edge, shapes.short_edge)):
        longest = round(shapes.short_edge * LONG_EDGE_RATIO) // divisor * divisor
        usual = (min(longest, height), min(longest, width))
        profiles.append(_profile(spec, low, dims(*usual, usual), dims(height, width, (height, width))))
    return tuple(profiles)


def _padded(height: int, width: int, divisor: int) -> tuple[int, int]:
    return height + -height % divisor, width + -width % divisor


def _profile(spec: StageSpec, low: dict[str, int], opt: dict[str, int], high: dict[str, int]) -> Profile:
    least, usual, most = (spec.input_shapes(**dims) for dims in (low, opt, high))
    return {name: ShapeRange(least[name], usual[name], most[name]) for name in usual}
