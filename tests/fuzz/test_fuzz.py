"""Ten thousand examples of each kind of input that comes from outside: a typed error or a result, and soon.

Deterministic (see tests/conftest.py), so a failure stays one. ``fuzz_image.py`` and ``fuzz_manifest.py`` beside this
file look further, guided by coverage, where atheris is installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from odise_rt import Bundle, BundleError, ImageError, OptionsError, Vocabulary, VocabularyError
from odise_rt.preprocessing import load_image
from odise_rt.serve.fields import FIELDS, parse_fields
from odise_rt.serve.limits import Limits
from odise_rt.serve.problems import RequestRefused
from odise_rt.serve.triton.orchestrator import read_options
from odise_rt.serve.uploads import read_upload
from odise_rt.serve.worker import read_words
from tests.fuzz.mutations import JSON, damaged, damaged_manifest, encoded_images
from tests.odise_rt.fake_bundle import write_bundle

EXAMPLES = 10_000
SECONDS = 10.0
"""No example may take longer; sound ones take milliseconds, and the machine may be busy."""
MAX_PIXELS = 100_000
MAX_WORDS = Limits().max_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@contextlib.contextmanager
def soon() -> Iterator[None]:
    started = time.perf_counter()
    yield
    assert time.perf_counter() - started < SECONDS


@many
@given(data=damaged(encoded_images()))
def test_images(data: bytes) -> None:
    with soon(), contextlib.suppress(ImageError):
        pixels = load_image(data, MAX_PIXELS)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS


@many
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_images(data: bytes) -> None:
    with soon(), contextlib.suppress(ImageError):
        load_image(data, MAX_PIXELS)


WORDY = st.text(st.one_of(st.characters(), st.sampled_from(";,:#\n\r\t{}[]\"'\\\0\u200b\ufeff\u2028 ")), max_size=80)


@many
@given(
    text=st.one_of(WORDY, st.lists(st.sampled_from(["thing:", "stuff:", "sky", "a", ";", ",", "\n", " "])).map("".join))
)
def test_words(text: str) -> None:
    with soon(), contextlib.suppress(VocabularyError):
        vocabulary = read_words(text, MAX_WORDS)
        assert len(vocabulary) > 0
        assert all(c.words and all(c.words) for c in vocabulary)


@many
@given(
    data=st.one_of(JSON, st.lists(JSON), st.dictionaries(st.sampled_from(["things", "stuff", "classes", "a"]), JSON))
)
def test_vocabularies_in_json(data: Any) -> None:
    with soon(), contextlib.suppress(VocabularyError):
        assert len(Vocabulary.from_dict(data)) > 0
    with soon(), contextlib.suppress(VocabularyError):
        read_words(json.dumps(data), MAX_WORDS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("fuzz") / "bundle")


@many
@given(data=st.data())
def test_manifests(root: Path, data: st.DataObject) -> None:
    path = root / "bundle.json"
    sound = root.parent / "sound.json"
    if not sound.exists():
        sound.write_bytes(path.read_bytes())
    path.write_bytes(data.draw(damaged_manifest(sound.read_text())))
    with soon(), contextlib.suppress(BundleError):
        bundle = Bundle.open(root, verify=data.draw(st.booleans()), graphs=data.draw(st.booleans()))
        for entry in bundle.stages.values():
            assert entry.file.path.resolve().is_relative_to(root.resolve())
        bundle.constants()


@many
@given(data=st.data())
def test_constants(root: Path, data: st.DataObject) -> None:
    sound = root.parent / "constants.sound"
    manifest = root.parent / "sound.json"
    path = root / "constants.npz"
    if not sound.exists():
        sound.write_bytes(path.read_bytes())
    if manifest.exists():
        (root / "bundle.json").write_bytes(manifest.read_bytes())
    path.write_bytes(data.draw(damaged((sound.read_bytes(),))))
    with soon(), contextlib.suppress(BundleError):
        arrays = Bundle.open(root, verify=False).constants()
        assert all(np.isfinite(a).all() for a in arrays.values())


FORM = (
    b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\nContent-Type: image/png\r\n\r\nPIXELS\r\n'
    b'--b\r\nContent-Disposition: form-data; name="vocabulary"\r\n\r\nred; green\r\n'
    b'--b\r\nContent-Disposition: form-data; name="short_edge"\r\n\r\n64\r\n--b--\r\n'
)


@many
@given(
    body=damaged((FORM, FORM.replace(b'"image"', b"image"))),
    kind=st.sampled_from(
        ["multipart/form-data; boundary=b", 'multipart/form-data; boundary="b"', "image/png", "text/x"]
    ),
    cuts=st.lists(st.integers(0, 400), max_size=4),
)
def test_request_bodies(body: bytes, kind: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(c, len(body)) for c in cuts), len(body)]

    async def pieces() -> AsyncIterator[bytes]:
        for start, stop in itertools.pairwise(edges):
            yield body[start:stop]

    async def read() -> None:
        with contextlib.suppress(RequestRefused):
            image, fields = await read_upload(pieces(), kind, None, Limits(max_request_bytes=100_000))
            assert image
            parse_fields(fields)

    with soon():
        asyncio.run(read())


@many
@given(fields=st.lists(st.tuples(st.one_of(st.sampled_from(list(FIELDS)), st.text(max_size=8)), WORDY), max_size=5))
def test_fields(fields: list[tuple[str, str]]) -> None:
    with soon(), contextlib.suppress(RequestRefused):
        parse_fields(fields)


@many
@given(data=st.one_of(JSON, st.dictionaries(st.sampled_from([n for n, f in FIELDS.items() if f.option]), JSON)))
def test_options_in_json(data: Any) -> None:
    value = np.array([json.dumps(data).encode()], dtype=np.object_)
    with soon(), contextlib.suppress(OptionsError):
        assert read_options(value, 100).max_pixels == 100
