"""The commands that judge what was generated: sensitivity, evaluate, classify, compare, report."""

from __future__ import annotations

import argparse
from pathlib import Path

from ccella_fast import commands
from ccella_fast.cli.options import above_zero, add_command, add_device
from ccella_fast.data.readers.series_names import SEQUENCES
from ccella_fast.entrypoint import whole_number


def add_sensitivity(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast sensitivity`."""
    example = "ccella-fast sensitivity --real prepared:test --out evaluation"
    about = "Show which features can judge: do they order blur, noise and gland size of real volumes? Run it before evaluate."
    command = add_command(subparsers, "sensitivity", commands.run_sensitivity, about, example)
    add = command.add_argument
    add("--real", required=True, metavar="FOLDER", help="real volumes, as for evaluate")
    about = "folder for sensitivity.json, that of evaluate (default evaluation)"
    add("--out", type=Path, default=Path("evaluation"), metavar="FOLDER", help=about)
    add("--features", nargs="+", metavar="NAME", help="as for evaluate")
    add("--allow_unknown_weights", action="store_true", help="as for evaluate")
    about = "volumes that are degraded in eight ways each (default 8)"
    add("--num_volumes", type=whole_number(3), default=8, metavar="N", help=about)
    add("--seed", type=whole_number(0), default=0, metavar="N", help="of the random halves (default 0)")
    add_device(add)


def add_evaluate(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast evaluate`."""
    example = "ccella-fast evaluate --real prepared:test --synthetic samples --train prepared:train --out evaluation"
    about = (
        "Compare generated volumes with real ones: distances in several feature spaces, each with its floor and an interval; "
        "diversity, copies of training studies, anatomy, agreement with the class."
    )
    command = add_command(subparsers, "evaluate", commands.run_evaluate, about, example)
    volumes = "prepared folder (or FOLDER:test, a split of it), folder of samples, or folder of NIfTI files"
    add = command.add_argument_group("volumes").add_argument
    add("--real", required=True, metavar="FOLDER", help=f"volumes that the generator was not trained on: {volumes}")
    add("--synthetic", required=True, metavar="FOLDER", help="generated volumes, of this or any other generator")
    add("--train", metavar="FOLDER", help="volumes that the generator was trained on, to look for copies of them")
    about = "autoencoder of the generator, whose limit is shown too (needs the latents of a prepared folder)"
    add("--vae", type=Path, metavar="PATH", help=about)
    about = (
        "table of the real cases and of the prompts (column case) with any of side, zone, level, lesion_size_mm, report"
    )
    add("--findings", type=Path, metavar="FILE", help=about)
    about = "samples of the same seeds as --synthetic and another class or report, to see what that changes"
    add("--counterfactual", metavar="FOLDER", help=about)
    about = "safetensors file of a text-image model's vectors: report/NAME, synthetic/ID and, if wanted, real/ID"
    add("--embeddings", type=Path, metavar="FILE", help=about)
    about = "those that are compared (default: all, which all folders must have)"
    add("--sequences", nargs="+", choices=SEQUENCES, metavar="NAME", help=f"{about}: {', '.join(SEQUENCES)}")
    add = command.add_argument_group("what is computed").add_argument
    about = "taps, radiomics, random, medicalnet=FILE[:INPUT], radimagenet=FILE[:INPUT] (default: the first three)"
    add("--features", nargs="+", metavar="NAME", help=about)
    about = "accept weight files whose SHA-256 is not known; their architecture is checked all the same"
    add("--allow_unknown_weights", action="store_true", help=about)
    about = "fd kid mmd prdc c2st intensity spectrum msssim memorisation anatomy condition (default: all that apply)"
    add("--metrics", nargs="+", metavar="NAME", help=about)
    about = "random splits for floors and intervals (default 100)"
    add("--draws", type=whole_number(2), default=100, metavar="N", help=about)
    add("--seed", type=whole_number(0), default=0, metavar="N", help="of the splits (default 0)")
    add = command.add_argument_group("output").add_argument
    about = "folder for metrics.json; features are kept in it, so that the same command continues"
    add("--out", type=Path, default=Path("evaluation"), metavar="FOLDER", help=f"{about} (default evaluation)")
    about = "folder of features, which several evaluations of the same volumes may share (default: features in --out)"
    add("--cache", type=Path, metavar="FOLDER", help=about)
    add_device(command.add_argument_group("machine").add_argument)


def add_classify(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast classify`."""
    example = "ccella-fast classify --real prepared --synthetic prepared_synthetic --seeds 8 --out classify"
    about = (
        "Train classifiers on real, generated and both kinds of studies, and compare them on real ones: is a classifier "
        "better with generated studies?"
    )
    memory = "use a smaller --batch_size, --backbone small, or --device with another device"
    command = add_command(subparsers, "classify", commands.run_classify, about, example, if_out_of_memory=memory)
    add = command.add_argument_group("studies").add_argument
    about = "prepared folder of real studies with classes, with the splits train and test and, if wanted, val"
    add("--real", type=Path, required=True, metavar="FOLDER", help=about)
    about = "prepared folders of generated studies: one for each training seed of the generator"
    add("--synthetic", type=Path, nargs="+", default=[], metavar="FOLDER", help=about)
    about = "the same of another generator, for the arm rb"
    add("--baseline", type=Path, nargs="+", default=[], metavar="FOLDER", help=about)
    about = "autoencoder of the generator, for the arm v (needs the latents of --real)"
    add("--vae", type=Path, metavar="PATH", help=about)
    about = "use only N of the real training studies, in the proportion of their classes"
    add("--num_real", type=whole_number(2), metavar="N", help=about)
    about = (
        "share of the training patients that are set aside for validation without a split val (default 0.2; 0: none)"
    )
    add("--validation_fraction", type=float, default=0.2, metavar="FRACTION", help=about)
    add = command.add_argument_group("what is trained").add_argument
    about = (
        "r (real), rr (real twice), v (reconstructed), s (synthetic), sl (synthetic, class as predicted), rs, rsl (both), "
        "rb (real and baseline) (default: all for which everything is there)"
    )
    add("--arms", nargs="+", metavar="ARM", help=about)
    about = "classifiers for each arm and generator, with the seeds 0 to N-1 (default 5)"
    add("--seeds", type=whole_number(1), default=5, metavar="N", help=about)
    about = (
        "matched: equal updates and equal parts of each source (default); reference: equal epochs, with the settings of "
        "the reference implementation"
    )
    add("--protocol", choices=["matched", "reference"], default="matched", help=about)
    about = "efficientnet-b0 (default), or small for grids with fewer than 32 voxels"
    add("--backbone", choices=["efficientnet-b0", "small"], help=about)
    add("--updates", type=whole_number(1), metavar="N", help="updates of the weights (default 2000)")
    add("--batch_size", type=whole_number(1), metavar="N", help="studies in a batch (default 16)")
    add("--lr", type=above_zero, metavar="RATE", help="learning rate (default 1e-4; of the small network 3e-3)")
    add = command.add_argument_group("what is compared").add_argument
    about = "arms are equivalent if their accuracy differs by less than these points (default 5)"
    add("--margin", type=float, default=5.0, metavar="POINTS", help=about)
    about = "differences that the experiment is made for; the others are exploratory (default rs-rr)"
    add("--primary", nargs="+", default=["rs-rr"], metavar="ARM-ARM", help=about)
    add = command.add_argument_group("output").add_argument
    about = (
        "folder for classify.json, table.md and the predictions; the same command continues there (default classify)"
    )
    add("--out", type=Path, default=Path("classify"), metavar="FOLDER", help=about)
    add_device(command.add_argument_group("machine").add_argument)


def add_compare(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast compare`."""
    example = "ccella-fast compare --preset mini --config configs/demo.json --out out/compare --jobs 2"
    about = (
        "Variants and seeds through training, synthesis, evaluation and classification, by a protocol that is written first: "
        "the experiment of the paper at any size. Run it again to continue."
    )
    command = add_command(subparsers, "compare", commands.run_compare, about, example)
    add = command.add_argument
    about = (
        "smoke (minutes; shows nothing), mini (two variants; hours on two cores), table (nine variants), paper (--data)"
    )
    add("--preset", choices=["smoke", "mini", "table", "paper"], default="mini", help=f"{about} (default mini)")
    about = "configuration of the variants, of which the presets of phantoms change grid, network and steps"
    add("--config", type=Path, required=True, metavar="FILE", help=about)
    about = "folder for everything; comparison.json, table.md, table.csv, table.tex and report.html are the results"
    add("--out", type=Path, required=True, metavar="FOLDER", help=about)
    about = "folder of studies with the splits train, val and test, for --preset paper; distances are measured to val"
    add("--data", type=Path, metavar="FOLDER", help=about)
    about = "autoencoder, in place of one that is trained on the training studies"
    add("--vae", type=Path, metavar="PATH", help=about)
    about = "variants in place of the preset's; the first is compared with the second"
    add("--variants", nargs="+", metavar="NAME", help=about)
    about = "weights that the trainings of a variant start from; may be repeated"
    add("--init_from", nargs=2, action="append", default=[], metavar=("VARIANT", "PATH"), help=about)
    add("--seeds", type=whole_number(2), metavar="N", help="trainings of each variant, in place of the preset's")
    about = "commands at a time, which share the cores (default 1)"
    add("--jobs", type=whole_number(1), default=1, metavar="N", help=about)


def add_report(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast report`."""
    about = "Write FOLDER/report.html: one page of the evaluation, curves, montages and timings that needs no network."
    command = add_command(subparsers, "report", commands.run_report, about, "ccella-fast report out/demo")
    about = "folder that contains prepared/, vae/, model/, samples/ and evaluation/, or the folder of an evaluation"
    command.add_argument("folder", type=Path, metavar="FOLDER", help=about)
    about = (
        "table of the reports that were prompts, as for evaluate: the generated volumes are marked where the report has "
        "a lesion"
    )
    command.add_argument("--findings", type=Path, metavar="FILE", help=about)
