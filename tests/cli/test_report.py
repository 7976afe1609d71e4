"""The page: complete, offline, silent about reports and identities. The pictures: right side, right proportions."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

from ccella_fast.errors import DataError
from ccella_fast.report import html
from ccella_fast.report.figures import Panel, _smooth, curves, cut, histogram, montage
from ccella_fast.report.html import write_report
from report_fixtures import CANARY_ID, CANARY_TEXT, SPACING, Page, pictures, read, volume, write_prepared, write_run


def assert_offline(page: Page, text: str) -> None:
    loaded = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action", "poster")]
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert not re.search(r"https?://|url\(|@import|//[a-z]+\.", re.sub(r"base64,[^\"]+", "", text))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)


def test_the_page_is_complete_offline_and_silent(tmp_path):
    path = write_report(write_run(tmp_path, [CANARY_ID, "quagga-2"]))
    text = path.read_text(encoding="utf-8")
    page = read(path)
    assert_offline(page, text)
    assert path.stat().st_size < 5e6
    for secret in (CANARY_ID, "quagga", CANARY_TEXT, "Quagga", str(tmp_path)):
        assert secret not in text
    words = " ".join(page.words)
    for expected in ("L1 0.0321, PSNR 27.5 dB", "1 train, 1 test", "24 x 16 x 8 voxels of 1.5 x 1.5 x 3 mm", "CCELLA",
                     "finished, step 49 of 49", "0.750", "2 processes", "torch", "synthetic",
                     "prepare: image", "12.5", "prepare: latent", "77.5", "1234 MiB on the GPU"):  # fmt: skip
        assert expected in words
    assert "There are no" not in words
    assert "<b>tiny" not in text  # escaped
    assert len(pictures(page)) == 6
    assert all(picture.std() > 0.01 for picture in pictures(page))  # none is blank


def test_studies_and_samples_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "_pictures", lambda *_: [])
    monkeypatch.setattr(html, "curves", lambda _: b"")
    run = write_run(tmp_path, ["a", "b", "c", "d"])
    manifest = json.loads((run / "prepared" / "manifest.json").read_text())
    for case, pirads in zip(manifest["cases"], ([1, 0], [0, 1], [0, 1], None), strict=True):
        case |= {"pirads": pirads, "text_isnull": int(pirads is None)}
    (run / "prepared" / "manifest.json").write_text(json.dumps(manifest))
    words = [word.strip() for word in read(write_report(run)).words if word.strip()]
    shown = dict(zip(words, words[1:], strict=False))
    assert shown["Studies"] == "3 train, 1 test" and shown["PI-RADS 1-2 / 3-5 / unknown"] == "1 / 2 / 1"
    assert shown["Without a report"] == "1" and shown["Generated volumes (synthetic)"] == "2"
    table = " ".join(words)
    for number in (1, 2):  # volume, report, seed, solver, steps, class given, probabilities
        assert f" {number} 1 {number - 1} ddim 50 - 0.250 0.750 " in table


def test_the_offline_check_sees_a_link():
    text = '<html><body><img src="https://example.org/a.png"></body></html>'
    with pytest.raises(AssertionError):
        assert_offline(Page(text), text)


def test_phantoms_are_called_synthetic(tmp_path):
    def words(name: str, ids: list[str], synthetic: bool) -> str:
        return " ".join(read(write_report(write_run(tmp_path / name, ids, synthetic))).words)

    drawn = words("drawn", ["one", "two"], True)
    assert "Phantom studies (synthetic)" in drawn and "All studies are synthetic" in drawn and "not patients" in drawn
    mixed = words("mixed", ["measured", "two"], True)
    assert "Phantom studies (synthetic)" not in mixed and "Some studies are synthetic" in mixed
    assert "not patients" not in words("real", ["phantom-0000", "phantom-0001"], False)  # a name says nothing


def test_what_is_missing_is_said(tmp_path):
    write_prepared(tmp_path / "prepared", ["a"])
    page = read(write_report(tmp_path))
    words = " ".join(page.words)
    for missing in ("no reconstructions", "no generated volumes", "no autoencoder training", "no diffusion training"):
        assert missing in words
    assert len(pictures(page)) == 1
    with pytest.raises(DataError, match="contains no results"):
        write_report(tmp_path / "prepared" / "images")


@pytest.mark.parametrize("damage", ["list", "empty", "strings"])
@pytest.mark.parametrize(
    "name",
    [
        "model/config.json",
        "model/run_status.json",
        "model/run_record.json",
        "prepared/run_record.json",
        "samples/sample-",
    ],
)
def test_a_damaged_file_of_the_results_is_named(tmp_path, monkeypatch, name, damage):
    """A list in place of an object, no keys, and texts in place of all values. Negative control: the undamaged folder."""
    monkeypatch.setattr(html, "curves", lambda _: b"")
    run = write_run(tmp_path, ["a", "b"])
    write_report(run)
    (path, *_) = sorted(run.glob(f"{name}*"))
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps({"list": [1], "empty": {"quagga": 1}, "strings": dict.fromkeys(values, "quagga")}[damage])
    )
    with pytest.raises(DataError) as caught:
        write_report(run)
    assert caught.value.path == str(path) and "quagga" not in str(caught.value)


def test_equal_folders_give_equal_pictures(tmp_path):
    first, second = (pictures(read(write_report(write_run(tmp_path / name, ["a", "b"])))) for name in "xy")
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    panels = [Panel(volume(0), SPACING, "a")]
    assert montage(panels, window=(0, 1)) == montage(panels, window=(0, 1))
    assert montage(panels, window=(0, 1)) != montage(panels, window=(0, 0.5))


@pytest.mark.parametrize(
    ("axis", "end", "plane", "edge"),
    [
        (0, -1, "axial", "left"), (0, -1, "coronal", "left"),  # the patient's right is on the left side
        (1, -1, "axial", "top"), (1, -1, "sagittal", "left"),  # front
        (2, -1, "coronal", "top"), (2, -1, "sagittal", "top"),  # head
        (0, 0, "axial", "right"), (1, 0, "axial", "bottom"), (2, 0, "sagittal", "bottom"), (1, 0, "sagittal", "right"),
    ],
)  # fmt: skip
def test_slices_are_turned_as_the_letters_say(axis, end, plane, edge):
    """One face of the volume is bright; it must appear at the edge whose letter names it."""
    faces = {(0, -1): "R", (0, 0): "L", (1, -1): "A", (1, 0): "P", (2, -1): "S", (2, 0): "I"}
    marked = np.zeros((6, 8, 4))
    np.moveaxis(marked, axis, 0)[end] = 1
    shown = cut(marked, (1, 1, 2), plane)
    edges = {"left": np.s_[:, 0], "right": np.s_[:, -1], "top": np.s_[0], "bottom": np.s_[-1]}
    letters = dict(zip(("left", "right", "top", "bottom"), shown.letters, strict=True))
    assert letters[edge] == faces[axis, end]
    assert [name for name, where in edges.items() if (shown.pixels[where] == 1).all()] == [edge]


def test_slices_keep_their_size_in_mm():
    sizes = {plane: cut(np.zeros((6, 8, 4)), (0.5, 1.0, 3.0), plane) for plane in ("axial", "coronal", "sagittal")}
    assert {plane: part.size for plane, part in sizes.items()} == {
        "axial": (3.0, 8.0), "coronal": (3.0, 12.0), "sagittal": (8.0, 12.0),
    }  # fmt: skip
    assert {plane: part.pixels.shape for plane, part in sizes.items()} == {
        "axial": (8, 6), "coronal": (4, 6), "sagittal": (4, 8),
    }  # fmt: skip


def test_a_cube_in_mm_is_a_square_in_the_picture():
    """Anisotropic voxels: a 24 mm cube, drawn white, measures the same across and down in all three planes."""
    from matplotlib.image import imread

    cube = np.zeros((48, 32, 20))  # 1 x 1.5 x 3 mm
    cube[12:36, 8:24, 6:14] = 1
    pixels = imread(io.BytesIO(montage([Panel(cube, (1.0, 1.5, 3.0), "")], window=(0, 1))))[..., :3].min(2) > 0.5
    rows = np.flatnonzero(pixels.sum(1) > 20)
    parts = np.split(rows, np.flatnonzero(np.diff(rows) > 3) + 1)
    squares = [part for part in parts if len(part) > 20]  # the scale bar is thinner
    assert len(squares) == 3
    for square in squares:
        columns = np.flatnonzero(pixels[square].sum(0) > 20)
        assert abs(len(square) - (columns[-1] - columns[0] + 1)) <= 4
    assert max(map(len, squares)) - min(map(len, squares)) <= 4


def test_letters_and_scale_bar_are_where_the_sides_are(monkeypatch):
    from matplotlib.axes import Axes

    letters, bars = [], []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: letters.append((text, round(x), round(2 * y) / 2)))
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **_: bars.append((self.get_xlim(), x)))
    montage([Panel(volume(0), SPACING, "")], window=(0, 1))
    found = [entry for entry in letters if entry[0] != "20 mm"]
    assert [text for text, *_ in found] == list("RLAPRLSIAPSI")
    left, right, top, bottom = (0, 0.5), (1, 0.5), (0, 1), (0, 0)  # 0.5 is rounded to 0
    assert [place for _, *place in found] == [list(place) for place in (left, right, top, bottom)] * 3
    ((low, high), (start, end)) = bars[0]
    assert len(bars) == 1 and (low, high) == (0, 24 * 1.5) and end - start == 20 and low < start


def test_curves_are_smoothed_by_the_mean_of_their_neighbours():
    values = np.random.default_rng(0).random(200)
    width = 200 // 33  # 6: three before, two after
    expected = [values[max(0, n - 3) : n + 3].mean() for n in range(200)]
    assert width == 6
    np.testing.assert_allclose(_smooth(values), expected, rtol=1e-12)
    np.testing.assert_array_equal(_smooth(values[:65]), values[:65])
    assert not np.array_equal(_smooth(values[:66]), values[:66])


def test_charts_show_their_data():
    steps = list(range(100))
    one = curves([{"title": "a", "lines": {"x": (steps, steps)}}])
    assert one != curves([{"title": "a", "lines": {"x": (steps, steps[::-1])}}])
    point, nothing = {"title": "b", "lines": {"x": ([5], [1.0])}}, {"title": "c", "lines": {"x": ([5], [np.nan])}}
    # One point is drawn, and a chart without any is not.
    assert curves([point, nothing]) == curves([point]) != curves([nothing])
    real = np.random.default_rng(0).random(1000)
    assert histogram({"real": real}, window=(0, 1), unit="") != histogram({"real": real / 2}, window=(0, 1), unit="")


def test_what_was_measured_during_the_training_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("ccella_fast.report.html.curves", lambda groups: drawn.append(groups) or b"")
    train = {"loss": 1.0, "loss_l1": 1.0, "loss_class": None, "lr": 1e-4, "samples_per_second": 2.0}
    measured = {
        "weights": "averaged",
        "val_loss": 0.5,
        "train_eval_loss": 0.4,
        "val_loss_l1_0_249": 0.3,
        "overfits_since": 2,
    }
    lines = [{"step": step, **train} for step in (1, 2, 3)]
    lines += [
        {"step": 2, **measured},
        {"step": 3, "weights": "averaged", "sample_distance": 0.25, "sample_copies": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chart = html._model_chart(tmp_path)
    series = {name: points for group in drawn[0] for name, points in group["lines"].items()}
    assert series["validation studies"] == ([2], [0.5]) and series["as many training studies"] == ([2], [0.4])
    assert series["timesteps 0-249"] == ([2], [0.3]) and series["distance"] == ([3], [0.25])
    assert series["total"] == ([1, 2, 3], [1.0] * 3) and np.isnan(series["share"][1])
    assert "moving average" in chart["caption"] and "since step 2" in chart["caption"]
    for step in range(10, 70, 10):
        (tmp_path / "previews").mkdir(exist_ok=True)
        (tmp_path / "previews" / f"step-{step:08d}.png").write_bytes(bytes([step]))
    captions = [figure["caption"] for figure in html._training_previews(tmp_path)]
    assert [re.search(r"after (\d+) steps", caption)[1] for caption in captions] == ["20", "40", "60"]


def test_a_class_loss_that_no_study_enters_is_not_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "ccella_fast.report.html.curves", lambda groups: drawn.append([g["title"] for g in groups]) or b""
    )
    for classes in (None, 0.5):
        line = {"step": 1, "loss": 1.0, "loss_l1": 1.0, "loss_class": classes, "lr": 1e-4, "samples_per_second": 2.0}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        caption = html._model_chart(tmp_path)["caption"]
        assert ("No class loss is shown" in caption) == (classes is None)
    assert [any("class loss" in title for title in titles) for titles in drawn] == [False, True]


def test_the_curves_of_the_autoencoder_are_those_of_its_terms(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("ccella_fast.report.html.curves", lambda groups: drawn.append(groups) or b"")
    for terms in (
        {"l1": 0.1, "kl": 9.0},
        {"l2": 0.02, "kl": 9.0, "spectral": 0.3, "adversarial": 0.4, "discriminator": 0.5},
    ):
        line = {"step": 10, **{f"loss_{name}": value for name, value in terms.items()}}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        html._vae_chart(tmp_path)
        assert [values for group in drawn.pop() for _, values in group["lines"].values()] == [
            [v] for v in terms.values()
        ]
