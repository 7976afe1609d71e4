"""Sharing a model on the hub, with a client that keeps what is uploaded: the same model, a true card, and refusals in time."""

from __future__ import annotations

import inspect
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import CommitOperationAdd, ModelCard, metadata_load
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from ccella_fast import FastSampler, cli, load_checkpoint
from ccella_fast.checkpoint import export_reference, write_manifest
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.evaluation.folders import evaluate_to_folder
from ccella_fast.sampling import licenses
from ccella_fast.sampling.command import sample_to_folder
from ccella_fast.storage import read_json, sha256, write_json
from evaluation_fixtures import draw, write_prepared
from evaluation_page_fixtures import write_evaluation
from sampling_fixtures import FakeEncoder, write_checkpoint
from study_fixtures import write_bert

REPO, CANARIES = "my-group/prostate", ("zebedee-1971", "/home/quagga")
LICENSED = {"license": "cc-by-nc-4.0", "vae_license": "cc-by-nc-4.0"}
REQUEST = {"reports": ["abc"], "seeds": [3], "num_inference_steps": 3}


CLIENT = huggingface_hub.HfApi


class Hub:
    """Stands in for `HfApi`, and takes what that takes: keeps the files of repositories, and lists the calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.answers: dict[str, int] = {}  # name of a call -> HTTP status with which it fails

    def __call__(self, **options: object) -> Hub:
        inspect.signature(CLIENT).bind(**options)
        return self

    def called(self, name: str, *given: object, **options: object) -> None:
        self.calls.append(name)
        inspect.signature(getattr(CLIENT if hasattr(CLIENT, name) else ModelCard, name)).bind(None, *given, **options)
        if name in self.answers:
            answer: Any = SimpleNamespace(status_code=self.answers[name], headers={}, request=None)
            raise HfHubHTTPError("the hub says no", response=answer)

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        self.called("create_repo", repo_id, private=private, exist_ok=exist_ok)
        assert exist_ok
        self.files.setdefault(repo_id, {".gitattributes": b""})
        self.private.setdefault(repo_id, bool(private))
        return f"https://huggingface.co/{repo_id}"

    def model_info(self, repo_id: str) -> SimpleNamespace:
        self.called("model_info", repo_id)
        siblings = [SimpleNamespace(rfilename=name) for name in self.files[repo_id]]
        return SimpleNamespace(siblings=siblings, private=self.private[repo_id])

    def create_commit(self, repo_id: str, operations: list, *, commit_message: str) -> None:
        self.called("create_commit", repo_id, operations, commit_message=commit_message)
        for operation in operations:
            if isinstance(operation, CommitOperationAdd):
                self.files[repo_id][operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()
            else:
                del self.files[repo_id][operation.path_in_repo]

    def download(self, folder: Path, repo_id: str = REPO) -> Path:
        """What `snapshot_download` gets of a repository."""
        for name, content in self.files[repo_id].items():
            if name.endswith((".json", ".safetensors")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        return folder


@pytest.fixture
def hub(monkeypatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(ModelCard, "validate", lambda card: fake.called("validate"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    return fake


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a package whose name is that of an encoder: `package:tiny_report_encoder`."""
    folder = tmp_path_factory.mktemp("packages")
    write_bert(folder / "tiny_report_encoder" / "model", width=16)
    (folder / "tiny_report_encoder" / "__init__.py").touch()
    return folder


