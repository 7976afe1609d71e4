"""The door `ccella-fast`: prepare, train-vae, sample, report and their kin. Training has its own door, train.py.

Each command parses first and imports what it needs afterwards, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ccella_fast import entrypoint

EXIT_CODES = "exit codes: 0 ok, 1 a bug, 2 usage or configuration, 3 data, 4 checkpoint, 5 disk, 6 non-finite loss"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    arguments = _parser().parse_args(argv)
    return entrypoint.run_command(lambda: arguments.run(arguments) or 0, debug=arguments.debug)


def phantom(arguments: argparse.Namespace) -> None:
    from ccella_fast.data.phantom.phantom import write_phantoms

    write_phantoms(arguments.out, num_studies=arguments.num_studies, seed=arguments.seed)


def prepare(arguments: argparse.Namespace) -> None:
    from ccella_fast.data.preparation.prepare import prepare as run

    run(
        arguments.data,
        arguments.out,
        _config(arguments),
        vae=arguments.vae,
        csv=arguments.csv,
        test_data=arguments.test_data,
        data_base_dir=arguments.data_base_dir,
        embedding_base_dir=arguments.embedding_base_dir,
        augment=arguments.augment,
        preview=arguments.preview,
        workers=arguments.workers,
    )


def train_vae(arguments: argparse.Namespace) -> None:
    from ccella_fast.training.autoencoder.run import train_vae as run

    run(arguments.data, arguments.out, _config(arguments))


def sample(arguments: argparse.Namespace) -> None:
    from ccella_fast.sampling.command import sample_to_folder
    from ccella_fast.sampling.guidance import Reuse

    reports = list(arguments.report or []) + [_read_report(path) for path in arguments.report_file or []]
    sample_to_folder(
        arguments.checkpoint,
        arguments.out,
        reports=reports or None,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        solver=arguments.solver,
        num_steps=arguments.num_inference_steps,
        spacing=arguments.spacing,
        pirads=arguments.pirads,
        class_override=arguments.class_override,
        guidance_scale=arguments.guidance_scale,
        guidance_interval=arguments.guidance_interval,
        reuse=None if arguments.reuse is None else Reuse(*arguments.reuse),
        batch_size=arguments.batch_size,
        batch_invariant=arguments.batch_invariant,
        dtype=arguments.dtype,
        vae=arguments.vae,
        overwrite=arguments.overwrite,
    )


def report(arguments: argparse.Namespace) -> None:
    from ccella_fast.report.html import write_report

    print(write_report(arguments.folder))


def export(arguments: argparse.Namespace) -> None:
    from ccella_fast.checkpoint import export_reference

    export_reference(arguments.checkpoint, arguments.out, weights=arguments.weights)


def env(arguments: argparse.Namespace) -> None:
    import json

    from ccella_fast.environment import describe_environment, environment_warnings, format_environment

    facts = describe_environment()
    if arguments.json:
        print(json.dumps({**facts, "warnings": environment_warnings(facts)}, indent=2))
    else:
        print(format_environment(facts))


def _config(arguments: argparse.Namespace):
    from ccella_fast.config import load_config, make_config

    if arguments.config is None:
        return make_config(arguments.set)
    return load_config(arguments.config, arguments.set)


def _read_report(path: Path) -> str:
    from ccella_fast.errors import DataError

    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError:
        raise DataError("this report cannot be read", path=path, fix="check the path") from None
    except UnicodeDecodeError:
        raise DataError("this report is not UTF-8 text", path=path, fix="save it as UTF-8") from None


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
        commands, "phantom", phantom, "Draw synthetic pelvis-like T2 studies with reports and classes.", example
    )
    command.add_argument("--out", type=Path, required=True, help="folder for the studies")
    command.add_argument("--num_studies", type=_from(1), default=24, help="how many (default 24)")
    command.add_argument("--seed", type=_from(0), default=0, help="same seed, same bytes (default 0)")


def _prepare(commands: argparse._SubParsersAction) -> None:
    example = "ccella-fast prepare --data studies/ --out out/prepared --config configs/demo.json"
    about = "Bring studies to one grid, encode reports and, once there is a VAE, latents. Rerun to go on or to add."
    command = _add(commands, "prepare", prepare, about, example)
    command.add_argument(
        "--data", type=Path, required=True, help="folder of studies, or a manifest in the reference's JSON form"
    )
    command.add_argument("--out", type=Path, required=True, help="prepared folder")
    command.add_argument("--vae", type=Path, help="VAE folder or MAISI weight file; adds latents and the scale factor")
    command.add_argument("--csv", type=Path, help="reports and classes of a study folder (default: studies.csv in it)")
    command.add_argument("--test_data", type=Path, help="JSON manifest of the test split")
    command.add_argument("--data_base_dir", type=Path, help="what a JSON manifest's image paths start from")
    command.add_argument("--embedding_base_dir", type=Path, help="where the reference's prepared latents and text lie")
    about = "also store this many augmented latents of every training study (needs --vae; 0: use them no longer)"
    command.add_argument("--augment", type=_from(0), metavar="K", help=about)
    about = "also write a picture of every study before and after, and of augmentations at their largest"
    command.add_argument("--preview", action="store_true", help=about)
    command.add_argument(
        "--workers", type=_from(1), help="processes that make images (default: what cores and memory allow)"
    )
    _add_config(command)


def _train_vae(commands: argparse._SubParsersAction) -> None:
    example = "ccella-fast train-vae --data out/prepared --out out/vae --config configs/demo.json"
    command = _add(
        commands, "train-vae", train_vae, "Train the autoencoder from scratch on prepared images (L1 + KL).", example
    )
    command.add_argument("--data", type=Path, required=True, help="prepared folder")
    command.add_argument("--out", type=Path, required=True, help="VAE folder")
    _add_config(command)


def _sample(commands: argparse._SubParsersAction) -> None:
    example = (
        'ccella-fast sample --checkpoint out/model --report "PI-RADS 5 lesion, left" --num_samples 4 --out out/samples'
    )
    about = "Generate volumes from reports: .nii.gz with geometry, a JSON sidecar each, and a montage."
    command = _add(commands, "sample", sample, about, example)
    command.add_argument("--checkpoint", type=Path, required=True, help="run folder, step folder or reference .pt")
    command.add_argument("--out", type=Path, required=True, help="folder for the volumes")
    command.add_argument("--report", action="append", help="report text; repeat for several")
    command.add_argument(
        "--report_file", action="append", type=Path, help="UTF-8 file with a report; repeat for several"
    )
    command.add_argument(
        "--num_samples", type=_from(1), default=1, help="volumes per report, seeds seed, seed+1, ... (default 1)"
    )
    command.add_argument(
        "--seed", type=_from(0), default=0, help="same seed, same volume, whatever the batch (default 0)"
    )
    command.add_argument(
        "--solver", metavar="NAME", help="ddpm, ddim, dpmpp_2m, dpmpp_2m_sde or unipc (default: the checkpoint's)"
    )
    command.add_argument("--num_inference_steps", type=_from(1), help="default: the checkpoint's")
    command.add_argument(
        "--spacing", type=float, nargs=3, metavar="MM", help="voxel size in mm (default: the training grid's)"
    )
    command.add_argument("--pirads", choices=["neg", "pos"], help="class, for variants that are given one")
    command.add_argument("--class_override", choices=["neg", "pos"], help="class, in place of the predicted one")
    command.add_argument(
        "--guidance_scale", type=float, help="classifier-free guidance against the null report (default 1: off)"
    )
    command.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar="FRACTION",
        help="part of the schedule it acts in (default 0 1)",
    )
    command.add_argument(
        "--reuse",
        type=_from(1),
        nargs=2,
        metavar=("INTERVAL", "DEPTH"),
        help="reuse deep features, e.g. 3 1 (default off)",
    )
    command.add_argument("--batch_size", type=_from(1), help="volumes at a time (default: the checkpoint's)")
    command.add_argument(
        "--batch_invariant", action="store_true", help="each volume alone: on a CPU equal bits whatever the batch"
    )
    command.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], help="of the weights (default auto: bf16 where it is fast)"
    )
    command.add_argument("--vae", type=Path, help="VAE, for a reference .pt (our checkpoints hold theirs)")
    command.add_argument("--overwrite", action="store_true", help="replace what lies in --out")


def _report(commands: argparse._SubParsersAction) -> None:
    about = "Write FOLDER/report.html: one offline page of curves, montages and timings."
    command = _add(commands, "report", report, about, "ccella-fast report out/demo")
    command.add_argument("folder", type=Path, help="folder that holds prepared/, vae/, model/ and samples/")


def _export(commands: argparse._SubParsersAction) -> None:
    about = "Write a checkpoint in the reference's layout, one .pt file."
    command = _add(commands, "export", export, about, "ccella-fast export --checkpoint out/model --out CCELLA.pt")
    command.add_argument("--checkpoint", type=Path, required=True, help="run folder or step folder")
    command.add_argument("--out", type=Path, required=True, help="file to write")
    command.add_argument("--weights", choices=["ema", "raw"], default="ema", help="which weights (default ema)")


def _env(commands: argparse._SubParsersAction) -> None:
    about = "Print versions, CPU, GPUs, each kernel's backend and why, and what is known to be slow here."
    command = _add(commands, "env", env, about, "ccella-fast env")
    command.add_argument("--json", action="store_true", help="as JSON, for a bug report")


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
            raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from {least}")
        return int(text)

    return number


def _add_config(command: argparse.ArgumentParser) -> None:
    about = "our JSON file, or the reference's env, config and def files (default: built-in defaults)"
    command.add_argument("--config", type=Path, nargs="+", metavar="FILE", help=about)
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. data.dim=[96,96,32]"
    )


if __name__ == "__main__":
    sys.exit(main())
