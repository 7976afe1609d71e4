"""The errors that users see: what is printed, with which exit code, also when raised in another process."""

from __future__ import annotations

import pickle

import pytest

from ccella_fast import errors

EXIT_CODES = {
    "CcellaError": 1, "ConfigError": 2, "DataError": 3, "CheckpointError": 4, "DiskError": 5, "NonFiniteError": 6,
}  # fmt: skip


@pytest.mark.parametrize("name", EXIT_CODES)
def test_an_error_keeps_everything_across_processes(name: str):
    error = getattr(errors, name)("it broke", path="a/b.nii", field="x.y", fix="correct\nit")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(again) is type(error) and again.exit_code == EXIT_CODES[name] and again.args == ("it broke",)
    assert str(again) == "error: it broke\n  file:  a/b.nii\n  field: x.y\n  fix:   correct it"


def test_what_is_not_known_is_not_printed():
    assert str(errors.DataError("it broke")) == "error: it broke"
    assert str(errors.DataError("it broke", fix="wait")) == "error: it broke\n  fix:   wait"


def test_the_nearest_word_is_proposed():
    known = ["spacing", "Spline", "dim"]
    assert errors.did_you_mean("SPACNIG", known) == "did you mean 'spacing'?"
    assert errors.did_you_mean("spine", known) == "did you mean 'Spline'?"
    assert errors.did_you_mean("zebra", known) == "use one of: Spline, dim, spacing"


def test_a_name_of_any_length_makes_a_short_message():
    error = errors.ConfigError(f"unknown key '{'x' * 10**6}'", path="a.json", field="x" * 10**6, fix="remove it")
    lines = str(error).splitlines()
    assert len(lines) == 4 and max(map(len, lines)) < 1100
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301