def trained(folder: Path, variant: str = "CCELLA", **overrides) -> Path:
    """A checkpoint with averages, the counts of its training, and what must not be shared."""
    given = {"text.encoder": "package:tiny_report_encoder", "text.dtype": "float32", "paths.model_dir": CANARIES[1]}
    given |= {"name": f"run of {CANARIES[1]}", "data.dataset": CANARIES[1]}
    write_checkpoint(folder, variant, **(given | overrides))
    average = {name: 0.5 * tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(average, folder / "ema.safetensors")
    state = read_json(folder / "training_state.json")
    seen = {"classes": [31, 11], "spacing": [[1.25, 1.5, 3.0], [1.5, 1.75, 3.0]]}
    seen["cases"] = [CANARIES[0]]
    write_json(folder / "training_state.json", {**state, "trained_on": seen, "note": CANARIES[0]})
    (folder / "manifest.json").unlink()
    write_manifest(folder, step=12)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run") / "step")


def sampler(path: Path, **options) -> FastSampler:
    return FastSampler.from_checkpoint(path, device="cpu", dtype="float32", text_encoder=FakeEncoder(), **options)


def loaded(path: Path) -> FastSampler:
    return FastSampler.from_pretrained(path, device="cpu", dtype="float32", text_encoder=FakeEncoder())


def push(checkpoint: Path, *options: object) -> int:
    return cli.main(["push", "--checkpoint", str(checkpoint), "--repo", REPO, *map(str, options)])


def stated(**more: object) -> list[object]:
    return [word for name, value in (LICENSED | more).items() for word in (f"--{name}", value)]


def evaluation_of(checkpoint: Path, folder: Path, **changes: object) -> Path:
    """An evaluation with known numbers, of samples of a checkpoint."""
    write_evaluation(folder)
    content = read_json(folder / "metrics.json")
    files = {"weights_sha256": "ema.safetensors", "vae_sha256": "vae/model.safetensors"}
    hashes = {name: sha256(checkpoint / file) for name, file in files.items()}
    generator = hashes | {"solver": "ddim", "num_inference_steps": 50} | changes
    write_json(folder / "metrics.json", {**content, "generator": generator})
    write_json(folder / "protocol.json", {**read_json(folder / "protocol.json"), "format": "ccella_fast.evaluation"})
    return folder


def card_of(text: str) -> tuple[dict, str]:
    """The metadata, read by the hub's own parser, and the text."""
    card = ModelCard(text)
    return card.data.to_dict(), card.text


# ---- the model ----


def test_the_uploaded_model_is_the_checkpoint(hub, checkpoint, tmp_path):
    assert push(checkpoint, *stated()) == 0
    assert hub.calls == ["validate", "create_repo", "model_info", "create_commit"]
    folder = hub.download(tmp_path / "download")
    assert {path.name for path in folder.rglob("*.safetensors")} == {"model.safetensors"}
    got, true = load_file(folder / "model.safetensors"), load_file(checkpoint / "ema.safetensors")
    assert got.keys() == true.keys() and all(torch.equal(got[name], true[name]) for name in true)
    raw = load_file(checkpoint / "model.safetensors")
    assert not any(torch.equal(got[name], raw[name]) for name in raw if raw[name].any())
    again, before = loaded(folder), sampler(checkpoint)
    theirs = before.autoencoder.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.autoencoder.state_dict().items())
    assert torch.equal(again(**REQUEST).volumes, before(**REQUEST).volumes)
    assert not torch.equal(again(**REQUEST).volumes, sampler(checkpoint, weights="raw")(**REQUEST).volumes)
    assert (again.scale_factor, again.intensity_scale) == (before.scale_factor, before.intensity_scale)
    assert again.origin.trained_on == before.origin.trained_on is not None and again.class_head == "trained"


def test_raw_weights_and_a_shared_folder_can_be_shared(hub, checkpoint, tmp_path):
    assert push(checkpoint, *stated(), "--weights", "raw") == 0
    folder = hub.download(tmp_path / "download")
    true = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(tensor, true[name]) for name, tensor in load_file(folder / "model.safetensors").items())
    first = dict(hub.files[REPO])
    assert push(folder, *stated()) == 0
    assert hub.files[REPO] == first and b"| Weights | not averaged" in first["README.md"]


def test_averages_stay_averages_when_they_are_shared_again(hub, checkpoint, tmp_path):
    assert push(checkpoint, *stated()) == 0
    first = dict(hub.files[REPO])
    assert push(hub.download(tmp_path / "download"), *stated()) == 0
    assert hub.files[REPO] == first and b"| Weights | moving average" in first["README.md"]


