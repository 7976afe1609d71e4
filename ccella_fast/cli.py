"""The command `ccella-fast` with its subcommands and their options. `ccella-fast train` is train.py, for one process.

What a subcommand does is in `commands.py`. Nothing slow is imported before the arguments are parsed, so that `--help` is
answered at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ccella_fast import commands, entrypoint, train
from ccella_fast.cli_options import above_zero, add_config, add_device, add_studies
from ccella_fast.data.readers.series_names import SEQUENCES
from ccella_fast.entrypoint import whole_number
from ccella_fast.pirads import CLASSES

ORDER = """The order of a project: your studies or phantom, prepare, train-vae, prepare --vae, train, sample, report.
On several GPUs, train with a launcher: deepspeed ccella_fast/train.py --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    entrypoint.adopt_launcher()
    arguments = _parser().parse_args(argv)

    def work() -> int:
        return arguments.run(arguments) or 0

    return entrypoint.run_command(work, debug=arguments.debug, if_out_of_memory=arguments.if_out_of_memory)


def _parser() -> argparse.ArgumentParser:
    parser = entrypoint.Parser(
        prog="ccella-fast",
        description="Report-conditioned 3D prostate MRI: prepare studies, train, sample, report.",
        epilog=f"{ORDER}\n\n{entrypoint.EXIT_CODES}",
    )
    entrypoint.add_version(parser)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    _phantom(subparsers)
    _import(subparsers)
    _check(subparsers)
    _prepare(subparsers)
    _train_vae(subparsers)
    _train(subparsers)
    _average(subparsers)
    _sample(subparsers)
    _synthesize(subparsers)
    _sensitivity(subparsers)
    _evaluate(subparsers)
    _classify(subparsers)
    _report(subparsers)
    _export(subparsers)
    _push(subparsers)
    _env(subparsers)
    return parser


def _phantom(subparsers: argparse._SubParsersAction) -> None:
    example = "ccella-fast phantom --out out/studies --num_studies 24"
    command = _add(
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


def _check(subparsers: argparse._SubParsersAction) -> None:
    example = "ccella-fast check --data studies/ --config configs/ccella.json --out out/check"
    about = (
        "Find everything that is wrong with a data set in one pass: damaged files, classes, duplicates, leakage, sizes."
    )
    command = _add(subparsers, "check", commands.run_check, about, example)
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


def _import(subparsers: argparse._SubParsersAction) -> None:
    example = "ccella-fast import --data EXPORT --out studies/ --reports reports.csv"
    about = (
        "Find the axial T2, high-b and ADC series of a PACS export (DICOM) and de-identify them: the first run shows the "
        "choice and writes no study; run it again with --write."
    )
    command = _add(subparsers, "import", commands.run_import, about, example, if_out_of_memory="use --workers 1")
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


def _prepare(subparsers: argparse._SubParsersAction) -> None:
    example = "ccella-fast prepare --data studies/ --out out/prepared --config configs/demo.json"
    about = "Resample studies to one grid, encode reports and, with --vae, latents. Run it again to continue or to add."
    memory = "use --workers 1, a smaller text.batch_size or text.encoder, or a smaller grid (data.dim)"
    command = _add(subparsers, "prepare", commands.run_prepare, about, example, if_out_of_memory=memory)
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


def _train_vae(subparsers: argparse._SubParsersAction) -> None:
    example = "ccella-fast train-vae --data out/prepared --out out/vae --config configs/demo.json"
    about = "Train the autoencoder from scratch on prepared images (L1 + KL)."
    memory = "make vae_training.patch smaller, vae_training.batch_size smaller, or autoencoder.num_channels smaller"
    command = _add(subparsers, "train-vae", commands.run_train_vae, about, example, if_out_of_memory=memory)
    command.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="prepared folder")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="VAE folder")
    add_config(command, "vae_training", "autoencoder")


def _train(subparsers: argparse._SubParsersAction) -> None:
    example = "ccella-fast train --config configs/demo.json --data out/prepared --output_dir out/model --resume"
    about = (
        "Train the diffusion model on one device: train.py without a launcher. On several GPUs, start the script with one: "
        "deepspeed --num_gpus 8 ccella_fast/train.py, with the same options."
    )
    command = _add(subparsers, "train", train.run, about, example, if_out_of_memory=train.IF_OUT_OF_MEMORY)
    train.add_arguments(command)


