"""What is written before anything is trained, and what is decided on real studies alone."""

from __future__ import annotations

import pytest

from ccella_fast.comparison import protocol
from ccella_fast.comparison.gates import choose_size, choose_space, is_too_easy
from ccella_fast.errors import ConfigError
from ccella_fast.storage import read_json
from ccella_fast.variants import VARIANTS


def test_presets_differ_in_what_they_say_and_share_the_rest():
    smoke, mini, table, paper = (protocol.asked_for(name) for name in protocol.PRESETS)
    assert smoke.keys() == mini.keys() == table.keys() == paper.keys()
    assert mini["variants"] == ["CCELLA", "MAISI"] and table["variants"] == list(VARIANTS)
    assert {name for name in mini if mini[name] != table[name]} == {"variants"}
    assert paper["phantom"] is None and paper["classifier"]["protocol"] == "reference"
    pools = [mini["phantom"][name]["seed"] for name in ("real", "calibration", "autoencoder")]
    assert len(set(pools)) == 3  # pools share no patient
    assert protocol.asked_for("mini", variants=["LAST", "MAISI"], seeds=2)["training_seeds"] == [1, 2]
    assert protocol.PRESETS["mini"]["training_seeds"] == [1, 2, 3, 4]  # not changed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "minni"}, "did you mean 'mini'"),
        ({"preset": "mini", "variants": ["CCELA", "MAISI"]}, "did you mean 'CCELLA'"),
        ({"preset": "mini", "variants": ["MAISI", "MAISI"]}, "needs two variants"),
        ({"preset": "mini", "seeds": 1}, "must be at least 2, got 1"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        protocol.asked_for(**arguments)


def test_a_folder_keeps_its_protocol_and_refuses_another(tmp_path):
    asked = protocol.asked_for("smoke")
    first = protocol.keep(tmp_path, asked)
    assert first["decided"] is None and protocol.keep(tmp_path, asked) == first
    with pytest.raises(ConfigError, match=r"began with sizes = \[10\], now it is \[12\]") as caught:
        protocol.keep(tmp_path, asked | {"sizes": [12]})
    assert caught.value.field == "sizes" and len(str(caught.value).splitlines()) <= 5
    frozen = protocol.freeze(tmp_path, first, {"size": 10})
    assert protocol.keep(tmp_path, asked) == frozen == read_json(tmp_path / "protocol.json")
    assert frozen["decided"] == {"size": 10} and protocol.digest(frozen) != protocol.digest(first)


@pytest.mark.parametrize(
    ("accuracies", "size", "too_easy"),
    [
        ({24: 0.58, 40: 0.66, 64: 0.71, 96: 0.83}, 40, False),  # the smallest inside of 0.65 to 0.80
        ({24: 0.80, 40: 0.90}, 24, False),  # the bounds belong to it
        ({24: 0.81, 40: 0.90}, 24, True),  # none: the nearest to 0.72
        ({24: 0.51, 40: 0.60}, 40, False),
        ({24: 0.62, 40: 0.82}, 24, False),  # as near: the smaller number
    ],
)
def test_the_number_of_training_studies(accuracies, size, too_easy):
    assert choose_size(accuracies, [0.65, 0.80], 0.72) == size
    assert is_too_easy(accuracies, [0.65, 0.80]) == too_easy


def test_the_space_that_judges_has_passed_the_gate():
    gates = [
        {"space": "taps-l3", "passed": False},
        {"space": "random", "passed": True},
        {"space": "radiomics", "passed": True},
    ]
    assert choose_space(gates, ["taps-l3", "radiomics", "random"]) == "radiomics"
    assert choose_space(gates, ["taps-l3", "taps-l4"]) is None
    assert choose_space(gates[:1], ["taps-l3"]) is None
