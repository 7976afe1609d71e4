"""The commands that train: train-vae, train, average."""

from __future__ import annotations

import argparse
from pathlib import Path

from ccella_fast import commands, train
from ccella_fast.cli.options import above_zero, add_command, add_config
from ccella_fast.entrypoint import whole_number


def add_train_vae(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast train-vae`."""
    example = "ccella-fast train-vae --data out/prepared --out out/vae --config configs/demo.json"
    about = "Train the autoencoder from scratch on prepared images (L1 + KL)."
    memory = "make vae_training.patch smaller, vae_training.batch_size smaller, or autoencoder.num_channels smaller"
    command = add_command(subparsers, "train-vae", commands.run_train_vae, about, example, if_out_of_memory=memory)
    command.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="prepared folder")
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="VAE folder")
    add_config(command, "vae_training", "autoencoder")


def add_train(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast train`."""
    example = "ccella-fast train --config configs/demo.json --data out/prepared --output_dir out/model --resume"
    about = (
        "Train the diffusion model on one device: train.py without a launcher. On several GPUs, start the script with one: "
        "deepspeed --num_gpus 8 ccella_fast/train.py, with the same options."
    )
    command = add_command(subparsers, "train", train.run, about, example, if_out_of_memory=train.IF_OUT_OF_MEMORY)
    train.add_arguments(command)


def add_average(subparsers: argparse._SubParsersAction) -> None:
    """`ccella-fast average`."""
    about = "Make a model with another average of a run's weights, from the snapshots of its power-function averages."
    example = "ccella-fast average --run out/model --width 0.08 --out out/averaged"
    command = add_command(subparsers, "average", commands.run_average, about, example)
    add = command.add_argument
    about = "run folder of a training with training.power_ema_snapshot_steps"
    add("--run", type=Path, required=True, metavar="FOLDER", help=about, dest="run_folder")
    about = "width of the average relative to the length of the training, such as 0.08"
    add("--width", type=above_zero, required=True, metavar="FRACTION", help=about)
    about = "step of the snapshot at which the average ends (default: the newest)"
    add("--step", type=whole_number(1), metavar="N", help=about)
    add("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the model")
