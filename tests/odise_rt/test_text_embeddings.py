"""Each word is encoded once: in memory, on disk, among threads; and a broken cache only costs time."""

from __future__ import annotations

import logging
import os
import threading
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odise_rt import BackendError, Bundle, Vocabulary, embedding_cache, text_embeddings
from odise_rt.backends.ort import OrtBackend
from odise_rt.backends.pool import StagePool
from odise_rt.embedding_cache import CACHE_VARIABLE, EmbeddingCache, default_cache_dir
from odise_rt.text_embeddings import EmbeddedVocabulary, TextEmbedder, model_key, normalise
from odise_rt.vocabulary import MAX_WORDS
from tests.odise_rt.fake_bundle import read_manifest, write_manifest


class CountingStage:
    def __init__(self, stage: Any, log: list[int]) -> None:
        self._stage, self._log, self.facts = stage, log, stage.facts

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._log.append(len(inputs["tokens"]))
        outputs: dict[str, np.ndarray] = self._stage.run(inputs)
        return outputs

    def close(self) -> None:
        self._stage.close()


class CountingBackend(OrtBackend):
    """Notes how many prompts each run of the text encoder had."""

    def __init__(self) -> None:
        super().__init__("cpu", threads=1)
        self.runs: list[int] = []
        self.loads = 0

    def load(self, bundle: Bundle, stage: str) -> Any:
        self.loads += 1
        return CountingStage(super().load(bundle, stage), self.runs)


class Setup:
    """An embedder on the colour bundle, with everything a test may look at."""

    def __init__(self, bundle: Path, cache: Path | None, **limits: int) -> None:
        opened = Bundle.open(bundle, verify=False)
        self.backend = CountingBackend()
        self.stages = StagePool(self.backend, opened, keep=frozenset())
        disk = EmbeddingCache(cache, model_key(opened), **limits) if cache else None
        self.embedder = TextEmbedder(opened, self.stages, disk)

    @property
    def encoded(self) -> int:
        return sum(self.backend.runs)

    def __call__(self, words: str) -> EmbeddedVocabulary:
        return self.embedder.embed(Vocabulary.parse(words))


def test_the_text_encoder_is_loaded_once_for_both_templates(label_bundle: Path) -> None:
    setup = Setup(label_bundle, None)
    setup("red; green")
    assert len(setup.backend.runs) == 2  # raw words for masks, prompts for CLIP
    assert setup.backend.loads == 1
    assert setup.stages._slots["clip_text"].stage is None
    setup("red; green")
    assert setup.backend.loads == 1


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.npz"))


def same(a: EmbeddedVocabulary, b: EmbeddedVocabulary) -> bool:
    return np.array_equal(a.mask_text, b.mask_text) and np.array_equal(a.clip_text, b.clip_text)


