"""The commands that generate volumes, and those that give a model away: sample, synthesize, export, push."""

from __future__ import annotations

import argparse
from pathlib import Path

from ccella_fast import commands
from ccella_fast.cli.options import above_zero, add_command, add_device
from ccella_fast.entrypoint import whole_number
from ccella_fast.pirads import CLASSES


def add_sample(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast sample`."""
    example = (
        'ccella-fast sample --checkpoint out/model --report "PI-RADS 5 lesion, left" --num_samples 4 --out out/samples'
    )
    about = "Generate volumes from reports: .nii.gz files with geometry, a JSON file with each, and a montage."
    memory = "use --batch_size 1, --dtype bfloat16, or --device with another device"
    command = add_command(subparsers, "sample", commands.run_sample, about, example, if_out_of_memory=memory)
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


def add_synthesize(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast synthesize`."""
    example = "ccella-fast synthesize --checkpoint out/model --data out/prepared --out out/synthetic"
    about = (
        "Generate a labelled set of synthetic studies, one or more from the report of each case, which `prepare` reads."
    )
    memory = "use --batch_size 1, --dtype bfloat16, or --device with another device"
    command = add_command(subparsers, "synthesize", commands.run_synthesize, about, example, if_out_of_memory=memory)
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


def add_export(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast export`."""
    about = "Write a checkpoint as one .pt file in the reference's format, or as a MONAI bundle."
    command = add_command(
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


def add_push(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast push`."""
    example = (
        "ccella-fast push --checkpoint model --repo my-group/prostate --license cc-by-nc-4.0 --vae_license nvidia.txt"
    )
    about = "Share a model on the Hugging Face hub, with a model card: data, licenses, evaluation, intended use."
    command = add_command(subparsers, "push", commands.run_push, about, example)
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
