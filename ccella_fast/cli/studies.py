"""The commands that make and prepare studies: phantom, import, check, prepare."""

from __future__ import annotations

import argparse
from pathlib import Path

from ccella_fast import commands
from ccella_fast.cli.options import add_command, add_config, add_studies
from ccella_fast.entrypoint import whole_number


def add_phantom(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast phantom`."""
    example = "ccella-fast phantom --out out/studies --num_studies 24"
    command = add_command(
        subparsers,
        "phantom",
        commands.run_phantom,
        "Draw synthetic T2 studies of a pelvis, with reports and classes.",
        example,
    )
    add = command.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for the studies")
    add("--num_studies", type=whole_number(1), default=24, metavar="N", help="number of studies (default 24)")
    about = "numbers of studies in train, val and test, in place of --num_studies; those of val and test do not depend on TRAIN"
    add("--splits", type=whole_number(0), nargs=3, metavar=("TRAIN", "VAL", "TEST"), help=about)
    add("--seed", type=whole_number(0), default=0, metavar="N", help="the same seed gives the same bytes (default 0)")
    about = "factor of the size of lesions, 0.3 to 2 (default 1)"
    add("--lesion_size", type=float, default=1.0, metavar="FACTOR", help=about)
    about = "factor of the contrast of lesions, 0 to 1 (default 1)"
    add("--lesion_contrast", type=float, default=1.0, metavar="FACTOR", help=about)
    about = "factor of the noise, 0 to 10 (default 1)"
    add("--noise", type=float, default=1.0, metavar="FACTOR", help=about)
    about = (
        "what reports say: full (default); no_scores: no PI-RADS category or score; no_findings: PSA and volume alone"
    )
    add("--reports", choices=["full", "no_scores", "no_findings"], default="full", help=about)


def add_import(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast import`."""
    example = "ccella-fast import --data EXPORT --out studies/ --reports reports.csv"
    about = (
        "Find the axial T2, high-b and ADC series of a PACS export (DICOM) and de-identify them: the first run shows the "
        "choice and writes no study; run it again with --write."
    )
    command = add_command(subparsers, "import", commands.run_import, about, example, if_out_of_memory="use --workers 1")
    add = command.add_argument
    add("--data", type=Path, required=True, metavar="FOLDER", help="folder of the export, in any layout")
    about = "folder for the studies; FOLDER.import gets the page and choices.csv"
    add("--out", type=Path, required=True, metavar="FOLDER", help=about)
    add("--write", action="store_true", help="write the studies as choices.csv says")
    about = "folder for the key from old to new ids, which must not be passed on (default: that of --out + .private)"
    add("--private", type=Path, metavar="FOLDER", help=about)
    about = "shares of train, val and test among new patients (default 0.7 0.15 0.15)"
    add("--split", type=float, nargs=3, default=(0.7, 0.15, 0.15), metavar=("TRAIN", "VAL", "TEST"), help=about)
    about = "number of processes that read files (default: as many as cores and memory allow)"
    add("--workers", type=whole_number(1), metavar="N", help=about)
    add = command.add_argument_group("reports").add_argument
    about = "CSV file of reports, or folder of .txt files named by accession number, study UID or patient id"
    add("--reports", type=Path, metavar="PATH", help=about)
    add("--report_column", metavar="NAME", help="column of the text, if it is not recognized")
    about = "column of accession number, study UID or patient id, if it is not recognized"
    add("--id_column", metavar="NAME", help=about)


def add_check(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast check`."""
    example = "ccella-fast check --data studies/ --config configs/ccella.json --out out/check"
    about = (
        "Find everything that is wrong with a data set in one pass: damaged files, classes, duplicates, leakage, sizes."
    )
    command = add_command(subparsers, "check", commands.run_check, about, example)
    add_studies(command, "folder or JSON list of studies, or prepared folder")
    add = command.add_argument_group("what is checked").add_argument
    about = "do not count this finding, for example leakage; may be repeated"
    add("--allow", action="append", default=[], metavar="NAME", help=about)
    about = "read only the headers of images: fast, but damaged voxels and copies are not found"
    add("--headers_only", action="store_true", help=about)
    add = command.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="FOLDER", help="folder for check.json and check.html (default: nothing is written)")
    add("--workers", type=whole_number(1), metavar="N", help="number of processes that read images")
    add_config(command, "data", "text")


def add_prepare(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast prepare`."""
    example = "ccella-fast prepare --data studies/ --out out/prepared --config configs/demo.json"
    about = "Resample studies to one grid, encode reports and, with --vae, latents. Run it again to continue or to add."
    memory = "use --workers 1, a smaller text.batch_size or text.encoder, or a smaller grid (data.dim)"
    command = add_command(subparsers, "prepare", commands.run_prepare, about, example, if_out_of_memory=memory)
    add_studies(command, "folder of studies, or a manifest in the reference's JSON form")
    add = command.add_argument_group("output").add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="prepared folder")
    about = "VAE folder or MAISI weight file; adds latents and the scale factor"
    add("--vae", type=Path, metavar="PATH", help=about)
    about = "also store N augmented latents per training study (needs --vae; 0: stop using them)"
    add("--augment", type=whole_number(0), metavar="N", help=about)
    about = (
        "also write a picture of every study before and after preparation, and with each augmentation at full strength"
    )
    add("--preview", action="store_true", help=about)
    about = "replace what --out holds for other settings or another autoencoder"
    add("--overwrite", action="store_true", help=about)
    add = command.add_argument_group("machine").add_argument
    about = "processes that make images (default: as many as cores and memory allow)"
    add("--workers", type=whole_number(1), metavar="N", help=about)
    add_config(command, "data", "text")
