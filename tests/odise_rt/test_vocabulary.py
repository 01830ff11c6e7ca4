"""Words in, classes out: every way to write a vocabulary, and every way to get it wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odise_rt import Vocabulary, VocabularyClass, VocabularyError
from odise_rt.vocabulary import BUILTIN, MAX_WORD_CHARACTERS


def summary(vocabulary: Vocabulary) -> list[tuple[tuple[str, ...], bool]]:
    return [(c.words, c.isthing) for c in vocabulary]


# ---- the text syntax -------------------------------------------------------------------------------------------------


def test_the_example_of_the_documentation() -> None:
    vocabulary = Vocabulary.parse("black pickup truck, pickup truck; blue sky, sky")
    assert summary(vocabulary) == [(("black pickup truck", "pickup truck"), True), (("blue sky", "sky"), False)]
    assert vocabulary.names == ("black pickup truck", "blue sky")
    assert vocabulary.words == ("black pickup truck", "pickup truck", "blue sky", "sky")
    assert vocabulary.first_word.tolist() == [0, 2]
    assert vocabulary.isthing.tolist() == [True, False]


def test_kind_is_set_by_a_prefix() -> None:
    vocabulary = Vocabulary.parse("stuff: cat, kitten; THING : sky; Stuff:dog")
    assert summary(vocabulary) == [(("cat", "kitten"), False), (("sky",), True), (("dog",), False)]


@pytest.mark.parametrize(
    ("word", "isthing"),
    [
        ("sky", False),
        ("green grass", False),
        ("old brick wall", False),
        ("Snow", False),
        ("bottle of water", True),
        ("wall clock", True),
        ("man on the beach", True),
        ("cat", True),
        ("sandwich", True),
    ],
)
def test_kind_follows_the_head_noun_where_nothing_is_said(word: str, isthing: bool) -> None:
    assert Vocabulary.parse(word)[0].isthing is isthing


def test_lines_comments_and_empty_parts() -> None:
    text = "# my words\ncat, , kitten;;\n\n dog ;\n  # more\nbird"
    assert [c.words for c in Vocabulary.parse(text)] == [("cat", "kitten"), ("dog",), ("bird",)]


def test_repeated_words_count_once() -> None:
    vocabulary = Vocabulary.parse("cat, Cat, CAT , kitten; cat, pussycat; dog")
    assert [c.words for c in vocabulary] == [("cat", "kitten", "pussycat"), ("dog",)]
    assert Vocabulary.parse("Cat, cat").words == ("Cat",), "as it was first spelt"


def test_one_word_may_belong_to_several_classes() -> None:
    assert len(Vocabulary.parse("car, vehicle; truck, vehicle")) == 2


@pytest.mark.parametrize("text", ["", " ", ";", ",;,", "# only a comment", "\n\n"])
def test_no_word_at_all(text: str) -> None:
    with pytest.raises(VocabularyError, match="empty"):
        Vocabulary.parse(text)


def test_prefix_without_a_word() -> None:
    with pytest.raises(VocabularyError, match="followed by no word"):
        Vocabulary.parse("cat; stuff: ; dog")


def test_contradicting_kinds() -> None:
    with pytest.raises(VocabularyError, match="as a thing and as stuff"):
        Vocabulary.parse("stuff: cat; thing: cat")
    assert summary(Vocabulary.parse("stuff: cat; stuff: cat")) == [(("cat",), False)]


def test_emoji_and_other_scripts_are_words() -> None:
    assert Vocabulary.parse("😀, grinning; 日本語; naïve").names == ("😀", "日本語", "naïve")


WORD = st.text("abc ", min_size=1, max_size=4).filter(str.strip)


@given(st.lists(st.lists(WORD, min_size=1, max_size=4), min_size=1, max_size=6))
def test_parsing_keeps_order_and_loses_no_word(classes: list[list[str]]) -> None:
    vocabulary = Vocabulary.parse("; ".join(", ".join(words) for words in classes))
    assert set(vocabulary.words) == {" ".join(w.split()) for words in classes for w in words}
    assert list(vocabulary.names) == list(dict.fromkeys(" ".join(words[0].split()) for words in classes))
    for entry, first in zip(vocabulary, vocabulary.first_word, strict=True):
        assert vocabulary.words[first] == entry.name
        assert len(set(entry.words)) == len(entry.words)


def test_kind_of_merged_classes_follows_all_their_words() -> None:
    assert summary(Vocabulary.parse("cat; cat, sky")) == [(("cat", "sky"), False)]
    assert summary(Vocabulary.parse("sky; thing: sky")) == [(("sky",), True)]
    assert summary(Vocabulary.parse("thing: sky; sky")) == [(("sky",), True)]


def test_merged_classes_have_the_first_id_that_was_given(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "odise_rt.vocabulary")  # a server of before may have quieted it
    classes = [{"name": "cat"}, {"name": "cat", "id": 7}, {"name": "dog", "id": 0}, {"name": "cat", "id": 8}, "dog"]
    assert [(c.name, c.id) for c in Vocabulary.from_dict(classes)] == [("cat", 7), ("dog", 0)]
    assert [record.getMessage().split("'")[1] for record in caplog.records] == ["cat", "cat", "dog"]


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        vocabulary = Vocabulary.parse(text)
    except VocabularyError:
        return
    assert len(vocabulary) >= 1
    assert all(w.strip() for w in vocabulary.words)


# ---- lists and JSON --------------------------------------------------------------------------------------------------


def test_lists() -> None:
    vocabulary = Vocabulary.from_lists(["cat", ["truck", "pickup"], "sky"], things=["tree"], stuff=[["dog", "hound"]])
    assert summary(vocabulary) == [
        (("cat",), True),
        (("truck", "pickup"), True),
        (("sky",), False),
        (("tree",), True),
        (("dog", "hound"), False),
    ]
    assert Vocabulary.from_lists([" blue  sky "]).names == ("blue sky",)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (["cat", ["dog", "hound"]], [(("cat",), True), (("dog", "hound"), True)]),
        ({"classes": [{"name": "cat", "synonyms": ["kitty"], "kind": "stuff"}]}, [(("cat", "kitty"), False)]),
        ({"categories": [{"id": 3, "name": "sky", "isthing": 1}]}, [(("sky",), True)]),
        ({"categories": [{"name": "cat", "isthing": 0}]}, [(("cat",), False)]),
        ([{"name": "cat", "kind": "stuff", "isthing": 1}], [(("cat",), False)]),
        (["cat", "dog", ["cat", "kitty"]], [(("cat", "kitty"), True), (("dog",), True)]),
        (
            {"things": ["sky"], "stuff": ["cat", {"name": "dog"}]},
            [(("sky",), True), (("cat",), False), (("dog",), False)],
        ),
        ({"cat": ["kitty"], "sky": []}, [(("cat", "kitty"), True), (("sky",), False)]),
    ],
)
def test_json_forms(data: Any, expected: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "Words.JSON"
    path.write_text(json.dumps(data))
    assert summary(Vocabulary.from_json(path)) == expected
    assert Vocabulary.load(path) == Vocabulary.load(str(path)) == Vocabulary.from_dict(data)


def test_json_and_back() -> None:
    vocabulary = Vocabulary.parse("cat, kitty; stuff: dog") + Vocabulary.builtin("coco")
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary
    assert Vocabulary((VocabularyClass(("cat",)), VocabularyClass(("dog", "hound"), False, 0))).to_dict() == {
        "classes": [{"name": "cat", "kind": "thing"}, {"name": "dog", "id": 0, "synonyms": ["hound"], "kind": "stuff"}]
    }


@pytest.mark.parametrize(
    "data",
    [
        [],
        {},
        3,
        None,
        "cat",
        [3],
        [[]],
        [""],
        [["cat", 3]],
        {"classes": [{"synonyms": ["x"]}]},
        {"classes": [{"name": "x", "synonyms": "y"}]},
        {"classes": [{"name": "x", "kind": "creature"}]},
        {"classes": [{"name": "x", "id": "7"}]},
        {"cat": "kitty"},
        {"cat": ["kitty"], "dog": "hound"},
        {"cat": ["kitty"], "dog": [3]},
        {"things": ["cat"], "stuff": "sky"},
        {"things": [" "]},
    ],
)
def test_json_that_is_no_vocabulary(data: Any) -> None:
    with pytest.raises(VocabularyError):
        Vocabulary.from_dict(data)


def test_lists_that_are_no_lists() -> None:
    with pytest.raises(VocabularyError, match="parse"):
        Vocabulary.from_lists("cat; dog")
    with pytest.raises(VocabularyError, match="from_lists"):
        Vocabulary.parse(["cat"])  # type: ignore[arg-type]


def test_a_key_that_occurs_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    path.write_text('{"dog": ["puppy"], "dog": ["hound"]}')
    with pytest.raises(VocabularyError, match=r"words\.json .*'dog' occurs twice"):
        Vocabulary.load(path)


def test_lists_nested_without_end_are_no_vocabulary() -> None:
    data: list[Any] = []
    for _ in range(100_000):
        data = [data]
    with pytest.raises(VocabularyError, match="expected a word"):
        Vocabulary.from_dict(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 50_000])
def test_broken_json_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "words.json"
    path.write_bytes(content)
    with pytest.raises(VocabularyError, match=r"words\.json"):
        Vocabulary.from_json(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="check the path"):
        Vocabulary.load(str(tmp_path / "nothing.txt"))


# ---- OpenSeg label files ---------------------------------------------------------------------------------------------


def test_openseg_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("0:invalid_class_id\n1:person,child\n \n 2 :sky\n5:window \n7:sky\n")
    vocabulary = Vocabulary.load(path)
    assert [(c.id, c.words, c.isthing) for c in vocabulary] == [
        (1, ("person", "child"), True),
        (2, ("sky",), False),
        (5, ("window",), True),
        (7, ("sky",), False),  # an index of a data set: not merged
    ]
    things = Vocabulary.from_openseg(path, things={"sky"})
    assert [c.isthing for c in things] == [False, True, False, True]
    by_id = Vocabulary.from_openseg(path, things=lambda identifier, name: identifier == 2)
    assert [c.isthing for c in by_id] == [False, True, False, False]


@pytest.mark.parametrize("text", ["1:person\nsky", "x:person", "1:", "1:,", "0:invalid_class_id", ""])
def test_broken_openseg_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(VocabularyError, match="id:synonym"):
        Vocabulary.from_openseg(path)


def test_broken_line_of_an_openseg_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("1:person\n\nsky\n")
    with pytest.raises(VocabularyError, match=r"labels\.txt, line 3: 'sky'"):
        Vocabulary.from_openseg(path)


def test_text_file_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeff# things\ncat, kitty\nstuff: dog\ncat, pussycat\n", encoding="utf-8")
    assert summary(Vocabulary.load(path)) == [(("cat", "kitty", "pussycat"), True), (("dog",), False)]


def test_a_file_without_words_is_an_empty_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n# nothing\n")
    with pytest.raises(VocabularyError, match="the vocabulary is empty"):
        Vocabulary.load(tmp_path / "words.txt")


def test_a_file_of_another_order_of_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "words.txt"
    path.write_text("cat;dog")
    monkeypatch.setattr("odise_rt.vocabulary.MAX_FILE_BYTES", 7)
    assert len(Vocabulary.load(path)) == 2
    monkeypatch.setattr("odise_rt.vocabulary.MAX_FILE_BYTES", 6)
    with pytest.raises(VocabularyError, match=r"words\.txt is larger"):
        Vocabulary.load(path)


# ---- built-in lists --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "classes", "things"), [("coco", 133, 80), ("ade20k", 150, 100), ("lvis", 1203, 1203)])
def test_builtin_lists_have_their_published_sizes(name: str, classes: int, things: int) -> None:
    vocabulary = Vocabulary.builtin(name)
    assert len(vocabulary) == classes
    assert int(vocabulary.isthing.sum()) == things
    assert len({c.id for c in vocabulary}) == classes
    assert len({w.lower() for w in vocabulary.names}) == classes
    assert Vocabulary.load(f" {name.upper()} ") == vocabulary


@pytest.mark.parametrize("text", ["COCO; dog", "dog; lvis", "coco, ade20k; dog", "words.txt; dog"])
def test_a_list_among_words_is_no_word(text: str) -> None:
    for read in (Vocabulary.load, Vocabulary.parse):
        with pytest.raises(VocabularyError, match="give lists by themselves"):
            read(text)


def test_what_is_called_like_a_list_can_be_a_word(tmp_path: Path) -> None:
    assert Vocabulary.load("car, auto; thing: Coco").names == ("car", "Coco")
    path = tmp_path / "nouns.txt"
    path.write_text("auto\ndog\n")
    assert Vocabulary.load(path).names == ("auto", "dog")


def test_builtin_lists_by_sample() -> None:
    coco = {c.id: c for c in Vocabulary.builtin("coco")}
    assert (coco[1].name, coco[90].name, coco[187].name) == ("person", "toothbrush", "sky")
    assert (coco[1].isthing, coco[187].isthing) == (True, False)
    ade = Vocabulary.builtin("ade20k")
    assert (ade[0].name, ade[12].name, ade[149].name) == ("wall", "person", "flag")
    lvis = {c.id: c for c in Vocabulary.builtin("lvis")}
    assert (lvis[569].name, lvis[631].name, lvis[1203].name) == ("horse", "laptop computer", "zucchini")


def test_unknown_list_is_named() -> None:
    with pytest.raises(VocabularyError, match=", ".join(BUILTIN)):
        Vocabulary.builtin("imagenet")


# ---- values ----------------------------------------------------------------------------------------------------------


def test_seen_means_any_synonym_was_in_training() -> None:
    vocabulary = Vocabulary.parse("auto, Car; bicycle; blue  Sky")
    assert vocabulary.seen(["car", "blue sky", "truck"]).tolist() == [True, False, True]
    assert not vocabulary.seen([]).any()
    assert Vocabulary((VocabularyClass(("Blue  sky",)),)).seen(["blue sky"]).all()


def test_sum_merges_classes_of_one_name() -> None:
    total = Vocabulary.parse("cat, kitty; stuff: person") + Vocabulary.builtin("coco")
    assert len(total) == 133
    assert total[0].words == ("cat", "kitty")
    assert total[0].isthing
    assert not total[1].isthing, "the earlier class keeps its kind"
    with pytest.raises(TypeError):
        total + "cat"  # type: ignore[operator]


def test_hashes_tell_vocabularies_apart() -> None:
    one, other = Vocabulary.parse("cat; dog"), Vocabulary.parse("cat; stuff: dog")
    assert one.content_hash == Vocabulary.parse(" cat;dog ").content_hash
    assert one.content_hash != other.content_hash
    assert one.words_hash == other.words_hash != Vocabulary.parse("cat; hound").words_hash
    assert one == Vocabulary.parse("cat; dog")


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Vocabulary.parse("x" * MAX_WORD_CHARACTERS)
    with pytest.raises(VocabularyError, match=f"{MAX_WORD_CHARACTERS}"):
        Vocabulary.parse("x" * (MAX_WORD_CHARACTERS + 1))
    monkeypatch.setattr("odise_rt.vocabulary.MAX_WORDS", 3)
    assert Vocabulary.parse("cat, kitty; dog")
    with pytest.raises(VocabularyError, match="has 4 words, at most 3"):
        Vocabulary.parse("cat, kitty; dog, hound")
    with pytest.raises(VocabularyError, match="no word"):
        Vocabulary((VocabularyClass(()),))
    with pytest.raises(VocabularyError, match="empty word"):
        Vocabulary((VocabularyClass(("cat", "\u200b\x00".strip("\u200b"))),))


@pytest.mark.parametrize("words", ["a;", "a, b;"])
def test_repeated_classes_cost_what_others_do(words: str) -> None:
    """Copied at each repetition, the words of the first would take minutes here; seconds are of this process alone."""
    started = time.process_time()
    vocabulary = Vocabulary.parse(words * 100_000)
    assert time.process_time() - started < 10
    assert vocabulary == Vocabulary.parse(words)


def test_merged_classes_keep_the_order_of_their_words() -> None:
    vocabulary = Vocabulary.parse("a, b; x; a, c; x, y; stuff: a, d, b")
    assert summary(vocabulary) == [(("a", "b", "c", "d"), False), (("x", "y"), True)]


def test_ten_thousand_classes() -> None:
    vocabulary = Vocabulary.parse("; ".join(f"thing {i}, object {i}" for i in range(10_000)))
    assert len(vocabulary) == 10_000
    assert len(vocabulary.words) == 20_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# mine\n0:invalid_class_id\n1:cat,kitten\n  # its friend\n2:dog\n", ["cat", "dog"]),
        ("cat, kitten\n# a remark\ndog\n", ["cat", "dog"]),
    ],
)
def test_remarks_in_files_are_no_words(tmp_path: Path, text: str, expected: list[str]) -> None:
    (tmp_path / "words.txt").write_text(text)
    assert [c.name for c in Vocabulary.load(tmp_path / "words.txt").classes] == expected


def test_a_file_of_two_forms_is_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("1:cat,kitten\n2 dog\n")
    with pytest.raises(VocabularyError, match="such as '2 dog': expected one form"):
        Vocabulary.load(tmp_path / "words.txt")
    with pytest.raises(VocabularyError, match=r"ending in .json or .txt"):
        Vocabulary.load(str(tmp_path))


def test_lists_are_taken_for_tuples() -> None:
    listed = VocabularyClass(["cat", "kitten"])  # type: ignore[arg-type]
    assert listed == VocabularyClass(("cat", "kitten"))
    vocabulary = Vocabulary([listed])  # type: ignore[arg-type]
    assert vocabulary == Vocabulary((listed,)) == Vocabulary.parse("cat, kitten")
    assert len({vocabulary, Vocabulary.parse("cat, kitten")}) == 1


def test_arrays_of_a_vocabulary_cannot_be_written_to() -> None:
    """Built-in ones are shared by the whole process."""
    for array in (Vocabulary.builtin("coco").isthing, Vocabulary.builtin("coco").first_word):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_classes_of_other_types_are_refused() -> None:
    with pytest.raises(VocabularyError, match="came as 'coconut': expected strings"):
        VocabularyClass("coconut")  # type: ignore[arg-type]
    with pytest.raises(VocabularyError, match="expected strings"):
        VocabularyClass(("cat", 3))  # type: ignore[arg-type]
    with pytest.raises(VocabularyError, match="class 0 came as str"):
        Vocabulary(("cat",))  # type: ignore[arg-type]
    for nothing in (None, 3):
        with pytest.raises(VocabularyError, match="came as"):
            VocabularyClass(nothing)  # type: ignore[arg-type]
        with pytest.raises(VocabularyError, match="came as"):
            Vocabulary(nothing)  # type: ignore[arg-type]
        with pytest.raises(VocabularyError, match=f"expected a list of words, got {type(nothing).__name__} {nothing}"):
            Vocabulary.from_lists(stuff=nothing)  # type: ignore[arg-type]
    with pytest.raises(VocabularyError, match="no built-in"):
        Vocabulary.builtin(["coco"])  # type: ignore[arg-type]
    counted = VocabularyClass(("cat",), isthing=np.bool_(False), id=np.int64(1))  # type: ignore[arg-type]
    assert counted == VocabularyClass(("cat",), False, 1)
    assert json.dumps(counted.to_dict()) == '{"name": "cat", "id": 1, "kind": "stuff"}', "plain types"
    for kind in ("stuff", "thing", None, 2):
        with pytest.raises(VocabularyError, match="expected True for a thing, False for stuff"):
            VocabularyClass(("sky",), kind)  # type: ignore[arg-type]
        with pytest.raises(VocabularyError, match="expected true or false"):
            Vocabulary.from_dict([{"name": "sky", "isthing": kind}])
    for value, isthing in ((0, False), (1, True), (False, False), (True, True)):
        assert Vocabulary.from_dict([{"name": "sky", "isthing": value}])[0].isthing is isthing
    for identifier in ("1", 1.5, True):
        with pytest.raises(VocabularyError, match="expected a whole number"):
            VocabularyClass(("cat",), id=identifier)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["classes.csv", "CLASSES.YAML"])
def test_file_of_another_kind_is_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("dog\ncat\n")
    Path("dog").touch()
    with pytest.raises(VocabularyError, match=r"is a path.*\.json or \.txt"):
        Vocabulary.load(name)
    assert [Vocabulary.load(word).names for word in ("dog", "st. bernard")] == [("dog",), ("st. bernard",)]


@pytest.mark.parametrize(
    "read",
    [
        lambda word: VocabularyClass((word,)),
        lambda word: Vocabulary.parse(f"dog; stuff: sky, {word}"),
        lambda word: Vocabulary.from_lists([["dog", word]]),
        lambda word: Vocabulary.from_dict([{"name": word}]),
        lambda word: Vocabulary.load(f"dog, {word}"),
    ],
)
@pytest.mark.parametrize("word", ["caf\udce9", "\ud83d smile"])
def test_a_word_that_is_no_text_is_refused(read: Callable[[str], object], word: str) -> None:
    """Without what is no text it would be another word."""
    with pytest.raises(VocabularyError, match=r"the word .*which is no character: write it in UTF-8"):
        read(word)
