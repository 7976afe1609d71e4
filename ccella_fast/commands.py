"""What the subcommands of `ccella-fast` do with their parsed arguments.

Each asks first for the packages beyond the base that it uses, then reads its configuration, and imports what it needs only
afterwards, so that mistakes are answered at once. Each ends with what it wrote and the command that usually comes next.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccella_fast.entrypoint import is_local_rank_zero, log_next, sibling
from ccella_fast.optional import require_installed
from ccella_fast.quantities import counted

if TYPE_CHECKING:
    from ccella_fast.config import Config


def run_phantom(arguments: argparse.Namespace) -> None:
    """Draw phantom studies."""
    require_installed("nibabel")
    from ccella_fast.data.phantom.phantom import Difficulty, write_phantoms

    difficulty = Difficulty(arguments.lesion_size, arguments.lesion_contrast, arguments.noise)
    write_phantoms(
        arguments.out, arguments.num_studies, arguments.seed, difficulty, arguments.reports, arguments.splits
    )
    prepared = sibling(arguments.out, "prepared")
    command = ["prepare", "--data", arguments.out, "--out", prepared, "--config", "configs/demo.json"]
    log_next(arguments.out, ["ccella-fast", *command])


def run_import(arguments: argparse.Namespace) -> None:
    """Find the series of a PACS export, and write them with --write."""
    require_installed("pydicom", "SimpleITK", "nibabel", "matplotlib", "jinja2")
    from ccella_fast.errors import DataError
    from ccella_fast.folder_kinds import check_folder

    check_folder(arguments.data, "export", error=DataError, field="--data")
    from ccella_fast.data.importing.import_studies import import_studies

    options = _options(arguments, without=[])
    wrote = import_studies(options.pop("data"), options.pop("out"), **options)
    if arguments.write:
        prepared = sibling(arguments.out, "prepared")
        command = ["prepare", "--data", arguments.out, "--out", prepared, "--config", "configs/ccella.json"]
        log_next(wrote, ["ccella-fast", *command])
    else:
        log_next(wrote, ["ccella-fast", *sys.argv[1:], "--write"])


def run_prepare(arguments: argparse.Namespace) -> None:
    """Prepare studies."""
    require_installed("nibabel", "SimpleITK", *(["matplotlib"] if arguments.preview else []))
    from ccella_fast.errors import DataError
    from ccella_fast.folder_kinds import check_folder

    config = _config(arguments)
    config.check_grid()
    check_folder(arguments.data, "studies", error=DataError, field="--data")
    from ccella_fast.data.manifest import load_manifest
    from ccella_fast.data.preparation.prepare import prepare

    options = _options(arguments, without=["config", "set"])
    data, out = options.pop("data"), options.pop("out")
    _check_backends()
    prepare(data, out, config, **options)
    if load_manifest(out).scale_factor is None:
        command = ["ccella-fast", "train-vae", "--data", out, "--out", sibling(out, "vae")]
    else:
        command = ["deepspeed", "ccella_fast/train.py", "--data", out, "--output_dir", sibling(out, "model")]
    log_next(out, [*command, *_config_options(arguments)])


def run_check(arguments: argparse.Namespace) -> int:
    """Check a data set; returns the exit code."""
    from ccella_fast.errors import DataError
    from ccella_fast.folder_kinds import check_folder, folder_kind

    require_installed(*(["jinja2"] if arguments.out else []))
    if folder_kind(arguments.data) != "prepared":
        require_installed("nibabel", "SimpleITK", "transformers")
        check_folder(arguments.data, "studies", error=DataError, field="--data")
    from ccella_fast.data.checking.check import check

    options = _options(arguments, without=["config", "set"])
    return check(options.pop("data"), _config(arguments), **options)


def run_train_vae(arguments: argparse.Namespace) -> None:
    """Train the autoencoder."""
    config = _config(arguments)
    from ccella_fast.training.autoencoder.run import train_vae

    _check_backends()
    train_vae(arguments.data, arguments.out, config)
    command = ["prepare", "--data", "STUDIES", "--out", arguments.data, "--vae", arguments.out]
    log_next(arguments.out, ["ccella-fast", *command, *_config_options(arguments)])


def run_average(arguments: argparse.Namespace) -> None:
    """Make a model with another average of a run's weights."""
    from ccella_fast.training.snapshots import write_average

    out = arguments.out
    made = write_average(arguments.run_folder, out, width=arguments.width, step=arguments.step)
    about = "width %g at step %d, from %s: the error of the profile is %.2g; possible widths: %s"
    snapshots = counted(made.snapshots, "snapshot")
    logging.getLogger("ccella_fast").info(about, made.width, made.step, snapshots, made.error, made.possible)
    log_next(out, ["ccella-fast", "sample", "--checkpoint", out, "--out", sibling(out, "samples")])


