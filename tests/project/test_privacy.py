"""A report, its tokens and a patient's name go through every command, and are found in nothing that the commands leave.

What is written is searched as bytes, unpacked where it is packed, in several encodings; what is drawn into a picture is
searched as the texts that matplotlib is given; what is said is every record of every logger, and tracebacks of --debug.
"""

from __future__ import annotations

import base64
import gzip
import json
import logging
import os
import struct
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from canary_fixtures import contents, spellings
from ccella_fast import cli
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import DataError
from ccella_fast.report.html import write_report
from ccella_fast.storage import write_json
from study_fixtures import config, write_bert, write_dicom, write_studies

WORD, NAME, STUDY = "kanarienvogel", "Quagga^Zebedee", "aardvark-1971"
REPORT = f"left zone lesion of 9 mm {WORD} 8 7 6 5"
SMALL = {
    "model__num_latents": 4, "model__adapter_blocks": 2, "model__adapter_heads": 2, "model__adapter_time_dim": 16,
    "model__class_head_dim": 8, "training__max_train_steps": 2, "training__batch_size": 2, "training__precision": "fp32",
    "training__checkpointing_steps": 1, "sampling__num_inference_steps": 2, "sampling__solver": "ddim",
    "sampling__batch_size": 1, "text__max_length": 16, "augmentation__noise": 0.01, "data__engine": "torch",
    "monitoring__validation_steps": 1, "monitoring__sample_steps": 2, "monitoring__samples": 1,
    "monitoring__sample_inference_steps": 2, "vae_training__max_train_steps": 2, "vae_training__patch": [16, 16, 16],
}  # fmt: skip


class Journey:
    """Everything that a run of all commands leaves: a folder, what was said, what was drawn."""

    def __init__(self, folder: Path, records: list[str], drawn: list[str]):
        self.folder, self.records, self.drawn = folder, records, drawn

    def where(self, *secrets: bytes, but: tuple[str, ...] = ()) -> list[str]:
        """The files below out/ that hold one of these, and "log" and "pictures"."""
        found = [
            name
            for name, content in contents(self.folder / "out")
            if any(secret in content for secret in secrets) and not name.startswith(but)
        ]
        said, drawn = ("\n".join(texts).encode() for texts in (self.records, self.drawn))
        found += ["log"] if any(secret in said for secret in secrets) else []
        return found + (["pictures"] if any(secret in drawn for secret in secrets) else [])


def tokens(encoder: Path, report: str) -> list[bytes]:
    """The report's token ids as they may be written: as text, and as numbers of 8, 4 and 2 bytes."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(encoder)(report)["input_ids"]
    assert len(ids) > 8
    texts = [separator.join(map(str, ids)).encode() for separator in (", ", ",", " ", ",\n    ")]
    return [*texts, *(struct.pack(f"<{len(ids)}{kind}", *ids) for kind in "qih")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Iterator[Journey]:
    """check, prepare (text, latents, augmented latents, previews), train-vae, train, sample, export, report, in one process."""
    from matplotlib.text import Text

    from ccella_fast.data.checking.check import check
    from ccella_fast.data.checking.findings import STOPPING
    from ccella_fast.sampling.command import sample_to_folder
    from ccella_fast.sampling.monai_bundle import export_monai_bundle
    from ccella_fast.sampling.preview import make_previews
    from ccella_fast.training.autoencoder.run import train_vae
    from ccella_fast.training.run import train

    folder, records, drawn = tmp_path_factory.mktemp("journey"), [], []
    studies, out = write_studies(folder / "studies"), folder / "out"
    write_dicom(studies / STUDY / "t2w", t0010_0010=NAME, t0010_0020=NAME)
    table = studies / "studies.csv"
    table.write_text(table.read_text().replace("lesion of 4 mm in the left zone", REPORT) + f"{STUDY},val,4,{REPORT}\n")
    settings = config(variant="CCELLA", encoder=encoder, **SMALL)
    write_json(folder / "config.json", settings.dump())

    handler = logging.Handler(0)
    handler.emit = lambda record: records.append(logging.Formatter("%(name)s %(message)s").format(record))  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in (None, "ccella_fast", "transformers", "DeepSpeed")]
    levels = [logger.level for logger in loggers]
    patch, environment = pytest.MonkeyPatch(), dict(os.environ)
    plain = Text.set_text
    patch.setattr(Text, "set_text", lambda self, text: drawn.append(str(text)) or plain(self, text))
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(1)
    try:
        check(studies, settings, out=out / "check" / "studies")
        prepare(studies, out / "prepared", settings)
        train_vae(out / "prepared", out / "vae", settings)
        prepare(studies, out / "prepared", settings, vae=out / "vae", augment=1, preview=True)
        observed = {"allow": STOPPING, "make_previews": make_previews}
        assert train(settings, data=out / "prepared", run=out / "model", **observed) == 0
        sample_to_folder(
            out / "model", out / "samples", reports=[REPORT, ""], num_samples=1, seed=0, guidance_scale=2.0
        )
        export_monai_bundle(out / "model", out / "bundle")
        write_report(out)
        check(out / "prepared", settings, out=out / "check" / "prepared")
        yield Journey(folder, records, drawn)
    finally:
        patch.undo()
        os.environ.clear()
        os.environ.update(environment)
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def test_the_journey_reached_every_stage(journey: Journey):
    """Else silence would say nothing."""
    out = journey.folder / "out"
    for pattern in ("prepared/text/*.npy", "prepared/latents/*/augmented1*", "prepared/preview/*.png", "vae/*.safetensors",
                    "samples/*.nii.gz", "samples/montage.png", "bundle/models/model.pt",
                    "check/*/check.html", "report.html", "model/**/*.safetensors",
                    "model/previews/*.png"):  # fmt: skip
        assert list(out.glob(pattern)), pattern
    texts = {
        case["files"]["text"]["path"] for case in json.loads((out / "prepared/manifest.json").read_text())["cases"]
    }
    assert len(texts) == 3 and any("seed 0" in text for text in journey.drawn) and len(journey.records) > 10


@pytest.mark.parametrize("text", [REPORT, WORD])
def test_report_text_is_nowhere(journey: Journey, text: str):
    assert not journey.where(*spellings(text))


def test_token_ids_are_nowhere(journey: Journey, encoder: Path):
    assert not journey.where(*tokens(encoder, REPORT))


def test_patient_names_are_nowhere(journey: Journey):
    assert not journey.where(*spellings(NAME), *spellings("Zebedee"))


def test_study_ids_leave_the_prepared_folder_in_no_page_picture_or_checkpoint(journey: Journey):
    """They name files and records of the prepared folder, the autoencoder's reconstructions, and findings."""
    allowed = ("prepared/", "vae/reconstructions/", "check/")
    assert set(journey.where(*spellings(STUDY), but=allowed)) <= {"log"}
    prepared = [name for name, content in contents(journey.folder / "out") if STUDY.encode() in content]
    assert any(name.startswith("prepared/cases/") for name in prepared)


