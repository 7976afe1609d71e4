"""The page of a comparison, from a made-up record and evaluations: its parts in their order, links, and what is missing."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from ccella_fast.comparison import results, tables
from ccella_fast.errors import DataError
from ccella_fast.report import comparison
from ccella_fast.report.comparison import Further, Table, write_page
from ccella_fast.report.evaluation_figures import Pair
from ccella_fast.report.figures import Panel
from ccella_fast.storage import read_json, write_json
from comparison_fixtures import CONTRASTS, record, row
from evaluation_page_fixtures import SPACING, all_rows, copies, gate, pelvis, write_evaluation

PARTS = [
    "Variants", "Distances", "Classifiers", "Volumes of the same prompts", "Same noise, other class",
    "Copies of training studies", "Volume of the gland", "Slices", "Intensities and sharpness", "Can the features see?",
    "Plausible glands", "Decided on real studies alone", "Protocol", "Time",
]  # fmt: skip


def made(folder: Path) -> dict[str, Any]:
    """A record, and the evaluations that belong to it."""
    found = record([10.0, 12.0], [20.0, 22.0], CONTRASTS)
    for generator in found["generators"]:
        rows = [each for each in all_rows() if each["metric"] != "copies"]
        near = copies(0, 24, (0.0, 0.1), details={"null": [2.0, 3.0, 4.0]})
        write_evaluation(folder / "evaluation" / f"{generator['variant']}-{generator['seed']}", [*rows, near], shown=1)
    write_json(
        folder / "sensitivity" / "sensitivity.json", {"gates": [gate("taps-l3", True), gate("radiomics", False)]}
    )
    curve = {"false_positive_rate": [0.0, 0.5, 1.0], "mean": [0.0, 0.7, 1.0], "sd": [0.0, 0.1, 0.0], "classifiers": 2}
    found["roc"] = [{"label": "r", **curve}, {"label": "rs", **curve}]
    found["statements"] = [each._asdict() for each in results.statements(found)]
    return found


def write(folder: Path, found: dict[str, Any], **more: Any) -> str:
    """The page."""
    panels = [[Panel(pelvis(1, kind), SPACING, f"shown {kind}") for kind in ("real", "reconstructed", "synthetic")]]
    pair = Pair(pelvis(1), pelvis(2), SPACING, "Asked for pos", "")
    further = Further(
        tables.distances_table(found), tables.conditions_table(found), tables.class_changes_table(found),
        tables.copies_table(found), tables.gland_volumes_table(found), tables.slices_table(found),
        tables.images_table(found), tables.glands_table(found), panels, {"CCELLA, seed 1": [pair]},
    )._replace(**more)  # fmt: skip
    write_page(folder, found, Table(tables.COLUMNS, tables.variants_table(found), 2), further)
    return (folder / "report.html").read_text()


def part(page: str, name: str) -> str:
    """The text of a part of the page, without its pictures."""
    start = page.index(f">{name}</h2>")
    text = page[start : page.find("<h2", start)]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list[Any]]:
    """What the page draws, by the name of the function, instead of pictures."""
    calls: dict[str, list[Any]] = {}
    for name in ("trios", "pair_gallery", "nearest_distances", "roc_curves", "distances", "classifiers"):
        monkeypatch.setattr(
            comparison, name, lambda *given, _name=name, **more: calls.setdefault(_name, []).append(given) or b"x"
        )
    return calls


def test_the_page_has_its_parts_in_order_and_loads_nothing(tmp_path):
    page = write(tmp_path, made(tmp_path))
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", page) == PARTS
    assert page.count("data:image/png;base64,") == 7  # distances, classifiers, ROC, prompts, classes, nearest, curves
    assert not re.findall(r'(?:src|href)="(?!data:image/png|evaluation/)', page) and "<script" not in page
    links = set(re.findall(r'href="([^"#]*)', page))
    assert links == {f"evaluation/{name}/report.html" for name in ("CCELLA-1", "CCELLA-2", "MAISI-1", "MAISI-2")}
    assert "the segmenter does not find those of coarse phantoms" in part(page, "Plausible glands")
    assert "radimagenet=FILE" in part(page, "Slices")
    assert "exploratory" in page and page.count('class="verdict ') == 4
    gates = part(page, "Can the features see?")
    assert (
        "taps-l3 passes" in gates
        and "radiomics fails: gland in order in 50 %" in gates
        and "gland in order 1" not in gates
    )


def test_what_is_drawn_is_that_of_the_record(tmp_path, drawn):
    found = made(tmp_path)
    for seed, near in ((1, 0.25), (2, 0.75)):  # of the first variant; the space of the others is another one
        path = tmp_path / "evaluation" / f"CCELLA-{seed}" / "metrics.json"
        content = read_json(path)
        content["per_case"][0]["distance"] = near
        content["per_case"][1]["features"] = "image-4mm"
        write_json(path, content)
    page = write(tmp_path, found)
    ((null, groups),) = drawn["nearest_distances"]
    assert null == [2.0, 3.0, 4.0] and groups == {"CCELLA": [0.25, 0.75], "MAISI": [1.5, 2.5, 1.5, 2.5]}
    assert drawn["roc_curves"] == [(found["roc"],)]
    assert [panel.title for panel in drawn["trios"][0][0][0]] == [
        "shown real",
        "shown reconstructed",
        "shown synthetic",
    ]
    assert "CCELLA, seed 1. Same noise and same report" in page


def test_what_was_measured_takes_the_place_of_what_is_missing(tmp_path, drawn):
    found = made(tmp_path)
    for generator in found["generators"]:
        generator["rows"] += [
            row("gland_found", None, 0.75, floor=0.97), row("fd_slices", "radimagenet-axial", 4.0),
            row("condition_gland_volume", None, 0.5, ceiling=0.8, bias_cc=-3.0, real_bias_cc=-1.0),
        ]  # fmt: skip
    page = write(tmp_path, found)
    assert "real against real 0.97" in part(page, "Plausible glands") and "CCELLA 0.75" in part(
        page, "Plausible glands"
    )
    assert "radimagenet-axial" in part(page, "Slices") and "CCELLA 4" in part(page, "Slices")
    assert "real volumes 0.8 -1" in part(page, "Volume of the gland")
    page = write(tmp_path, found | {"roc": []}, same_prompts=[], other_class={})
    assert "the test studies are of one class" in part(page, "Classifiers")
    assert "No test study is the prompt" in part(page, "Volumes of the same prompts")


def test_names_are_escaped_and_a_damaged_evaluation_is_named(tmp_path, drawn):
    found = made(tmp_path)
    found["protocol"]["decided"]["difficulty"] = "<b>1</b>"
    assert "&lt;b&gt;1&lt;/b&gt;" in write(tmp_path, found)
    path = tmp_path / "evaluation" / "CCELLA-1" / "metrics.json"
    content = read_json(path)
    next(each for each in content["rows"] if each["metric"] == "copies")["details"] = {}
    write_json(path, content)
    with pytest.raises(DataError, match="evaluation"):
        write(tmp_path, found)