def _average(subparsers: argparse._SubParsersAction) -> None:
    about = "Make a model with another average of a run's weights, from the snapshots of its power-function averages."
    example = "ccella-fast average --run out/model --width 0.08 --out out/averaged"
    command = _add(subparsers, "average", commands.run_average, about, example)
    add = command.add_argument
    about = "run folder of a training with training.power_ema_snapshot_steps"
    add("--run", type=Path, required=True, metavar="FOLDER", help=about, dest="run_folder")
    about = "width of the average relative to the length of the training, such as 0.08"
    add("--width", type=above_zero, required=True, metavar="FRACTION", help=about)
    about = "step of the snapshot at which the average ends (default: the newest)"
    add("--step", type=whole_number(1), metavar="N", help=about)
    add("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the model")


def _sample(subparsers: argparse._SubParsersAction) -> None:
    example = (
        'ccella-fast sample --checkpoint out/model --report "PI-RADS 5 lesion, left" --num_samples 4 --out out/samples'
    )
    about = "Generate volumes from reports: .nii.gz files with geometry, a JSON file with each, and a montage."
    memory = "use --batch_size 1, --dtype bfloat16, or --device with another device"
    command = _add(subparsers, "sample", commands.run_sample, about, example, if_out_of_memory=memory)
    add = command.add_argument
    about = "run folder, step folder or reference .pt"
    add("--checkpoint", type=Path, required=True, metavar="PATH", help=about)
    about = "VAE, for a reference .pt (our checkpoints contain it)"
    add("--vae", type=Path, metavar="PATH", help=about)
    add = command.add_argument_group("conditioning").add_argument
    add("--report", action="append", metavar="TEXT", help="report text; may be repeated")
    about = "UTF-8 files, each with one report; their names without suffix are the report ids in samples.csv"
    add("--report_file", action="extend", nargs="+", type=Path, metavar="FILE", help=f"{about}; may be repeated")
    about = "table like studies.csv: its reports, with the cases as report ids"
    add("--report_table", type=Path, metavar="FILE", help=about)
    about = "PI-RADS 1 to 5 or class, for variants that take one as input"
    add("--pirads", choices=[*CLASSES], metavar="CLASS", help=f"{about}: {', '.join(CLASSES)}")
    about = "class that replaces the predicted one, as --pirads"
    add("--class_override", choices=[*CLASSES], metavar="CLASS", help=about)
    about = "voxel size in mm along R, A, S (default: the training grid's)"
    add("--spacing", type=above_zero, nargs=3, metavar="MM", help=about)
    sampling = command.add_argument_group("sampling")
    add = sampling.add_argument
    about = "number of volumes per report, with seeds seed, seed+1, ... (default 1)"
    add("--num_samples", type=whole_number(1), default=1, metavar="N", help=about)
    about = "the same seed gives the same volume in any batch (default 0)"
    add("--seed", type=whole_number(0), default=0, metavar="N", help=about)
    about = (
        "number the seeds on from one report to the next, so that no two volumes of the set begin from the same noise"
    )
    add("--distinct_seeds", action="store_true", help=about)
    _add_sampling(sampling)
    add = command.add_argument_group("output").add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for the volumes")
    about = "nifti: a .nii.gz file per volume (default); dicom: a folder with an MR series per volume"
    add("--format", choices=["nifti", "dicom"], default="nifti", help=about)
    add("--overwrite", action="store_true", help="replace existing samples in --out")
    _add_sampling_machine(command)


