"""What a folder is, recognized by the files in it, so that a wrong one is named by what it is and the right one is offered."""

from __future__ import annotations

import json
import os
import re
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ccella_fast.errors import CcellaError, ConfigError, nearest

Wanted = Literal["checkpoint", "run", "prepared", "autoencoder", "studies", "export", "results", "volumes"]
Output = Literal[
    "studies", "prepared data", "an autoencoder", "a run", "samples", "an evaluation", "a downstream experiment",
    "a comparison",
]  # fmt: skip

_NAMES = {
    "prepared": "a prepared folder",
    "unprepared": "a prepared folder whose preparation is not complete",
    "autoencoder": "an autoencoder (VAE) folder",
    "unfinished autoencoder": "the folder of an autoencoder whose training is not complete",
    "run": "a run folder of train.py",
    "step": "a checkpoint",
    "snapshot": "a snapshot of averaged weights, of which `ccella-fast average` makes a model",
    "unsaved run": "a run folder of train.py without a checkpoint yet",
    "steps": "the folder of a run's checkpoints",
    "samples": "a folder of generated samples",
    "evaluation": "the folder of an evaluation",
    "classification": "the folder of a downstream experiment",
    "comparison": "the folder of a comparison",
    "results": "a folder of results",
    "deepspeed": "a DeepSpeed checkpoint without the files of ccella_fast",
    "diffusers": "a model of diffusers",
    "encoder": "a text encoder",
    "bundle": "a MONAI bundle",
    "bids": "a BIDS data set",
    "studies": "a folder of studies",
    "empty": "an empty folder",
}
# What is accepted -> the kinds that are, and what to give.
_WANTED: dict[Wanted, tuple[set[str], str]] = {
    "checkpoint": ({"run", "step"}, "give the --output_dir of train.py, a step folder in it, or a reference .pt file"),
    "run": ({"run"}, "give the --output_dir of train.py"),
    "prepared": ({"prepared"}, "give the folder that `ccella-fast prepare --out` wrote"),
    "autoencoder": (
        {"autoencoder", "prepared", "step"},
        "give the folder that `ccella-fast train-vae --out` wrote, or MAISI's .pt file",
    ),
    "studies": ({"studies", "bids"}, "give the folder that contains the folders of the studies"),
    "export": ({"studies", "bids"}, "give the folder that the PACS has written"),
    "results": ({"results"}, "give the folder that contains prepared/, vae/, model/ and samples/"),
    "volumes": (
        {"prepared", "samples", "studies", "bids"},
        "give a prepared folder, a folder of `ccella-fast sample`, or a folder of NIfTI files",
    ),
}
# What a command writes -> the kinds of an existing folder that it may continue.
_OUTPUTS: dict[Output, set[str]] = {
    "studies": {"studies"},
    "prepared data": {"prepared", "unprepared"},
    "an autoencoder": {"autoencoder", "unfinished autoencoder"},
    "a run": {"run", "unsaved run"},
    "samples": {"samples"},
    "an evaluation": {"evaluation"},
    "a downstream experiment": {"classification"},
    "a comparison": {"comparison"},
}
_FORMATS = {
    "ccella_fast.prepared": "prepared",
    "ccella_fast.checkpoint": "step",
    "ccella_fast.snapshot": "snapshot",
    "ccella_fast.autoencoder": "autoencoder",
}
_IMAGES = (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".dcm")
_SAMPLE = re.compile(r"sample-\d{3,}_seed\d+(_seq-\w+)?\.(json|nii\.gz)")  # not a study's folder that is named like one
_MOST = 200  # entries of a folder that are looked at


