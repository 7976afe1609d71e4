"""Training of the diffusion model: `deepspeed ccella_fast/train.py`, or the same with `torchrun` or `python`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccella_fast import entrypoint
from ccella_fast.errors import ConfigError

if TYPE_CHECKING:
    from ccella_fast.config import PathsConfig

EXAMPLE = """example:
  deepspeed ccella_fast/train.py --config configs/demo.json --data out/demo/prepared --output_dir out/demo/model --resume
  deepspeed --num_gpus 2 ccella_fast/train.py ... --deepspeed configs/deepspeed/zero2.json

exit codes: 0 ok, 1 a bug, 2 usage or configuration, 3 data, 4 checkpoint, 5 disk, 6 non-finite loss,
130/143 stopped by a signal (the checkpoint is saved first). A launcher may hide them; OUTPUT_DIR/run_status.json does not."""


def main() -> int:
    """Parse the arguments, train, report an error in one message, and return the exit code."""
    arguments = _parser().parse_args()
    return entrypoint.run_command(lambda: _run(arguments), debug=arguments.debug)


def _run(arguments: argparse.Namespace) -> int:
    from ccella_fast.config import load_config

    three = [arguments.env_config, arguments.model_config, arguments.model_def]
    if (None in three) if arguments.config is None else any(three):
        fix = "give --config FILE alone, or all of --env_config, --model_config and --model_def"
        raise ConfigError("the configuration must be one file, or the reference's three files", fix=fix)
    overrides = list(arguments.set)
    if arguments.max_train_steps is not None:
        overrides.append(f"training.max_train_steps={arguments.max_train_steps}")
    if arguments.seed is not None:
        overrides.append(f"training.seed={arguments.seed}")
    if arguments.latents is not None:
        overrides.append(f"training.latents={arguments.latents}")
    config = load_config(arguments.config or three, overrides)
    if config.paths.existing_ckpt_filepath is not None:
        fix = "set it to null; --resume continues a run of ccella_fast"
        raise ConfigError("training cannot start from a reference checkpoint", field="existing_ckpt_filepath", fix=fix)
    data, run = arguments.data or config.paths.embedding_base_dir, arguments.output_dir or _reference_run(config.paths)
    if data is None or run is None:
        raise ConfigError(
            "the prepared folder and the output folder must be given",
            fix="add --data PREPARED_FOLDER and --output_dir FOLDER",
        )
    files = [file for file in (arguments.deepspeed, arguments.deepspeed_config) if file not in (None, True)]
    if len(files) > 1:
        raise ConfigError(
            f"two DeepSpeed files are given, {files[0]} and {files[1]}", field="--deepspeed", fix="give one of them"
        )
    settings: dict[str, Any] = {
        "data": Path(data),
        "run": Path(run),
        "deepspeed_file": Path(files[0]) if files else None,
        "allow": arguments.allow,
    }
    if arguments.dry_run:
        from ccella_fast.training.dry_run import describe_run

        print(describe_run(config, **settings))
        return 0
    from ccella_fast.training.run import train

    code = train(config, resume=arguments.resume, **settings)
    import torch.distributed as dist  # late, so that mistakes are reported before torch is imported

    if dist.is_initialized():  # it is not if the run was already complete
        dist.destroy_process_group()
    return code


def _reference_run(paths: PathsConfig) -> Path | None:
    """The run folder that corresponds to the reference's model file: model_dir/model_filename without its suffix."""
    if paths.model_dir is None:
        return None
    return Path(paths.model_dir, Path(paths.model_filename or "").stem)


def _parser() -> argparse.ArgumentParser:
    parser = entrypoint.Parser(description="Train the diffusion model on a prepared folder.", epilog=EXAMPLE)
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="our single configuration file")
    add("--env_config", type=Path, metavar="FILE", help="the reference's three files instead: env,")
    add("--model_config", type=Path, metavar="FILE", help="config")
    add("--model_def", type=Path, metavar="FILE", help="and def")
    add("--data", type=Path, metavar="FOLDER", help="prepared folder (default: embedding_base_dir of --env_config)")
    add(
        "--output_dir",
        type=Path,
        metavar="FOLDER",
        help="where the run is written (default: model_dir/model_filename of --env_config, without suffix)",
    )
    add(
        "--resume",
        nargs="?",
        const="latest",
        metavar="STEP_FOLDER",
        help="continue from the newest checkpoint if there is one, or from this one",
    )
    add(
        "--max_train_steps",
        type=int,
        metavar="N",
        help="length of the run in optimizer steps; fixed once it has started",
    )
    about = "stored latents, or online: augmented and encoded during training (needs a folder prepared with --vae)"
    add("--latents", choices=["stored", "online"], help=f"{about}; default: training.latents")
    add("--seed", type=int, metavar="N", help="seed of data order, noise and initial weights")
    about = "train although the data has this finding of `ccella-fast check`, for example leakage; may be repeated"
    add("--allow", action="append", default=[], metavar="NAME", help=about)
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting; may be repeated")
    add(
        "--deepspeed",
        nargs="?",
        const=True,
        metavar="FILE",
        help="DeepSpeed file, whose values take precedence; without FILE the option has no effect",
    )
    add("--deepspeed_config", metavar="FILE", help="the same under DeepSpeed's own name")
    add(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # added by launchers; LOCAL_RANK has the same value
    add(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="print resolved settings, parameters, memory and disk space, and write nothing",
    )
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