@pytest.mark.parametrize("variant", ["CCELLA", "DECOUPLED", "RADMAISI", "MAISI"])
def test_the_code_of_the_card_runs(hub, tmp_path, monkeypatch, variant, encoder):
    monkeypatch.syspath_prepend(encoder)
    monkeypatch.chdir(tmp_path)
    checkpoint = trained(tmp_path / "step", variant)
    assert push(checkpoint, *stated()) == 0
    download = lambda repo_id, allow_patterns: str(hub.download(tmp_path / "download", repo_id))  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    block = hub.files[REPO]["README.md"].decode().split("```python\n")[1].split("```")[0]
    assert f'from_pretrained("{REPO}")' in block
    names: dict = {}
    exec(compile(block, "<card>", "exec"), names)  # noqa: S102
    assert (
        names["result"].volumes.shape == (1, 1, 16, 12, 8) and (tmp_path / "samples/sample-000_seed0.nii.gz").is_file()
    )
    truth = FastSampler.from_checkpoint(checkpoint)
    arguments = ({"reports": ["PI-RADS 5 lesion, left"]} if variant in ("CCELLA", "DECOUPLED") else {}) | (
        {"pirads": "pos"} if variant in ("DECOUPLED", "RADMAISI") else {}
    )
    assert torch.equal(names["result"].volumes, truth(**arguments, seeds=[0]).volumes)


def test_no_path_and_no_entry_of_the_training_is_shared(hub, checkpoint):
    assert push(checkpoint, *stated()) == 0
    for canary, file in zip(CANARIES, ("training_state.json", "config.json"), strict=True):
        assert canary in (checkpoint / file).read_text()  # negative control
        assert not [name for name, content in hub.files[REPO].items() if canary.encode() in content]
    assert set(hub.files[REPO]) == {
        ".gitattributes", "README.md", "config.json", "manifest.json", "model.safetensors", "training_state.json",
        "vae/config.json", "vae/manifest.json", "vae/model.safetensors",
    }  # fmt: skip


# ---- the card ----


def parameters(file: Path) -> int:
    """The numbers in a safetensors file, by the sizes in its header."""
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    header = json.loads(file.read_bytes()[8 : 8 + length])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return max(ends) // 4


def test_the_card_states_the_facts_of_the_checkpoint(checkpoint, tmp_path):
    out = tmp_path / "shared"
    assert push(checkpoint, *stated(vae_license="Apache-2.0"), "--out", out) == 0
    data, text = card_of((out / "README.md").read_text())
    assert data == metadata_load(out / "README.md") == {
        "library_name": "ccella_fast", "pipeline_tag": "text-to-3d", "license": "other", "license_name": "one-for-each-file",
        "license_link": f"https://huggingface.co/{REPO}#licenses",
        "tags": ["ccella", "medical", "mri", "prostate", "3d", "latent-diffusion", "synthetic-data"],
    }  # fmt: skip
    for row in (
        "| Output | 16 x 12 x 8 voxels of 1.5 x 1.5 x 3 mm along R, A, S, of each sequence |",
        "| Latent | 4 channels, 8 x 6 x 4 voxels |", "| Weights | moving average, after 12 training steps |",
        "| Class head | trained on both classes |", "| Text encoder | package:tiny_report_encoder, 6 tokens |",
        f"| `model.safetensors` | diffusion model | {parameters(checkpoint / 'ema.safetensors'):,} | cc-by-nc-4.0 |",
        f"| `vae/model.safetensors` | autoencoder | {parameters(checkpoint / 'vae/model.safetensors'):,} | apache-2.0 |",
    ):  # fmt: skip
        assert f"{row}\n" in text, row
    assert "42 studies with a report and a PI-RADS class: 31 of PI-RADS 1 and 2, 11 of PI-RADS 3 to 5." in text
    assert "Voxels of 1.25 x 1.5 x 3 to 1.5 x 1.75 x 3 mm" in text and "Not for clinical use" in text
    assert "Started from" not in text
    assert "There is no evaluation" in text and "was not looked for" in text and licenses.NOT_STATED not in text


