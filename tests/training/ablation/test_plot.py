"""The picture of an ablation: what is drawn, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.ablation.plot import draw, main
from training.ablation.rows import ROWS


def table(seeds: tuple[int, ...] = (42, 43)) -> dict[str, Any]:
    rows = [
        {
            "id": row.id,
            "title": row.title,
            "results": [
                {"seed": seed, "pq": 10.0 + index, "pq_seen": 11.0 + index, "pq_unseen": None} for seed in seeds
            ],
        }
        for index, row in enumerate(ROWS)
    ]
    return {"rows": rows, "setup": {"iterations": 300, "scenes": 100}, "seeds": list(seeds), "claims": []}


def test_a_table_becomes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (extra bench)")
    source, target = tmp_path / "ablation.json", tmp_path / "ablation.png"
    source.write_text(json.dumps(table()))
    assert main([str(source), str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    with Image.open(target) as picture:
        assert picture.width > 800
        assert len(set(picture.convert("RGB").getdata())) > 100
    incomplete = table()
    for row in incomplete["rows"][:3]:
        row["results"] = []  # the whole first group
    draw(incomplete, tmp_path / "less.png")
    with Image.open(target) as whole, Image.open(tmp_path / "less.png") as less:
        assert less.height < whole.height


def test_what_cannot_be_drawn_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "ablation.json"
    assert main([]) == 2
    assert main([str(source), str(tmp_path / "x.png")]) == 1
    assert "is no table of an ablation" in capsys.readouterr().err
    source.write_text(json.dumps(table(())))
    assert main([str(source), str(tmp_path / "x.png")]) == 1
    assert "has no measured row yet" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
