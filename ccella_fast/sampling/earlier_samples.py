"""Compares the samples in a folder with a request before anything is loaded; `OutputWriter.missing` decides later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ccella_fast.errors import CcellaError, ConfigError
from ccella_fast.sampling.output import Format, report_digest, sample_name
from ccella_fast.sampling.plan import RequestPlan
from ccella_fast.sampling.request import Request
from ccella_fast.storage import read_json


def check_earlier_samples(
    out: Path,
    request: Request,
    plan: RequestPlan,
    weights: dict[str, Any],
    weak_weights: dict[str, Any] | None,
    format: Format,
) -> None:
    """Check that the sidecars in a folder are those of this request, as far as that is known without the weights.

    Args:
        out: the folder, which need not exist.
        request: the request.
        plan: its plan.
        weights: sidecar entries about the checkpoint.
        weak_weights: those about the weak model of autoguidance; None without one.
        format: the format in which the volumes are to be written.

    Raises:
        ConfigError: the folder contains samples of another request; the message names the first difference.
    """
    shared = weights | plan.request_metadata(request)
    volumes = plan.volumes
    numbers = {sample_name(k, seed): k for k, seed in enumerate(volumes.seeds)}
    for path in sorted(out.glob("sample-*.json")):
        if path.stem not in numbers:
            raise _another_request(path, "it has other seeds or fewer volumes")
        k, sidecar = numbers[path.stem], _read(path)
        for name, value in (shared | volumes.metadata(k)).items():
            if name in sidecar and sidecar[name] != value:
                raise _another_request(path, f"{name} was {sidecar[name]!r:.70}, now {value!r:.70}")
        if sidecar:
            _check_weak_weights(path, sidecar.get("autoguidance"), weak_weights)
        earlier = _format(sidecar)
        if earlier not in (None, format):
            raise _another_request(path, f"format was {earlier!r}, now {format!r}")
        if request.reports is not None and volumes.reports is not None and "report_sha256" in sidecar:
            report = request.reports[volumes.reports[k]]
            text = report if report.strip() else ""
            if sidecar["report_sha256"] != report_digest(text, sidecar.get("weights_sha256")):
                raise _another_request(path, "it had another report")


def _another_request(path: Path, difference: str) -> ConfigError:
    why = f"this folder contains samples of another request: {difference}"
    return ConfigError(why, path=path, fix="choose another --out, or add --overwrite, which deletes them")


def _check_weak_weights(path: Path, earlier: Any, now: dict[str, Any] | None) -> None:
    """Raise ConfigError if the samples were made with another weak model, or if only one of both requests has one."""
    if (earlier is None) != (now is None):
        raise _another_request(path, f"it was made {'with' if now is None else 'without'} --autoguidance")
    if isinstance(earlier, dict):
        for name, value in (now or {}).items():
            if name in earlier and earlier[name] != value:
                raise _another_request(path, f"{name} of the weak model was {earlier[name]!r:.70}, now {value!r:.70}")


def _format(sidecar: dict[str, Any]) -> Format | None:
    """The format of the files that a sidecar names; None if it names none."""
    files = sidecar.get("files")
    if not isinstance(files, dict) or not files:
        return None
    return "nifti" if all(str(name).endswith(".nii.gz") for name in files.values()) else "dicom"


def _read(path: Path) -> dict[str, Any]:
    """A sidecar; empty if it cannot be read, about which `OutputWriter.missing` says more."""
    try:
        content = read_json(path)
    except CcellaError:
        return {}
    return content if isinstance(content, dict) else {}
