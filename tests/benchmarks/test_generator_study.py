"""The study of start weights, flow and guidance: its rules, its resumption, its page."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest

import generator_report
import generator_study as study
from ccella_fast.errors import ConfigError
from ccella_fast.storage import read_json


def record(
    distances: dict[str, list[float]], agreements: dict[str, list[float]], protocol: dict[str, Any] = study.FIRST
) -> dict[str, Any]:
    """A record with one distance and one agreement of each arm."""
    arms = []
    for arm in study.arms(protocol):
        place = protocol["training_seeds"].index(arm.seed)
        rows = [
            {"metric": "fd", "features": "taps-l3", "value": distances.get(arm.group, [100.0] * 3)[place]},
            {"metric": "condition_class", "features": "foci", "value": agreements.get(arm.group, [0.6] * 3)[place]},
        ]
        arms.append({"group": arm.group, "seed": arm.seed, "guidance": arm.guidance, "rows": rows})
    return {"protocol": protocol, "arms": arms}


SCRATCH = [100.0, 110.0, 90.0]


@pytest.mark.parametrize(
    ("factors", "start_weights", "flow"),
    [
        ((0.8, 0.82, 0.78), "yes", "yes"),
        ((1.05, 1.06, 1.055), "no", "yes"),  # within the margin of the flow
        ((1.3, 1.32, 1.28), "no", "no"),
        ((0.7, 1.0, 1.5), "undecided", "undecided"),
    ],
)
def test_a_distance_is_judged_by_the_interval_over_paired_seeds(factors, start_weights, flow):
    values = [factor * value for factor, value in zip(factors, SCRATCH, strict=True)]
    found = study.claims(record({"scratch": SCRATCH, "fine-tuned": values, "flow": values}, {}))
    assert (found["start_weights"]["verdict"], found["flow"]["verdict"]) == (start_weights, flow)
    claim = found["flow"]
    assert claim["by_seed"] == pytest.approx(factors)
    assert claim["value"] == pytest.approx(math.prod(factors) ** (1 / 3))
    # Student's interval of the logarithms, written out.
    logs = [math.log(factor) for factor in factors]
    mean = sum(logs) / 3
    half = 4.3027 * math.sqrt(sum((value - mean) ** 2 for value in logs) / 2 / 3)
    assert claim["interval"] == pytest.approx([math.exp(mean - half), math.exp(mean + half)], rel=1e-3)


@pytest.mark.parametrize(
    ("gains", "verdict"), [((0.1, 0.12, 0.11), "yes"), ((-0.1, 0.2, 0.1), "undecided"), ((-0.1, -0.11, -0.09), "no")]
)
def test_guidance_is_judged_by_its_gain(gains, verdict):
    base = [0.6, 0.7, 0.65]
    guided = [value + gain for value, gain in zip(base, gains, strict=True)]
    claim = study.claims(record({}, {"flow": base, "flow, guidance 2": guided}))["guidance"]
    assert claim["verdict"] == verdict and claim["by_seed"] == pytest.approx(gains)


def test_another_protocol_is_refused(tmp_path):
    study.keep_protocol(tmp_path / "protocol.json", study.FIRST)
    study.keep_protocol(tmp_path / "protocol.json", copy.deepcopy(study.FIRST))
    with pytest.raises(ConfigError, match="began with prompts"):
        study.keep_protocol(tmp_path / "protocol.json", study.FIRST | {"prompts": 1})
    assert read_json(tmp_path / "protocol.json") == study.FIRST


def test_studies_share_no_patient_and_no_seed():
    seeds = [seed for protocol in study.PROTOCOLS.values() for _, seed in protocol["pools"].values()]
    seeds += [seed for protocol in study.PROTOCOLS.values() for seed in protocol["training_seeds"]]
    assert len(set(seeds)) == len(seeds)
    for protocol in study.PROTOCOLS.values():
        if "guidance" in protocol["judged"]:
            assert protocol["judged"]["guidance"]["scale"] in protocol["guidance_scales"]


def test_a_study_of_start_weights_alone_trains_nothing_else(tmp_path, monkeypatch):
    commands: dict[str, list[object]] = {}

    class Recorder:
        out = tmp_path

        def run(self, several: dict[str, list[object]]) -> None:
            commands.update(several)

    monkeypatch.setattr(study, "write_prompts", lambda *_: None)
    study.generate(Recorder(), study.THIRD)
    assert not [name for name in commands if "flow" in name] and not (tmp_path / "flow.json").exists()
    tuned = [words for name, words in commands.items() if name.startswith("fine-tuned")]
    assert len(tuned) == 6 and all(words[words.index("--max_train_steps") + 1] == 1500 for words in tuned)
    start, scratch = commands["start-weights"], commands["scratch-21"]
    assert start[start.index("--max_train_steps") + 1] == 6000 and "--max_train_steps" not in scratch
    few = study.THIRD | {"training_seeds": [21, 22, 23]}
    near = record({"scratch": SCRATCH, "fine-tuned": [0.9 * value for value in SCRATCH]}, {}, few)
    assert {arm["group"] for arm in near["arms"]} == {"scratch", "fine-tuned"}
    claims = study.claims(near)
    assert list(claims) == ["start_weights"] and claims["start_weights"]["verdict"] == "yes"


def test_the_margin_of_start_weights_is_that_of_the_study():
    near = {"scratch": SCRATCH, "fine-tuned": [1.02 * value for value in SCRATCH]}
    found = record(near, {})
    assert study.claims(found)["start_weights"]["verdict"] == "no"  # above 1
    judged = study.FIRST["judged"] | {"start_weights": study.SECOND["judged"]["start_weights"]}
    found["protocol"] = study.FIRST | {"judged": judged}
    assert study.claims(found)["start_weights"]["verdict"] == "yes"  # within 1.05


def test_the_page_states_the_means_and_the_values_of_the_seeds():
    found = record({"scratch": SCRATCH, "fine-tuned": [80.0, 90.0, 70.0]}, {"flow": [0.6, 0.7, 0.65]})
    for arm in found["arms"]:
        for row in arm["rows"]:
            row |= {"floor": 50.0, "details": {"ceiling": 0.9}}
        arm["rows"] += [
            {"metric": name, "features": "foci", "value": None, "floor": 0.5, "details": {"ceiling": 0.8}}
            for name in ("condition_side", "condition_zone", "condition_level")
        ]
    found["claims"] = study.claims(found)
    read = {"class": {"score": "auc", "ceiling": 0.84, "value": 0.83}}
    found["autoencoder"] = {"psnr": 24.31, "read": read, "accuracy_ratio": 0.98, "gate_open": True}
    page = generator_report.page({"first": found})
    mean, (low, high) = (found["claims"]["start_weights"][name] for name in ("value", "interval"))
    assert f"| 0.800, 0.818, 0.778 | {mean:.3f} | {low:.3f} to {high:.3f} | at most 1 | yes |" in page
    assert "| scratch | 100.0 (100.0, 110.0, 90.0) | 0.60 (0.60, 0.60, 0.60) | - | - | - |" in page
    assert "| *real phantoms* | 50.0 | 0.90 | 0.80 | 0.80 | 0.80 |" in page
    assert "PSNR of 24.3 dB" in page and "so the gate is open" in page and "| class | auc | 0.84 | 0.83 |" in page
    assert generator_report.plot(found).startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_smoke_study_runs_to_the_end_and_continues(tmp_path, monkeypatch, capsys):
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "judge", stop)  # everything is generated and nothing is evaluated
        assert study.main(["--out", str(tmp_path), "--smoke"]) == 130
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("samples/*/*.nii.gz")}
    assert len(kept) == 4 * len(study.arms(study.FIRST | study.SMOKE))
    capsys.readouterr()
    assert study.main(["--out", str(tmp_path), "--smoke"]) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    found = read_json(tmp_path / "generator_study.json")
    assert {arm["group"] for arm in found["arms"]} == {
        "scratch", "fine-tuned", "flow", "flow, guidance 2", "flow, guidance 4",
    }  # fmt: skip
    assert found["claims"].keys() == {"start_weights", "flow", "guidance"}
    assert capsys.readouterr().out.count("evaluate-") == len(found["arms"])
    assert study.main(["--out", str(tmp_path), "--smoke"]) == 0
    assert "evaluate-" not in capsys.readouterr().out


def test_the_page_is_generated_from_the_records():
    found = {name: read_json(path) for name, path in generator_report.RECORDS.items() if path.exists()}
    assert "first" in found and generator_report.PAGE.read_text() == generator_report.page(found)
    for name, each in found.items():
        assert each["protocol"] == study.PROTOCOLS[name]
        for question, claim in study.claims(each).items():
            kept = each["claims"][question]
            # The first record's intervals were computed with a quantile of three decimals.
            assert claim.pop("interval") == pytest.approx(kept["interval"], abs=1e-4)
            assert claim == {name: value for name, value in kept.items() if name != "interval"}
