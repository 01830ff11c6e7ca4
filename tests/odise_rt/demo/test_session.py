"""The page's logic: one network run a picture, names as often as wanted, errors in plain words."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from odise_rt import ImageError, InputError, OptionsError, Segmenter, SegmentOptions, Vocabulary, VocabularyError
from odise_rt.demo import session
from odise_rt.demo.corrections import Corrections
from odise_rt.demo.examples import find_examples
from odise_rt.demo.pictures import PictureStore
from odise_rt.demo.session import Controls, Words, Workbench, clean_name

Encode = Callable[..., bytes]
COLOURS = Words("red, crimson; green; blue; stuff: white")


@pytest.fixture
def runs(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every call of the network, counted where it happens rather than where it is reported."""
    calls: list[Any] = []
    original = segmenter.find_masks

    def counted(image: Any, options: SegmentOptions | None = None) -> Any:
        calls.append(image)
        return original(image, options)

    monkeypatch.setattr(segmenter, "find_masks", counted)
    return calls


def labels(state: dict[str, Any], index: int = 0) -> set[str]:
    return {region["label"] for region in state["views"][index]["regions"]}


def test_network_runs_once_whatever_is_set(
    bench: Workbench, colours: np.ndarray, encode: Encode, runs: list[Any]
) -> None:
    picture = bench.add(encode(colours), "colours.png")
    first = bench.show(picture, Controls(COLOURS))
    assert labels(first) == {"red", "green", "blue", "white"}
    assert first["times"]["ran"]
    for controls in (
        Controls(COLOURS, object_mask_threshold=0.99),
        Controls(COLOURS, overlap_threshold=0.0),
        Controls(COLOURS, clip_weight_seen=1.0, clip_weight_unseen=0.0),
        Controls(COLOURS, unknown=0.5),
        Controls(COLOURS, mode="semantic"),
        Controls(COLOURS, mode="instance", least_score=0.5),
        Controls(Words("sky; car")),
        Controls(COLOURS, other=Words("crimson; sky")),
    ):
        state = bench.show(picture, controls)
        assert not state["times"]["ran"]
        assert state["times"]["network"] == first["times"]["network"]
    assert len(runs) == 1
    assert bench.network_runs == 1