def test_rows_are_the_words_in_order_and_normalised(label_bundle: Path) -> None:
    embedded = Setup(label_bundle, None)("red, green; blue")
    assert embedded.mask_text.shape == (3, 5)
    assert embedded.clip_text.shape == (3, 8)
    np.testing.assert_allclose(np.linalg.norm(embedded.mask_text, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(embedded.clip_text, axis=1), 1, atol=1e-6)
    assert embedded.clip_text[:, :3].argmax(axis=1).tolist() == [0, 1, 2]
    assert not embedded.mask_text.flags.writeable


def test_label_has_two_prompts_and_caption_one(label_bundle: Path, caption_bundle: Path) -> None:
    for bundle, passes in ((label_bundle, 2), (caption_bundle, 1)):
        setup = Setup(bundle, None)
        embedded = setup("red; green; blue")
        assert setup.encoded == 3 * passes
        assert (embedded.mask_text.shape, embedded.clip_text.shape) == ((3, 5), (3, 8))


def test_memory_is_asked_first(label_bundle: Path) -> None:
    setup = Setup(label_bundle, None)
    first = setup("red; green")
    assert setup("red; green").mask_text is first.mask_text
    assert setup.encoded == 4


def test_only_new_words_are_encoded(label_bundle: Path, tmp_path: Path) -> None:
    setup = Setup(label_bundle, None)
    setup("red; green; blue")
    setup.backend.runs.clear()
    together = setup("white; blue, red")
    assert setup.encoded == 2
    assert same(together, Setup(label_bundle, None)("white; blue, red"))


def test_disk_serves_the_next_process(label_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Setup(label_bundle, tmp_path)("red; green")
    later = Setup(label_bundle, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingCache, "find", lambda *_: pytest.fail("a known list was looked for word by word"))
        patch.setattr(EmbeddingCache, "store", lambda *_: pytest.fail("a known list was written again"))
        assert same(later("red; green"), first)
    assert later.encoded == 0
    another = Setup(label_bundle, tmp_path)
    assert np.array_equal(another("white; green").clip_text[1], first.clip_text[1])
    assert another.encoded == 2, "one new word, two prompts"
    assert {p.parent.name for p in files(tmp_path)} == {model_key(Bundle.open(label_bundle))}


def test_known_words_in_a_new_order_get_a_file_of_their_own(label_bundle: Path, tmp_path: Path) -> None:
    Setup(label_bundle, tmp_path)("red; green; blue")
    assert len(files(tmp_path)) == 2
    for _ in range(2):
        again = Setup(label_bundle, tmp_path)
        assert same(again("blue; red"), Setup(label_bundle, None)("blue; red"))
        assert again.encoded == 0
        assert len(files(tmp_path)) == 4


def test_a_prompt_for_one_classifier_is_not_taken_for_the_other(label_bundle: Path) -> None:
    setup = Setup(label_bundle, None)
    setup("red")
    photo = "a photo of a red."
    assert same(setup(photo), Setup(label_bundle, None)(photo))
    assert setup.encoded == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"].update({"tokenizer.json": "0" * 64}),
        lambda m: m["stages"]["clip_text"].update(sha256="0" * 64),
        lambda m: m["stages"]["clip_text"].update(extra_files={"tokenizer.json": "0" * 64}),
        lambda m: m["model"].update(pad_token=1),
    ],
)
def test_another_text_encoder_or_tokenizer_has_other_embeddings(
    new_bundle: Callable[[], Path], change: Callable[[dict[str, Any]], object]
) -> None:
    root = new_bundle()
    manifest = read_manifest(root)
    before = model_key(Bundle.open(root))
    write_manifest(root, manifest | {"name": "another name"})
    assert model_key(Bundle.open(root)) == before
    change(manifest)
    write_manifest(root, manifest)
    assert model_key(Bundle.open(root, verify=False)) != before