def test_the_card_names_the_weights_that_the_training_started_from(tmp_path):
    """Also that of a copy, which is written from the loaded model."""
    checkpoint, digest = write_checkpoint(tmp_path / "step"), "ab" * 32
    state = json.loads((checkpoint / "training_state.json").read_text())
    state["start_weights"] = {"sha256": digest, "skip": ["adapter", "class_heads"]}
    write_json(checkpoint / "training_state.json", state)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, step=state["step"])
    assert push(checkpoint, *stated(), "--out", tmp_path / "shared") == 0
    assert push(tmp_path / "shared", *stated(), "--out", tmp_path / "again") == 0
    for name in ("shared", "again"):
        text = (tmp_path / name / "README.md").read_text()
        assert (
            f"| Started from | weights with the SHA-256 {digest}, without adapter, class_heads, whose license" in text
        )


def test_what_a_checkpoint_does_not_say_is_said(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "step", "MAISI")
    out = tmp_path / "shared"
    assert push(checkpoint, "--out", out) == 0
    data, text = card_of((out / "README.md").read_text())
    assert "license" not in data and data["pipeline_tag"] == "unconditional-image-generation"
    assert text.count("**not stated**") == 2 and "does not say how many studies" in text
    assert "| Weights | the checkpoint does not say whether they are averages, after" in text
    assert push(checkpoint, "--license", "mit", "--out", tmp_path / "half") == 0
    half, table = card_of((tmp_path / "half" / "README.md").read_text())
    assert "license" not in half and table.count("**not stated**") == 1 and "| mit |" in table
    assert "Class head" not in text and "encoder," not in text and "| Inputs | the voxel size |" in text


def test_a_license_may_be_a_file(hub, checkpoint, tmp_path):
    own = tmp_path / "Our Terms (v2).txt"
    own.write_text("You may look at it.\n")
    assert push(checkpoint, *stated(license=own, vae_license=own)) == 0
    data, text = card_of(hub.files[REPO]["README.md"].decode())
    assert [data[name] for name in ("license", "license_name", "license_link")] == [
        "other",
        "our-terms-v2",
        "LICENSE.md",
    ]
    assert "[our-terms-v2](LICENSE.md)" in text and "[our-terms-v2](vae/LICENSE.md)" in text
    assert hub.files[REPO]["LICENSE.md"] == hub.files[REPO]["vae/LICENSE.md"] == own.read_bytes()
    hub.files[REPO]["montage.png"] = b"theirs"
    assert push(checkpoint, *stated()) == 0  # what the new model does not have is removed, and nothing else
    assert {"LICENSE.md", "vae/LICENSE.md"}.isdisjoint(hub.files[REPO]) and "montage.png" in hub.files[REPO]
    assert card_of(hub.files[REPO]["README.md"].decode())[0]["license"] == "cc-by-nc-4.0"


