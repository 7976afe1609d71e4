"""The command: arms, files, resuming, refusals, and the page's commands."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ccella_fast import cli
from ccella_fast.downstream import classify as classify_module
from ccella_fast.downstream import train as train_module
from ccella_fast.downstream.classify import classify_to_folder
from ccella_fast.downstream.inputs import on_prepared_grid
from ccella_fast.downstream.results import make_table
from ccella_fast.errors import ConfigError, DataError
from ccella_fast.storage import read_json, write_json
from downstream_fixtures import add_latents, made_of, real_studies, write_classified
from study_fixtures import tree
from training_fixtures import environment, free_port

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "classify.md"
SMALL: dict[str, Any] = {"backbone": "small", "updates": 2, "batch_size": 4, "seeds": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Prepared folders: real studies with latents, two of one generator, one of another."""
    folder = tmp_path_factory.mktemp("place")
    train = real_studies()[:12]
    add_latents(write_classified(folder / "real", real_studies()), folder / "vae")
    for number, name in enumerate(("made0", "made1", "other"), start=1):
        write_classified(folder / name, made_of(train), seed=number)
    return folder


def everything(place: Path) -> dict[str, Any]:
    made = {"synthetic": [place / "made0", place / "made1"], "baseline": [place / "other"], "vae": place / "vae"}
    return {"real": place / "real", **made, **SMALL}


@pytest.fixture(scope="module")
def whole(place):
    """All arms with two seeds, and the initial weights of every network, by job."""
    weights, make_network = [], train_module.make_network

    def watched(backbone):
        network = make_network(backbone)
        weights.append(torch.cat([value.flatten() for value in network.state_dict().values()]))
        return network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "make_network", watched)
        content = classify_to_folder(out=place / "whole", **everything(place))
    return content, dict(zip([row["job"] for row in content["jobs"]], weights, strict=True))


def test_all_arms_are_trained_alike(place, whole):
    content, weights = whole
    jobs = {row["job"]: row for row in content["jobs"]}
    expected = {f"{arm}-seed{seed}" for arm in ("r", "rr", "v") for seed in (0, 1)}
    expected |= {f"{arm}-generator{g}-seed{s}" for arm in ("s", "sl", "rs", "rsl") for g in (0, 1) for s in (0, 1)}
    assert set(jobs) == expected | {"rb-generator0-seed0", "rb-generator0-seed1"}
    assert {row["updates"] for row in jobs.values()} == {2}
    for seed in (0, 1):
        same = [weights[job] for job in jobs if job.endswith(f"seed{seed}")]
        assert all(torch.equal(each, same[0]) for each in same)
    assert not torch.equal(weights["r-seed0"], weights["r-seed1"])
    both = {"neg": 6, "pos": 6}
    assert jobs["rs-generator1-seed0"]["n_train"] == [{"source": "real", **both}, {"source": "synthetic", **both}]
    assert jobs["v-seed0"]["n_train"] == [{"source": "reconstructed", **both}]
    for row in jobs.values():
        assert (row["val"]["n"], row["test"]["n"]) == (4, 8) and row["test"]["at_validation_threshold"] is not None


def test_predictions_are_of_the_held_out_real_studies_and_differ_between_arms(place, whole):
    names = [f"real{number}" for number in range(12, 24)]
    contents = set()
    for row in whole[0]["jobs"]:
        with open(place / "whole" / "predictions" / f"{row['job']}.csv", newline="") as file:
            found = list(csv.DictReader(file))
        assert [line["case"] for line in found] == names
        assert [line["split"] for line in found] == ["val"] * 4 + ["test"] * 8
        assert [int(line["label"]) for line in found] == [n % 2 for n in range(12, 24)]
        right = [(float(line["p_pos"]) >= 0.5) == int(line["label"]) for line in found[4:]]
        assert row["test"]["accuracy"] == sum(right) / 8
        contents.add(tuple(line["p_pos"] for line in found))
    # The labels asked for and predicted are equal here, and so are the classifiers of s and sl, rs and rsl.
    assert len(contents) == len(whole[0]["jobs"]) - 8


