"""The command `ccella-fast` with its subcommands. Training of the diffusion model has a script of its own, train.py.

Each subcommand parses its arguments first and imports what it needs afterwards, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccella_fast import entrypoint
from ccella_fast.data.readers.study import CLASSES

if TYPE_CHECKING:
    from ccella_fast.config import Config

EXIT_CODES = "exit codes: 0 ok, 1 a bug, 2 usage or configuration, 3 data, 4 checkpoint, 5 disk, 6 non-finite loss"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    arguments = _parser().parse_args(argv)
    return entrypoint.run_command(lambda: arguments.run(arguments) or 0, debug=arguments.debug)


def _run_phantom(arguments: argparse.Namespace) -> None:
    from ccella_fast.data.phantom.phantom import write_phantoms

    write_phantoms(arguments.out, num_studies=arguments.num_studies, seed=arguments.seed)


def _run_prepare(arguments: argparse.Namespace) -> None:
    from ccella_fast.data.preparation.prepare import prepare

    options = _options(arguments, without=["config", "set"])
    prepare(options.pop("data"), options.pop("out"), _config(arguments), **options)


def _run_train_vae(arguments: argparse.Namespace) -> None:
    from ccella_fast.training.autoencoder.run import train_vae

    train_vae(arguments.data, arguments.out, _config(arguments))


def _run_sample(arguments: argparse.Namespace) -> None:
    from ccella_fast.sampling.command import sample_to_folder
    from ccella_fast.sampling.guidance import Reuse

    options = _options(arguments, without=["report", "report_file"])
    texts, files = arguments.report or [], arguments.report_file or []
    options["reports"] = [*texts, *map(_read_report, files)] or None
    options["report_ids"] = [f"report-{number}" for number in range(1, len(texts) + 1)] + [path.stem for path in files]
    options["reuse"] = None if arguments.reuse is None else Reuse(*arguments.reuse)
    sample_to_folder(options.pop("checkpoint"), options.pop("out"), **options)


def _run_report(arguments: argparse.Namespace) -> None:
    from ccella_fast.report.html import write_report

    print(write_report(arguments.folder))


def _run_export(arguments: argparse.Namespace) -> None:
    from ccella_fast.checkpoint import export_reference

    export_reference(arguments.checkpoint, arguments.out, weights=arguments.weights)


def _run_env(arguments: argparse.Namespace) -> None:
    import json

    from ccella_fast.environment import describe_environment, environment_warnings, format_environment

    facts = describe_environment()
    if arguments.json:
        print(json.dumps({**facts, "warnings": environment_warnings(facts)}, indent=2))
    else:
        print(format_environment(facts))


def _options(arguments: argparse.Namespace, *, without: Sequence[str]) -> dict[str, Any]:
    """The options of a subcommand, which are named like the keyword arguments of the function that it calls."""
    return {name: value for name, value in vars(arguments).items() if name not in ("run", "debug", *without)}


def _config(arguments: argparse.Namespace) -> Config:
    from ccella_fast.config import load_config, make_config

    if arguments.config is None:
        return make_config(arguments.set)
    return load_config(arguments.config, arguments.set)


def _read_report(path: Path) -> str:
    from ccella_fast.errors import DataError

    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError:
        raise DataError(
            "this report file cannot be read", path=path, fix="check the path and its permissions"
        ) from None
    except UnicodeDecodeError:
        raise DataError("this report file is not UTF-8 text", path=path, fix="save it as UTF-8") from None


def _parser() -> argparse.ArgumentParser:
    parser = entrypoint.Parser(
        prog="ccella-fast",
        description="Report-conditioned 3D prostate MRI: prepare studies, train, sample, report.",
        epilog=f"Train the diffusion model with: deepspeed ccella_fast/train.py --help\n\n{EXIT_CODES}",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _phantom(commands)
    _prepare(commands)
    _train_vae(commands)
    _sample(commands)
    _report(commands)
    _export(commands)
    _env(commands)
    return parser


def _phantom(commands: argparse._SubParsersAction) -> None:
    example = "ccella-fast phantom --out out/studies --num_studies 24"
    command = _add(
        commands, "phantom", _run_phantom, "Draw synthetic T2 studies of a pelvis, with reports and classes.", example
    )
    command.add_argument("--out", type=Path, required=True, help="folder for the studies")
    command.add_argument("--num_studies", type=_from(1), default=24, help="number of studies (default 24)")
    command.add_argument("--seed", type=_from(0), default=0, help="the same seed gives the same bytes (default 0)")


def _prepare(commands: argparse._SubParsersAction) -> None:
    example = "ccella-fast prepare --data studies/ --out out/prepared --config configs/demo.json"
    about = "Resample studies to one grid, encode reports and, with --vae, latents. Run it again to continue or to add."
    command = _add(commands, "prepare", _run_prepare, about, example)
    command.add_argument(
        "--data", type=Path, required=True, help="folder of studies, or a manifest in the reference's JSON form"
    )
    command.add_argument("--out", type=Path, required=True, help="prepared folder")
    command.add_argument("--vae", type=Path, help="VAE folder or MAISI weight file; adds latents and the scale factor")
    command.add_argument("--csv", type=Path, help="reports and classes of a study folder (default: studies.csv in it)")
    command.add_argument("--test_data", type=Path, help="JSON manifest of the test split")
    command.add_argument(
        "--data_base_dir", type=Path, help="folder that the image paths of a JSON manifest are relative to"
    )
    command.add_argument(
        "--embedding_base_dir", type=Path, help="folder of latents and text features that the reference has prepared"
    )
    about = "also store K augmented latents per training study (needs --vae; 0: stop using them)"
    command.add_argument("--augment", type=_from(0), metavar="K", help=about)
    about = (
        "also write a picture of every study before and after preparation, and with each augmentation at full strength"
    )
    command.add_argument("--preview", action="store_true", help=about)
    command.add_argument(
        "--workers",
        type=_from(1),
        help="number of processes that make images (default: as many as cores and memory allow)",
    )
    _add_config(command)


def _train_vae(commands: argparse._SubParsersAction) -> None:
    example = "ccella-fast train-vae --data out/prepared --out out/vae --config configs/demo.json"
    command = _add(
        commands,
        "train-vae",
        _run_train_vae,
        "Train the autoencoder from scratch on prepared images (L1 + KL).",
        example,
    )
    command.add_argument("--data", type=Path, required=True, help="prepared folder")
    command.add_argument("--out", type=Path, required=True, help="VAE folder")
    _add_config(command)


def _sample(commands: argparse._SubParsersAction) -> None:
    example = (
        'ccella-fast sample --checkpoint out/model --report "PI-RADS 5 lesion, left" --num_samples 4 --out out/samples'
    )
    about = "Generate volumes from reports: .nii.gz files with geometry, a JSON file with each, and a montage."
    command = _add(commands, "sample", _run_sample, about, example)
    command.add_argument("--checkpoint", type=Path, required=True, help="run folder, step folder or reference .pt")
    command.add_argument("--out", type=Path, required=True, help="folder for the volumes")
    command.add_argument("--report", action="append", help="report text; may be repeated")
    command.add_argument(
        "--report_file",
        action="extend",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="UTF-8 files, each with one report; their names without suffix are the report ids in samples.csv",
    )
    command.add_argument(
        "--num_samples",
        type=_from(1),
        default=1,
        help="number of volumes per report, with seeds seed, seed+1, ... (default 1)",
    )
    command.add_argument(
        "--seed", type=_from(0), default=0, help="the same seed gives the same volume in any batch (default 0)"
    )
    command.add_argument(
        "--solver", metavar="NAME", help="ddpm, ddim, dpmpp_2m, dpmpp_2m_sde or unipc (default: the checkpoint's)"
    )
    command.add_argument(
        "--num_inference_steps",
        metavar="N",
        type=_from(1),
        help="denoising steps (default: the checkpoint's)",
    )
    command.add_argument(
        "--spacing", type=float, nargs=3, metavar="MM", help="voxel size in mm (default: the training grid's)"
    )
    command.add_argument("--pirads", choices=[*CLASSES], help="score or class, for variants that take one as input")
    command.add_argument("--class_override", choices=[*CLASSES], help="score or class that replaces the predicted one")
    command.add_argument(
        "--guidance_scale",
        type=float,
        help="classifier-free guidance against the null report (default 1, which is off)",
    )
    command.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar="FRACTION",
        help="part of the schedule in which guidance acts (default 0 1)",
    )
    command.add_argument(
        "--reuse",
        type=_from(1),
        nargs=2,
        metavar=("INTERVAL", "DEPTH"),
        help="reuse deep features between steps, for example 3 1 (default off)",
    )
    command.add_argument("--batch_size", type=_from(1), help="volumes denoised at a time (default: the checkpoint's)")
    command.add_argument(
        "--batch_invariant",
        action="store_true",
        help="process each volume alone, so that on a CPU its bits do not depend on the batch",
    )
    command.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        help="data type of the weights (default auto: bf16 where it is fast)",
    )
    command.add_argument("--vae", type=Path, help="VAE, for a reference .pt (our checkpoints contain it)")
    command.add_argument(
        "--format",
        choices=["nifti", "dicom"],
        default="nifti",
        help="nifti: a .nii.gz file per volume (default); dicom: a folder with an MR series per volume",
    )
    command.add_argument("--overwrite", action="store_true", help="replace existing samples in --out")


def _report(commands: argparse._SubParsersAction) -> None:
    about = "Write FOLDER/report.html: one page of curves, montages and timings that needs no network."
    command = _add(commands, "report", _run_report, about, "ccella-fast report out/demo")
    command.add_argument("folder", type=Path, help="folder that contains prepared/, vae/, model/ and samples/")


def _export(commands: argparse._SubParsersAction) -> None:
    about = "Write a checkpoint as one .pt file in the reference's format."
    command = _add(commands, "export", _run_export, about, "ccella-fast export --checkpoint out/model --out CCELLA.pt")
    command.add_argument("--checkpoint", type=Path, required=True, help="run folder or step folder")
    command.add_argument("--out", type=Path, required=True, help="file to write")
    command.add_argument(
        "--weights", choices=["ema", "raw"], default="ema", help="averaged or raw weights (default ema)"
    )


def _env(commands: argparse._SubParsersAction) -> None:
    about = "Print versions, CPU, GPUs, the backend of each kernel with the reason, and known problems of this machine."
    command = _add(commands, "env", _run_env, about, "ccella-fast env")
    command.add_argument("--json", action="store_true", help="print JSON, for a bug report")


def _add(
    commands: argparse._SubParsersAction, name: str, run: Callable[[argparse.Namespace], None], about: str, example: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=about.split(":")[0],
        description=about,
        epilog=f"example: {example}\n\n{EXIT_CODES}",
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _from(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number of at least {least}")
        return int(text)

    return number


def _add_config(command: argparse.ArgumentParser) -> None:
    about = "our JSON file, or the reference's env, config and def files (default: built-in defaults)"
    command.add_argument("--config", type=Path, nargs="+", metavar="FILE", help=about)
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, for example data.dim=[96,96,32]; may be repeated",
    )


if __name__ == "__main__":
    sys.exit(main())
