"""The report from a small run: complete, self-contained, and the same every time."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report_tables import TABLES, duration, peers_table, steps_table
from benchmarks.results import Result, Run
from benchmarks.steps import Step, steps_of
from tests.benchmarks.small_run import make_run

pytest.importorskip("matplotlib", reason="plots need matplotlib")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    make_run(seed=1).save(folder / "base.json")
    make_run(seed=2, scale={"runtime": 1.3, "runtime-again": 1.3}).save(folder / "run.json")
    arguments = [str(folder / "run.json"), str(folder / "base.json"), "--out", str(folder / "out")]
    assert report.main(arguments) == 0
    return folder


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href")]
        self.images += tag == "img"
        assert tag != "img" or dict(attrs)["alt"]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_file_that_loads_nothing(written: Path) -> None:
    text = (written / "out" / "report.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.images >= 7
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)


@pytest.mark.parametrize("name", ["report.html", "report.md"])
def test_failures_and_settings_are_in_it(written: Path, name: str) -> None:
    text = (written / "out" / name).read_text(encoding="utf-8")
    assert "FAILED: InductorError: no compiler" in text
    assert "OOM: needs 9 GiB" in text
    assert "0123456789ab" in text
    assert "Test CPU" in text
    assert "150 GFLOP/s" in text or "torch 150" in text
    assert "41.25" in text
    assert "slower" in text


def test_the_twin_refers_to_plots_that_are_there(written: Path) -> None:
    text = (written / "out" / "report.md").read_text(encoding="utf-8")
    names = re.findall(r"\]\((plots/[a-z]+\.svg)\)", text)
    assert {"plots/peers.svg", "plots/waterfall.svg", "plots/roofline.svg", "plots/comparison.svg"} <= set(names)
    for name in names:
        assert (written / "out" / name).read_text(encoding="utf-8").count("<svg") == 1
    assert not list((written / "out").glob(".report-*"))


def test_the_same_run_gives_the_same_report(written: Path, tmp_path: Path) -> None:
    arguments = [str(written / "run.json"), str(written / "base.json"), "--out", str(tmp_path)]
    assert report.main(arguments) == 0
    for path in (p for p in (written / "out").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(written / "out")).read_bytes(), path.name


def test_words_of_a_result_cannot_become_markup(tmp_path: Path) -> None:
    run = make_run()
    run.results.append(
        Result.missing("peers/256x256/ort-official", "a <b> | c", "failed", "<script>alert(1)</script> | x")
    )
    report.write_report(run, None, tmp_path)
    assert "<script>" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    row = next(line for line in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines() if "alert" in line)
    assert row.count(" | ") == peers_table(run).markdown().splitlines()[0].count(" | ")


def test_a_run_in_which_everything_failed_still_has_its_rows(tmp_path: Path) -> None:
    run = make_run()
    run.results = [Result.missing(r.key, r.label, "failed", "no luck") for r in run.results]
    report.write_report(run, None, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.count("FAILED: no luck") >= len(run.results)


def test_a_run_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    run.results, run.model = [], {"config": "odise-tiny"}
    run.rates = []
    run.save(tmp_path / "run.json")
    assert report.main([str(tmp_path / "run.json"), "--out", str(tmp_path / "out")]) == 2
    assert "error:" in capsys.readouterr().err


def test_each_step_is_measured_against_the_one_before() -> None:
    rows = {row[0]: row for row in steps_table(make_run(spread=0.0)).rows}
    assert rows["pruning"][1:] == ("300 ms", "0.75 ×", "±5.1 %", "100 ms", "0.75 ×")
    assert rows["batched windows"][4] == "40.0 ms"
    assert rows["fusion, Winograd"][1:] == ("100 ms", "0.83 ×", "±5.1 %", "20.0 ms", "0.25 ×")
    assert rows["fp16 graphs instead of fp32"][1] == "OOM: needs 9 GiB"


def test_what_a_step_saves_agrees_with_its_ratio_although_the_medians_do_not() -> None:
    run = make_run(spread=0.0)
    samples = {"official": [1.0, 1.0, 4.0], "step-pruning": [0.5, 2.0, 2.0]}  # medians 1 and 2, ratios 0.5, 2, 0.5
    run.results = [Result.measured(f"peers/256x256/{name}", name, values) for name, values in samples.items()]
    step = steps_of(run)[1]
    assert isinstance(step, Step)
    assert step.of_before.median == 0.5
    assert step.saved == pytest.approx(0.5)


def test_a_step_within_noise_saves_nothing() -> None:
    rows = {
        row[0]: row for row in steps_table(make_run(spread=0.0, scale={"runtime": 1.22, "runtime-again": 1.22})).rows
    }
    assert rows["fusion, Winograd"][1:5] == ("122 ms", "1.02 ×", "±5.1 %", "within noise")


@pytest.mark.parametrize("name", sorted(TABLES))
def test_every_table_has_as_many_cells_as_its_header(name: str) -> None:
    table = TABLES[name](make_run())
    assert all(len(row) == len(table.header) for row in table.rows), name


def test_columns_that_nobody_has_are_left_out_and_few_samples_have_no_p99() -> None:
    def table(rounds: int, **accuracy: object) -> dict[str, str]:
        run = make_run(rounds=rounds)
        run.results = [dataclasses.replace(r, accuracy=dict(accuracy)) for r in run.results]
        made = peers_table(run)
        cells = dict(zip(made.header, made.rows[0], strict=True))
        return cells | {"caption": made.caption}

    few = table(20)
    assert {"PQ", "p99", "same class as PyTorch", "mask logits off by"}.isdisjoint(few)
    assert "slowest" in few
    assert "Segments in the picture: 9 (our pruned structure, PyTorch eager)." in few["caption"]
    picture = {"class_agreement": 0.5, "mask_logits_error": 0.01, "mask_embedding_cosine": 0.99}
    many = table(100, picture=picture)
    assert many["same class as PyTorch"] == "50.00 %"
    assert many["mask logits off by"] == "1.0000 %"
    assert many["cosine of mask embeddings"] == "0.99000"
    assert "p99" in many
    both = table(100, picture=picture, scenes=50, class_agreement=0.75, pq={"all": 1.0, "seen": 2.0, "unseen": 0.5})
    assert both["same class as PyTorch"] == "75.00 %"
    assert "50 held-out scenes" in both["caption"]


def test_durations_have_three_digits() -> None:
    assert [duration(s) for s in (123.4, 2.345, 0.0456, 0.0123e-3)] == ["123 s", "2.35 s", "45.6 ms", "12.3 µs"]


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["run.json"], ["--compare", "a", "b", "--out", "c"]):
        with pytest.raises(SystemExit) as raised:
            report.main(arguments)
        assert raised.value.code == 2
    capsys.readouterr()


def test_run_files_without_gpu_fields_load(tmp_path: Path) -> None:
    run = make_run()
    run.save(tmp_path / "r.json")
    assert Run.load(tmp_path / "r.json").environment["gpus"] == []