def test_the_search_finds_what_is_there(journey: Journey, encoder: Path, tmp_path: Path):
    """Negative control: each kind of secret in each kind of hiding place."""
    for number, secret in enumerate([*spellings(REPORT), *tokens(encoder, REPORT)]):
        (tmp_path / "out" / str(number)).mkdir(parents=True)
        (tmp_path / "out" / str(number) / "a.bin").write_bytes(b"\0\1" + secret + b"\2")
        (tmp_path / "out" / str(number) / "a.gz").write_bytes(gzip.compress(b"before" + secret))
        found = Journey(tmp_path, [], []).where(secret)
        assert {f"{number}/a.bin", f"{number}/a.gz"} <= set(found)
    assert base64.b64encode(b"ab" + REPORT.encode()).find(spellings(REPORT)[-1]) > 0
    assert Journey(tmp_path / "none", [REPORT], [WORD]).where(*spellings(WORD)) == ["log", "pictures"]


class BrokenError(Exception):
    pass


def test_errors_and_tracebacks_of_every_stage_that_reads_text(
    journey: Journey, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """A row that cannot be used, features of another size, and an encoder that fails in the middle, with --debug."""
    from ccella_fast.data.text_encoder import TextEncoder

    studies, said = write_studies(tmp_path / "studies"), []
    table = studies / "studies.csv"
    sound = table.read_text().replace("lesion of 4 mm in the left zone", REPORT)
    settings = config(variant="CCELLA", encoder=encoder, **SMALL)
    write_json(tmp_path / "config.json", settings.dump())
    for old, new in [
        ("train,2", "train,8"),
        ("train,2", f"train,{REPORT}"),
        ("train,2,", "elsewhere,2,"),
        (",train", ",train,,,"),
    ]:
        table.write_text(sound.replace(old, new, 1))
        with pytest.raises(DataError) as caught:
            prepare(studies, tmp_path / "out", settings)
        said += traceback.format_exception(caught.value)
    table.write_text(sound)

    quoted = [REPORT]  # by a library, in its message, which only --debug shows

    def fails(self: TextEncoder, reports: list[str]) -> None:
        raise BrokenError(*quoted)

    prepares = ["prepare", "--data", studies, "--out", tmp_path / "out", "--config", tmp_path / "config.json"]
    samples = [
        "sample",
        "--checkpoint",
        journey.folder / "out/model",
        "--out",
        tmp_path / "samples",
        "--report",
        REPORT,
    ]
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", fails)
        for given in (prepares, samples):
            quoted[:] = [REPORT]
            assert cli.main([*map(str, given)]) != 0
            quoted.clear()
            with pytest.raises(BrokenError) as broken:  # --debug leaves it to Python, which shows the traceback
                cli.main([*map(str, given), "--debug"])
            said += traceback.format_exception(broken.value)
    assert cli.main([*map(str, samples), "--solver", "none"]) != 0
    captured = capfd.readouterr()
    assert "internal: BrokenError" in captured.err and "none" in captured.err  # all were reached
    for secret in spellings(WORD):
        assert secret not in "\n".join([*said, captured.out, captured.err]).encode()
