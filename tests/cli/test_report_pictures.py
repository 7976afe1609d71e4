"""The report's pictures hold the volumes that were written, in [0, 1]: decoded from the page and compared with known ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from ccella_fast.cli import main
from ccella_fast.report import html
from ccella_fast.report.figures import Mark, Panel, histogram, montage
from report_fixtures import SPACING, pictures, read, volume, write_run


def decoded(panels: list[Panel]) -> np.ndarray:
    return imread(io.BytesIO(montage(panels, window=(0, 1))))


def test_a_sample_is_what_was_written_divided_by_its_intensity(tmp_path: Path):
    samples = html._samples(write_run(tmp_path, ["a", "b"]) / "samples")
    assert len(samples) == 2
    for number, sample in enumerate(samples):
        np.testing.assert_allclose(sample.panel("t2w", "").volume, volume(number), rtol=1e-6)


def test_the_pages_montages_show_the_known_volumes(tmp_path: Path):
    shown = pictures(read(html.write_report(write_run(tmp_path, ["a", "b"]))))
    for picture, panels in zip(shown, [
        [Panel(volume(0), SPACING, "Real 1, test")],
        [Panel(volume(0) * 0.9, SPACING, "Reconstructed 1, test")],
        [Panel(volume(n), SPACING, f"Generated {n + 1}, seed {n}") for n in range(2)],
    ], strict=False):  # fmt: skip
        truth = decoded(panels)
        assert picture.shape == truth.shape and np.abs(picture - truth).max() <= 2 / 255
        brighter = decoded([panel._replace(volume=panel.volume * 1.2) for panel in panels])
        assert np.abs(picture - brighter).max() > 0.1


def test_of_many_volumes_some_are_shown_from_first_to_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, titles = write_run(tmp_path, ["a", "b"]), []
    for number in range(2, 20):
        text = (run / "samples" / "sample-000_seed0.json").read_text().replace('"seed": 0', f'"seed": {number}')
        (run / "samples" / f"sample-{number:03d}_seed{number}.json").write_text(text)
    monkeypatch.setattr(html, "montage", lambda panels, **_: titles.extend(panel.title for panel in panels) or b"")
    html.write_report(run)
    generated = [title for title in titles if title.startswith("Generated")]
    assert generated == [f"Generated {n + 1}, seed {n}" for n in (0, 2, 5, 7, 10, 12, 15, 17)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mark_points_from_its_side_at_the_slice_of_its_level(side: str):
    """The patient's left is on the right. The slices of this volume have different gray values."""
    block = np.zeros((96, 96, 12), np.float32)
    block += np.linspace(0.1, 0.9, 12, dtype=np.float32)
    plain, middle, base = (
        decoded([Panel(block, (1.0, 1.0, 3.0), "", mark)])
        for mark in (None, Mark(side, "PZ", "mid"), Mark(side, "PZ", "base"))  # type: ignore[arg-type]
    )
    changed = np.argwhere(np.abs(middle - plain).max(-1) > 0.05)
    half, axial = plain.shape[1] / 2, 30 + plain.shape[1]
    assert len(changed) > 20 and changed[:, 0].max() < axial
    assert (changed[:, 1] > half).all() if side == "left" else (changed[:, 1] < half).all()
    assert (changed[:, 0] > 40 + half).all()  # behind the middle: the front is at the top
    gray = [np.median(image[60:200, 20:-20]) for image in (plain, middle, base)]
    step = 0.8 / 11
    assert gray[0] == gray[1] and gray[2] - gray[0] == pytest.approx(3 * step, abs=0.01)  # 9 mm higher


def test_samples_are_marked_by_the_findings_of_their_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run, panels = write_run(tmp_path, ["a", "b"]), []
    for number, name in enumerate(["with", "without"]):
        path = run / "samples" / f"sample-00{number}_seed{number}.json"
        path.write_text(path.read_text().replace('"seed":', f'"report_id": "{name}", "seed":'))
    findings = tmp_path / "findings.csv"
    findings.write_text("case,side,zone,level\nwith,left,PZ,apex\nwithout,,,\nother,both,PZ,mid\n")
    monkeypatch.setattr(html, "montage", lambda shown, **_: panels.extend(shown) or b"")
    assert main(["report", str(run), "--findings", str(findings)]) == 0
    marked, unmarked = panels[-2:]
    assert (marked.title, marked.mark) == ("Generated 1, seed 0: left PZ apex", Mark("left", "PZ", "apex"))
    assert (unmarked.title, unmarked.mark) == ("Generated 2, seed 1", None)
    assert all(panel.mark is None for panel in panels[:-2])  # studies have other cases than reports
    assert "no generated volume has an arrow" not in capsys.readouterr().err
    findings.write_text("case,side,zone,level\nwithout,Right,tz,Mid\n")  # as a person may write it
    assert main(["report", str(run), "--findings", str(findings)]) == 0
    assert [panel.mark for panel in panels[-2:]] == [None, Mark("right", "TZ", "mid")]
    for useless in ("case,side\nother,left\n", "case,side\nwith,both\n", "case,report\nwith,Focus.\n"):
        findings.write_text(useless)
        assert main(["report", str(run), "--findings", str(findings)]) == 0
        assert "no generated volume has an arrow" in capsys.readouterr().err


def test_findings_are_refused_where_there_is_nothing_to_mark(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "protocol.json").write_text('{"format": "ccella_fast.evaluation"}')
    (tmp_path / "findings.csv").write_text("case,side\na,left\n")
    assert main(["report", str(tmp_path), "--findings", str(tmp_path / "findings.csv")]) == 2
    assert "this is that of an evaluation" in capsys.readouterr().err and not (tmp_path / "report.html").exists()


def test_histograms_count_the_shown_voxels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def stairs(self: Axes, values: np.ndarray, edges: np.ndarray, *, label: str, **_: Any) -> None:
        drawn[label] = (values, edges)

    monkeypatch.setattr(Axes, "stairs", stairs)
    monkeypatch.setattr(Axes, "legend", lambda *_, **__: None)
    groups: dict[str, np.ndarray] = {}
    monkeypatch.setattr(
        html, "histogram", lambda samples, **options: groups.update(samples) or histogram(samples, **options)
    )
    html.write_report(write_run(tmp_path, ["a", "b"]))
    np.testing.assert_allclose(groups["real"], volume(0).ravel(), rtol=1e-6)
    np.testing.assert_allclose(groups["generated"], np.concatenate([volume(0).ravel(), volume(1).ravel()]), rtol=1e-6)
    histogram({"known": np.array([-1.0, 0.0, 0.26, 0.26, 2.0])}, window=(0, 1), unit="")
    shares, edges = drawn["known"]
    assert shares.sum() == pytest.approx(100) and len(edges) == 65
    assert (shares[0], shares[16], shares[-1]) == pytest.approx(
        (40, 40, 20)
    )  # values outside are in the outermost bins