def folder_kind(folder: str | Path) -> str | None:
    """The kind of a folder, one of the keys of the table above; None for a file, a missing folder or an unknown one."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    names = {entry.name for entry in _entries(folder)}
    if (found := _FORMATS.get(str(_read(folder / "manifest.json").get("format")))) is not None:
        return found
    if "manifest.json" in names:  # damaged, or the reference's list of studies
        return None
    config = _read(folder / "config.json")
    written_by_evaluate = [_read(folder / name).get("format") for name in ("protocol.json", "sensitivity.json")]
    recognized = {
        "evaluation": "ccella_fast.evaluation" in written_by_evaluate,
        "classification": _read(folder / "settings.json").get("format") == "ccella_fast.classification",
        "comparison": "ccella_fast.comparison" in written_by_evaluate,
        "run": any(folder.glob("checkpoints/step-*")),
        "steps": any(folder.glob("step-*/manifest.json")),
        "unsaved run": "run_status.json" in names or "checkpoints" in names,
        "unprepared": "cases" in names and (folder / "cases").is_dir(),
        "unfinished autoencoder": "identity" in _read(folder / "training.json"),
        "samples": any(_SAMPLE.fullmatch(name) for name in names),
        "results": any(
            folder_kind(folder / name) in _NAMES for name in ("prepared", "vae", "model", "samples", "evaluation")
        ),
        "deepspeed": any(name.startswith(("global_step", "mp_rank_", "zero_pp_rank_")) for name in names),
        "diffusers": "model_index.json" in names or "_class_name" in config,
        "encoder": "model_type" in config or "tokenizer_config.json" in names,
        "bundle": (folder / "configs" / "metadata.json").is_file(),
        "bids": "dataset_description.json" in names,
        "studies": "studies.csv" in names or _holds_images(folder),
        "empty": not names,
    }
    return next((kind for kind, is_it in recognized.items() if is_it), None)


def check_folder(path: str | Path, wanted: Wanted, *, error: type[CcellaError], field: str | None = None) -> None:
    """Raise the error of `wrong_folder` if `path` is a folder of another kind. Anything unknown passes."""
    kind = folder_kind(path)
    if kind is not None and kind not in _WANTED[wanted][0]:
        raise wrong_folder(path, wanted, error=error, field=field)


def check_output(folder: str | Path, what: Output, *, field: str) -> None:
    """Raise ConfigError if `folder` holds something else than an earlier `what`.

    Anything unknown passes, and a folder whose folders hold the results of commands: those are not mixed.
    """
    kind = folder_kind(folder)
    if kind is not None and kind not in _OUTPUTS[what] | {"empty", "results"}:
        why = f"this is {_NAMES[kind]}; {what} would be mixed with its files"
        raise ConfigError(why, path=folder, field=field, fix="choose a folder of its own")


def wrong_folder(
    path: str | Path, wanted: Wanted, *, error: type[CcellaError], field: str | None = None
) -> CcellaError:
    """The error that says what `path` is and what to give in its place, by name if it is in or next to `path`.

    Of several folders next to `path` that would do, the one with the most similar name is offered, otherwise all are named.

    Args:
        path: the folder or file that was given.
        wanted: what is needed.
        error: class of the error.
        field: the option that was given.
    """
    path = Path(path)
    accepted, fix = _WANTED[wanted]
    kind = folder_kind(path)
    if kind in accepted and wanted == "checkpoint":
        why = "this is not a complete checkpoint"
    elif kind is not None:
        why = f"this is {_NAMES[kind]}, not {_article(wanted)}"
    elif not path.exists():
        why = f"this path does not exist; {_article(wanted)} is needed"
    else:
        why = f"this is not {_article(wanted)}"
    inside = [] if kind == "samples" else _entries(path)  # a sample's DICOM files look like a study
    around = [*inside, path.parent] if kind == "results" else [path.parent, *inside]
    around = [other for other in around if path.is_dir() and folder_kind(other) in accepted]
    siblings = [other for other in _entries(path.parent) if other != path and folder_kind(other) in accepted]
    similar = nearest(path.name, [other.name for other in siblings])
    offered = around[:1] or ([path.with_name(similar)] if similar else siblings)
    if kind == "unsaved run":
        fix = "wait for its first checkpoint (training.checkpointing_steps), or give another run"
    elif len(offered) == 1 and wanted != "export":  # nothing tells an export from other studies
        fix = f"give {offered[0]}"
    elif offered and wanted != "export":
        fix += f"; next to it: {', '.join(other.name for other in offered[:3])}" + ", ..." * (len(offered) > 3)
    if kind == "samples" and wanted in ("studies", "export"):
        fix += "; to prepare samples, copy each to FOLDER/CASE/, named by its sequence, and give samples.csv as `prepare --csv`"
    return error(why, path=path, field=field, fix=fix)


def _article(wanted: Wanted) -> str:
    names = {
        "checkpoint": "a checkpoint or run folder", "run": "a run folder", "prepared": "a prepared folder",
        "autoencoder": "an autoencoder (VAE) folder", "studies": "a folder of studies", "export": "a PACS export",
        "results": "a folder of results", "volumes": "a folder of volumes",
    }  # fmt: skip
    return names[wanted]


def _entries(folder: Path) -> list[Path]:
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return []
    return sorted(islice(folder.iterdir(), _MOST))


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _holds_images(folder: Path) -> bool:
    """Whether the folder or one of its folders contains an image; what a killed command has left does not count."""
    entries = [entry for entry in _entries(folder) if not entry.name.startswith(".")]
    files = [*entries, *(inner for entry in entries[:20] for inner in _entries(entry))]
    return any(file.name.lower().endswith(_IMAGES) for file in files)
