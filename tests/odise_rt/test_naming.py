"""What is asked when masks are named, and masks in the host's memory."""

from __future__ import annotations

import numpy as np
import pytest

from odise_rt.classification import Classifier
from odise_rt.naming import HostMasks, NamingRequest
from odise_rt.options import SegmentOptions
from odise_rt.text_embeddings import EmbeddedVocabulary
from tests.odise_rt.fake_bundle import make_facts


def _request(options: SegmentOptions, classes: int = 3) -> NamingRequest:
    facts, texts = make_facts(), np.ones((2 * classes, 8), np.float32)
    first_word, weight = np.arange(0, 2 * classes, 2), np.full(classes, 0.5, np.float32)
    classifier = Classifier(facts, texts[0], EmbeddedVocabulary(texts, texts), first_word, weight)
    return NamingRequest(classifier, "words", np.ones(classes, bool), options.resolve(facts))


@pytest.mark.parametrize(("explain", "ranked"), [(0, 0), (2, 2), (5, 3)])
def test_no_more_classes_are_ranked_than_there_are(explain: int, ranked: int) -> None:
    assert _request(SegmentOptions(explain=explain)).ranked == ranked


def test_outputs_decide_what_is_asked_for() -> None:
    asked = {}
    for outputs in [("panoptic",), ("panoptic", "semantic"), ("panoptic", "instance")]:
        request = _request(SegmentOptions(outputs=outputs))  # type: ignore[arg-type]
        asked[outputs[-1]] = (request.wants_probabilities, request.rank_all)
    assert asked == {"panoptic": (False, False), "semantic": (True, False), "instance": (True, True)}


def test_masks_on_the_host_tell_their_size() -> None:
    logits = np.zeros((2, 3, 5), np.float32)
    masks = HostMasks(logits)
    assert masks.array() is logits
    assert (masks.shape, masks.nbytes) == ((2, 3, 5), 120)
