"""Report and class dropout: how often, which samples, what they get instead, and that nothing else of a run changes."""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ccella_fast.config import make_config
from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.text_encoder import TextEncoder
from ccella_fast.diffusion.objective import Objective
from ccella_fast.errors import ConfigError, DataError
from ccella_fast.losses import class_loss
from ccella_fast.sampling.request import Request
from ccella_fast.sampling.text_features import TextFeatureCache
from ccella_fast.sampling.trained_on import class_head_state
from ccella_fast.training.batches import BatchStream
from ccella_fast.training.condition_dropout import ConditionDropout
from ccella_fast.training.loop import joint_loss
from study_fixtures import config, times, write_bert, write_studies
from training_fixtures import CONFIG, losses, train_here, weights


def settings(**overrides):
    return make_config({key: value for key, value in CONFIG.items() if key != "name"} | overrides)


@pytest.fixture(scope="module")
def dataset(data):
    return PreparedDataset(data, settings())


def dropout_of(dataset, *, report=0.3, pirads=0.0, seed=3):
    return ConditionDropout(seed, report=report, pirads=pirads, null=dataset.null_report())


def stream_of(dataset, dropout, *, batch_size=1, accumulation=1, rank=0, world_size=1):
    return BatchStream(
        dataset, seed=3, batch_size=batch_size, accumulation=accumulation, rank=rank, world_size=world_size,
        scale=torch.ones(4), objective=Objective(), dropout=dropout,
    )  # fmt: skip


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_number_of_null_reports_is_binomial(dataset, p):
    count, dropout = 4000, dropout_of(dataset, report=p)
    dropped = sum(dropout.drops_report(position) for position in range(count))
    assert abs(dropped - count * p) < 4 * (count * p * (1 - p)) ** 0.5
    other = dropout_of(dataset, report=p, seed=4)
    same = sum(dropout.drops_report(position) == other.drops_report(position) for position in range(count))
    agree = p**2 + (1 - p) ** 2  # of independent draws
    assert abs(same - count * agree) < 4 * (count * agree * (1 - agree)) ** 0.5


