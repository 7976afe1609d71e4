"""Tables of findings: what is read, what is refused, and that no text of a report is kept."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from ccella_fast.data.phantom.phantom import write_phantoms
from ccella_fast.errors import DataError
from ccella_fast.evaluation.conditions import condition_agreement
from ccella_fast.evaluation.findings import findings_agreement, read_findings, stated_volume_agreement

SECRET = "Jansen"


def write(path, rows, columns=("case", "side", "zone", "lesion_size_mm", "report")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def test_the_table_of_the_phantoms_is_read(tmp_path):
    write_phantoms(tmp_path, 6)
    findings = read_findings(tmp_path / "studies.csv")
    with open(tmp_path / "studies.csv", newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert set(findings.properties) == {"side", "zone", "level", "lesion_size_mm"}
    for name, cases in findings.properties.items():
        expected = {case: row[name] for case, row in rows.items() if row[name]}
        assert cases == (
            expected if name != "lesion_size_mm" else {case: float(size) for case, size in expected.items()}
        )
    assert findings.volumes_cc == {case: float(row["prostate_ml"]) for case, row in rows.items() if row["report"]}
    assert len(findings.volumes_cc) == 5  # one phantom has no report


def test_no_text_of_a_report_is_kept_or_shown(tmp_path):
    rows = [["a", "left", "PZ", 12, f"{SECRET}: prostate volume 40 cc."], ["b", "", "", "", f"{SECRET}, no volume."]]
    findings = read_findings(write(tmp_path / "t.csv", rows))
    assert findings.volumes_cc == {"a": 40} and SECRET not in repr(findings)
    for number, bad in enumerate(
        ([["a", "left", "PZ", SECRET, ""]], [*rows, ["a", "", "", "", SECRET]], [["a", SECRET]])
    ):
        with pytest.raises(DataError) as caught:
            read_findings(write(tmp_path / f"{number}.csv", bad))
        assert SECRET not in str(caught.value) and f"{number}.csv" in str(caught.value) and "line" in str(caught.value)
    with pytest.raises(DataError, match="no column 'case'"):
        read_findings(write(tmp_path / "n.csv", [["left"]], ["side"]))
    with pytest.raises(DataError, match="a case must be a name"):
        read_findings(write(tmp_path / "c.csv", [["", "left", "PZ", "", ""]]))
    for size in ("nan", "inf", "12 mm"):
        with pytest.raises(DataError, match="must be a number or empty"):
            read_findings(write(tmp_path / "s.csv", [["a", "", "", size, ""]]))


def test_agreement_of_findings_knows_whose_report_was_the_prompt(tmp_path):
    rng = np.random.default_rng(0)
    sides = rng.choice(["left", "right"], 60).tolist()
    sizes = rng.uniform(8, 20, 60).round(1).tolist()
    real = rng.standard_normal((60, 30))
    real[:, 0] += [2 if side == "left" else 0 for side in sides]
    real[:, 1] += sizes
    ids = [f"case-{row}" for row in range(60)]
    volumes = rng.uniform(20, 80, 60).round().tolist()
    rows = [
        [*row[:2], "", row[2], f"Prostate volume {row[3]:g} cc."]
        for row in zip(ids, sides, sizes, volumes, strict=True)
    ]
    findings = read_findings(write(tmp_path / "t.csv", rows))
    order = rng.permutation(60)
    prompts = [ids[row] for row in order]
    found = {each.name: each for each in findings_agreement(findings, real, ids, real[order], prompts)}
    assert set(found) == {"side", "lesion_size_mm"}
    for name, known in (("side", sides), ("lesion_size_mm", sizes)):
        asked = [known[row] for row in order]
        expected = condition_agreement(name, real, known, real[order], asked, prompted_by=order.tolist())
        assert found[name] == expected and expected.normalized == pytest.approx(1)
    unknown = findings_agreement(findings, real, ids, real[order], [None] * 60)
    assert all(each.value is None and each.n_synthetic == 0 for each in unknown)
    glands = [volume + 1 for volume in volumes]
    agreed = stated_volume_agreement(findings, ids, glands, [*prompts, None], [*(glands[row] for row in order), 30.0])
    assert agreed.agreement.value == pytest.approx(1) and agreed.bias_cc == pytest.approx(1)
    assert agreed.agreement.n_synthetic == 60 and agreed.agreement.n_real == 60
