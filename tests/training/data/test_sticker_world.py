"""Sticker World: nouns, captions, textures, and scenes with exact masks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from odise_rt.errors import DatasetError
from training.data.coco_panoptic import CocoPanoptic
from training.data.sticker_world.__main__ import main
from training.data.sticker_world.captions import join_phrases
from training.data.sticker_world.nouns import all_nouns, category_id, plural, select, with_article
from training.data.sticker_world.scene import MIN_SEGMENT_AREA, compose
from training.data.sticker_world.sprites import find_font, load_sprites
from training.data.sticker_world.textures import TEXTURES, draw_texture
from training.data.sticker_world.writer import Recipe, encode_ids, scene_rng, segment_ids, write_dataset

FIXTURE = Path(__file__).parents[2] / "fixtures" / "sticker_world"


def has_font() -> bool:
    try:
        find_font()
    except DatasetError:
        return False
    return True


needs_font = pytest.mark.skipif(
    not has_font(), reason="needs the Noto Color Emoji font (Debian: apt install fonts-noto-color-emoji)"
)


@pytest.fixture(scope="module")
def sprites() -> dict[str, np.ndarray]:
    return load_sprites(find_font())


def test_there_are_enough_nouns_and_a_fifth_of_them_is_unseen() -> None:
    things = [noun for noun in all_nouns() if noun.is_thing]
    stuff = [noun for noun in all_nouns() if not noun.is_thing]
    assert len(things) >= 240
    assert len(stuff) >= 11
    assert 0.18 <= sum(noun.unseen for noun in things) / len(things) <= 0.22
    assert {noun.name for noun in stuff if noun.unseen} == {"water", "night sky", "carpet"}
    assert {noun.name for noun in stuff} == set(TEXTURES)


def test_the_split_stays_the_one_that_shipped_models_were_trained_on() -> None:
    unseen = ",".join(sorted(noun.name for noun in all_nouns() if noun.unseen))
    recorded = json.loads((FIXTURE / "split.json").read_text())
    assert unseen == ",".join(sorted(recorded["unseen_things"] + recorded["unseen_stuff"]))


def test_no_word_means_two_things() -> None:
    names = [name for noun in all_nouns() for name in noun.names]
    assert len(names) == len(set(names))
    assert all(name == name.lower().strip() and name for name in names)


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("dog", "a dog"), ("owl", "an owl"), ("umbrella", "an umbrella"), ("unicorn", "a unicorn"), ("ufo", "a ufo"),
     ("grapes", "some grapes"), ("bus", "a bus"), ("dress", "a dress"), ("bread", "some bread")],
)  # fmt: skip
def test_articles(name: str, phrase: str) -> None:
    assert with_article(name) == phrase


@pytest.mark.parametrize(
    ("name", "many"),
    [("dog", "dogs"), ("fox", "foxes"), ("maple leaf", "maple leaves"), ("teddy bear", "teddy bears"),
     ("goldfish", "goldfish"), ("battery", "batteries"), ("key", "keys"), ("scissors", "scissors"), ("bus", "buses")],
)  # fmt: skip
def test_plurals(name: str, many: str) -> None:
    assert plural(name) == many


def test_join_phrases_reads_naturally() -> None:
    assert [join_phrases(list("abc")[:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_are_deterministic_and_in_range(name: str) -> None:
    first, second = (draw_texture(name, np.random.default_rng(3), 128) for _ in range(2))
    assert first.shape == (128, 128, 3)
    assert first.min() >= 0
    assert first.max() <= 255
    assert first.std() > 3
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, draw_texture(name, np.random.default_rng(4), 128))


def test_segment_ids_are_distinct_colours() -> None:
    ids = segment_ids(40)
    assert len({tuple(colour) for colour in encode_ids(ids[None])[0]}) == 40
    assert (ids > 0).all()


@needs_font
@pytest.mark.font
@pytest.mark.parametrize("index", range(6))
def test_scenes_are_fully_annotated(sprites: dict[str, np.ndarray], index: int) -> None:
    scene = compose(sprites, scene_rng(0, "val", index), 128, "all")
    numbers, areas = np.unique(scene.segment_map, return_counts=True)
    assert (scene.segment_map == 0).mean() < 0.02
    assert numbers[numbers > 0].tolist() == list(range(1, len(scene.category_ids) + 1))
    assert areas[numbers > 0].min() >= MIN_SEGMENT_AREA
    shown = [all_nouns()[number - 1] for number in scene.category_ids]
    stuff = [noun for noun in shown if not noun.is_thing]
    assert len(stuff) == len(set(stuff)), "one segment for each kind of stuff"
    assert len(scene.captions) == 5
    for noun in set(shown):
        assert any(name in scene.captions[0] or plural(name) in scene.captions[0] for name in noun.names)


@needs_font
@pytest.mark.font
def test_masks_lie_exactly_on_the_things() -> None:
    """Things painted in one flat colour: the mask holds that colour, and almost nothing outside it does."""
    flat = np.zeros((90, 90, 4), np.uint8)
    flat[..., 0], flat[..., 2], flat[..., 3] = 255, 255, 255
    things = {noun.name: flat for noun in all_nouns() if noun.is_thing}
    scene = compose(things, scene_rng(1, "val", 0), 256, "all")
    is_thing = np.array([False] + [all_nouns()[number - 1].is_thing for number in scene.category_ids])
    red, green, blue = (scene.image[..., channel].astype(int) for channel in range(3))
    magenta = (red > green + 90) & (blue > green + 90)
    mask = is_thing[scene.segment_map]
    assert mask.any()
    assert (magenta & mask).sum() / (magenta | mask).sum() > 0.95


@needs_font
@pytest.mark.font
def test_seen_scenes_show_and_name_nothing_unseen(sprites: dict[str, np.ndarray]) -> None:
    unseen = [name for noun in all_nouns() if noun.unseen for name in noun.names]
    allowed = {category_id(noun) for noun in select(all_nouns(), "seen")}
    for index in range(12):
        scene = compose(sprites, scene_rng(2, "train", index), 128, "seen")
        assert set(scene.category_ids) <= allowed
        text = " , ".join(scene.captions)
        # "top hat" is unseen; "hat" inside "straw hat" is not: whole names between word borders only.
        found = [name for name in unseen if re.search(rf"\b{re.escape(name)}\b", text)]
        assert not [name for name in found if not _inside_a_seen_name(name, text)]


def _inside_a_seen_name(name: str, text: str) -> bool:
    longer = [other for noun in all_nouns() if not noun.unseen for other in noun.names if name in other]
    for other in longer:
        text = text.replace(plural(other), "").replace(other, "")
    return not re.search(rf"\b{re.escape(name)}\b", text)


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    content = b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()


@needs_font
@pytest.mark.font
def test_the_seed_decides_everything_and_workers_nothing(tmp_path: Path) -> None:
    recipe = Recipe(seed=5, size=64)
    write_dataset(tmp_path / "one", 3, recipe, workers=1)
    write_dataset(tmp_path / "two", 3, recipe, workers=2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    write_dataset(tmp_path / "longer", 4, recipe, workers=1)
    first = Path("train/000000000002.jpg")
    assert (tmp_path / "one" / first).read_bytes() == (tmp_path / "longer" / first).read_bytes()
    assert not list(tmp_path.rglob("*.partial"))
    assert len(list(CocoPanoptic.from_root(tmp_path / "one", "train"))) == 3


@needs_font
@pytest.mark.font
def test_an_existing_split_is_kept_unless_told(tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--images", "1", "--size", "64", "--workers", "1", "--seed"]
    assert main([*arguments, "1"]) == 0
    before = digest(tmp_path)
    assert main([*arguments, "2"]) == 1
    assert digest(tmp_path) == before
    assert main([*arguments, "2", "--overwrite"]) == 0
    assert digest(tmp_path) != before


@needs_font
@pytest.mark.font
def test_ctrl_c_is_one_line_of_all_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.data.sticker_world", str(tmp_path), "--images", "5000", "--seed", "1"]
    process = subprocess.Popen(
        [*command, "--size", "64", "--workers", "2"],
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(tmp_path.glob(".train.partial/images/*")) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    message = process.communicate()[1].decode()
    assert process.returncode == 130
    assert message.rstrip().endswith("stopped: nothing was written")
    assert "Traceback" not in message
    assert not list(tmp_path.glob(".*"))


def test_a_missing_font_is_named_with_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "none.ttf"
    assert main([str(tmp_path / "out"), "--images", "1", "--seed", "0", "--font", str(absent)]) == 1
    message = capsys.readouterr().err
    assert str(absent) in message
    assert "fonts-noto-color-emoji" in message


def test_a_file_that_is_no_font_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.ttf"
    wrong.write_bytes(b"not a font")
    with pytest.raises(DatasetError, match=r"wrong\.ttf cannot be used"):
        load_sprites(wrong)


def test_impossible_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="0 scenes"):
        write_dataset(tmp_path, 0, Recipe(seed=0))
    with pytest.raises(DatasetError, match="seed -1"):
        write_dataset(tmp_path, 1, Recipe(seed=-1))


@needs_font
@pytest.mark.font
def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(DatasetError, match="cannot write Sticker World"):
        write_dataset(blocker / "data", 1, Recipe(seed=0, size=64))
