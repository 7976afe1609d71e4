"""Training of the diffusion model: `deepspeed ccella_fast/train.py`, or the same with `torchrun` or `python`."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccella_fast import entrypoint
from ccella_fast.errors import ConfigError
from ccella_fast.launchers import check_not_one_of_many
from ccella_fast.optional import require_installed

if TYPE_CHECKING:
    from ccella_fast.config import PathsConfig

EXAMPLE = f"""example:
  deepspeed ccella_fast/train.py --config configs/demo.json --data out/demo/prepared --output_dir out/demo/model --resume
  deepspeed --num_gpus 2 ccella_fast/train.py ... --deepspeed configs/deepspeed/zero2.json

{entrypoint.EXIT_CODES}
After a signal the checkpoint is saved first. A launcher may hide the code; OUTPUT_DIR/run_status.json does not."""
IF_OUT_OF_MEMORY = (
    "lower training.batch_size and raise training.gradient_accumulation_steps, set training.activation_checkpointing=true, "
    "or use ZeRO 2 or 3; --dry-run estimates the memory"
)
_SKIPPABLE = ["unet", "adapter", "class_heads", "unet.attention", "unet.class_input"]
# Names in the training scripts of diffusers -> ours; names of our settings are recognized without this table.
_INSTEAD = {
    "train_batch_size": "--set training.batch_size=N", "learning_rate": "--set training.lr=NUMBER",
    "num_train_epochs": "--set training.n_epochs=N", "mixed_precision": "--set training.precision=bf16",
    "gradient_checkpointing": "--set training.activation_checkpointing=true", "max_grad_norm": "--set training.max_grad_norm=N",
    "snr_gamma": "--set training.min_snr_gamma=5", "prediction_type": "--set scheduler.prediction=v",
    "proportion_empty_prompts": "--set training.report_dropout=0.1",
    "use_ema": "--set training.ema_decay=0.9999", "resume_from_checkpoint": "--resume",
    "dataset_name": "--data", "train_data_dir": "--data", "pretrained_model_name_or_path": "--init_from",
}  # fmt: skip


def main() -> int:
    """Parse the arguments, train, report an error in one message, and return the exit code."""
    entrypoint.adopt_launcher()
    arguments = _parser().parse_args()
    work = functools.partial(run, arguments)
    return entrypoint.run_command(work, debug=arguments.debug, if_out_of_memory=IF_OUT_OF_MEMORY)


def run(arguments: argparse.Namespace) -> int:
    """Train, or describe the run if it is a dry run. Returns the exit code."""
    from ccella_fast.config import load_config

    require_installed("deepspeed", "hjson", "tensorboard")
    check_not_one_of_many()
    three = [arguments.env_config, arguments.model_config, arguments.model_def]
    if (None in three) if arguments.config is None else any(three):
        fix = "give --config FILE alone, or all of --env_config, --model_config and --model_def"
        raise ConfigError("the configuration must be one file, or the reference's three files", fix=fix)
    overrides = list(arguments.set)
    for name in ("max_train_steps", "seed", "latents"):
        if getattr(arguments, name) is not None:
            overrides.append(f"training.{name}={getattr(arguments, name)}")
    if arguments.init_from is not None:
        overrides.append(f"paths.existing_ckpt_filepath={json.dumps(str(arguments.init_from))}")
    if arguments.init_skip:
        overrides.append(f"training.init_skip={json.dumps(arguments.init_skip)}")
    config = load_config(arguments.config or three, overrides)
    if arguments.extend_to is not None and arguments.dry_run:
        fix = "remove one of them"
        raise ConfigError("--dry-run describes a new run, and --extend_to continues one", field="--extend_to", fix=fix)
    data, output = (
        arguments.data or config.paths.embedding_base_dir,
        arguments.output_dir or _reference_run(config.paths),
    )
    if data is None or output is None:
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
        "run": Path(output),
        "deepspeed_file": Path(files[0]) if files else None,
        "allow": arguments.allow,
    }
    config.check_grid()
    _check_machine()
    if arguments.dry_run:
        from ccella_fast.training.dry_run import describe_run

        print(describe_run(config, as_json=arguments.json, **settings))
        return 0
    from ccella_fast.training.run import train

    resume = arguments.resume or (None if arguments.extend_to is None else "latest")
    code = train(config, resume=resume, extend_to=arguments.extend_to, make_previews=_make_previews, **settings)
    import torch.distributed as dist  # late, so that mistakes are reported before torch is imported

    if dist.is_initialized():  # it is not if the run was already complete
        dist.destroy_process_group()
    if code == 0:
        command = ["sample", "--checkpoint", output, "--out", entrypoint.sibling(Path(output), "samples")]
        entrypoint.log_next(output, ["ccella-fast", *command])
    return code


def _make_previews(*arguments: Any) -> Any:
    """What generates volumes during the training; imported only if it is asked for, because it needs most of the package."""
    from ccella_fast.sampling.preview import make_previews

    return make_previews(*arguments)


def _check_machine() -> None:
    """Refuse a DS_ACCELERATOR or a CCELLA_FAST_BACKEND that this machine cannot run, before anything is loaded."""
    accelerator = os.environ.get("DS_ACCELERATOR", "")
    if accelerator not in ("", "cpu", "cuda"):
        fix = "unset it, or set it to cpu or cuda"
        raise ConfigError(f"the accelerator '{accelerator:.40}' is not supported", field="DS_ACCELERATOR", fix=fix)
    import torch

    from ccella_fast.kernels.backend import check_environment

    if accelerator == "cuda" and not torch.cuda.is_available():
        why = "DS_ACCELERATOR is cuda, but PyTorch finds no GPU on this machine"
        raise ConfigError(why, field="DS_ACCELERATOR", fix="unset it, or set it to cpu")
    check_environment("cpu" if accelerator == "cpu" else None)


def _reference_run(paths: PathsConfig) -> Path | None:
    """The run folder that corresponds to the reference's model file: model_dir/model_filename without its suffix."""
    if paths.model_dir is None:
        return None
    return Path(paths.model_dir, Path(paths.model_filename or "").stem)