def test_the_card_has_the_numbers_of_the_evaluation(hub, checkpoint, tmp_path):
    folder = evaluation_of(checkpoint, tmp_path / "evaluation")
    assert push(checkpoint, *stated(evaluation=folder)) == 0
    data, text = card_of(hub.files[REPO]["README.md"].decode())
    rows = read_json(folder / "metrics.json")["rows"]
    ((entry,),) = [data["model-index"][0]["results"]]
    assert data["model-index"][0]["name"] == "prostate" and entry["dataset"]["name"] == "phantoms"
    assert [(metric["type"], metric["value"]) for metric in entry["metrics"]] == [
        (row["metric"], row["value"]) for row in rows
    ]
    assert entry["metrics"][0]["name"] == "fd, taps-l3, t2w, floor 150"
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    shown = {(cells[0], cells[1]): cells for cells in table if len(cells) == 11}
    for row in rows:
        cells = shown[row["metric"], row["features"] or ""]
        for place, name in ((3, "value"), (4, "value_equal_n"), (6, "floor"), (7, "ratio"), (8, "limit_autoencoder")):
            assert cells[place] == ("" if row[name] is None else f"{row[name]:.4g}"), (row["metric"], name)
        assert cells[9] == "32 + 24"
    assert "with 50 steps of ddim" in text and "**Is it good?** no: Generated volumes (n = 24) are 4.9 times" in text
    assert "**Is it new?** undecided" in text and "The evaluation above says whether" in text
    assert "* `n<d`: There are no more volumes than features" in text
    assert "samples" not in "".join(cell for cells in shown.values() for cell in cells)  # nor other names of folders
    assert "given no training volumes" in text and "not trained on" not in text
    write_json(folder / "protocol.json", {**read_json(folder / "protocol.json"), "standardised_by": "train"})
    assert push(checkpoint, *stated(evaluation=folder)) == 0
    text = card_of(hub.files[REPO]["README.md"].decode())[1]
    assert "No phantom is among the training volumes" in text and "weaker model" not in text
    evaluation_of(checkpoint, tmp_path / "auto", autoguidance={"step": 1})
    assert push(checkpoint, *stated(evaluation=tmp_path / "auto")) == 0
    text = card_of(hub.files[REPO]["README.md"].decode())[1]
    assert "50 steps of ddim, guided by a weaker model that is not part of this repository, compared" in text


def first_row(**changes):
    return lambda content: content["rows"][0].update(changes)


