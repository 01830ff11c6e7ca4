"""Documents of a whole run: the numbers of its images."""

from __future__ import annotations

from odise_rt.result_files import coco_image_ids


def test_images_called_by_a_number_have_it_and_others_the_free_ones() -> None:
    names = ["b", "000000000139", "a", "sub/2", "c", "clip.frames/000000"]
    assert coco_image_ids(names) == {"b": 1, "000000000139": 139, "a": 3, "sub/2": 2, "c": 4, "clip.frames/000000": 0}
    assert coco_image_ids(["x/7", "y/007", "8", "z"]) == {"x/7": 1, "y/007": 2, "8": 8, "z": 3}
    for name in ("-3", "1.5", "٣", "9" * 16, "v2"):
        assert coco_image_ids([name]) == {name: 1}


def test_a_number_stays_whatever_other_images_there_are() -> None:
    some, all_of_them = coco_image_ids(["a", "139"]), coco_image_ids(["0", "a", "b", "139"])
    assert some["139"] == all_of_them["139"] == 139