def run_sample(arguments: argparse.Namespace) -> None:
    """Generate volumes."""
    require_installed("pydicom" if arguments.format == "dicom" else "nibabel", "matplotlib")
    from ccella_fast.data.readers.study_table import reports_of
    from ccella_fast.sampling.command import sample_to_folder
    from ccella_fast.sampling.guidance import Reuse

    options = _options(arguments, without=["report", "report_file", "report_table"])
    texts, files = arguments.report or [], arguments.report_file or []
    rows = reports_of(arguments.report_table) if arguments.report_table else {}
    options["reports"] = [*texts, *map(_read_report, files), *rows.values()] or None
    names = [f"report-{number}" for number in range(1, len(texts) + 1)]
    options["report_ids"] = [*names, *(path.stem for path in files), *rows]
    options["reuse"] = None if arguments.reuse is None else Reuse(*arguments.reuse)
    sample_to_folder(options.pop("checkpoint"), options.pop("out"), **options)


def run_synthesize(arguments: argparse.Namespace) -> None:
    """Generate a set of synthetic studies."""
    require_installed("nibabel")
    from ccella_fast.sampling.guidance import Reuse
    from ccella_fast.sampling.synthesis import synthesize

    options = _options(arguments)
    options["reuse"] = None if arguments.reuse is None else Reuse(*arguments.reuse)
    synthesize(options.pop("checkpoint"), options.pop("out"), **options)


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Compare generated volumes with real ones."""
    require_installed("nibabel", "SimpleITK", "matplotlib", "jinja2")
    from ccella_fast.evaluation.folders import evaluate_to_folder

    options = _options(arguments, without=[])
    out = options.pop("out")
    result = evaluate_to_folder(options.pop("real"), options.pop("synthetic"), out, **options)
    if is_local_rank_zero():
        print(result.table(), flush=True)  # before what is logged, where both go to one file
        from ccella_fast.report.evaluation import write_evaluation_page

        write_evaluation_page(out)
    log_next(out / "report.html", ["ccella-fast", "report", out.parent])


def run_sensitivity(arguments: argparse.Namespace) -> None:
    """Show which feature spaces order known degradations of real volumes."""
    require_installed("SimpleITK")
    from ccella_fast.evaluation.folders import sensitivity_to_folder
    from ccella_fast.evaluation.sensitivity import gate_table

    options = _options(arguments, without=[])
    real, out = options.pop("real"), options.pop("out")
    print(gate_table(sensitivity_to_folder(real, out, **options)), flush=True)
    command = ["evaluate", "--real", real, "--synthetic", "SAMPLES", "--out", out]
    log_next(out / "sensitivity.json", ["ccella-fast", *command])


def run_classify(arguments: argparse.Namespace) -> None:
    """Train and compare the classifiers of the downstream experiment."""
    network = ["monai"] if arguments.backbone != "small" else []
    require_installed(*network, *(["SimpleITK"] if arguments.protocol == "reference" else []))
    from ccella_fast.downstream.classify import classify_to_folder
    from ccella_fast.downstream.results import TABLE, make_table

    options = _options(arguments, without=[])
    real, out = options.pop("real"), options.pop("out")
    content = classify_to_folder(real, out, **options)
    if is_local_rank_zero():
        print(make_table(content), end="", flush=True)
        logging.getLogger("ccella_fast").info("wrote %s", out / TABLE)


def run_compare(arguments: argparse.Namespace) -> None:
    """Run a comparison."""
    # Also what its steps need, so that none is missing after an hour.
    require_installed("nibabel", "SimpleITK", "matplotlib", "jinja2", "deepspeed", "hjson", "tensorboard")
    from ccella_fast.comparison.compare import compare

    options = _options(arguments)
    options["init_from"] = dict(options["init_from"])
    out = options.pop("out")
    for statement in compare(out, **options)["statements"]:
        print(f"{statement['question']} {statement['answer']}. {statement['sentence']}", flush=True)
    print(f"wrote {out / 'report.html'}", flush=True)


def run_report(arguments: argparse.Namespace) -> None:
    """Write the page of a folder of results."""
    require_installed("jinja2", "matplotlib", "nibabel")
    from ccella_fast.errors import DataError
    from ccella_fast.folder_kinds import check_folder, folder_kind, wrong_folder

    if not arguments.folder.is_dir():
        raise wrong_folder(arguments.folder, "results", error=DataError)
    if folder_kind(arguments.folder) == "evaluation":
        if arguments.findings is not None:
            from ccella_fast.errors import ConfigError

            why = "--findings marks the generated volumes on the page of a folder of results, and this is that of an evaluation"
            fix = "give the folder that contains samples/, or remove the option: `evaluate --findings` has its own"
            raise ConfigError(why, path=arguments.folder, field="--findings", fix=fix)
        from ccella_fast.report.evaluation import write_evaluation_page

        print(write_evaluation_page(arguments.folder))
        return
    check_folder(arguments.folder, "results", error=DataError)
    from ccella_fast.report.html import write_report

    print(write_report(arguments.folder, marks=lesion_marks(arguments.findings) if arguments.findings else None))


def run_export(arguments: argparse.Namespace) -> None:
    """Write a checkpoint in the form of the reference, or as a MONAI bundle."""
    if arguments.format == "monai-bundle":
        require_installed("monai")
        from ccella_fast.sampling.monai_bundle import export_monai_bundle

        encoder = arguments.text_encoder
        export_monai_bundle(arguments.checkpoint, arguments.out, weights=arguments.weights, text_encoder=encoder)
        log_next(arguments.out, ["ccella-fast", "sample", "--checkpoint", arguments.out / "models", "--out", "samples"])
        return
    if arguments.text_encoder is not None:
        from ccella_fast.errors import ConfigError

        why = "a .pt file in the reference's format has no text encoder"
        raise ConfigError(why, field="--text_encoder", fix="leave it out, or give --format monai-bundle")
    from ccella_fast.checkpoint import export_reference, step_folders
    from ccella_fast.config import make_config
    from ccella_fast.sampling.pretrained import peek_config

    export_reference(arguments.checkpoint, arguments.out, weights=arguments.weights)
    config = peek_config(arguments.checkpoint)
    if config is None or _grid_and_encoder(config) == _grid_and_encoder(make_config()):
        vae = next(iter(step_folders(arguments.checkpoint)), arguments.checkpoint)  # a .pt file does not contain one
        command = ["sample", "--checkpoint", arguments.out, "--vae", vae, "--out", arguments.out.with_suffix("")]
    else:
        about = (
            "a .pt file has no grid and no text encoder, and those of this model are not the defaults: sample from %s"
        )
        logging.getLogger("ccella_fast").info(about, arguments.checkpoint)
        command = ["sample", "--checkpoint", arguments.checkpoint, "--out", "samples"]
    log_next(arguments.out, ["ccella-fast", *command])


def _grid_and_encoder(config: Config) -> tuple[object, ...]:
    return config.data.spacing, config.data.dim, config.text.encoder, config.text.max_length


def run_push(arguments: argparse.Namespace) -> None:
    """Share a model on the Hugging Face hub."""
    require_installed("huggingface_hub")
    from ccella_fast.sampling.hub import Upload

    options = _options(arguments, without=["checkpoint", "repo", "vae", "weights"])
    upload = Upload.check(arguments.repo, **options)
    from ccella_fast.sampling.sampler import FastSampler

    sampler = FastSampler.from_checkpoint(
        arguments.checkpoint, device="cpu", dtype="float32", vae=arguments.vae, weights=arguments.weights
    )
    wrote = upload.run(sampler.parts())
    if upload.out is None:
        print(wrote)
        return
    print("\n".join(str(path.relative_to(wrote)) for path in sorted(upload.out.rglob("*")) if path.is_file()))
    if None in upload.licenses:
        about = "README.md says that a license is not stated: give --license and --vae_license before you share %s"
        logging.getLogger("ccella_fast").warning(about, wrote)
    else:
        log_next(wrote, ["hf", "upload", upload.repo_id, wrote, *(["--private"] if upload.private else [])])


def run_env(arguments: argparse.Namespace) -> None:
    """Print what this machine is."""
    import json

    from ccella_fast.environment import describe_environment, environment_warnings, format_environment

    facts = describe_environment()
    if arguments.json:
        print(json.dumps({**facts, "warnings": environment_warnings(facts)}, indent=2))
    else:
        print(format_environment(facts))
        print("for a bug report: ccella-fast env --json > env.json")


def _check_backends() -> None:
    """Refuse a value of CCELLA_FAST_BACKEND that this machine cannot run, before anything is loaded."""
    from ccella_fast.kernels.backend import check_environment

    check_environment()


def _options(arguments: argparse.Namespace, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The options of a subcommand, which are named like the keyword arguments of the function that it calls."""
    other = {"run", "debug", "if_out_of_memory", *without}
    options = {name: value for name, value in vars(arguments).items() if name not in other}
    return {name: None if (name, value) == ("device", "auto") else value for name, value in options.items()}