def test_thresholds_change_what_is_shown(bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    picture = bench.add(encode(colours), "colours.png")
    scores = {r["label"]: r["score"] for r in bench.show(picture, Controls(COLOURS))["views"][0]["regions"]}
    middle = sorted(scores.values())[2]
    state = bench.show(picture, Controls(COLOURS, object_mask_threshold=middle - 1e-4))
    assert labels(state) == {name for name, score in scores.items() if score >= middle - 1e-4} != set(scores)
    assert labels(bench.show(picture, Controls(COLOURS, unknown=1.0))) == {"unknown"}


def test_two_vocabularies(bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    picture = bench.add(encode(colours), "colours.png")
    state = bench.show(picture, Controls(COLOURS, other=Words("crimson; sky")))
    assert labels(state, 0) == {"red", "green", "blue", "white"}
    assert "crimson" in labels(state, 1)
    assert state["views"][0]["key"] != state["views"][1]["key"]
    assert [(v["classes"], v["seen"]) for v in state["views"]] == [(4, 2), (2, 0)]


def test_what_was_shown_is_not_made_again(bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    picture = bench.add(encode(colours), "colours.png")
    once = bench.show(picture, Controls(COLOURS))["views"][0]
    assert bench.show(picture, Controls(COLOURS))["views"][0] is once
    assert bench.show(picture, Controls(COLOURS, other=Words("sky")))["views"][0] is once
    assert bench.show(picture, Controls(Words("red")))["views"][0] is not once
    other = bench.add(encode(colours[:, ::-1].copy()), "mirrored.png")
    assert bench.show(other, Controls(COLOURS))["views"][0]["map"] != once["map"]


def test_views_are_at_the_page_s_size_and_downloads_at_the_picture_s(
    bench: Workbench, colours: np.ndarray, encode: Encode
) -> None:
    picture = bench.add(encode(colours), "colours.png")
    state = bench.show(picture, Controls(COLOURS))
    drawn = state["views"][0]
    assert (drawn["map"]["height"], drawn["map"]["width"]) == (256, 384)
    assert sum(drawn["map"]["lengths"]) == 256 * 384
    document = json.loads(bench.file(picture, drawn["key"], "json"))
    assert (document["height"], document["width"]) == (64, 96)
    assert {s["label"] for s in document["segments"]} == labels(state)
    assert all(len(s["candidates"]) == 4 for s in document["segments"])
    with Image.open(io.BytesIO(bench.file(picture, drawn["key"], "overlay"))) as png:
        png.load()
        assert png.format == "PNG"
        assert png.height == 64 * 7, "enlarged by a whole factor"


@pytest.mark.parametrize("mode", ["panoptic", "instance"])
def test_corrected_names_are_shown_and_downloaded(
    bench: Workbench, colours: np.ndarray, encode: Encode, mode: Any
) -> None:
    picture = bench.add(encode(colours), "colours.png")
    controls = Controls(COLOURS, mode=mode, least_score=0.2)
    regions = bench.show(picture, controls)["views"][0]["regions"]
    red = next(region for region in regions if region["label"] == "red")
    kept = [region["label"] for region in regions if region is not red]
    for names in (["blue"], ["green", "blue"], ["blue", "no candidate"]):
        corrections = Corrections(tuple((*red["place"], name) for name in names))
        state = bench.show(picture, dataclasses.replace(controls, corrections=corrections))["views"][0]
        renamed = next(region for region in state["regions"] if region["place"] == red["place"])
        assert renamed["label"] == "blue"
        assert (renamed["score"], renamed["corrected"]) == (1, True)
        assert sorted(region["label"] for region in state["regions"]) == sorted([*kept, "blue"])
        document = json.loads(bench.file(picture, state["key"], "json"))
        assert sorted(s["label"] for s in document["segments"]) == sorted([*kept, "blue"])


def test_corrections_are_those_of_one_result_of_a_comparison(
    bench: Workbench, colours: np.ndarray, encode: Encode
) -> None:
    picture = bench.add(encode(colours), "colours.png")
    controls = Controls(COLOURS, other=COLOURS)
    red = next(r for r in bench.show(picture, controls)["views"][0]["regions"] if r["label"] == "red")
    made = Corrections(((*red["place"], "blue"),))
    assert labels(bench.show(picture, dataclasses.replace(controls, corrections=made)), 1) == labels(
        bench.show(picture, Controls(COLOURS))
    )
    state = bench.show(picture, dataclasses.replace(controls, other_corrections=made))
    assert "red" in labels(state, 0)
    assert "red" not in labels(state, 1)


@pytest.mark.parametrize("mode", ["panoptic", "semantic", "instance"])
def test_downloads_of_each_mode(bench: Workbench, colours: np.ndarray, encode: Encode, mode: Any) -> None:
    picture = bench.add(encode(colours), "colours.png")
    state = bench.show(picture, Controls(COLOURS, mode=mode, least_score=0.2, other=Words("crimson; green")))
    for index, drawn in enumerate(state["views"]):
        document = json.loads(bench.file(picture, drawn["key"], "json"))
        assert document["mode"] == state["mode"] == mode
        assert {s["label"] for s in document["segments"]} == labels(state, index)
        assert bench.file(picture, drawn["key"], "overlay").startswith(b"\x89PNG")


def test_a_comparison_s_second_picture_has_the_page_s_colours(
    bench: Workbench, colours: np.ndarray, encode: Encode
) -> None:
    picture = bench.add(encode(colours), "colours.png")
    state = bench.show(picture, Controls(COLOURS, other=Words("blue; crimson")))
    blue = [next(r["colour"] for r in view["regions"] if r["label"] == "blue") for view in state["views"]]
    assert blue[0] == blue[1]
    with Image.open(io.BytesIO(bench.file(picture, state["views"][1]["key"], "overlay"))) as png:
        legend = np.asarray(png.convert("RGB"))[:, 96 * 7 :].reshape(-1, 3)
    wanted = [int(blue[1][i : i + 2], 16) for i in (1, 3, 5)]
    assert (legend == wanted).all(axis=1).any(), "the legend's swatch"


def test_unknown_downloads_are_refused(bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    picture, other = bench.add(encode(colours), "a.png"), bench.add(encode(colours), "b.png")
    key = bench.show(picture, Controls(COLOURS))["views"][0]["key"]
    for wrong, which in (("0" * 32, picture), (key, other)):
        with pytest.raises(InputError, match="no longer in the server's memory"):
            bench.file(which, wrong, "overlay")
    with pytest.raises(InputError, match=r"no format 'gif': expected one of overlay, json, coco"):
        bench.file(picture, key, "gif")


def test_visitors_at_once_share_one_network_run_a_picture(
    bench: Workbench, colours: np.ndarray, encode: Encode, runs: list[Any]
) -> None:
    pictures = [bench.add(encode(np.roll(colours, 8 * i, axis=1)), f"{i}.png") for i in range(3)]
    expected = [labels(Workbench(bench.segmenter).show(p, Controls(COLOURS))) for p in pictures]
    for picture in pictures:
        picture.proposals = None
    runs.clear()
    failed: list[Exception] = []

    def visit(number: int) -> None:
        try:
            for _ in range(3):
                assert labels(bench.show(pictures[number % 3], Controls(COLOURS))) == expected[number % 3]
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(runs) == 3


# ---- words -----------------------------------------------------------------------------------------------------------


def test_words_and_lists_add_up() -> None:
    assert Words("bagpipe", ("coco",)).vocabulary().names[0] == "bagpipe"
    assert len(Words("bagpipe", ("coco",)).vocabulary()) == 134
    assert len(Words("", ("coco",)).vocabulary()) == 133
    assert len(Words(" COCO ").vocabulary()) == 133, "a list by its name, as on the command line"
    with pytest.raises(VocabularyError, match="'coco' would be a word"):
        Words("coco; bagpipe").vocabulary()


def test_sliders_do_not_parse_the_words_again(
    bench: Workbench, colours: np.ndarray, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    parse = Vocabulary.parse

    def counted(text: str) -> Vocabulary:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(Vocabulary, "parse", counted)
    picture = bench.add(encode(colours), "colours.png")
    first, second = Words("red; blue; slid one"), Words("green; crimson; slid two")
    for step in range(5):
        bench.show(picture, Controls(first, other=second, overlap_threshold=step / 10))
    assert parsed == [first.text, second.text]
    assert first.vocabulary() is Words(first.text).vocabulary(), "with what it knows of itself, such as its hash"
    for number in range(50):
        Words(f"word {number}").vocabulary()
    first.vocabulary()
    assert parsed.count(first.text) == 2, "only so many are kept"
    for _ in range(2):
        with pytest.raises(VocabularyError):
            Words(";").vocabulary()
    assert parsed[-2:] == [";", ";"], "what failed is not kept"


def test_empty_words() -> None:
    for text in ("", "  \n ", ";;", "# nothing yet"):
        with pytest.raises(VocabularyError, match="vocabulary is empty"):
            Words(text).vocabulary()


def test_too_many_words() -> None:
    with pytest.raises(VocabularyError, match="20,001 characters"):
        Words("x" * 20_001).vocabulary()


def test_words_never_name_a_file_of_the_server(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("password")
    with pytest.raises(VocabularyError, match="would be a word"):
        Words(str(secret)).vocabulary()
    assert Words(f"thing: {secret}").vocabulary().names == (str(secret),)


def test_controls_are_checked(bench: Workbench, colours: np.ndarray, encode: Encode) -> None:
    with pytest.raises(OptionsError, match="mode"):
        Controls(COLOURS, mode="everything")  # type: ignore[arg-type]
    with pytest.raises(OptionsError, match="least score"):
        Controls(COLOURS, least_score=2.0)
    with pytest.raises(OptionsError, match="outside of the picture"):
        Controls(COLOURS, corrections=Corrections(((0.5, 1.0, "red"),)))
    with pytest.raises(OptionsError, match="corrected names are longer"):
        Controls(COLOURS, other_corrections=Corrections(((0.5, 0.5, "red"),) * 5001))
    with pytest.raises(OptionsError, match="corrected names are longer"):
        Controls(COLOURS, corrections=Corrections(words=("x" * 20_000,)))
    with pytest.raises(OptionsError, match="overlap_threshold"):
        bench.show(bench.add(encode(colours), "a.png"), Controls(COLOURS, overlap_threshold=7.0))


def test_wrong_words_do_not_run_the_network(
    bench: Workbench, colours: np.ndarray, encode: Encode, runs: list[Any]
) -> None:
    picture = bench.add(encode(colours), "a.png")
    with pytest.raises(VocabularyError):
        bench.show(picture, Controls(COLOURS, other=Words("")))
    assert runs == []


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_broken_and_foreign_files_are_called_by_their_name(
    bench: Workbench, colours: np.ndarray, encode: Encode
) -> None:
    with pytest.raises(ImageError, match=r"^notes\.txt is not an image"):
        bench.add(b"hello", "C:\\Users\\me\\notes.txt")
    with pytest.raises(ImageError, match=r"^cut\.png is truncated or broken"):
        bench.add(encode(colours)[:-60], "/home/me/cut.png")
    with pytest.raises(ImageError, match=r"^none\.png is empty"):
        bench.add(b"", "none.png")
    assert len(bench.store) == 0


def test_large_pictures_are_refused_without_a_programmer_s_advice(segmenter: Segmenter, encode: Encode) -> None:
    bench = Workbench(segmenter, max_pixels=100)
    with pytest.raises(ImageError) as error:
        bench.add(encode(np.zeros((20, 20, 3), np.uint8)), "large.png")
    assert "20 x 20" in str(error.value)
    assert "SegmentOptions" not in str(error.value)


def test_forgotten_pictures_are_reported(segmenter: Segmenter, colours: np.ndarray, encode: Encode) -> None:
    bench = Workbench(segmenter, PictureStore(max_bytes=1))
    first = bench.add(encode(colours), "a.png")
    bench.add(encode(colours), "b.png")
    with pytest.raises(InputError, match="drop it again"):
        bench.store.get(first.token)


def test_names() -> None:
    assert clean_name("../../etc/passwd") == "passwd"
    assert clean_name("a\nb\x00c.png") == "abc.png"
    assert clean_name("") == clean_name("..") == clean_name("a/") == "picture"
    assert clean_name("Straße 猫.jpg") == "Straße 猫.jpg"
    assert len(clean_name("x" * 500 + ".png")) == session.MAX_NAME


def test_nothing_of_a_visitor_is_logged(
    bench: Workbench, colours: np.ndarray, encode: Encode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "odise_rt")
    picture = bench.add(encode(colours), "my diary.png")
    bench.show(picture, Controls(Words("embarrassing word")))
    too_long = "embarrassing and more than the text encoder reads " * 5
    bench.show(picture, Controls(Words(f"{too_long}; embarrassing word; embarrassing word, another")))
    assert "network run 1" in caplog.text
    assert "embarrassing" not in caplog.text
    assert "diary" not in caplog.text
    assert picture.token not in caplog.text


# ---- examples --------------------------------------------------------------------------------------------------------


def test_package_has_examples_with_words(bench: Workbench) -> None:
    examples = find_examples(None)
    assert examples
    for example in examples:
        assert example.words
        assert example.thumbnail.startswith("data:image/jpeg;base64,")
        assert example.path.stat().st_size < 50_000, "the wheel stays small"


def test_examples_of_a_folder(tmp_path: Path, segmenter: Segmenter, colours: np.ndarray) -> None:
    Image.fromarray(colours).save(tmp_path / "two_boats.png")
    Image.fromarray(colours).save(tmp_path / "a.jpg")
    (tmp_path / "a_vocabulary.txt").write_text("thing: christmas tree\nred, crimson\nstuff: glass\nsky\n")
    (tmp_path / "notes.md").write_text("no picture")
    examples = find_examples(tmp_path)
    assert [(e.title, e.words) for e in examples] == [
        ("a", "thing: christmas tree\nred, crimson\nstuff: glass\nsky"),
        ("two boats", None),
    ]
    words = Words(examples[0].words or "").vocabulary()
    assert [c.isthing for c in words] == [True, True, False, False], "kinds survive the way through the text field"
    bench = Workbench(segmenter, examples=examples)
    assert bench.add_example(1).name == "two_boats.png"
    for index in (-1, 2):
        with pytest.raises(InputError, match="no example"):
            bench.add_example(index)


def test_broken_examples_are_left_out(tmp_path: Path, colours: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(colours).save(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes()[:-60])
    caplog.set_level(logging.WARNING, "odise_rt")
    assert [example.title for example in find_examples(tmp_path)] == ["b"]
    assert "a.png is truncated" in caplog.text
    (tmp_path / "b.png").unlink()
    with pytest.raises(OptionsError, match="no picture that can be used"):
        find_examples(tmp_path)


def test_bad_example_folders(tmp_path: Path, colours: np.ndarray) -> None:
    with pytest.raises(OptionsError, match="holds no picture"):
        find_examples(tmp_path)
    with pytest.raises(OptionsError, match="not a folder"):
        find_examples(tmp_path / "missing")
    Image.fromarray(colours).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(";")
    with pytest.raises(OptionsError, match=r"words of the example a\.png"):
        find_examples(tmp_path)