def test_dropped_samples_have_the_null_report_and_nothing_else_changes(dataset):
    dropout, null = dropout_of(dataset, report=0.4), dataset.null_report()
    plain, found = (stream_of(dataset, each, batch_size=50).micro_batch(1, 0) for each in (None, dropout))
    dropped = torch.tensor([dropout.drops_report(position) for position in range(50, 100)])
    assert 0 < dropped.sum() < 50
    assert torch.equal(found.batch.text[dropped], null.expand(int(dropped.sum()), -1, -1))
    assert not torch.equal(plain.batch.text[dropped], found.batch.text[dropped])
    assert torch.equal(found.batch.text[~dropped], plain.batch.text[~dropped])
    assert torch.equal(found.batch.has_class, plain.batch.has_class & ~dropped)
    for name in ("latents", "noise", "timesteps"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    assert torch.equal(found.batch.pirads, plain.batch.pirads) and found.batch.ids == plain.batch.ids
    again = stream_of(dataset, dropout, batch_size=50).micro_batch(1, 0)  # the dataset itself is unchanged
    assert torch.equal(again.batch.text, found.batch.text) and torch.equal(dataset.null_report(), null)


def test_the_layout_of_processes_and_micro_steps_drops_the_same(dataset):
    whole = stream_of(dataset, dropout_of(dataset, report=0.5), batch_size=8).micro_batch(2, 0)
    parts = [
        stream_of(dataset, dropout_of(dataset, report=0.5), batch_size=2, accumulation=2, rank=rank, world_size=2)
        .micro_batch(2, micro)
        for micro in (0, 1)
        for rank in (0, 1)
    ]  # fmt: skip
    for number, expected in enumerate(whole.tensors()):
        assert torch.equal(torch.cat([list(part.tensors())[number] for part in parts]), expected), number


def test_the_class_loss_is_the_mean_over_samples_that_keep_their_report(dataset):
    """Also if they are spread unevenly over micro-batches: the mean over all of them is by hand."""
    dropout, count = dropout_of(dataset, report=0.5), 10
    logits = torch.linspace(-1, 2, 2 * count).view(count, 2)
    model = SimpleNamespace(variant=SimpleNamespace(text=True, class_input="predicted"))
    model.parameters = lambda: iter([torch.zeros(1)])

    def classes(samples, rows):
        outputs = lambda *_, **__: (samples.noise, logits[rows])  # noqa: E731
        network = type("Network", (), {"__call__": lambda self, *a, **k: outputs(), **vars(model)})()
        network.parameters = model.parameters
        return float(joint_loss(network, samples, Objective(), 1.0).classes)

    whole = stream_of(dataset, None, batch_size=count).micro_batch(0, 0)
    keeps = [bool(known) and not dropout.drops_report(k) for k, known in enumerate(whole.batch.has_class)]
    assert 1 < sum(keeps) < int(whole.batch.has_class.sum())
    each = [float(class_loss(logits[k : k + 1], whole.batch.pirads[k : k + 1], torch.ones(1))) for k in range(count)]
    expected = np.mean([value for value, kept in zip(each, keeps, strict=True) if kept])
    found = [
        classes(stream_of(dataset, dropout, accumulation=count).micro_batch(0, k), slice(k, k + 1))
        for k in range(count)
    ]
    assert np.mean(found) == pytest.approx(expected, rel=1e-5)
    assert [value != 0 for value in found] == keeps
    undropped = [value for value, known in zip(each, whole.batch.has_class, strict=True) if known]
    assert np.mean(found) != pytest.approx(np.mean(undropped), rel=1e-2)  # negative control


def fingerprint(run, step):
    files = sorted((run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return losses(run), [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_a_resumed_run_drops_the_same(tmp_path, data):
    training = {"report_dropout": 0.5, "max_train_steps": 4, "checkpointing_steps": 2}
    train_here(tmp_path / "run", data, **training)
    expected = fingerprint(tmp_path / "run", 4)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    train_here(tmp_path / "run", data, resume="latest", **training)
    assert fingerprint(tmp_path / "run", 4) == expected
    train_here(tmp_path / "plain", data, **training | {"report_dropout": 0.0})
    assert fingerprint(tmp_path / "plain", 4) != expected
    with pytest.raises(ConfigError, match="training.report_dropout is 0.4"):
        train_here(tmp_path / "run", data, resume="latest", **training | {"report_dropout": 0.4})


def rewritten(data, folder):
    """The same studies with other reports; that of the study without one stays."""
    copy = shutil.copytree(data, folder)
    manifest = json.loads((copy / "manifest.json").read_text())
    for case in manifest["cases"][:-1]:
        file = copy / case["files"]["text"]["path"]
        file.chmod(0o644)
        array = np.load(file)
        np.save(file, np.roll(array, 3) * 2)
        case["files"]["text"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_with_probability_1_the_model_never_sees_a_report(tmp_path, data):
    other = rewritten(data, tmp_path / "other")
    for name, p in (("always", 1.0), ("never", 0.0)):
        for folder in (data, other):
            train_here(
                tmp_path / name / folder.name, folder, report_dropout=p, max_train_steps=2, checkpointing_steps=2
            )
    same = {
        name: all(
            torch.equal(value, weights(tmp_path / name / "other", 2)[key])
            for key, value in weights(tmp_path / name / data.name, 2).items()
        )
        for name in ("always", "never")
    }
    assert same == {"always": True, "never": False}
    line = json.loads((tmp_path / "always" / "other" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss_class"] is None  # no class has been learned, and the checkpoint knows it
    trained_on = {"classes": [2, 2], "spacing": [[1, 1, 1], [1, 1, 1]]}
    assert class_head_state(settings(**{"training.report_dropout": 1.0}), trained_on) == "untrained"
    assert class_head_state(settings(**{"training.report_dropout": 0.9}), trained_on) == "trained"


def test_nothing_is_dropped_by_default(dataset, monkeypatch):
    monkeypatch.setattr(PreparedDataset, "null_report", None)  # not even looked for
    assert ConditionDropout.from_config(settings(), dataset) is None


# ---- the class ----


def test_report_and_class_are_dropped_together(dataset):
    """With equal probabilities they are, and never the class of a study that keeps its report."""
    for pirads, only_report in ((0.4, 0), (0.1, 1)):
        dropout = dropout_of(dataset, report=0.4, pirads=pirads)
        found = stream_of(dataset, dropout, batch_size=200).micro_batch(0, 0).batch
        plain = stream_of(dataset, None, batch_size=200).micro_batch(0, 0).batch
        without_report = torch.tensor([dropout.drops_report(position) for position in range(200)])
        without_class = (found.pirads != plain.pirads).any(1) | (
            (found.pirads == 0).all(1) & (plain.pirads == 0).all(1)
        )
        had_class = plain.pirads.any(1)
        assert not (without_class & had_class & ~without_report).any()
        assert bool((without_report & had_class & ~without_class).any()) == bool(only_report)
        assert (found.pirads[without_class] == 0).all()


@pytest.mark.parametrize("variant", ["RADMAISI", "DECOUPLED"])
def test_the_null_class_of_training_is_that_of_guidance(tmp_path, variant):
    from ccella_fast import FastSampler
    from sampling_fixtures import FakeEncoder, write_checkpoint

    dropout = {"training.class_dropout": 0.2}
    seen = {}
    for name, overrides in (("trained", dropout), ("not", {})):
        folder = write_checkpoint(tmp_path / name, variant, **overrides)
        sampler = FastSampler.from_checkpoint(folder, device="cpu", dtype="float32", text_encoder=FakeEncoder())
        reports = {"reports": ["abc"]} if variant == "DECOUPLED" else {}
        request = Request(**reports, pirads="pos", guidance_scale=2.0, num_inference_steps=2, decode=False)
        if name == "not" and variant == "RADMAISI":
            with pytest.raises(ConfigError, match="guidance needs a report, and RADMAISI does not take one"):
                sampler.check(request)
            continue
        rows = sampler.check(request).prompts.rows([0], guided=True, device=torch.device("cpu"))
        seen[name] = rows.pirads[list(rows.rows)].tolist()
        volumes = [sampler(**vars(request) | {"guidance_scale": scale}).latents for scale in (1.0, 2.0)]
        assert not torch.equal(*volumes)
    assert seen["trained"] == [[0.0, 100.0], [0.0, 0.0]]  # as `ConditionDropout.apply` leaves it
    assert seen.get("not", [[0.0, 100.0]] * 2) == [[0.0, 100.0]] * 2


# ---- where the null report comes from ----


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_bert(tmp_path_factory.mktemp("bert"))


def with_reports(folder):
    """Studies that all have a report."""
    studies = write_studies(folder)
    table = (studies / "studies.csv").read_text().splitlines()
    (studies / "studies.csv").write_text(
        "\n".join([*table[:-1], "case2,train,4,lesion of 6 mm in the left zone"]) + "\n"
    )
    return studies


def test_prepare_adds_the_null_report_that_sampling_uses_and_repeats_nothing(tmp_path, bert):
    plain = config(variant="CCELLA", encoder=bert)
    dropping = config(variant="CCELLA", encoder=bert, **{"training.report_dropout": 0.1})
    studies, out = with_reports(tmp_path / "studies"), tmp_path / "out"
    prepare(studies, out, plain)
    before, manifest = times(out), (out / "manifest.json").read_bytes()
    assert "null_text" not in json.loads(manifest)
    prepare(studies, out, dropping)
    added = {path for path in out.rglob("*") if path.is_file()} - {out / name for name in before}
    null = load_manifest(out).null_text
    assert {path for path in added if path.suffix == ".npy"} == {out / null.path}
    assert all(times(out)[name] == time for name, time in before.items() if name.endswith(".npy"))
    stored = np.load(out / null.path)
    encoder = TextEncoder(dropping.text)
    cache = TextFeatureCache(dropping, encoder, checks_length=True)
    sampled = cache.features_for(Request(reports=["lesion"], guidance_scale=2.0), guided=True)
    assert np.array_equal(stored, sampled.null[0].numpy())
    assert not np.array_equal(stored, sampled.features[0].numpy())
    after = times(out)
    for again in (dropping, plain):  # it stays, so that runs on this folder can be resumed
        prepare(studies, out, again)
        assert times(out) == after
    (out / null.path).write_bytes(b"damaged")
    prepared = load_manifest(out)
    with pytest.raises(DataError, match="size of this file"):
        prepared.open_entry(prepared.null_text, "null_text", verify=True)


def test_a_folder_without_the_null_report_is_refused_before_the_run_begins(tmp_path, data):
    folder = shutil.copytree(data, tmp_path / "prepared")
    manifest = json.loads((folder / "manifest.json").read_text())
    for case in manifest["cases"]:
        case["text_isnull"] = 0
    manifest["text"]["fingerprint"] = "0"
    manifest["text"] |= {"encoder": "test", "dtype": "float32"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="does not contain it: every study has a report") as caught:
        train_here(tmp_path / "run", folder, report_dropout=0.1)
    assert "ccella-fast prepare" in caught.value.fix and not list((tmp_path / "run").glob("*"))
    assert train_here(tmp_path / "run", folder, report_dropout=0.0, max_train_steps=1) == 0