def _parser() -> argparse.ArgumentParser:
    parser = entrypoint.Parser(description="Train the diffusion model on a prepared folder.", epilog=EXAMPLE)
    entrypoint.add_version(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_arguments(parser)
    return parser


def add_arguments(parser: entrypoint.Parser) -> None:
    """Add the options of training, which `ccella-fast train` has too."""
    parser.instead = _instead
    add = parser.add_argument_group("data and output").add_argument
    about = "prepared folder (default: embedding_base_dir of --env_config)"
    add("--data", type=Path, metavar="FOLDER", help=about)
    about = "where the run is written (default: model_dir/model_filename of --env_config, without suffix)"
    add("--output_dir", type=Path, metavar="FOLDER", help=about)
    about = "continue from the newest checkpoint if there is one, or from this one"
    add("--resume", nargs="?", const="latest", metavar="STEP_FOLDER", help=about)
    about = "continue a run, also a finished one, to N optimizer steps; includes --resume"
    add("--extend_to", type=entrypoint.whole_number(1), metavar="N", help=about)
    add = parser.add_argument_group("start weights").add_argument
    about = "weights that a new run starts from: a run or step folder, or a file of the reference, MAISI or NV-Generate-CTMR"
    add("--init_from", type=Path, metavar="PATH", help=f"{about} (default: existing_ckpt_filepath of --env_config)")
    about = "parts that are not taken from the weights and start anew"
    add("--init_skip", nargs="+", choices=_SKIPPABLE, metavar="PART", help=f"{about}: {', '.join(_SKIPPABLE)}")
    add = parser.add_argument_group("configuration").add_argument
    add("--config", type=Path, metavar="FILE", help="the configuration, one JSON file")
    about = "the reference's {} file; give all three of its files in place of --config"
    add("--env_config", type=Path, metavar="FILE", help=about.format("env"))
    add("--model_config", type=Path, metavar="FILE", help=about.format("config"))
    add("--model_def", type=Path, metavar="FILE", help=about.format("def"))
    about = "length of the run in optimizer steps; once it has started, only --extend_to changes it"
    add("--max_train_steps", type=entrypoint.whole_number(1), metavar="N", help=about)
    about = "stored latents, or online: augmented and encoded during training (needs a folder prepared with --vae)"
    add("--latents", choices=["stored", "online"], help=f"{about}; default: training.latents")
    add("--seed", type=entrypoint.whole_number(0), metavar="N", help="seed of data order, noise and initial weights")
    about = "train although the data has this finding of `ccella-fast check`, for example leakage; may be repeated"
    add("--allow", action="append", default=[], metavar="NAME", help=about)
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting; may be repeated")
    add = parser.add_argument_group("DeepSpeed").add_argument
    about = "DeepSpeed file, whose values take precedence; without FILE the option has no effect"
    add("--deepspeed", nargs="?", const=True, metavar="FILE", help=about)
    add("--deepspeed_config", metavar="FILE", help="the same under DeepSpeed's own name")
    # Added by launchers; LOCAL_RANK has the same value.
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    add = parser.add_argument_group("dry run").add_argument
    about = "check the data, print settings, parameters, memory and disk space, and write nothing"
    add("--dry-run", "--dry_run", action="store_true", help=about)
    add("--json", action="store_true", help="print the dry run as JSON, with every setting")


def _instead(option: str) -> str | None:
    """What to give in place of an option that is a setting here, or that has another name."""
    from ccella_fast.config import Config
    from ccella_fast.config_errors import as_set_option

    known = _INSTEAD.get(option.lstrip("-").replace("-", "_"))
    return known or as_set_option(
        option, Config, ("model", "scheduler", "data", "augmentation", "training", "monitoring")
    )


if __name__ == "__main__":
    sys.exit(main())
