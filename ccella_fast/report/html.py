"""`report.html`: the results of a folder as one page that needs no network.

It is built from the files that the commands have written and names those that are missing. Report text and case ids are not
copied; studies are numbered.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from ccella_fast.data.manifest import Manifest, Split, StudyEntry, load_manifest, open_array
from ccella_fast.data.readers.sample_files import read_sample
from ccella_fast.environment import describe_environment
from ccella_fast.errors import DataError
from ccella_fast.quantities import counted
from ccella_fast.report.evaluation import evaluation_part
from ccella_fast.report.figures import COLUMNS, Mark, Panel, curves, histogram, montage, spread
from ccella_fast.report.page import POLICY, TEMPLATE, render
from ccella_fast.storage import atomic_path, damage_named, read_json

WINDOW = (0.0, 1.0)
_PREVIEWS = 3
logger = logging.getLogger("ccella_fast")
_SYNTHETIC = "Generated images are synthetic. Nothing on this page is for diagnosis."


class Sample(NamedTuple):
    """A generated volume as written by `ccella-fast sample`: its JSON file, and per sequence its NIfTI file or DICOM folder."""

    path: Path
    sidecar: dict[str, Any]
    files: dict[str, Path]

    def panel(self, sequence: str, title: str, mark: Mark | None = None) -> Panel:
        """The volume (X, Y, Z) in float32, scaled to [0, 1]."""
        volume = read_sample(self.files[sequence])
        with damage_named(self.path):
            return Panel(volume / self.sidecar["intensity_scale"][sequence], self.sidecar["spacing"], title, mark)


def write_report(folder: str | Path, *, marks: Mapping[str, Mark] | None = None) -> Path:
    """Write `folder/report.html` from `prepared/`, `vae/`, `model/`, `samples/` and `evaluation/` in it, and return its path.

    Args:
        folder: of the results.
        marks: where the reports that were prompts have a lesion, by report id. Their volumes are marked there.

    Raises:
        DataError: all five are missing, or a file is damaged.
    """
    folder = Path(folder)
    if not any((folder / name).is_dir() for name in ("prepared", "vae", "model", "samples", "evaluation")):
        fix = "give the folder that contains prepared/, vae/, model/ and samples/"
        raise DataError("this folder contains no results", path=folder, fix=fix)
    prepared = load_manifest(folder / "prepared") if (folder / "prepared" / "manifest.json").is_file() else None
    name = "results"
    if config := _read(folder / "model" / "config.json"):
        with damage_named(folder / "model" / "config.json"):
            name = config["name"]
    samples = _samples(folder / "samples")
    evaluation = evaluation_part(folder / "evaluation") if (folder / "evaluation" / "metrics.json").is_file() else None
    page = render(
        TEMPLATE,
        title=f"ccella_fast: {name}",
        subtitle="Report-conditioned latent diffusion of 3D prostate MRI",
        notices=_notices(prepared),
        facts=_facts(prepared, folder, samples),
        pictures=_pictures(prepared, folder, samples, marks or {}),
        charts=[_vae_chart(folder / "vae"), _model_chart(folder / "model"), *_training_previews(folder / "model")],
        samples=[_sample_row(number, sample) for number, sample in enumerate(samples, start=1)],
        class_heads=_class_heads(samples),
        no_samples="There are no generated volumes yet: run `ccella-fast sample`.",
        timings=[row for name, command in _COMMANDS for row in _timings(folder / name, command)],
        environment=_environment(folder),
        evaluation=evaluation.html if evaluation else "",
        policy=evaluation.policy if evaluation else POLICY,
    )
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    if marks is not None and samples and not any(sample.sidecar.get("report_id") in marks for sample in samples):
        about = (
            "no generated volume has an arrow: none has the report id of a case for which the table says left or right"
        )
        logger.warning(about)
    return folder / "report.html"


_COMMANDS = [("prepared", "prepare"), ("vae", "train-vae"), ("model", "train"), ("samples", "sample")]


def _samples(folder: Path) -> list[Sample]:
    found = []
    for path in sorted(folder.glob("sample-*.json")):
        sidecar = read_json(path)
        with damage_named(path):
            files = {sequence: folder / name for sequence, name in sidecar["files"].items()}
        if all(file.exists() for file in files.values()):
            found.append(Sample(path, sidecar, files))
    return found


def _notices(prepared: Manifest | None) -> list[str]:
    if prepared is not None and any(case.synthetic for case in prepared.cases):
        return [
            f"{'All' if _all_synthetic(prepared) else 'Some'} studies are synthetic too: drawn by a program, not patients. "
            "They are called phantoms below.",
            _SYNTHETIC,
        ]
    return [_SYNTHETIC]


def _all_synthetic(prepared: Manifest) -> bool:
    return all(case.synthetic for case in prepared.cases)


def _facts(prepared: Manifest | None, folder: Path, samples: list[Sample]) -> list[tuple[str, str]]:
    facts = []
    if prepared:
        counts = Counter(case.split for case in prepared.cases)
        count = ", ".join(f"{counts[split]} {split}" for split in get_args(Split) if split != "val" or counts[split])
        classes = [sum(case.pirads == one_hot for case in prepared.cases) for one_hot in ([1, 0], [0, 1])]
        without = sum(case.text_isnull for case in prepared.cases)
        facts += [
            ("Phantom studies (synthetic)" if _all_synthetic(prepared) else "Studies", count),
            ("PI-RADS 1-2 / 3-5 / unknown", f"{classes[0]} / {classes[1]} / {len(prepared.cases) - sum(classes)}"),
            ("Without a report", str(without)),
            ("Sequences", ", ".join(prepared.data.sequences)),
            ("Grid", f"{_times(prepared.data.dim)} voxels of {_times(prepared.data.spacing)} mm"),
        ]
    path = folder / "model" / "config.json"
    if config := _read(path):
        with damage_named(path):
            model, training = config["model"], config["training"]
            facts += [
                ("Variant", model["variant"]),
                ("U-Net channels", ", ".join(map(str, model["num_channels"]))),
                ("Batch, precision", f"{training['batch_size']} per process, {training['precision']}"),
            ]
    path = folder / "model" / "run_status.json"
    if status := _read(path):
        with damage_named(path):
            facts.append(("Training", f"{status['state']}, step {status['step']:d} of {status['total_steps']:d}"))
    path = folder / "vae" / "run_record.json"
    if record := _read(path):
        with damage_named(path):
            if test := record.get("test"):
                facts.append(("Autoencoder, test split", f"L1 {test['l1']:.4f}, PSNR {test['psnr']:.1f} dB"))
    if samples:
        facts.append(("Generated volumes (synthetic)", str(len(samples))))
    return facts


def _pictures(
    prepared: Manifest | None, folder: Path, samples: list[Sample], marks: Mapping[str, Mark]
) -> list[dict[str, Any]]:
    """Real, reconstructed and generated montages, then their intensities."""
    cases = _shown(prepared)
    real = [
        Panel(prepared.array(case, f"image/{sequence}"), case.spacing,
              _title(f"{_word([case])} {n}, {case.split}", sequence, prepared))
        for n, case in enumerate(cases, start=1)
        for sequence in (prepared.data.sequences if prepared else ())
        if prepared and f"image/{sequence}" in case.files
    ]  # fmt: skip
    reconstructed = [
        Panel(open_array(file), case.spacing, _title(f"Reconstructed {n}, {case.split}", sequence, prepared))
        for n, case in enumerate(cases, start=1)
        for sequence in (prepared.data.sequences if prepared else ())
        if (file := folder / "vae" / "reconstructions" / case.id / f"{sequence}.npy").is_file()
    ]
    few = 2 * COLUMNS // max((len(sample.files) for sample in samples), default=1)
    generated = []
    for n, sample in spread(list(enumerate(samples, start=1)), few):
        mark = marks.get(sample.sidecar.get("report_id") or "")
        asked = "" if mark is None else ": " + " ".join(word for word in mark if word)
        title = f"Generated {n}, seed {sample.sidecar.get('seed')}{asked}"
        generated += [sample.panel(name, _title(title, name, prepared), mark) for name in sample.files]
    about = "Generated volumes (synthetic)."
    if any(panel.mark for panel in generated):
        about += " Arrows and titles say where the report has a lesion: the axial slice is that of its level."
    word = _word(cases)
    caption = f"{word} studies as prepared." + ("" if word == "Real" else " Phantoms are synthetic.")
    return [
        _montage(real, caption, "There are no prepared images: run `ccella-fast prepare`."),
        _montage(
            reconstructed,
            "The same studies after the autoencoder (encoded to the posterior mean, decoded).",
            "There are no reconstructions: the autoencoder was not trained here, or not to its end.",
        ),
        _montage(generated, about, "There are no generated volumes: run `ccella-fast sample`."),
        _histogram(real, generated, word),
        *_previews(folder / "prepared" / "preview"),
    ]


def _previews(folder: Path) -> list[dict[str, Any]]:
    """The first few pictures of `prepare --preview`, where there are any."""
    caption = "Study {} as read, as prepared, and with each augmentation in use at its maximum strength, to scale."
    found = sorted(folder.glob("*.png"))[:_PREVIEWS]
    return [_figure(path.read_bytes(), caption.format(number), "") for number, path in enumerate(found, start=1)]


def _training_previews(folder: Path) -> list[dict[str, Any]]:
    """A few of the pictures that were made during the training, the last one among them."""
    found = sorted((folder / "previews").glob("step-*.png"))
    shown = spread(found[::-1], _PREVIEWS)[::-1]
    caption = "Generated (synthetic) after {} steps of the training, from the same reports and noise each time."
    return [_figure(path.read_bytes(), caption.format(int(path.stem.removeprefix("step-"))), "") for path in shown]


def _shown(prepared: Manifest | None) -> list[StudyEntry]:
    """A row of studies: of the test split, in the manifest's order, as train-vae reconstructs them; else of the train split."""
    if prepared is None:
        return []
    train, test = ([case for case in prepared.cases if case.split == split] for split in ("train", "test"))
    return (test or train)[: max(1, COLUMNS // len(prepared.data.sequences))]


def _word(cases: Sequence[StudyEntry]) -> str:
    """What these studies are called."""
    synthetic = [case.synthetic for case in cases]
    return "Phantom" if all(synthetic) and synthetic else "Real and phantom" if any(synthetic) else "Real"


def _title(text: str, sequence: str, prepared: Manifest | None) -> str:
    return text if prepared and len(prepared.data.sequences) == 1 else f"{text}, {sequence}"


def _montage(panels: Sequence[Panel], caption: str, missing: str) -> dict[str, Any]:
    image = montage(panels, window=WINDOW) if panels else None
    return _figure(image, caption, missing)


def _histogram(real: Sequence[Panel], generated: Sequence[Panel], word: str) -> dict[str, Any]:
    missing = "Intensities are compared once there are prepared images and generated volumes."
    if not (real and generated):
        return _figure(None, "", missing)
    groups = {name: np.concatenate([panel.volume.ravel() for panel in panels])
              for name, panels in ((word.lower(), real), ("generated", generated))}  # fmt: skip
    image = histogram(groups, window=WINDOW, unit="normalized intensity")
    caption = "Intensities of the volumes shown above, all voxels; the last bin holds what is clipped."
    return _figure(image, caption, missing)


def _vae_chart(folder: Path) -> dict[str, Any]:
    with damage_named(folder / "metrics.jsonl"):
        return _vae_curves(_metrics(folder / "metrics.jsonl"))


def _vae_curves(lines: list[dict[str, Any]]) -> dict[str, Any]:
    missing = "There is no autoencoder training to show: run `ccella-fast train-vae`."
    if not lines:
        return _figure(None, "", missing)
    norm = "L1" if "loss_l1" in lines[-1] else "L2"
    pixelwise = _series(lines, {norm: f"loss_{norm.lower()}"})
    groups = [
        {"title": f"autoencoder: {norm} on training patches", "unit": norm, "log": True, "lines": pixelwise},
        {"title": "autoencoder: KL", "unit": "nats a patch", "log": True, "lines": _series(lines, {"KL": "loss_kl"})},
    ]
    for term in ("spectral", "perceptual", "adversarial", "discriminator"):
        if any(f"loss_{term}" in line for line in lines):
            groups.append({"title": f"autoencoder: {term} loss", "lines": _series(lines, {term: f"loss_{term}"})})
    return _figure(curves(groups), f"Autoencoder, {counted(lines[-1]['step'], 'step')}.", missing)


def _model_chart(folder: Path) -> dict[str, Any]:
    with damage_named(folder / "metrics.jsonl"):
        return _model_curves(_metrics(folder / "metrics.jsonl"))


def _model_curves(lines: list[dict[str, Any]]) -> dict[str, Any]:
    missing = "There is no diffusion training to show: run `deepspeed ccella_fast/train.py`."
    validations, previews, lines = (
        [line for line in lines if key in line] for key in ("val_loss", "sample_distance", "loss")
    )
    if not lines:
        return _figure(None, "", missing)
    groups = [
        {"title": "diffusion: loss", "lines": _series(lines, {"total": "loss", "L1 on noise": "loss_l1"})},
        {"title": "learning rate", "lines": _series(lines, {"lr": "lr"})},
        {"title": "throughput", "unit": "samples/s", "lines": _series(lines, {"samples/s": "samples_per_second"})},
    ]
    caption = f"Diffusion model, {counted(lines[-1]['step'], 'step')}. Faint: each logged step; bold: running mean."
    if any(line.get("loss_class") is not None for line in lines):
        title = "diffusion: class loss, before its weight"
        groups.insert(1, {"title": title, "lines": _series(lines, {"class": "loss_class"})})
    else:
        caption += " No class loss is shown: the model has no class head, or no study with a report has a class."
    if validations:
        groups[1:1] = _validation_groups(validations)
        caption += " Validation: at fixed noise and timesteps, with the " + (
            "moving average of the weights." if validations[-1]["weights"] == "averaged" else "weights of the training."
        )
        if (step := validations[-1].get("overfits_since")) is not None:
            caption += (
                f" The validation loss has risen since step {step} while that of training studies falls: overfitting."
            )
    if previews:
        title = "generated volumes: distance to validation studies"
        groups.append({"title": title, "lines": _series(previews, {"distance": "sample_distance"})})
        groups.append(
            {"title": "generated volumes: near copies", "lines": _series(previews, {"share": "sample_copies"})}
        )
    return _figure(curves(groups), caption, missing)


def _validation_groups(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The charts of the lines about validations."""
    bands = [name for name in lines[-1] if re.fullmatch(r"val_loss_l1_\d+_\d+", name)]
    by_band = {"timesteps " + name.removeprefix("val_loss_l1_").replace("_", "-"): name for name in bands}
    both = {"validation studies": "val_loss", "as many training studies": "train_eval_loss"}
    return [
        {"title": "diffusion: validation loss", "lines": _series(lines, both)},
        {"title": "diffusion: validation L1 on noise", "lines": _series(lines, by_band)},
    ]


def _series(lines: list[dict[str, Any]], names: dict[str, str]) -> dict[str, tuple[list, list]]:
    steps = [line["step"] for line in lines]
    return {label: (steps, [_number(line.get(key)) for line in lines]) for label, key in names.items()}


def _number(value: float | None) -> float:
    return np.nan if value is None else value


def _figure(image: bytes | None, caption: str, missing: str) -> dict[str, Any]:
    encoded = base64.b64encode(image).decode() if image else None
    return {"image": encoded, "caption": caption, "alt": caption, "missing": missing}


def _class_heads(samples: list[Sample]) -> str:
    """A sentence about the predicted classes, where their meaning is limited."""
    heads = {sample.sidecar.get("class_head", "unknown") for sample in samples if _has_prediction(sample)}
    if "untrained" in heads:
        return "P is not shown for models that were not trained to predict the class."
    if "unknown" in heads:
        return "The checkpoint does not say whether it was trained to predict the class: without that, P means nothing."
    return ""


def _has_prediction(sample: Sample) -> bool:
    with damage_named(sample.path):
        return bool(sample.sidecar["class_probabilities"]) or sample.sidecar.get("class_head") == "untrained"


def _sample_row(number: int, sample: Sample) -> dict[str, Any]:
    side = sample.sidecar
    with damage_named(sample.path):
        probabilities = side["class_probabilities"] or {}
        neg, pos = (f"{probabilities[name]:.3f}" if name in probabilities else "-" for name in ("neg", "pos"))
        return {
            "number": number, "report": side["report"] + 1, "seed": side["seed"], "solver": side["solver"],
            "steps": side["num_inference_steps"], "given": side["class_given"] or "-", "neg": neg, "pos": pos,
        }  # fmt: skip


def _timings(folder: Path, command: str) -> list[dict[str, Any]]:
    """A row of a command, or of each of its stages."""
    record = _read(folder / "run_record.json")
    if record is None:
        return [{"command": command, "seconds": None, "memory": None, "remarks": "not run, or not to its end"}]
    with damage_named(folder / "run_record.json"):
        stages = record.get("stages", {})
        return [_timing(f"{command}: {name}", stage) for name, stage in stages.items()] or [_timing(command, record)]


def _timing(command: str, record: dict[str, Any]) -> dict[str, Any]:
    nouns = {
        "studies": ("study", "studies"),
        "images": ("image", "images"),
        "volumes": ("volume", "volumes"),
        "world_size": ("process", "processes"),
        "total_steps": ("step", "steps"),
    }
    remarks = [counted(record[key], *words) for key, words in nouns.items() if key in record]
    if "peak_gpu_memory_mib" in record:
        remarks.append(f"{record['peak_gpu_memory_mib']} MiB on the GPU")
    return {
        "command": command, "seconds": record["seconds"], "memory": record["peak_memory_mib"], "remarks": ", ".join(remarks),
    }  # fmt: skip


def _environment(folder: Path) -> list[tuple[str, str]]:
    """Of the training run, or of this machine where there was none."""
    record = _read(folder / "model" / "run_record.json")
    if record is None:
        return _environment_rows(describe_environment(), recorded=False)
    with damage_named(folder / "model" / "run_record.json"):
        return _environment_rows(record["environment"], recorded=True)


def _environment_rows(found: dict[str, Any], *, recorded: bool) -> list[tuple[str, str]]:
    cpu, gpus = found["cpu"], found["gpu"]
    instructions = ", ".join(cpu["instructions"]) or "no AVX2"
    packages = [f"{name} {version}" for name, version in found["packages"].items() if version]
    used = f"{counted(cpu['cores'], 'core')}, {counted(cpu['torch_threads'], 'thread')}"
    return [
        ("Recorded by", "the training run" if recorded else "this report, because no training run has finished"),
        ("ccella_fast", found["ccella_fast"] or "not installed"),
        ("Python, system", f"{found['python']}, {found['system']}"),
        ("CPU", f"{used}, {cpu['memory_gib']} GiB, {instructions}"),
        ("GPU", ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in gpus) or "none"),
        ("Packages", ", ".join(packages)),
    ]


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _read(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _times(values: Sequence[float]) -> str:
    return " x ".join(f"{value:g}" for value in values)
