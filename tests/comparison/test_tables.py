"""The tables of a comparison, from a made-up record whose numbers are computed by hand."""

from __future__ import annotations

from typing import Any

from ccella_fast.comparison import results, tables
from comparison_fixtures import CONTRASTS, record, row


def lines(table: Any) -> dict[str, dict[str, str]]:
    """The rows by their names."""
    return {line[0]: dict(zip(table.columns, line, strict=True)) for line in table.rows}


def made(**more: Any) -> dict[str, Any]:
    """A record with these further rows of each generator, by variant; those of the seeds in order."""
    found = record([10.0, 12.0], [20.0, 22.0], CONTRASTS)
    for generator in found["generators"]:
        generator["rows"] += more[generator["variant"]][generator["seed"] - 1]
    return found


def test_the_table_has_the_floor_the_limit_and_the_variants():
    found = record([10.0, 12.0], [20.0, 22.0], CONTRASTS)
    found["statements"] = [each._asdict() for each in results.statements(found)]
    written = tables.variants_table(found)
    rows = {line[0]: dict(zip(tables.COLUMNS, line, strict=True)) for line in written}
    assert (rows["real against real"]["FD"], rows["real against real"]["class AUC"]) == ("2", "0.9")
    assert rows["real against real"]["accuracy of rs"] == "0.71 ± 0.014"
    assert rows["autoencoder alone"]["FD"] == "3" and rows["autoencoder alone"]["accuracy of rs"] == "–"
    assert rows["CCELLA"]["FD"] == "11 ± 1.4" and rows["CCELLA"]["KID"] == "0.11 ± 0.014"
    assert rows["CCELLA"]["class AUC"] == "0.61 ± 0.014"  # by the features that read it best from real volumes
    assert rows["CCELLA"]["accuracy of rs"] == "0.75 ± 0.014" and rows["MAISI"]["accuracy of rs"] == "0.71"
    assert rows["CCELLA"]["coverage"] == "–"  # was not computed
    assert (rows["CCELLA"]["report"], rows["MAISI"]["report"], rows["CCELLA"]["head"]) == ("yes", "no", "cascade")
    assert (rows["CCELLA"]["parameters"], rows["MAISI"]["parameters"]) == ("2.48 M", "1.84 M")
    assert (rows["CCELLA"]["training, s"], rows["CCELLA"]["synthesis, s"]) == ("1,650", "10")
    page = tables.markdown(found, written)
    assert "| CCELLA | yes | predicted | cascade | 0.11 ± 0.014 | 11 ± 1.4 |" in page and "0.071" in page
    assert "on other data" in page and found["protocol_sha256"] in page
    code = tables.latex(written)
    assert r"11 $\pm$ 1.4" in code and "±" not in code
    assert {line.count("&") for line in code.splitlines() if line.endswith(r"\\")} == {len(tables.COLUMNS) - 1}


def test_a_variant_that_starts_from_given_weights_is_called_fine_tuned():
    found = record([10.0, 12.0], [20.0, 22.0], CONTRASTS)
    found["protocol"]["asked"]["given"] = {"vae": "0" * 64, "MAISI": "1" * 64}
    assert [line[0] for line in tables.variants_table(found)[2:]] == ["CCELLA", "MAISI, fine-tuned"]
    assert "MAISI, fine-tuned" in lines(tables.distances_table(found))


def test_distances_are_shown_in_every_space():
    found = record([10.0, 12.0], [20.0, 22.0], CONTRASTS)
    table = tables.distances_table(found)
    assert table.columns == ["variant", "FD, taps-l3", "FD, radiomics", "KID, taps-l3"] and table.references == 2
    assert lines(table)["MAISI"] == {
        "variant": "MAISI", "FD, taps-l3": "21 ± 1.4", "FD, radiomics": "99 ± 0", "KID, taps-l3": "0.21 ± 0.014",
    }  # fmt: skip
    found["protocol"]["decided"]["passed"] = {"taps-l3": True, "radiomics": False}
    assert tables.distances_table(found).columns[1:3] == ["FD, taps-l3", "FD, radiomics (fails the gate)"]


def test_slices_have_their_numbers_and_gland_volumes_their_differences():
    counts = {"slices_real": 640, "slices_synthetic": 320}
    more = [row("fd_slices", "radimagenet-axial", 4.0, **counts), row("fd_slices", "radimagenet", 5.0)]
    volume = [row("condition_gland_volume", None, 0.5, floor=0.01, ceiling=0.8, bias_cc=-3.0, real_bias_cc=-1.0)]
    found = made(CCELLA=[more + volume] * 2, MAISI=[more + volume, more])
    slices = tables.slices_table(found)
    assert slices.columns[1:] == ["radimagenet-axial (640 real, 320 generated slices)", "radimagenet"]
    glands = lines(tables.gland_volumes_table(found))
    assert glands["real volumes"]["rank correlation"] == "0.8"
    assert glands["real volumes"]["segmented minus stated, cc"] == "-1"
    assert glands["CCELLA"]["segmented minus stated, cc"] == "-3 ± 0"
    assert glands["MAISI"]["rank correlation"] == "–"  # not of all seeds


def test_the_effect_of_the_class_is_that_of_the_generators_that_made_pairs():
    effect = [row("counterfactual_class", "random", 0.1, moved=0.5, ci95=[0.0, 0.2]),
              row("counterfactual_class", "foci", 0.62, moved=0.75, ci95=[0.5, 0.7])]  # fmt: skip
    table = tables.class_changes_table(made(CCELLA=[effect, []], MAISI=[[], []]))
    assert table.rows == [["CCELLA, seed 1", "0.62", "0.5 to 0.7", "75 %", "20", "foci"]]


def test_what_was_not_measured_has_no_table():
    found = record([10.0, 12.0], [20.0, 22.0], CONTRASTS)
    for make in (tables.slices_table, tables.glands_table, tables.images_table, tables.gland_volumes_table,
                 tables.class_changes_table):  # fmt: skip
        assert not make(found).rows
    copies = tables.copies_table(found)
    assert copies.columns == ["variant", "copies"] and lines(copies)["expected"]["copies"] == "0"