def _synthesize(subparsers: argparse._SubParsersAction) -> None:
    example = "ccella-fast synthesize --checkpoint out/model --data out/prepared --out out/synthetic"
    about = (
        "Generate a labelled set of synthetic studies, one or more from the report of each case, which `prepare` reads."
    )
    memory = "use --batch_size 1, --dtype bfloat16, or --device with another device"
    command = _add(subparsers, "synthesize", commands.run_synthesize, about, example, if_out_of_memory=memory)
    add = command.add_argument
    add("--checkpoint", type=Path, required=True, metavar="PATH", help="run folder, step folder or reference .pt")
    about = "VAE, for a reference .pt (our checkpoints contain it)"
    add("--vae", type=Path, metavar="PATH", help=about)
    group = command.add_argument_group("cases")
    sources = group.add_mutually_exclusive_group(required=True)
    about = "prepared folder: its text features, classes, voxel sizes and positions"
    sources.add_argument("--data", type=Path, metavar="FOLDER", help=about)
    about = "table like studies.csv in place of a prepared folder"
    sources.add_argument("--report_table", type=Path, metavar="FILE", help=about)
    about = "split of the cases in --data, and of the synthetic studies (default train)"
    group.add_argument("--split", choices=["train", "val", "test"], default="train", help=about)
    counts = group.add_mutually_exclusive_group()
    about = "studies from each case (default 1)"
    counts.add_argument("--per_case", type=whole_number(1), default=1, metavar="N", help=about)
    about = "studies of each class, from all cases of the class in turn"
    counts.add_argument("--per_class", type=whole_number(1), metavar="N", help=about)
    about = "class of a study in studies.csv: that of its case (report, default), or the model's prediction (predicted)"
    group.add_argument("--label", choices=["report", "predicted"], default="report", help=about)
    sampling = command.add_argument_group("sampling")
    about = "seed of the set: the noise of a study depends on it, its case and its number alone (default 0)"
    sampling.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help=about)
    _add_sampling(sampling)
    add = command.add_argument_group("output").add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for the studies")
    _add_sampling_machine(command)


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    """Options of how volumes are generated."""
    add = group.add_argument
    about = "ddpm, ddim, dpmpp_2m, dpmpp_2m_sde or unipc; of a flow model euler_flow or heun_flow (default: the checkpoint's)"
    add("--solver", metavar="NAME", help=about)
    about = "denoising steps (default: the checkpoint's)"
    add("--num_inference_steps", type=whole_number(1), metavar="N", help=about)
    about = "classifier-free guidance against the null report (default 1, which is off)"
    add("--guidance_scale", type=float, metavar="SCALE", help=about)
    about = "weaker model of the same training: guidance is against its prediction, not that for the null report"
    add("--autoguidance", type=Path, metavar="PATH", help=about)
    about = "part of the schedule in which guidance acts (default 0 1)"
    add("--guidance_interval", type=float, nargs=2, metavar="FRACTION", help=about)
    about = "reuse deep features between steps, for example 3 1 (default off)"
    add("--reuse", type=whole_number(1), nargs=2, metavar=("INTERVAL", "DEPTH"), help=about)


def _add_sampling_machine(command: argparse.ArgumentParser) -> None:
    """Options of what volumes are generated on."""
    add = command.add_argument_group("machine").add_argument
    add_device(add)
    about = "volumes denoised at a time (default: the checkpoint's)"
    add("--batch_size", type=whole_number(1), metavar="N", help=about)
    about = "process each volume alone, so that on a CPU its bits do not depend on the batch"
    add("--batch_invariant", action="store_true", help=about)
    about = "data type of the weights (default auto: bf16 where it is fast)"
    add("--dtype", choices=["auto", "float32", "bfloat16"], help=about)


def _sensitivity(subparsers: argparse._SubParsersAction) -> None:
    example = "ccella-fast sensitivity --real prepared:test --out evaluation"
    about = "Show which features can judge: do they order blur, noise and gland size of real volumes? Run it before evaluate."
    command = _add(subparsers, "sensitivity", commands.run_sensitivity, about, example)
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


def _evaluate(subparsers: argparse._SubParsersAction) -> None:
    example = "ccella-fast evaluate --real prepared:test --synthetic samples --train prepared:train --out evaluation"
    about = (
        "Compare generated volumes with real ones: distances in several feature spaces, each with its floor and an interval; "
        "diversity, copies of training studies, anatomy, agreement with the class."
    )
    command = _add(subparsers, "evaluate", commands.run_evaluate, about, example)
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
    add_device(command.add_argument_group("machine").add_argument)


