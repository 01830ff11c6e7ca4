"""Places in the queue, and bounds that contradict themselves."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from odise_rt import OptionsError, SegmentOptions
from odise_rt.serve.limits import Admission, Limits
from odise_rt.serve.problems import RequestRefused
from tests.odise_rt.fake_bundle import make_facts


def test_places_are_given_back_however_a_request_ends() -> None:
    admission = Admission(queue=1, workers=1)
    with pytest.raises(RuntimeError), admission.place():
        raise RuntimeError
    with contextlib.ExitStack() as stack:
        stack.enter_context(admission.place())
        stack.enter_context(admission.place())
        assert admission.inside == admission.capacity == 2
        with pytest.raises(RequestRefused) as caught, admission.place():
            pass
        assert caught.value.problem.type == "overloaded"
        assert (caught.value.problem.retry_after or 0) >= 1
    assert admission.inside == 0


def test_the_wait_grows_with_the_time_of_requests() -> None:
    admission = Admission(queue=3, workers=1)
    for _ in range(60):
        admission.learn(20.0, inside=1)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(admission.place())
        with pytest.raises(RequestRefused) as caught, admission.place():
            pass
    assert 30 < (caught.value.problem.retry_after or 0) < 50  # half of four requests of 20 s


@pytest.mark.parametrize(
    "values",
    [{"max_pixels": 0}, {"max_request_bytes": -1}, {"timeout": 0.0}, {"timeout": float("inf")}, {"queue": -1}],
)
def test_bounds_must_make_sense(values: dict[str, Any]) -> None:
    with pytest.raises(OptionsError):
        Limits(**values)


def test_edges_are_bounded_by_the_model_unless_the_operator_says_more() -> None:
    facts = make_facts()
    Limits().check_costs(SegmentOptions(short_edge=64, long_edge=160), facts)
    with pytest.raises(OptionsError, match="at most 64"):
        Limits().check_costs(SegmentOptions(short_edge=65), facts)
    Limits(max_short_edge=128).check_costs(SegmentOptions(short_edge=128), facts)


def test_instances_are_bounded_by_the_model() -> None:
    facts = make_facts()
    most = facts.instances_per_image
    Limits().check_costs(SegmentOptions(instances_per_image=most), facts)
    with pytest.raises(OptionsError, match=f"instances_per_image is {most + 1}: this server accepts at most {most}"):
        Limits().check_costs(SegmentOptions(instances_per_image=most + 1), facts)