def test_contrasts_of_the_arms_are_reported_once_for_each_metric(whole):
    found = {(each["contrast"], each["metric"]): each for each in whole[0]["contrasts"]}
    assert len(found) == len(whole[0]["contrasts"]) == 3 * 14
    assert [name for name, each in found.items() if each["primary"]] == [("rs-rr", "accuracy")]
    main = found["rs-rr", "accuracy"]
    mean = {arm: sum(row["test"]["accuracy"] for row in rows) / len(rows) for arm in ("rs", "rr")
            if (rows := [row for row in whole[0]["jobs"] if row["arm"] == arm])}  # fmt: skip
    assert main["difference"] == pytest.approx(mean["rs"] - mean["rr"], abs=1e-6)
    assert main["ci95"][0] <= main["difference"] <= main["ci95"][1] and main["p_holm"] == main["p"]
    assert main["equivalence"]["margin"] == 0.05 and set(main["mcnemar"]) == {
        "only_first_right",
        "only_second_right",
        "p",
    }
    assert "one_generator" in found["rs-rb", "auc"]["guards"] and "equivalence" not in found["rs-rr", "auc"]
    table = make_table(whole[0])
    assert "| rs | real and synthetic, class as asked for | 12 + 12 | 4 |" in table and table.count("\n| rs-r |") == 3


def test_a_command_that_was_killed_continues_with_the_same_bytes(place, whole, monkeypatch):
    """Killed in the fifth training, and between the two files of a job."""
    train, calls = classify_module.train_classifier, []

    def killed(*arguments, **more):
        calls.append(more["name"].split()[0])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return train(*arguments, **more)

    monkeypatch.setattr(classify_module, "train_classifier", killed)
    out = place / "killed"
    with pytest.raises(KeyboardInterrupt):
        classify_to_folder(out=out, **everything(place))
    assert not (out / "classify.json").exists() and len(list((out / "jobs").iterdir())) == 4
    (out / "jobs" / f"{calls[1]}.json").unlink()
    classify_to_folder(out=out, **everything(place))
    assert len(calls) == 5 + len(whole[0]["jobs"]) - 3 and calls.count(calls[0]) == 1 and calls.count(calls[1]) == 2
    assert tree(out) == tree(place / "whole")
    classify_to_folder(out=out, **everything(place))
    assert len(calls) == 5 + len(whole[0]["jobs"]) - 3  # nothing was left to do


def test_an_arm_alone_has_the_predictions_that_it_has_among_others_and_arms_can_be_added(place, whole, monkeypatch):
    alone = {"real": place / "real", **SMALL, "seeds": 1, "arms": ["r"]}
    classify_to_folder(out=place / "alone", **alone)
    more = classify_to_folder(out=place / "alone", **alone | {"arms": ["rs", "r"], "synthetic": [place / "made0"]})
    assert [row["job"] for row in more["jobs"]] == ["rs-generator0-seed0", "r-seed0"]
    for name in ("r-seed0", "rs-generator0-seed0"):
        found, expected = (
            (place / folder / "predictions" / f"{name}.csv").read_bytes() for folder in ("alone", "whole")
        )
        assert found == expected


@pytest.mark.parametrize(
    ("change", "field"),
    [({"updates": 3}, "--updates"), ({"batch_size": 6}, "--batch_size"), ({"lr": 0.1}, "--lr"), ({"margin": 3.0}, "--margin"),
     ({"num_real": 8}, "--num_real"), ({"primary": ["rs-r"]}, "--primary"), ({"protocol": "reference"}, "--protocol")],
)  # fmt: skip
def test_another_setting_is_refused_by_name_in_the_same_folder(place, whole, change: dict[str, Any], field: str):
    before = tree(place / "whole")
    given = {**everything(place), **change}
    if "protocol" in change:
        given |= {"backbone": None, "updates": None, "batch_size": None}
    with pytest.raises(ConfigError) as caught:
        classify_to_folder(out=place / "whole", **given)
    assert caught.value.field == field and "choose another --out" in str(caught.value)
    assert tree(place / "whole") == before


