"""The command line as people use it: exit codes, files, and one clear line for every error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from odise_rt import cli
from odise_rt.doctor import REQUIRED
from odise_rt.inputs import find_inputs, output_names, result_names
from odise_rt.kernels.native import FOLDER_VARIABLE
from odise_rt.kernels.sources import STAMP
from odise_rt.model_arguments import BUNDLE_VARIABLE
from odise_rt.result_files import FORMATS
from odise_rt.run_log import FILE_NAME as RUN_LOG
from tests.odise_rt.fake_bundle import colour_image
from tests.odise_rt.fake_gpu import write_fatbins

WORDS = "red; green; blue; white"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(colour_image()).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good images, two broken ones, and files that are no images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(colour_image(64 + i, 96)).save(folder / f"good{i}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    return folder


def results(folder: Path) -> set[str]:
    """Files in a folder of results, without those by which a run is resumed."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"run.jsonl", ".run.lock"} <= found
    return found - {"run.jsonl", ".run.lock"}


def segment(bundle: Path, *arguments: Any) -> int:
    return cli.main(["segment", "--bundle", str(bundle), "--threads", "1", "-q", *map(str, arguments)])


def test_one_image(label_bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    assert segment(label_bundle, photo, "--vocab", WORDS, "--out", out) == 0
    assert results(out) == {"photo.overlay.png", "photo.json"}
    data = json.loads((out / "photo.json").read_text())
    assert {s["label"] for s in data["segments"]} == {"red", "green", "blue", "white"}
    printed = capsys.readouterr().out
    assert str(out / "photo.overlay.png") in printed
    assert "onnxruntime" in printed


def test_every_format(label_bundle: Path, photo: Path, tmp_path: Path) -> None:
    formats = ",".join(FORMATS)
    assert segment(label_bundle, photo, "--vocab", WORDS, "--out", tmp_path / "o", "--format", formats) == 0
    assert results(tmp_path / "o") == {
        "photo.overlay.png",
        "photo.json",
        "photo.rle.json",
        "photo.panoptic.png",
        "photo.semantic.png",
        "panoptic/photo.png",
        "panoptic.json",
        "labelme/photo.json",
        "cvat.xml",
    }
    with Image.open(tmp_path / "o/photo.semantic.png") as image:
        assert np.asarray(image)[60, 4] == 0
    coco = json.loads((tmp_path / "o/panoptic.json").read_text())
    assert [c["name"] for c in coco["categories"]] == ["red", "green", "blue", "white"]
    assert coco["images"] == [{"id": 1, "file_name": "photo.png", "height": 64, "width": 96}]
    assert coco["annotations"][0]["image_id"] == 1


def test_out_that_is_a_file(
    label_bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "o").write_text("mine")
    assert segment(label_bundle, photo, "--vocab", WORDS, "--out", tmp_path / "o") == 1
    assert "o is a file: name a folder" in capsys.readouterr().err
    assert (tmp_path / "o").read_text() == "mine"


def test_folder_with_broken_images(
    label_bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = segment(label_bundle, folder, "--vocab", WORDS, "--out", tmp_path / "o", "--format", "json")
    assert code == 2
    assert results(tmp_path / "o") == {"good0.json", "good1.json", "good2.json", "failed.json"}
    captured = capsys.readouterr()
    assert "3 of 5 files segmented" in captured.out
    assert "2 of 5 files could not be segmented" in captured.err
    failed = json.loads((tmp_path / "o/failed.json").read_text())
    assert [Path(f["image"]).name for f in failed] == ["broken.jpg", "empty.png"]
    assert {f["kind"] for f in failed} == {"ImageError"}
    assert "broken.jpg" in captured.err
    assert "empty.png" in captured.err
    assert "Traceback" not in captured.err


def test_json_on_standard_output(
    label_bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment(label_bundle, folder, "--vocab", WORDS, "--out", tmp_path / "o", "--json") == 2
    data = json.loads(capsys.readouterr().out)
    assert [Path(i["image"]).name for i in data["images"]] == ["good0.png", "good1.png", "good2.png"]
    assert [Path(f["image"]).name for f in data["failed"]] == ["broken.jpg", "empty.png"]
    assert all(Path(f).is_file() for i in data["images"] for f in i["files"])


def test_folder_shows_progress(
    label_bundle: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["segment", str(folder), "--bundle", str(label_bundle), "--vocab", WORDS, "--out", str(tmp_path / "o")]
    assert cli.main(arguments) == 2
    assert "5/5" in capsys.readouterr().err


def test_patterns_and_several_vocabularies(label_bundle: Path, folder: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("green\nblue, azure\n")
    code = segment(
        label_bundle,
        folder / "good*.png",
        "--vocab",
        "red",
        "--vocab",
        words,
        "--out",
        tmp_path / "o",
        "--format",
        "json",
    )
    assert code == 0
    data = json.loads((tmp_path / "o/good1.json").read_text())
    assert {"red", "green", "blue"} <= {s["label"] for s in data["segments"]}


def test_options_reach_the_segmenter(label_bundle: Path, photo: Path, tmp_path: Path) -> None:
    options = ["--overlap-threshold", "0.25", "--clip-weight-seen", "0.4", "--short-edge", "96", "--low-memory"]
    assert segment(label_bundle, photo, "--vocab", WORDS, "--out", tmp_path / "o", *options) == 0
    facts = json.loads((tmp_path / "o/photo.json").read_text())["facts"]
    assert facts["options"]["overlap_threshold"] == 0.25
    assert facts["options"]["clip_weight_seen"] == 0.4
    assert facts["network_size"] == [96, 144]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab", " ; "], "vocabulary is empty"),
        (["--vocab", "nothing.txt"], "cannot read the vocabulary"),
        (["--vocab", "red", "--overlap-threshold", "3"], "overlap_threshold is 3.0"),
        (["--vocab", "red", "--format", "gif"], "--format has gif"),
        (["--vocab", "red", "--device", "tpu"], "device is 'tpu'"),
        (["--vocab", "red", "--threads", "0"], "threads is 0"),
    ],
)
def test_errors_are_one_line(
    label_bundle: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    given = ["segment", str(photo), "--bundle", str(label_bundle), "--out", str(tmp_path / "o"), *arguments]
    assert cli.main(given) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("odise-rt: error: ")
    assert message in error
    assert "\n" not in error


def test_missing_bundle(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(BUNDLE_VARIABLE, raising=False)
    assert segment(tmp_path / "nothing", photo, "--vocab", "red") == 1
    assert "no bundle at" in capsys.readouterr().err
    assert cli.main(["segment", str(photo), "--vocab", "red"]) == 1
    assert "--bundle" in capsys.readouterr().err


def test_bundle_from_the_environment(
    label_bundle: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUNDLE_VARIABLE, str(label_bundle))
    assert cli.main(["segment", str(photo), "--vocab", "red", "--out", str(tmp_path / "o"), "-q"]) == 0
    assert cli.main(["inspect"]) == 0
    assert cli.main(["export-triton", "--out", str(tmp_path / "repository")]) == 0


def test_folder_without_images(label_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none").mkdir()
    assert segment(label_bundle, tmp_path / "none", "--vocab", "red") == 1
    assert "holds no image" in capsys.readouterr().err
    assert segment(label_bundle, tmp_path / "*.jpg", "--vocab", "red") == 1
    assert "nothing matches" in capsys.readouterr().err


def test_output_that_cannot_be_written(
    label_bundle: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert segment(label_bundle, photo, "--vocab", "red", "--out", tmp_path / "file" / "o") == 1
    assert "file system refused" in capsys.readouterr().err
    (tmp_path / "o" / "photo.json").mkdir(parents=True)
    assert segment(label_bundle, photo, "--vocab", "red", "--out", tmp_path / "o", "--format", "json") == 1
    assert f"refused {tmp_path / 'o' / 'photo.json'}: Is a directory" in capsys.readouterr().err, "not a temporary file"


def test_usage_errors_end_with_2() -> None:
    for arguments in ([], ["segment"], ["nonsense"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


def test_help_opens_with_the_modules_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "Segment images by words, and look into bundles." in capsys.readouterr().out


def test_inspect(label_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(label_bundle)]) == 0
    text = capsys.readouterr().out
    for part in ("fake-label", "match their SHA-256", "unet_tap", "windows -> image_embedding"):
        assert part in text
    assert cli.main(["inspect", str(label_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["queries"] == 6


def test_doctor(label_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(label_bundle)]) == 0
    text = capsys.readouterr().out
    assert "cpu (CPUExecutionProvider)" in text
    assert "all files match, fits cpu" in text
    assert cli.main(["doctor", "--json", str(tmp_path)]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert not findings["ready"]
    assert "not a bundle" in findings["bundles"][str(tmp_path)]["problem"]
    assert findings["devices"]["cpu (CPUExecutionProvider)"] == "works"


def test_doctor_tells_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert cli.main(["doctor"]) == 0, "a CPU needs none"
    assert f"the CUDA kernels are not built: no mask_pooling.fatbin in {tmp_path}" in capsys.readouterr().out
    write_fatbins(tmp_path)
    cli.main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out)["kernels"] == f"of this version, in {tmp_path}"
    (tmp_path / STAMP).write_text("0" * 64)
    cli.main(["doctor"])
    assert "they were compiled from other sources" in capsys.readouterr().out


def test_doctor_looks_for_every_package_that_is_required() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert tuple(re.findall(r'"([\w.-]+)', listed[1])) == REQUIRED


def test_doctor_goes_on_after_a_bundle_whose_engines_cannot_be_listed(
    new_bundle: Callable[[], Path],
    label_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    crowded = new_bundle()
    (crowded / "engines/one").mkdir(parents=True)
    monkeypatch.setattr("odise_rt.engines.MAX_ENGINES", 0)
    assert cli.main(["doctor", "--json", str(crowded), str(label_bundle)]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert not findings["ready"]
    assert "holds 1 folders, at most 0 are looked at" in findings["bundles"][str(crowded)]["problem"]
    assert findings["bundles"][str(label_bundle)]["problem"] is None


def test_labels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["labels"]) == 0
    assert {"coco", "ade20k", "lvis"} <= set(capsys.readouterr().out.split())
    assert cli.main(["labels", "cat, kitty; sky"]) == 0
    assert capsys.readouterr().out.splitlines() == ["     0  thing  cat, kitty", "     1  stuff  sky"]
    assert cli.main(["labels", "coco", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["classes"]) == 133


def test_reader_that_goes_away_is_no_error() -> None:
    """As in `odise-rt labels lvis | head -1`."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "odise_rt", "labels", "lvis", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 1
        assert b"Traceback" not in process.stderr.read()


def test_names_of_results_are_unique() -> None:
    images = [Path("a/x.jpg"), Path("a/x.png"), Path("b/x.jpg"), Path("b/X.JPG"), Path("c/y.jpg"), Path("a/x.jpg")]
    names = output_names(images, [p.stem for p in images])
    assert names[:3] == ["x", "x_png", "x_jpg"]
    assert len({n.casefold() for n in names}) == len(images)


def test_names_that_macos_takes_for_one_are_told_apart() -> None:
    composed, decomposed = Path("a/caf\u00e9.jpg"), Path("b/CAFE\u0301.jpg")
    assert output_names([composed, decomposed], ["caf\u00e9", "CAFE\u0301"]) == ["caf\u00e9", "CAFE\u0301_jpg"]


def test_no_result_takes_the_place_of_another(tmp_path: Path) -> None:
    names = ("failed", "panoptic", "run", "a", "a.rle", "a.overlay", "labelme/a", "panoptic/a", "ok")
    for name in names:
        (tmp_path / "labelme").mkdir(exist_ok=True)
        (tmp_path / "panoptic").mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.jpg")
    found = find_inputs([str(tmp_path)], recursive=True)
    assert len(found) == len(names)
    files = [file.casefold() for item in found for file in result_names(item.name)]
    assert len(files) == len(set(files))
    assert not {"failed.json", "panoptic.json", "cvat.xml", RUN_LOG} & set(files)
    assert {"a", "ok"} <= {item.name for item in found}


def test_documents_tell_pictures_of_one_name_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "a.jpg")
        Image.new("RGB", (4, 4)).save(tmp_path / folder / f"{folder}.jpg")
    found = find_inputs([str(tmp_path / "x"), str(tmp_path / "y")])
    assert [item.file_name for item in found] == [
        f"{tmp_path.as_posix()}/x/a.jpg", "x.jpg", f"{tmp_path.as_posix()}/y/a.jpg", "y.jpg",
    ]  # fmt: skip


def test_a_name_too_long_for_its_results_is_that_pictures_failure(
    label_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a" * 250, "b"):
        Image.fromarray(colour_image()).save(pictures / f"{name}.jpg")
    arguments = ["segment", str(pictures), "--bundle", str(label_bundle), "--vocab", "red; sky", "--device", "cpu"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--format", "overlay,json"]) == 2
    assert "too long for those of its results: rename it" in capsys.readouterr().err
    assert (tmp_path / "out" / "b.json").is_file()


def test_json_is_utf8_whatever_the_terminal_speaks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "odise_rt", "labels", "café; 🐕", "--json"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert "🐕" in json.loads(done.stdout)["classes"][1]["name"]


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("labels coco >&-", 0),
        ("inspect /nonexistent --json >&-", 1),
        ("inspect /nonexistent --json 2>&- >/dev/full", 1),
        ("labels coco --json >/dev/full", 1),
        ("serve --help >/dev/full", 0),
    ],
)
def test_an_output_that_takes_nothing_gives_no_traceback(command: str, status: int) -> None:
    if "/dev/full" in command and not Path("/dev/full").exists():
        pytest.skip("the system has no device that is always full")
    done = subprocess.run(
        f"exec {sys.executable} -m odise_rt {command}", shell=True, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("arguments", [["inspect", "/nonexistent", "--json"], ["serve", "--help"]])
def test_a_reader_that_is_gone_from_the_start_gets_no_traceback(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "odise_rt", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == ("inspect" in arguments)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_help_is_printed_in_any_encoding() -> None:
    command = [sys.executable, "-m", "odise_rt", "serve", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    subprocess.run(command, capture_output=True, env=environment, check=True)


def test_results_as_json_into_a_closed_output(
    label_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(colour_image()).save(picture)
    monkeypatch.setattr(sys, "stdout", None)
    arguments = ["segment", str(picture), "--bundle", str(label_bundle), "--vocab", "red; sky", "--device", "cpu"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--json"]) == 0


def test_a_limit_on_threads_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def limited(*arguments: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("odise_rt.vocabulary.Vocabulary.load", limited)
    assert cli.main(["labels", "coco", "--json"]) == 1
    told = capsys.readouterr()
    assert told.err.startswith("odise-rt: error: the system starts no more threads: raise its limit")
    assert json.loads(told.out)["error"]["type"] == "RuntimeError"


def test_images_are_found_in_order(folder: Path) -> None:
    names = [i.path.name for i in find_inputs([str(folder), str(folder / "good0.png")])]
    assert names == ["broken.jpg", "empty.png", "good0.png", "good1.png", "good2.png"], "each file once"
