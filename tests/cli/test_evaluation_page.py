"""The page of an evaluation as text: complete, silent about ids, and the same for the same folder."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccella_fast.errors import DataError
from ccella_fast.report import evaluation, viewer
from ccella_fast.report.evaluation import write_evaluation_page
from ccella_fast.report.evaluation_figures import Dot, DotPanel
from ccella_fast.report.html import write_report
from ccella_fast.report.stored_evaluation import _GUARDS
from ccella_fast.report.viewer import ViewedCase, ViewedVolume, Viewer, make_viewer
from evaluation_page_fixtures import SPACING, all_rows, distance, gate, pelvis, row, write_evaluation
from report_fixtures import Page, pictures, read, write_run

NIIVUE = pytest.mark.skipif(viewer._niivue() is None, reason='ipyniivue is not installed: pip install -e ".[test]"')


@pytest.fixture
def without_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(viewer, "distribution", missing)
    viewer._niivue.cache_clear()
    yield
    viewer._niivue.cache_clear()


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dot_plots", "trios", "pair_gallery", "profiles", "volume_strips"):
        monkeypatch.setattr(evaluation, name, lambda *_, **__: b"")


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", " ".join(page.words))


def test_the_page_answers_first_and_shows_everything(tmp_path: Path, without_viewer):
    page = read(write_evaluation_page(write_evaluation(tmp_path)))
    text = words(page)
    order = ["against 32", "not patients", "for diagnosis", "Is it good?", "4.9 times as far from phantoms", "Is it new?",
             "Does it obey the report?", "Numbers", "Kernel distance", "Side by side", "Closest pairs", "Glands",
             "Intensities and sharpness", "Can the features see?", "Protocol"]  # fmt: skip
    places = [text.index(each) for each in order]
    assert places == sorted(places)
    assert re.search(r"Is it good\? No .* Is it new\? Undecided .* obey the report\? Undecided ", text)
    for expected in ("24 generated volumes (samples) against 32 phantoms (prepared:test)", "Kernel distance (KID)", "0.420",
                     "0.310 to 0.550", "as among real volumes", "fails: gland in order in 50 %", "0123456789abcdef",
                     "2.25, 2.25, 3",
                     "There are no more volumes than features", "all of these", "ccella-fast[viewer]"):  # fmt: skip
        assert expected in text, expected
    shown = pictures(page)
    assert len(shown) == 5 and all(picture[..., :3].std() > 0.01 for picture in shown)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes


def test_rows_refer_to_the_sentences_of_their_guards(tmp_path: Path, without_viewer, without_pictures):
    rows = [
        distance("taps-l3", 2, 0.1, guards=["n<d", "few"]),
        distance("random", 2, 0.1, guards=["few"]),
        row("kid", "x", 1.0),
    ]
    text = words(read(write_evaluation_page(write_evaluation(tmp_path, rows))))
    for features, notes in (("taps-l3", "1, 2"), ("random", "2")):
        assert re.search(rf"{features} 270 \d+ to \d+ 300 150 2\.00 330 32, 24 {notes} ", text)
    assert text.index(_GUARDS["n<d"]) < text.rindex(_GUARDS["few"])
    assert re.search(r"lower is better x 1\.00 - - - - - 32, 24 ", text)


def test_text_of_files_is_escaped_and_ids_are_not_shown(tmp_path: Path, without_viewer, without_pictures):
    rows = [{**each, "set": "<b>samples"} for each in all_rows()]
    text = write_evaluation_page(write_evaluation(tmp_path, rows)).read_text(encoding="utf-8")
    assert "<b>samples" not in text and "&lt;b&gt;samples" in text and str(tmp_path) not in text


def test_real_volumes_are_not_called_phantoms(tmp_path: Path, without_viewer, without_pictures):
    text = words(read(write_evaluation_page(write_evaluation(tmp_path, phantom=False))))
    assert "phantom" not in text.lower() and "Nothing on this page is for diagnosis" in text


def test_what_is_missing_is_said(tmp_path: Path, without_viewer):
    write_evaluation(tmp_path, [row("kid", "x", None)], shown=0, gates=[])
    content = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").write_text(json.dumps({**content, "per_case": []}))
    page = read(write_evaluation_page(tmp_path))
    for expected in ("No distance was computed", "No volumes were kept", "no training set was given", "No gland was segmented",
                     "Intensities and spectra were not compared", "The sensitivity gate was not run"):  # fmt: skip
        assert expected in words(page)
    assert not pictures(page)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("metrics.json", lambda content: content.pop("rows")),
        ("metrics.json", lambda content: content["rows"][0].update(value="quagga")),
        ("metrics.json", lambda content: content["rows"][0].update(guards=3)),
        ("metrics.json", lambda content: content["rows"][0]["details"].update(ratio_ci95=[1])),
        ("metrics.json", lambda content: content["per_case"][0].update(id="quagga")),
        ("metrics.json", lambda content: content["rows"][9]["details"].update(curves={"real": [1.0] * 7})),
        ("metrics.json", lambda content: content["rows"][9]["details"].update(curves={"quagga": [1.0] * 64})),
        ("protocol.json", lambda content: [1]),
        ("sensitivity.json", lambda content: content["gates"][0].pop("in_order")),
        ("examples/examples.json", lambda content: content["examples"][0].update(kind="quagga")),
        ("examples/examples.json", lambda content: content["examples"][0].update(file="../metrics.json")),
        ("examples/examples.json", lambda content: content["examples"][0].update(file="quagga.nii.gz")),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, without_viewer, without_pictures, name, change):
    write_evaluation_page(write_evaluation(tmp_path))  # negative control
    (tmp_path / "report.html").unlink()
    content = json.loads((tmp_path / name).read_text())
    content = change(content) if name == "protocol.json" else (change(content), content)[1]
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        write_evaluation_page(tmp_path)
    assert caught.value.path == str(tmp_path / name) and not (tmp_path / "report.html").exists()


def test_the_report_of_a_run_starts_with_its_evaluation(tmp_path: Path, without_viewer):
    run = write_run(tmp_path, ["a", "b"])
    before = read(write_report(run))
    write_evaluation(run / "evaluation")
    after = read(write_report(run))
    assert "Is it new?" not in words(before) and len(pictures(after)) == len(pictures(before)) + 5
    assert words(after).index("Is it new?") < words(after).index("Images") < words(after).index("Environment")
    for name in ("prepared", "vae", "model", "samples"):
        (run / name).rename(tmp_path / f"no-{name}")
    assert "Is it new?" in words(read(write_report(run)))


def test_equal_folders_give_equal_pages(tmp_path: Path):
    first, second = (write_evaluation_page(write_evaluation(tmp_path / name, shown=1)).read_bytes() for name in "xy")
    assert first == second


def test_pairs_are_the_kept_ones_and_the_nearest_comes_first(tmp_path: Path, without_viewer, monkeypatch):
    monkeypatch.setattr(evaluation, "trios", lambda *_, **__: b"")
    drawn: list[evaluation.Pair] = []
    monkeypatch.setattr(evaluation, "pair_gallery", lambda pairs, **_: drawn.extend(pairs) or b"")
    write_evaluation(tmp_path)
    content = json.loads((tmp_path / "metrics.json").read_text())
    content["per_case"][0]["null_percentile"] = 90.0
    content["per_case"].append(
        {**content["per_case"][0], "id": "synthetic-009", "null_percentile": 0.0}
    )  # was not kept
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    write_evaluation_page(tmp_path)
    assert [pair.title.split("  |  ")[:2] for pair in drawn] == [
        ["Generated 2", "training study 1"],
        ["Generated 1", "training study 2"],
    ]
    assert drawn[0].subtitle == "distance 2.50, nearer than 80 % of held-out volumes"
    content["per_case"][0]["copy"] = True
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    write_evaluation_page(tmp_path)
    assert [pair.title[:11] for pair in drawn[2:]] == ["Generated 1", "Generated 2"]
    assert drawn[2].subtitle.endswith(": a copy") and not drawn[3].subtitle.endswith(": a copy")
    for pair, numbers in zip(drawn[:2], ((2, 1), (1, 2)), strict=True):
        for array, number, kind in zip(pair[:2], numbers, ("synthetic", "train"), strict=True):
            assert np.abs(array - pelvis(number, kind)).max() <= 0.5 / 255 + 1e-6
        assert pair.spacing == SPACING


def test_dots_are_compared_at_equal_n_and_distances_in_multiples_of_the_floor(
    tmp_path: Path, without_viewer, without_pictures, monkeypatch
):
    panels: list[DotPanel] = []
    monkeypatch.setattr(evaluation, "dot_plots", lambda given: panels.extend(given) or b"")
    precision = row(
        "precision", "random", 0.5, value_equal_n=0.75, ci95=[0.375, 0.625], floor=0.9, limit_autoencoder=0.8
    )
    rows = [distance("taps-l3", 4.0, 0.5), distance("random", 1.5, 0.5), precision, row("coverage", "random", 0.25)]
    write_evaluation_page(write_evaluation(tmp_path, rows, gates=[gate("random", False)]))
    assert panels == [
        DotPanel("Fréchet distance, multiples of the floor", [
            Dot("taps-l3", 4.0, (3.5, 4.5), 1.0, 330 / 150), Dot("random", 1.5, (1.0, 2.0), 1.0, 330 / 150, faint=True)]),
        DotPanel("Precision", [Dot("random", 0.75, (0.625, 0.875), 0.9, 0.8, faint=True)], share=True),
        DotPanel("Coverage", [Dot("random", 0.25, None, None, None, faint=True)], share=True),
    ]  # fmt: skip


def test_curves_are_those_of_the_planes_that_are_named(tmp_path: Path, without_viewer, without_pictures, monkeypatch):
    groups: list[dict[str, Any]] = []
    monkeypatch.setattr(evaluation, "profiles", lambda given: groups.extend(given) or b"")
    spectrum, histogram = np.arange(96.0), np.arange(512.0) / 512
    rows = [row("spectrum", None, 1.0, details={"curves": {"synthetic": spectrum.tolist()}}),
            row("intensity", None, 1.0, details={"curves": {"real": histogram.tolist()}})]  # fmt: skip
    write_evaluation_page(write_evaluation(tmp_path, rows, phantom=False))
    intensities, axial, coronal = groups
    np.testing.assert_allclose(
        intensities["lines"]["real"][1][[0, -1]], [100 * sum(range(8)) / 512, 100 * sum(range(504, 512)) / 512]
    )
    for group, first in ((axial, 64), (coronal, 32)):  # the planes are in the order sagittal, coronal, axial
        np.testing.assert_array_equal(group["lines"]["generated"][1], np.arange(first, first + 32))
        np.testing.assert_allclose(group["lines"]["generated"][0][[0, -1]], [1 / 64, 63 / 64])
    assert ["axial" in axial["title"], "coronal" in coronal["title"]] == [True, True]


def make_case(folder: Path, name: str) -> ViewedCase:
    return ViewedCase(name, [ViewedVolume("Real 1", folder / "examples" / "real-1-t2w.nii.gz")])


@NIIVUE
def test_the_viewer_allows_its_own_script_and_embeds_what_fits(tmp_path: Path, monkeypatch):
    import base64
    import hashlib

    write_evaluation(tmp_path, shown=1)
    found = make_viewer([make_case(tmp_path, "</script><b>"), make_case(tmp_path, "second")])
    assert isinstance(found, Viewer) and [case["title"] for case in json.loads(found.cases)] == [
        "</script><b>",
        "second",
    ]
    assert "<" not in found.cases and "</script" not in found.script.lower() and "<!--" not in found.script
    assert found.policy == f"'sha256-{base64.b64encode(hashlib.sha256(found.script.encode()).digest()).decode()}'"
    assert "Redistribution and use" in found.script[:3000]  # its licence
    monkeypatch.setattr(viewer, "_MAX_BYTES", 10)
    small = make_viewer([make_case(tmp_path, "first"), make_case(tmp_path, "second")])
    assert isinstance(small, Viewer) and [case["title"] for case in json.loads(small.cases)] == ["first"]


def test_a_package_without_the_known_module_is_named(tmp_path: Path, monkeypatch):
    write_evaluation(tmp_path, shown=1)
    monkeypatch.setattr(viewer, "_niivue", lambda: "var Niivue;")
    assert make_viewer([make_case(tmp_path, "first")]) == viewer.UNKNOWN