INJECTED = "fd |\n# Zebedee"
DAMAGE = {
    "a metric of two lines": first_row(metric=INJECTED), "a space of two lines": first_row(features=INJECTED),
    "a sequence of two lines": first_row(sequence=INJECTED), "a guard of two lines": first_row(guards=[INJECTED]),
    "nan": first_row(value=float("nan")), "infinity": first_row(floor=float("inf")), "a huge integer": first_row(value=10**400),
    "no limit": first_row(ci95=[float("nan"), 1.0]), "no end": first_row(ci95=[None, 1.0]), "n": first_row(n_real=-5),
    "a value of nothing": first_row(metric="copies", value=0.5, ci95=[0.1, 0.9], n_synthetic=0),
    "rows by name": lambda content: content.update(rows={}),
    "a digest of two lines": lambda content: content.update(protocol_sha256=INJECTED),
    "no steps": lambda content: content["generator"].pop("num_inference_steps"),
    "a solver of two lines": lambda content: content["generator"].update(solver=INJECTED),
    "another format": lambda content: content.update(schema=99),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_an_evaluation_that_was_edited_or_is_of_another_format_is_refused(hub, checkpoint, tmp_path, capsys, name):
    folder = evaluation_of(checkpoint, tmp_path / "evaluation")
    content = read_json(folder / "metrics.json")
    DAMAGE[name](content)
    (folder / "metrics.json").write_text(json.dumps(content))
    assert push(checkpoint, *stated(evaluation=folder)) == 3 and hub.calls == []
    said = capsys.readouterr().err
    assert str(folder / "metrics.json") in said and "Zebedee" not in said and len(said.splitlines()) <= 5
    assert ("format 99" in said) is (name == "another format")


def test_samples_are_evaluated_and_shared_with_their_model(hub, checkpoint, tmp_path, monkeypatch):
    """The whole way: whatever `sample` and `evaluate` write is what `push` accepts, for these weights alone."""
    from ccella_fast.evaluation.features import taps

    monkeypatch.setattr(taps, "is_installed", lambda: False)
    options = {"reports": ["abc", "d"], "num_samples": 2, "seed": 0, "text_encoder": FakeEncoder(), "device": "cpu"}
    sample_to_folder(checkpoint, tmp_path / "samples", dtype="float32", **options)
    real = write_prepared(tmp_path / "prepared", {f"case{k}": {"t2w": draw(k)} for k in range(4)})
    given = {"features": ["random"], "metrics": ["fd", "kid"], "draws": 4}
    result = evaluate_to_folder(real, tmp_path / "samples", tmp_path / "evaluation", **given)
    assert push(checkpoint, *stated(evaluation=tmp_path / "evaluation")) == 0
    metrics = card_of(hub.files[REPO]["README.md"].decode())[0]["model-index"][0]["results"][0]["metrics"]
    assert metrics[0] == {
        "type": "fd",
        "name": f"fd, random, t2w, floor {result['fd', 'random'].floor:.4g}",
        "value": pytest.approx(result["fd", "random"].value),
    }
    assert push(checkpoint, *stated(evaluation=tmp_path / "evaluation"), "--weights", "raw") == 2


# ---- refusals ----

REFUSED = {
    "no license": ([], ["--license, --vae_license", "the diffusion model and the autoencoder"]),
    "no license of the autoencoder": (["--license", "mit"], ["--vae_license", "weights of the autoencoder"]),
    "unknown license": (stated(license="cc-by-nc-40"), ["--license", "did you mean 'cc-by-nc-4.0'?", "give the file"]),
    "a license that permits nothing": (stated(vae_license="unknown"), ["--vae_license", "'unknown'"]),
    "no owner": ([*stated(), "--repo", "prostate"], ["--repo", "does not name the owner"]),
    "not a name": ([*stated(), "--repo", "my group/x"], ["--repo", "'my group/x'", "my-group/prostate-t2w"]),
    "not an evaluation": (stated(evaluation="{tmp}"), ["--evaluation", "not the folder of an evaluation"]),
    "evaluation of another model": (stated(evaluation="{other}"), ["--evaluation", "another diffusion model: 0000", "{sha}"]),
    "evaluation with another autoencoder": (stated(evaluation="{other_vae}"), ["another autoencoder: 1111"]),
    "evaluation of unknown volumes": (stated(evaluation="{unknown}"), ["does not say which diffusion model"]),
    "no checkpoint": ([*stated(), "--checkpoint", "{tmp}/none"], ["{tmp}/none", "does not exist"]),
    "a reference file": ([*stated(), "--checkpoint", "{pt}", "--vae", "{checkpoint}"], ["{pt}", "a checkpoint folder"]),
    "no autoencoder": ([*stated(), "--checkpoint", "{without}"], ["no autoencoder", "--vae"]),
    "encoder in a folder of Windows": ([*stated(), "--text_encoder", "C:\\t5"], ["text.encoder", "--text_encoder"]),
    "encoder of two lines": ([*stated(), "--text_encoder", "google/t5\n# x"], ["text.encoder", "--text_encoder"]),
    "encoder in a folder": ([*stated(), "--checkpoint", "{local}"], ["text.encoder", "--text_encoder", "/data/t5"]),
    "output exists": ([*stated(), "--out", "{tmp}"], ["--out", "already exists"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(checkpoint, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("places")
    sha = sha256(checkpoint / "ema.safetensors")[:12]
    export_reference(checkpoint, tmp_path / "CCELLA.pt")
    return {
        "tmp": tmp_path, "checkpoint": checkpoint, "pt": tmp_path / "CCELLA.pt", "sha": sha,
        "other": evaluation_of(checkpoint, tmp_path / "other", weights_sha256="0" * 64),
        "other_vae": evaluation_of(checkpoint, tmp_path / "other_vae", vae_sha256="1" * 64),
        "unknown": evaluation_of(checkpoint, tmp_path / "unknown", weights_sha256=None),
        "without": write_checkpoint(tmp_path / "without", with_vae=False),
        "local": trained(tmp_path / "local", **{"text.encoder": "/data/t5"}),
    }  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_named_before_the_hub_is_asked(hub, checkpoint, places, capsys, name):
    options, words = REFUSED[name]
    before = sorted(places["tmp"].rglob("*"))
    assert push(checkpoint, *(str(option).format(**places) for option in options)) in (2, 3, 4)
    said = capsys.readouterr().err
    assert [word for word in words if word.format(**places) not in said] == [] and len(said.splitlines()) <= 5
    assert hub.calls == [] and sorted(places["tmp"].rglob("*")) == before


def test_a_machine_without_the_hub_is_named_and_can_write_the_folder(hub, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert push(checkpoint, *stated()) == 2 and "hf auth login" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert push(checkpoint, *stated()) == 2 and "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert push(checkpoint, *stated(), "--out", tmp_path / "shared") == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "README.md", "config.json", "manifest.json", "model.safetensors", "training_state.json",
        "vae/config.json", "vae/manifest.json", "vae/model.safetensors",
    ]  # fmt: skip
    assert f"hf upload {REPO} {tmp_path}/shared" in said.err and hub.calls == []
    assert torch.equal(loaded(tmp_path / "shared")(**REQUEST).volumes, sampler(checkpoint)(**REQUEST).volumes)
    assert push(checkpoint, "--out", tmp_path / "unlicensed") == 0
    said = capsys.readouterr()
    assert "a license is not stated" in said.err and "hf upload" not in said.err


@pytest.mark.parametrize(
    ("call", "status", "words"),
    [
        ("validate", 400, "the hub says no"),
        ("create_repo", 401, "does not accept the token"),
        ("create_repo", 403, f"may not write to {REPO}"),
        ("create_commit", 503, "the hub says no"),
    ],
)
def test_answers_of_the_hub_are_explained(hub, checkpoint, capsys, call, status, words):
    hub.answers = {call: status}
    assert push(checkpoint, *stated()) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) <= 5
    assert hub.calls[-1] == call and not set(hub.files.get(REPO, {})) - {".gitattributes"}
    hub.answers = {}
    assert push(checkpoint, *stated()) == 0 and "model.safetensors" in hub.files[REPO]


def test_a_repository_of_something_else_or_for_everybody_is_left_alone(hub, checkpoint, capsys):
    hub.files[REPO], hub.private[REPO] = {"README.md": b"mine", "model.safetensors": b"theirs"}, False
    assert push(checkpoint, *stated()) == 2 and "holds another model" in capsys.readouterr().err
    assert hub.files[REPO] == {"README.md": b"mine", "model.safetensors": b"theirs"}
    hub.files.clear(), hub.private.clear()
    assert push(checkpoint, *stated()) == 0 and not hub.private[REPO]
    before = dict(hub.files[REPO])
    assert push(checkpoint, *stated(), "--private") == 2 and "exists and is public" in capsys.readouterr().err
    assert hub.files[REPO] == before
    hub.files.clear(), hub.private.clear()
    assert push(checkpoint, *stated(), "--private") == 0 and hub.private[REPO]


def test_from_python(hub, checkpoint):
    shared = sampler(checkpoint)
    assert shared.push_to_hub(REPO, **LICENSED, text_encoder="google/flan-t5-small") == f"https://huggingface.co/{REPO}"
    assert json.loads(hub.files[REPO]["config.json"])["text"]["encoder"] == "google/flan-t5-small"
    with pytest.raises(ConfigError, match="no license"):
        shared.push_to_hub(REPO)
    in_memory = FastSampler(load_checkpoint(checkpoint).model, shared.autoencoder, dtype="float32")
    with pytest.raises(CheckpointError, match="a checkpoint folder"):
        in_memory.push_to_hub(REPO, **LICENSED)
    assert hub.calls.count("create_commit") == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_evaluation_is_not_of_weights_that_were_rounded_or_changed(hub, checkpoint, tmp_path, dtype):
    folder = evaluation_of(checkpoint, tmp_path / "evaluation")
    shared = FastSampler.from_checkpoint(checkpoint, device="cpu", dtype=dtype, text_encoder=FakeEncoder())
    if dtype == "float32":
        shared.push_to_hub(REPO, **LICENSED, evaluation=folder)
        with torch.no_grad():
            list(shared.model.parameters())[-1][0] += 1e-3
    count = len(hub.calls)
    with pytest.raises(ConfigError, match="rounded or changed"):
        shared.push_to_hub(REPO, **LICENSED, evaluation=folder)
    assert len(hub.calls) == count