def _classify(subparsers: argparse._SubParsersAction) -> None:
    example = "ccella-fast classify --real prepared --synthetic synthetic_prepared --seeds 8 --out classify"
    about = (
        "Train classifiers on real, generated and both kinds of studies, and compare them on real ones: is a classifier "
        "better with generated studies?"
    )
    memory = "use a smaller --batch_size, --backbone small, or --device with another device"
    command = _add(subparsers, "classify", commands.run_classify, about, example, if_out_of_memory=memory)
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
    about = "share of the training patients that validate if there is no split val (default 0.2; 0: none)"
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


def _report(subparsers: argparse._SubParsersAction) -> None:
    about = "Write FOLDER/report.html: one page of the evaluation, curves, montages and timings that needs no network."
    command = _add(subparsers, "report", commands.run_report, about, "ccella-fast report out/demo")
    about = "folder that contains prepared/, vae/, model/, samples/ and evaluation/, or the folder of an evaluation"
    command.add_argument("folder", type=Path, metavar="FOLDER", help=about)
    about = (
        "table of the reports that were prompts, as for evaluate: the generated volumes are marked where the report has "
        "a lesion"
    )
    command.add_argument("--findings", type=Path, metavar="FILE", help=about)


def _export(subparsers: argparse._SubParsersAction) -> None:
    about = "Write a checkpoint as one .pt file in the reference's format, or as a MONAI bundle."
    command = _add(
        subparsers, "export", commands.run_export, about, "ccella-fast export --checkpoint out/model --out CCELLA.pt"
    )
    add = command.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FOLDER", help="run folder or step folder")
    add("--out", type=Path, required=True, metavar="PATH", help="file to write; for a bundle, the folder")
    about = "reference: a .pt file (default); monai-bundle: a folder that monai.bundle loads and runs"
    add("--format", choices=["reference", "monai-bundle"], default="reference", help=about)
    about = "averaged or raw weights (default ema)"
    add("--weights", choices=["ema", "raw"], default="ema", help=about)
    about = "name of the text encoder on the hub, for a bundle of a model that was trained with a folder"
    add("--text_encoder", metavar="NAME", help=about)


def _push(subparsers: argparse._SubParsersAction) -> None:
    example = (
        "ccella-fast push --checkpoint model --repo my-group/prostate --license cc-by-nc-4.0 --vae_license nvidia.txt"
    )
    about = "Share a model on the Hugging Face hub, with a model card: data, licenses, evaluation, intended use."
    command = _add(subparsers, "push", commands.run_push, about, example)
    add = command.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FOLDER", help="run folder or step folder")
    add("--repo", required=True, metavar="OWNER/NAME", help="repository on the hub, created if it does not exist")
    add("--private", action="store_true", help="only the owner can see the repository")
    about = "write the files to a new folder to look at them, and upload nothing"
    add("--out", type=Path, metavar="FOLDER", help=about)
    add = command.add_argument_group("weights").add_argument
    add("--weights", choices=["ema", "raw"], help="averaged or raw weights (default: averaged, if there are any)")
    add("--vae", type=Path, metavar="PATH", help="VAE, if the checkpoint does not contain one")
    about = "name of the text encoder on the hub, if the model was trained with a folder"
    add("--text_encoder", metavar="NAME", help=about)
    add = command.add_argument_group("model card").add_argument
    about = "license of the diffusion model: an identifier such as cc-by-nc-4.0, or a file with the text"
    add("--license", metavar="ID", help=about)
    add("--vae_license", metavar="ID", help="license of the autoencoder, as --license")
    about = "what `ccella-fast evaluate` wrote for samples of these weights"
    add("--evaluation", type=Path, metavar="FOLDER", help=about)


def _env(subparsers: argparse._SubParsersAction) -> None:
    about = "Print versions, CPU, GPUs, the backend of each kernel with the reason, and known problems of this machine."
    command = _add(subparsers, "env", commands.run_env, about, "ccella-fast env")
    command.add_argument("--json", action="store_true", help="print JSON, for a bug report")


def _add(
    subparsers: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    about: str,
    example: str,
    *,
    if_out_of_memory: str = entrypoint.LESS_MEMORY,
) -> entrypoint.Parser:
    command = subparsers.add_parser(
        name,
        help=about.split(":")[0],
        description=about,
        epilog=f"example: {example}\n\n{entrypoint.EXIT_CODES}",
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run, if_out_of_memory=if_out_of_memory)
    return command


if __name__ == "__main__":
    sys.exit(main())