def _config(arguments: argparse.Namespace) -> Config:
    from ccella_fast.config import load_config, make_config

    if arguments.config is None:
        return make_config(arguments.set)
    return load_config(arguments.config, arguments.set)


def _config_options(arguments: argparse.Namespace) -> list[str]:
    """The configuration, as the next command needs it again."""
    files = ["--config", *map(str, arguments.config)] if arguments.config else []
    return [*files, *(part for text in arguments.set for part in ("--set", text))]


def lesion_marks(table: Path) -> dict[str, Any]:
    """Where the reports of a table have a lesion, as far as their side is known, by case."""
    from ccella_fast.evaluation.findings import read_findings
    from ccella_fast.report.figures import Mark

    known = read_findings(table).properties
    zones, levels = known.get("zone", {}), known.get("level", {})
    sides = {case: str(side).lower() for case, side in known.get("side", {}).items()}
    return {
        case: Mark(side, str(zones.get(case, "")).upper() or None, str(levels.get(case, "")).lower() or None)  # type: ignore[arg-type]
        for case, side in sides.items()
        if side in ("left", "right")
    }


def _read_report(path: Path) -> str:
    from ccella_fast.data.readers.pointers import check_is_data
    from ccella_fast.errors import DataError

    try:
        check_is_data(path)
        return path.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        fix = f"give the files in it: --report_file {path}/*.txt"
        raise DataError("this is a folder, not a report file", path=path, field="--report_file", fix=fix) from None
    except OSError:
        raise DataError(
            "this report file cannot be read", path=path, fix="check the path and its permissions"
        ) from None
    except UnicodeDecodeError:
        raise DataError("this report file is not UTF-8 text", path=path, fix="save it as UTF-8") from None