def test_words_repeated_in_a_vocabulary_are_encoded_once(label_bundle: Path) -> None:
    setup = Setup(label_bundle, None)
    embedded = setup("red, green; blue, green")
    assert setup.encoded == 6
    assert np.array_equal(embedded.clip_text[1], embedded.clip_text[3])


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text", "shape", "nan"])
def test_damaged_entry_is_discarded(
    label_bundle: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = Setup(label_bundle, tmp_path)("red; green")
    for path in files(tmp_path):
        content = bytearray(path.read_bytes())
        if damage == "truncate":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            at = content.find(b"embedding.npy") + 120
            content[at] ^= 0xFF
            path.write_bytes(content)
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "text":
            path.write_text("not an archive")
        else:
            with np.load(path) as stored:
                arrays: dict[str, Any] = dict(stored)
            name = next(n for n in arrays if n != "prompts")
            arrays[name] = arrays[name][:, :-1] if damage == "shape" else arrays[name] * np.float32("nan")
            np.savez(path, **arrays)
    again = Setup(label_bundle, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert same(again("red; green"), first)
    assert again.encoded == 4
    assert "discarded" in caplog.text
    fresh = Setup(label_bundle, tmp_path)
    fresh("red; green")
    assert fresh.encoded == 0, "the damaged files were replaced"


def test_disk_cache_is_bounded_and_drops_the_oldest(label_bundle: Path, tmp_path: Path) -> None:
    on_disk = embedding_cache._size_on_disk
    bound = 8 * 4096
    setup = Setup(label_bundle, tmp_path, max_bytes=bound)
    for i in range(12):
        setup(f"red; thing {i}")
        for path in files(tmp_path):
            os.utime(path, (path.stat().st_mtime - 10,) * 2)
        assert sum(on_disk(p.stat()) for p in files(tmp_path)) <= bound
    last = Setup(label_bundle, tmp_path)
    last("red; thing 11")
    assert last.encoded == 0
    last("red; thing 0")
    assert last.encoded == 2


def test_list_above_the_bound_is_not_stored(label_bundle: Path, tmp_path: Path) -> None:
    Setup(label_bundle, tmp_path, max_bytes=10)("red; green")
    assert files(tmp_path) == []


def test_folder_that_cannot_be_written_only_costs_time(
    label_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    setup = Setup(label_bundle, blocked)
    with caplog.at_level(logging.DEBUG):
        for word in ("red", "green", "blue"):
            assert setup(word).mask_text.shape == (1, 5)
    told = [record.levelno for record in caplog.records if "cannot write" in record.message]
    assert told == [logging.WARNING] + [logging.DEBUG] * 5, "one warning, not two for each vocabulary"


def test_nothing_half_written_is_left(label_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", disk_full)
    Setup(label_bundle, tmp_path)("red")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_two_threads_encode_a_word_once(label_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(label_bundle, None)
    run = CountingStage.run

    def slow(self: CountingStage, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(0.02)  # the other threads come meanwhile
        return run(self, inputs)

    monkeypatch.setattr(CountingStage, "run", slow)
    words = "; ".join(f"thing {i}" for i in range(40))
    results: list[EmbeddedVocabulary] = []
    threads = [threading.Thread(target=lambda: results.append(setup(words))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert setup.encoded == 80
    assert len(results) == 4
    assert all(r.mask_text is results[0].mask_text for r in results)


@pytest.fixture
def embeddings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds count embeddings and nothing else, so that a test can say how many words fit."""
    monkeypatch.setattr(text_embeddings, "_overhead", lambda prompts: 0)


@pytest.mark.usefixtures("embeddings_alone")
def test_memory_is_bounded(label_bundle: Path) -> None:
    opened = Bundle.open(label_bundle, verify=False)
    stages = StagePool(OrtBackend("cpu", 1), opened, keep=frozenset())
    embedder = TextEmbedder(opened, stages, None, memory_bytes=400)
    for i in range(20):
        embedder.embed(Vocabulary.parse(f"red; thing {i}"))
    assert 200 < embedder._memory.nbytes <= 400


@pytest.mark.usefixtures("embeddings_alone")
def test_memory_forgets_what_was_not_used_longest(label_bundle: Path) -> None:
    opened = Bundle.open(label_bundle, verify=False)
    backend = CountingBackend()
    three_words = 3 * 4 * (5 + 8)
    embedder = TextEmbedder(opened, StagePool(backend, opened, keep=frozenset()), None, three_words)
    for word in ("red", "green", "blue", "red", "white", "blue", "red", "white"):
        embedder.embed(Vocabulary.parse(word))
    assert sum(backend.runs) == 2 * 4
    embedder.embed(Vocabulary.parse("green"))
    assert sum(backend.runs) == 2 * 5


def test_memory_counts_what_one_word_lists_really_need() -> None:
    memory = text_embeddings._Memory(1 << 30)
    tracemalloc.start()
    try:
        for number in range(2000):
            word = [f"a photo of the word {number}."]
            memory.put(f"{number:064d}", f"{-number:064d}", word, {"embedding": np.zeros((1, 8), np.float32)})
        real = tracemalloc.get_traced_memory()[0]
        more = [f"a photo of the other word {number}." for number in range(20_000)]
        memory.put("long", "list", more, {"embedding": np.zeros((20_000, 8), np.float32)})
        longer = tracemalloc.get_traced_memory()[0] - real
    finally:
        tracemalloc.stop()
    counted = sum(entry.size for key, entry in memory._lists.items() if key != "long")
    assert 0.7 * real < counted < 1.5 * real
    assert 0.7 * longer < memory._lists["long"].size < 1.5 * longer
    assert memory.nbytes == counted + memory._lists["long"].size


def test_memory_keeps_its_count_and_finds_what_is_there() -> None:
    """Against the plain meaning: of the lists that are kept, the latest that was put and holds the prompt."""
    rng = np.random.default_rng(0)
    memory = text_embeddings._Memory(40_000)
    for number in range(300):
        prompts = [f"word {i}" for i in rng.integers(0, 40, rng.integers(1, 9))]
        names = (("mask",), ("clip",), ("clip", "mask"))[number % 3]
        arrays = {name: np.full((len(prompts), 2), number, np.float32) for name in names}
        memory.put(f"key {number % 90}", f"vocabulary {number // 2}", prompts, arrays)
        memory.get(f"key {rng.integers(0, 90)}")
        assert memory.nbytes == sum(entry.size for entry in memory._lists.values()) <= 40_000
        there = {p for entry in memory._lists.values() if "mask" in entry.arrays for p in entry.prompts}
        found = memory.find([f"word {i}" for i in range(40)], {"mask": 2})
        assert set(found) == there
        for prompt, row in found.items():
            holding = [e for e in memory._lists.values() if prompt in e.prompts and "mask" in e.arrays]
            assert any(np.array_equal(row["mask"], e.arrays["mask"][e.prompts.index(prompt)]) for e in holding)
    assert 5 < len(memory._lists) < 90
    held = [key for table in memory._holders.values() for holders in table.values() for key in holders]
    assert set(held) == set(memory._lists), "what is dropped is forgotten"


def test_memory_touches_only_what_it_is_asked_for() -> None:
    """Not every list that is kept, of which there may be a hundred thousand: nothing walks over them."""

    class Untouched(OrderedDict[str, Any]):
        def values(self) -> Any:
            raise AssertionError("walked over all lists")

        items = keys = values

    memory = text_embeddings._Memory(2000 * 1000)
    memory._lists = Untouched()
    steps = 0

    class Counted(text_embeddings._WordList):
        def __getattribute__(self, name: str) -> Any:
            nonlocal steps
            steps += 1
            return super().__getattribute__(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_embeddings, "_WordList", Counted)
        for number in range(2000):
            memory.put(f"{number}", f"{number}", [f"word {number}"], {"embedding": np.zeros((1, 2), np.float32)})
        assert steps < 8 * 2000
        steps = 0
        memory.find([f"new {number}" for number in range(1000)], {"embedding": 2})
        memory.find(["word 1999"], {"embedding": 2})
    assert len(memory._lists) > 1000
    assert steps < 10


def test_a_list_that_comes_again_is_counted_once() -> None:
    memory = text_embeddings._Memory(1 << 20)
    for word in ("red", "green"):
        memory.put("key", "words", [word, word], {"embedding": np.zeros((2, 3), np.float32)})
    assert memory.nbytes == memory._lists["key"].size
    assert memory.find(["red", "green"], {"embedding": 3}).keys() == {"green"}


def test_progress_is_told(label_bundle: Path) -> None:
    setup = Setup(label_bundle, None)
    told: list[tuple[int, int]] = []
    words = Vocabulary.parse("; ".join(f"thing {i}" for i in range(40)))
    setup.embedder.embed(words, lambda done, total: told.append((done, total)))
    assert told == [(32, 40), (40, 40)] * 2
    told.clear()
    setup.embedder.embed(words, lambda done, total: told.append((done, total)))
    assert told == []


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert default_cache_dir() is None
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "odise_rt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "odise_rt"


def test_normalise_leaves_zero_rows_at_zero() -> None:
    rows = normalise(np.array([[3, 4], [0, 0]], np.float32))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], atol=1e-7)
    assert rows.dtype == np.float32


# ---- long lists ------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_embeddings, "CHUNK", 8)
    monkeypatch.setattr(text_embeddings, "BATCH", 4)


def many(count: int) -> str:
    return "; ".join(f"thing {i}" for i in range(count))


@pytest.mark.usefixtures("short_chunks")
def test_long_lists_are_stored_in_chunks(label_bundle: Path, tmp_path: Path) -> None:
    first = Setup(label_bundle, tmp_path)(many(30))
    assert len(files(tmp_path)) == 2 * 4
    later = Setup(label_bundle, tmp_path)
    assert same(later(many(30)), first)
    assert later.encoded == 0
    later("red; " + many(30))
    assert later.encoded == 2, "chunks begin elsewhere now, yet every known word is found"
    assert len(files(tmp_path)) == 2 * 5, "only the chunk with the new word is written"


@pytest.mark.usefixtures("short_chunks")
def test_chunks_of_a_list_above_the_bound_push_nothing_out(label_bundle: Path, tmp_path: Path) -> None:
    bound = 4 * 5 * 1000 - 1  # bytes of the smaller embeddings
    Setup(label_bundle, tmp_path, max_bytes=bound)("red; green")
    before = files(tmp_path)
    assert len(before) == 2
    Setup(label_bundle, tmp_path, max_bytes=bound)(many(1000))
    assert files(tmp_path) == before


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_interrupted_embedding_goes_on_where_it_was(
    label_bundle: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 20:
            raise error

    setup = Setup(label_bundle, tmp_path)
    with pytest.raises(error):
        setup.embedder.embed(Vocabulary.parse(many(30)), stop)
    assert setup.encoded == 20
    told: list[tuple[int, int]] = []
    again = Setup(label_bundle, tmp_path)
    embedded = again.embedder.embed(Vocabulary.parse(many(30)), lambda done, total: told.append((done, total)))
    assert again.encoded == 10 + 30, "the rest of the first prompt's, and all of the second's"
    assert told[0] == (4, 10)
    assert same(embedded, Setup(label_bundle, None)(many(30)))


@pytest.mark.usefixtures("short_chunks")
def test_killed_embedding_keeps_whole_chunks(label_bundle: Path, tmp_path: Path) -> None:
    """As if by kill -9: nothing runs after the last complete chunk was written."""
    Setup(label_bundle, tmp_path)(many(30))
    for path in files(tmp_path):
        with np.load(path) as stored:
            if b"thing 20" in stored["prompts"].tobytes():
                path.unlink()
    again = Setup(label_bundle, tmp_path)
    again(many(30))
    assert again.encoded == 2 * 8


@pytest.mark.usefixtures("embeddings_alone")
def test_list_of_one_vocabulary_does_not_push_out_its_other_prompts(label_bundle: Path) -> None:
    """Larger than the bound: both prompts' embeddings stay, else every image would encode one of them again."""
    opened = Bundle.open(label_bundle, verify=False)
    backend = CountingBackend()
    embedder = TextEmbedder(opened, StagePool(backend, opened, keep=frozenset()), None, memory_bytes=10)
    words = Vocabulary.parse("red; green")
    embedder.embed(words)
    embedder.embed(words)
    assert sum(backend.runs) == 4
    embedder.embed(Vocabulary.parse("blue"))
    assert embedder._memory.nbytes == 4 * (5 + 8)


def test_a_long_list_does_not_hold_up_others(label_bundle: Path) -> None:
    setup = Setup(label_bundle, None)
    waiting, finished = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        waiting.set()
        assert finished.wait(30), "the other vocabulary waited for this one"

    thread = threading.Thread(target=lambda: setup.embedder.embed(Vocabulary.parse(many(3)), hold))
    thread.start()
    assert waiting.wait(30)
    setup("red")
    finished.set()
    thread.join()
    assert not setup.embedder._locks


def test_bound_holds_the_largest_vocabulary_at_full_size() -> None:
    cache = EmbeddingCache(Path("nowhere"), "key")
    assert cache.holds(MAX_WORDS * 4 * (256 + 768))


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of a disk cache whose facts were asked for while folders were listed."""
    log: list[str] = []
    real = embedding_cache._files

    def listed(folder: str | Path) -> Iterator[tuple[str, os.stat_result]]:
        for path, facts in real(folder):
            log.append(path)
            yield path, facts

    monkeypatch.setattr(embedding_cache, "_files", listed)
    return log


def test_many_lists_on_disk_are_not_listed_for_every_word(
    tmp_path: Path, looked_at: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_cache, "_FILES_PER_FIND", 8)
    cache = EmbeddingCache(tmp_path, "model")
    for number in range(100):
        cache.store(f"key{number}", [f"word {number}"], {"embedding": np.zeros((1, 3), np.float32)})
    assert len(looked_at) < 10, "there is room: nothing is measured"
    for number in range(100, 130):
        assert cache.find([f"word {number}"], {"embedding": 3}) == {}
        cache.store(f"key{number}", [f"word {number}"], {"embedding": np.full((1, 3), number, np.float32)})
        assert cache.find([f"word {number}"], {"embedding": 3})[f"word {number}"]["embedding"][0] == number
    assert len(looked_at) < 60 * 12
    EmbeddingCache(tmp_path, "model").store("others", ["other"], {"embedding": np.zeros((1, 3), np.float32)})
    assert any(cache.find(["other"], {"embedding": 3}) for _ in range(20)), "another process's lists come with the next"


def test_a_full_cache_on_disk_is_not_measured_for_every_word(tmp_path: Path, looked_at: list[str]) -> None:
    bound = 96 * 4096
    cache = EmbeddingCache(tmp_path, "model", max_bytes=bound)
    for number in range(192):
        cache.store(f"key{number:04d}", [f"word {number}"], {"embedding": np.zeros((1, 3), np.float32)})
        os.utime(tmp_path / "text" / "model" / f"key{number:04d}.npz", (number, number))
    left = sorted(files(tmp_path))
    assert sum(embedding_cache._size_on_disk(p.stat()) for p in left) <= bound
    assert [p.name for p in left] == [f"key{number:04d}.npz" for number in range(192 - len(left), 192)]
    assert len(left) > 80
    assert len(looked_at) < 192 * 96 / 4


def test_a_small_file_counts_as_its_blocks() -> None:
    class Facts:
        st_size = 1000
        st_blocks = 8

    facts: Any = Facts()
    assert embedding_cache._size_on_disk(facts) == 4096
    Facts.st_size = 5000  # sparse, or compressed by the file system
    assert embedding_cache._size_on_disk(facts) == 5000
    del Facts.st_blocks
    assert embedding_cache._size_on_disk(facts) == 5000


def test_a_list_on_disk_is_looked_into_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who types one word after the other makes many small lists: a new word must not read them all again."""
    read: list[str] = []
    look = EmbeddingCache._read_index
    monkeypatch.setattr(EmbeddingCache, "_read_index", lambda self, path: read.append(path.name) or look(self, path))
    cache = EmbeddingCache(tmp_path, "model")
    for number in range(5):
        cache.store(f"key{number}", [f"word {number}"], {"embedding": np.full((1, 3), number, np.float32)})
    for number in range(5):
        found = cache.find([f"word {number}", "no word"], {"embedding": 3})
        assert {word: entry["embedding"].tolist() for word, entry in found.items()} == {f"word {number}": [number] * 3}
    assert sorted(read) == [f"key{number}.npz" for number in range(5)]
    assert cache.find(["word 1"], {"another": 3}) == {}
    cache.store("key5", ["word 5"], {"embedding": np.zeros((1, 3), np.float32)})
    (tmp_path / "text" / "model" / "key1.npz").unlink()
    assert cache.find(["word 1"], {"embedding": 3}) == {}
    assert list(cache.find(["word 5"], {"embedding": 3})) == ["word 5"]
    assert sorted(read)[5:] == ["key5.npz"]
    assert len(cache._indices) == 5, "what is gone is forgotten"


def test_a_file_that_cannot_be_read_now_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As without rights, or with too many files open: it may be good."""
    caplog.set_level("WARNING", "odise_rt")
    cache = EmbeddingCache(tmp_path, "model")
    cache.store("key", ["word"], {"embedding": np.zeros((1, 3), np.float32)})
    file = tmp_path / "text" / "model" / "key.npz"

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as context:
        context.setattr(Path, "open", refuse)
        assert cache.load("key", {"embedding": 3}, 1) is None
    assert "cannot be read" in caplog.text
    assert file.is_file()
    assert cache.load("key", {"embedding": 3}, 1) is not None


def test_a_text_encoder_that_gives_no_numbers_is_an_error(
    label_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(label_bundle, tmp_path)
    run = CountingStage.run

    def spoilt(self: CountingStage, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = {name: array.copy() for name, array in run(self, inputs).items()}
        for array in outputs.values():
            array[0, 1] = np.nan
        return outputs

    monkeypatch.setattr(CountingStage, "run", spoilt)
    with pytest.raises(BackendError, match="embeddings that are not numbers"):
        setup("red")
    assert files(tmp_path) == []


def test_no_home_for_the_cache_is_no_cache(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless(self: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    caplog.set_level("WARNING")
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setenv(CACHE_VARIABLE, "~/cache")
    assert default_cache_dir() is None
    assert "ODISE_RT_CACHE=~/cache names no folder" in caplog.text