def test_other_studies_are_refused_in_the_same_folder(place, whole):
    given = everything(place)
    with pytest.raises(DataError, match=" s-generator0-seed0 was trained with other studies than those of --synthetic"):
        classify_to_folder(out=place / "whole", **given | {"synthetic": [place / "made1", place / "made0"]})
    fewer = write_classified(place / "fewer", real_studies(test=6))
    with pytest.raises(ConfigError, match="other real studies"):
        classify_to_folder(out=place / "whole", **given | {"real": fewer, "vae": None, "arms": ["r"]})


def test_changed_predictions_are_noticed(place):
    given = {"real": place / "real", **SMALL, "seeds": 1, "arms": ["r"], "out": place / "changed"}
    classify_to_folder(**given)
    file = place / "changed" / "predictions" / "r-seed0.csv"
    file.write_text(file.read_text().replace("test", "val", 1))
    with pytest.raises(DataError, match="the predictions of r-seed0 are missing, or are not what was written"):
        classify_to_folder(**given)


WRONG = {
    "unknown arm": ({"arms": ["r", "rss"]}, ["--arms", "'rss'", "did you mean"]),
    "no generated studies": ({"arms": ["rs"], "synthetic": []}, ["the arm rs", "needs --synthetic"]),
    "no autoencoder": ({"arms": ["v"], "vae": None}, ["the arm v", "needs --vae"]),
    "no baseline": ({"arms": ["rb"], "baseline": []}, ["needs --baseline"]),
    "odd batch": ({"batch_size": 5}, ["--batch_size", "equal parts"]),
    "fixed setting": ({"protocol": "reference"}, ["--backbone", "fixed settings"]),
    "seeds": ({"seeds": 0}, ["--seeds", "at least 1"]),
    "margin": ({"margin": 0.0}, ["--margin", "above 0"]),
    "fraction": ({"validation_fraction": 1.0}, ["--validation_fraction", "below 1"]),
    "contrast": ({"primary": ["rs-q"]}, ["--primary", "'rs-q'"]),
    "small grid": ({"backbone": "efficientnet-b0"}, ["at least 32 voxels", "--backbone small"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_is_refused_before_anything_is_written(place, name: str):
    change, words = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        classify_to_folder(out=place / "refused", **everything(place) | change)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (place / "refused").exists()


def test_a_folder_twice_and_missing_predictions_are_refused(place):
    with pytest.raises(ConfigError, match="would count as two generators"):
        classify_to_folder(out=place / "refused", **everything(place) | {"synthetic": [place / "made0"] * 2})
    unlabelled = write_classified(place / "unlabelled", made_of(real_studies()[:12], class_predicted=None), seed=1)
    given = everything(place) | {"synthetic": [unlabelled], "seeds": 1}
    with pytest.raises(DataError, match="the arm sl needs the predicted class of every generated study"):
        classify_to_folder(out=place / "refused", **given, arms=["sl"])
    arms = {row["arm"] for row in classify_to_folder(out=place / "default", **given)["jobs"]}
    assert arms == {"r", "rr", "v", "s", "rs", "rb"}  # those for which everything is there


def test_the_folder_of_something_else_is_refused(place):
    with pytest.raises(ConfigError, match="a downstream experiment would be mixed with its files"):
        classify_to_folder(out=place / "vae", **everything(place))


def test_the_reference_protocol_runs_equal_epochs_of_the_union(place, monkeypatch):
    """With fewer epochs, smaller images and the small network, which no option can change."""
    from ccella_fast.downstream.networks import SmallClassifier

    monkeypatch.setattr(classify_module, "_EPOCHS", 2)
    monkeypatch.setattr(classify_module, "as_the_reference", on_prepared_grid)
    monkeypatch.setattr(train_module, "make_network", lambda backbone: SmallClassifier())
    given = {
        "real": place / "real",
        "synthetic": [place / "made0"],
        "seeds": 1,
        "device": "cpu",
        "protocol": "reference",
    }
    content = classify_to_folder(out=place / "reference", arms=["r", "rs"], **given)
    assert [(row["arm"], row["updates"]) for row in content["jobs"]] == [("r", 2), ("rs", 4)]
    settings = content["settings"]
    assert (settings["backbone"], settings["batch_size"], settings["lr"], settings["updates"]) == (
        "efficientnet-b0", 16, 1e-4, None
    )  # fmt: skip
    assert classify_module.REFERENCE_SHAPE == (256, 256, 32)


@pytest.mark.slow
def test_two_processes_share_the_classifiers_and_write_the_same_bytes(place, whole):
    words = ["classify", "--real", "real", "--synthetic", "made0", "made1", "--baseline", "other", "--vae", "vae"]
    words += [
        "--backbone",
        "small",
        "--updates",
        "2",
        "--batch_size",
        "4",
        "--seeds",
        "2",
        "--device",
        "cpu",
        "--out",
        "shared",
    ]
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port", free_port()]
    done = subprocess.run(
        [*launcher, "-m", "ccella_fast.cli", *words], cwd=place, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert tree(place / "shared") == tree(place / "whole")
    assert read_json(place / "shared" / "run_record.json")["processes"] == 2


def test_the_commands_of_the_page_run(place, tmp_path, monkeypatch, capsys):
    """With two updates and one seed in place of the page's, on the small network."""
    monkeypatch.chdir(tmp_path)
    for name, source in (("prepared", "real"), ("vae", "vae"), ("baseline_prepared", "other"),
                         ("synthetic_prepared", "made0"), ("synthetic1_prepared", "made1")):  # fmt: skip
        (tmp_path / name).symlink_to(place / source)
    text = PAGE.read_text().replace("\\\n", " ")
    commands = [
        shlex.split(line)[1:] for line in re.findall(r"^    (ccella-fast classify .*)", text, flags=re.MULTILINE)
    ]
    assert len(commands) >= 4
    monkeypatch.setattr(classify_module, "_EPOCHS", 1)
    monkeypatch.setattr(classify_module, "as_the_reference", on_prepared_grid)
    small, make_network = [], train_module.make_network
    monkeypatch.setattr(train_module, "make_network", lambda backbone: small.append(backbone) or make_network("small"))  # type: ignore[func-returns-value]
    for number, words in enumerate(commands):
        tiny = {"--seeds": "1", "--updates": "2", "--backbone": "small", "--batch_size": "4", "--num_real": "6"}
        for option, value in tiny.items():
            fixed = "reference" in words and option != "--seeds"
            if option in words:
                words[words.index(option) + 1] = value
            elif option != "--num_real" and not fixed:
                words += [option, value]
        words = [*words, "--device", "cpu"]
        assert cli.main(words) == 0, (number, capsys.readouterr().err)
        out = tmp_path / words[words.index("--out") + 1]
        names = {path.name for path in out.iterdir()}
        assert names == {"classify.json", "table.md", "settings.json", "jobs", "predictions", "run_record.json"}
        assert "| arm | trains on |" in capsys.readouterr().out
    assert set(small) == {"small", "efficientnet-b0"}  # the second by the protocol of the reference


def test_no_study_is_named_but_in_the_predictions(place, whole):
    """Ids may name patients."""
    for file in (path for path in (place / "whole").rglob("*") if path.is_file() and path.parent.name != "predictions"):
        assert not re.search(r"real\d", file.read_text()), file


def test_results_are_json_that_says_what_it_was_made_with(place, whole):
    content = json.loads((place / "whole" / "classify.json").read_text())
    assert content["settings"]["updates"] == 2 and "torch" in content["versions"]
    assert content["studies"]["real"]["test"] == {"neg": 4, "pos": 4}
    assert [each["name"] for each in content["studies"]["synthetic"]] == ["made0", "made1"]
    assert read_json(place / "whole" / "settings.json")["settings"] == content["settings"]
    broken = read_json(place / "whole" / "settings.json")
    write_json(place / "elsewhere.json", broken)  # a copy is what it was
    assert list(islice(broken, 2)) == ["format", "version"]
