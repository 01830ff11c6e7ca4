"""The shapes that engines are built for hold every image of the usual options."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.engine_profiles import EngineShapes, engine_shapes, stage_profiles
from odise_rt.engine_facts import Profile
from odise_rt.errors import OptionsError
from odise_rt.preprocessing import network_size
from odise_rt.specs import ModelFacts, stage_specs
from odise_rt.windows import window_grid
from tests.odise_rt.fake_bundle import make_facts

FULL = make_facts(
    window=512, size_divisor=64, test_short_edge=1024, test_long_edge=2560, queries=100, clip_image_size=336
)
SPECS = stage_specs(FULL)
SHAPES = engine_shapes(FULL)


def holding(profiles: tuple[Profile, ...], shapes: dict[str, tuple[int, ...]]) -> list[int]:
    return [i for i, p in enumerate(profiles) if all(p[name].holds(shape) for name, shape in shapes.items())]


def image_dims(facts: ModelFacts, height: int, width: int, divisor: int = 64) -> dict[str, int]:
    padded_h, padded_w = height + -height % divisor, width + -width % divisor
    masks = {"mh": padded_h // 4, "mw": padded_w // 4, "Q": facts.queries}
    return {"H": padded_h, "W": padded_w, "h": height, "w": width} | masks


def test_shapes_of_the_full_model() -> None:
    assert (
        EngineShapes(
            window_counts=(1, 2, 4, 6, 9),
            window_sides=(512,),
            sizes=((512, 512), (1024, 1024), (1024, 1408), (1408, 1024)),
            short_edge=1024,
            long_edge=2560,
        )
        == SHAPES
    )


def test_every_count_of_windows_has_one_profile_tuned_for_the_next_listed_one() -> None:
    profiles = stage_profiles(SPECS["unet_tap"], FULL, SHAPES)
    assert [p["windows"].opt[0] for p in profiles] == [1, 2, 4, 6, 9]
    for count in range(1, 10):
        shapes = SPECS["unet_tap"].input_shapes(N=count, s=512)
        (index,) = holding(profiles, shapes)
        assert profiles[index]["windows"].opt[0] == min(n for n in (1, 2, 4, 6, 9) if n >= count)
    assert not holding(profiles, SPECS["unet_tap"].input_shapes(N=10, s=512))


@given(st.integers(40, 3000), st.integers(40, 3000), st.booleans())
def test_every_image_under_default_options_fits_both_forms(height: int, width: int, few: bool) -> None:
    h, w = network_size(height, width, FULL.test_short_edge, FULL.test_long_edge)
    dims = image_dims(FULL, h, w)
    for stage in ("mask_decoder", "clip_mask"):
        profiles = stage_profiles(SPECS[stage], FULL, SHAPES, few)
        needed = {t.name: t.resolve(dims) for t in SPECS[stage].inputs}
        assert holding(profiles, needed), (stage, needed)
    side = window_grid(dims["H"], dims["W"], FULL.window).side
    if side == FULL.window:
        for stage in ("clip_image", "unet_tap"):
            profiles = stage_profiles(SPECS[stage], FULL, SHAPES, few)
            assert all(holding(profiles, SPECS[stage].input_shapes(N=n, s=side)) for n in range(1, 10))


def test_few_profiles_are_few() -> None:
    counts = {stage: len(stage_profiles(spec, FULL, SHAPES, few=True)) for stage, spec in SPECS.items()}
    assert counts == {"clip_image": 1, "unet_tap": 1, "mask_decoder": 2, "clip_mask": 2, "clip_text": 1}


def test_a_size_of_the_user_gets_a_profile_of_its_own_before_padding_too() -> None:
    shapes = engine_shapes(FULL, sizes=((700, 1000), (4000, 3000)))
    assert (704, 1024) in shapes.sizes
    assert shapes.long_edge == 4032
    profiles = stage_profiles(SPECS["clip_mask"], FULL, shapes)
    found = [
        profiles[i]
        for i in holding(profiles, {t.name: t.resolve(image_dims(FULL, 700, 1000)) for t in SPECS["clip_mask"].inputs})
    ]
    assert any(p["image"].opt == (1, 3, 704, 1024) for p in found)


def test_images_smaller_than_a_window_get_smaller_windows() -> None:
    shapes = engine_shapes(FULL, sizes=((256, 384),))
    assert shapes.window_sides == (512, 256)
    profiles = stage_profiles(SPECS["clip_image"], FULL, shapes)
    assert holding(profiles, {"windows": (2, 3, 256, 256)})


@pytest.mark.parametrize(
    ("sizes", "windows", "message"),
    [
        (((10, 1024),), (1,), "size 10x1024"),
        (((1024, 99999),), (1,), "size 1024x99999"),
        ((), (), "window counts"),
        ((), (0, 1), "window counts"),
        ((), (65,), "window counts"),
    ],
)
def test_what_is_out_of_range(sizes: tuple, windows: tuple, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(OptionsError, match=message):
        engine_shapes(FULL, sizes, windows)


def test_an_unknown_dimension_is_an_error() -> None:
    spec = SPECS["clip_text"]
    odd = dataclasses.replace(spec, inputs=(dataclasses.replace(spec.inputs[0], shape=("Z", 12)),))
    with pytest.raises(OptionsError, match="dimensions \\['Z'\\]"):
        stage_profiles(odd, FULL, SHAPES)
