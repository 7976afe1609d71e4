"""The command that measures `speed_up` on a network, on a clock that the networks themselves set forward."""

from __future__ import annotations

import copy
import sys
import types

import pytest
import torch
from torch import nn

import dropin
import dropin_networks
import dropin_report
from ccella_fast.dropin import speed_up
from ccella_fast.storage import read_json

CPU = torch.device("cpu")


class Tiny(nn.Module):
    """A block whose call takes `cost` seconds of the clock of the test; its last convolution starts as zero."""

    clock = types.SimpleNamespace(now=0.0)

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.SiLU())
        self.last = nn.Conv3d(8, 2, 1)
        nn.init.zeros_(self.last.weight)
        self.cost, self.change = 1.0, lambda h: h

    def forward(self, x):
        Tiny.clock.now += self.cost
        return self.last(self.change(self.layers(x)))


def make():
    return Tiny(), (torch.randn(1, 2, 4, 4, 4),), {}


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs the command on `Tiny`: (exit code, its row, what was printed)."""
    rows = []
    judge = dropin.judge
    monkeypatch.setattr(dropin, "judge", lambda record: (judge(record), rows.append(record["networks"][-1])))
    monkeypatch.setattr(dropin, "time", types.SimpleNamespace(time=lambda: 0.0, process_time=lambda: Tiny.clock.now))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "my_project", types.SimpleNamespace(make_unet=make))

    def run(*, change=None, **settings):
        def changed(model, *, without=()):
            report = speed_up(model, without=without)
            for name, value in settings.items():
                setattr(model, name, value)
            if change:
                model.change = change
            return report

        monkeypatch.setattr(dropin, "speed_up", changed)
        code = dropin.main(["my_project:make_unet", "--seconds", "0"])
        return code, rows[-1], capsys.readouterr().out

    return run


def test_speed_up_of_a_known_block_is_right(command):
    code, row, printed = command()
    assert (code, row["status"], row["replaced"]) == (0, "ok", {"group_norm_silu": 1})
    assert row["equality"]["fp32"]["differences"].keys() == {"outputs", "gradients"}
    assert 0 < row["equality"]["bf16"]["errors"]["outputs"] <= 2
    assert {ratios["all"]["median"] for ratios in row["ratios"].values()} == {1.0}
    assert "replaced    1 `group_norm_silu`" in printed and "1 ok, 0 wrong, 0 slower" in printed


def scaled_gradient(h):
    return h.detach() + 1.001 * (h - h.detach())


@pytest.mark.parametrize(
    ("change", "precision"),
    [
        pytest.param(lambda h: h * (1 + 1e-4), "fp32", id="outputs"),
        pytest.param(scaled_gradient, "fp32", id="gradients-alone"),
        pytest.param(lambda h: h + (h.dtype == torch.bfloat16) * 0.1, "bf16", id="bf16-alone"),
        pytest.param(lambda h: h * float("nan"), "fp32", id="not-finite"),
        pytest.param(lambda h: h.missing, "the sped-up network", id="raises"),
    ],
)
def test_wrong_replacements_are_reported(command, change, precision):
    """Although the last convolution starts as zero, behind which no change of the outputs would be seen."""
    code, row, printed = command(change=change)
    assert (code, row["status"], row["ratios"]) == (1, "wrong", {})
    assert row["why"].startswith(precision) and "WRONG: my_project:make_unet" in printed


@pytest.mark.parametrize(("cost", "status"), [(0.5, "ok"), (1.02, "ok"), (1.1, "slower")])
def test_slower_networks_are_reported(command, cost, status):
    """By hand: the ratio is 1 / cost, that of the original to itself is 1, and 0.97 is the bar."""
    code, row, printed = command(cost=cost)
    assert (code, row["status"]) == (int(status == "slower"), status)
    assert {ratios["all"]["median"] for ratios in row["ratios"].values()} == {float(f"{1 / cost:.4g}")}
    assert ("SLOWER:" in printed) == (status == "slower")


def test_the_bar_is_relative_to_the_lowest_ratio_of_an_original_to_itself():
    def row(again, ours):
        return {"status": "ok", "ratios": {"fp32": {"again": {"median": again}, "all": {"median": ours}}}}

    record = {"networks": [row(0.9, 0.95), row(1.0, 0.88), row(1.0, 0.87)]}
    dropin.judge(record)
    assert record["lowest_again"] == 0.9 and [each["status"] for each in record["networks"]] == ["ok", "ok", "slower"]


@pytest.mark.parametrize(
    ("error", "status"), [(ImportError("No module named 'nets'"), "missing"), (ValueError("no such size"), "failed")]
)
def test_networks_that_cannot_be_built_are_named_with_the_reason(error, status):
    def broken():
        raise error

    row = dropin.measure(broken, CPU, 0)
    assert row["status"] == status and str(error) in row["why"]
    assert str(error) in dropin_report.describe({"project": "nets", "name": "UNet", **row})


@pytest.mark.parametrize(
    "arguments",
    [["my_project:make_unet", "--table"], [], ["no_such_module:make"], ["json:no_such_function"],
     ["--table", "--project", "no such project"]],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments, capsys):
    assert dropin.main(arguments) == 2
    assert "fix:" in capsys.readouterr().err


# The committed table


def test_the_page_is_generated_from_the_record():
    assert dropin_report.PAGE.read_text() == dropin_report.markdown(read_json(dropin_report.RECORD))


def test_the_record_has_all_networks_of_the_table_and_none_is_wrong():
    """Their statuses follow from the ratios."""
    record = read_json(dropin_report.RECORD)
    names = [(network.project, network.name) for network in dropin_networks.networks()]
    assert [(row["project"], row["name"]) for row in record["networks"]] == names
    assert {row["status"] for row in record["networks"]} <= {"ok", "slower"}
    judged = copy.deepcopy(record)
    dropin.judge(judged)
    assert judged == record
