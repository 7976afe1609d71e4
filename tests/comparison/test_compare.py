"""The smallest comparison runs to its end, continues where it was stopped, and refuses another protocol."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from ccella_fast import cli
from ccella_fast.comparison.compare import compare
from ccella_fast.comparison.protocol import PRESETS
from ccella_fast.comparison.stages import Stages
from ccella_fast.errors import CcellaError
from ccella_fast.storage import read_json, write_json

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.json"
RESULTS = ("comparison.json", "table.md", "table.csv", "table.tex", "report.html")


def run(out: Path, *more: str) -> int:
    """The first command of the page, with this folder."""
    page = (DEMO.parents[1] / "docs" / "how-to" / "compare.md").read_text().replace("\\\n", " ")
    (program, *words), *_ = (
        shlex.split(line) for line in re.findall(r"^    (ccella-fast \S.*)", page, flags=re.MULTILINE)
    )
    assert program == "ccella-fast" and words[words.index("--preset") + 1] == "smoke"
    places = {"configs/demo.json": str(DEMO), "out/compare": str(out)}
    return cli.main([*(places.get(word, word) for word in words), *more])


def test_a_comparison_runs_stops_and_continues(tmp_path, monkeypatch, capsys):
    """Everything that a stage has finished is kept, and what is left is done once."""
    out = tmp_path / "out"
    real = Stages._start

    def stop(self: Stages, name: str, words: list[str], processes: int) -> None:
        if name.startswith("evaluate"):
            raise KeyboardInterrupt
        real(self, name, words, processes)

    with monkeypatch.context() as patch:
        patch.setattr(Stages, "_start", stop)
        assert run(out) == 130
    protocol = read_json(out / "protocol.json")
    assert protocol["decided"]["size"] == 10 and protocol["decided"]["space"] == "random"
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    models = {path: path.stat().st_mtime_ns for path in out.glob("models/*/checkpoints/*/model.safetensors")}
    assert kept and len(models) >= 4 and not (out / "comparison.json").exists()
    capsys.readouterr()
    assert run(out) == 0
    assert {path: path.stat().st_mtime_ns for path in [*kept, *models]} == kept | models
    found = read_json(out / "comparison.json")
    said = capsys.readouterr().out
    assert [each["name"] for each in found["statements"]] == ["O1", "O2", "O3", "O4"]
    assert all(each["question"] in said for each in found["statements"])
    assert {each["variant"] for each in found["generators"]} == {"CCELLA", "MAISI"} and len(found["generators"]) == 4
    # Those of predicted classes are left out if a model that was hardly trained predicts one class for all.
    assert {"r", "rr", "v", "s", "rs", "rb"} <= {job["arm"] for job in found["classifiers"]}
    with open(out / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["real against real", "autoencoder alone", "CCELLA", "MAISI"]
    assert all(row["FD"] not in ("", "–") for row in rows)
    page = (out / "report.html").read_text()
    assert found["protocol_sha256"][:12] in page and "phantoms, not about patients" in page and "0.071" in page
    # The page has every part of its own, and links to those of the evaluations, which know the sensitivity gate.
    assert page.count("data:image/png;base64,") == 7 and all(each["parameters"] > 1e5 for each in found["generators"])
    assert {"r", "rs", "rb MAISI"} <= {curve["label"] for curve in found["roc"]}
    metrics = {row["metric"] for row in found["generators"][0]["rows"]}
    assert {"fd", "intensity", "spectrum", "copies", "condition_class", "counterfactual_class"} <= metrics
    for link in re.findall(r'href="([^"#]*)', page):
        evaluation = (out / link).read_text()
        assert "Can the features see?" in evaluation and "sensitivity gate was not run" not in evaluation
    # Both classes are drawn from the same noise.
    seeds = [[read_json(path)["seed"] for path in sorted((out / "samples" / f"CCELLA-1-{name}").glob("sample-*.json"))]
             for name in ("neg", "pos")]  # fmt: skip
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == len(seeds[0]) >= 2
    # No word of a report is in the results.
    with open(out / "real" / "studies" / "studies.csv", newline="") as file:
        reports = [row["report"] for row in csv.DictReader(file) if row["report"]]
    for name in RESULTS:
        text = (out / name).read_text()
        assert not [report for report in reports if report[:40] in text], name
    before = {name: (out / name).read_bytes() for name in RESULTS}
    assert run(out) == 0 and {name: (out / name).read_bytes() for name in RESULTS} == before
    assert run(out, "--seeds", "3") == 2
    assert "training_seeds" in capsys.readouterr().err
    # The real studies are those of the protocol.
    manifest = out / "real" / "prepared" / "manifest.json"
    shutil.copy(manifest, tmp_path / "manifest.json")
    manifest.write_text(
        manifest.read_text().replace('"truncated_reports": []', '"truncated_reports": ["phantom-0001"]')
    )
    assert run(out) in (2, 3)


@pytest.mark.slow
def test_own_studies_are_compared(tmp_path, monkeypatch):
    """The preset `paper` with small numbers: nothing is drawn, the findings of phantoms are not used, glands are segmented."""
    small = PRESETS["paper"] | {
        name: PRESETS["smoke"][name]
        for name in ("training_seeds", "prompts_per_class", "classifier_seeds", "sensitivity_volumes", "spaces", "features")
    }  # fmt: skip
    small |= {"classifier": PRESETS["smoke"]["classifier"], "sampling": PRESETS["smoke"]["sampling"]}
    monkeypatch.setitem(PRESETS, "paper", small)
    config = read_json(DEMO)
    for section, values in PRESETS["smoke"]["config"].items():
        config[section] |= values
    write_json(tmp_path / "config.json", config)
    assert cli.main(["phantom", "--out", str(tmp_path / "studies"), "--splits", "11", "8", "8"]) == 0
    start = tmp_path / "start"
    own = {"preset": "paper", "config": tmp_path / "config.json", "data": tmp_path / "studies", "jobs": 2}
    compare(tmp_path / "first", **own)
    shutil.copytree(tmp_path / "first" / "models" / "MAISI-1", start)
    # Another one with the autoencoder of the first, whose second row starts from the weights of the first.
    found = compare(tmp_path / "second", **own, vae=tmp_path / "first" / "vae", init_from={"MAISI": start})
    assert found["protocol"]["decided"].keys() == {"autoencoder", "space", "passed", "real_sha256"}
    assert found["protocol"]["asked"]["given"].keys() == {"vae", "MAISI"}
    assert not [
        path for path in (tmp_path / "second").iterdir() if path.name in ("vae", "autoencoder", "calibration-0")
    ]
    metrics = {row["metric"] for row in found["generators"][0]["rows"]}
    assert {"fd", "copies", "condition_class"} <= metrics and any(name.startswith("gland_") for name in metrics)
    table = (tmp_path / "second" / "table.md").read_text()
    assert "| MAISI, fine-tuned |" in table and "| CCELLA |" in table
    page = (tmp_path / "second" / "report.html").read_text()
    assert "phantoms, not about patients" not in page and "This was not looked at" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "paper"}, "the preset paper needs --data"),
        ({"preset": "mini", "data": "studies"}, "the preset mini draws its own studies"),
        ({"preset": "mini", "init_from": {"LAST": "x"}}, "names LAST, which is not compared"),
        ({"preset": "mini", "init_from": {"MAISI": "x"}}, "does not exist; a checkpoint or run folder is needed"),
        ({"preset": "mini", "init_from": {"MAISI": "empty"}}, "an empty folder, not a checkpoint or run folder"),
        ({"preset": "mini", "vae": "x"}, "does not exist; an autoencoder is needed"),
        ({"preset": "mini", "vae": "empty"}, "an empty folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, monkeypatch, arguments: dict[str, Any], words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CcellaError, match=words):
        compare(tmp_path / "out", config=DEMO, **arguments)
    assert not (tmp_path / "out").exists()
