"""The reference's three JSON files (env, config, def) translated to our sections, without running anything in them.

`_target_` must name one of the classes that we implement, `@name` refers to a plain top-level value, `$` expressions are
refused. Keys that the reference never reads, and keys that only choose an implementation, are known and dropped.
"""

from __future__ import annotations

from typing import Any

from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.variants import VARIANTS

# Reference key -> dotted key of ours.
_PATHS = {
    key: f"paths.{key}"
    for key in (
        "data_base_dir embedding_base_dir train_json test_json model_dir model_filename output_dir "
        "trained_autoencoder_path existing_ckpt_filepath"
    ).split()
}
_TRAIN = {"batch_size": "training.batch_size", "lr": "training.lr", "n_epochs": "training.n_epochs"}
_INFERENCE = {
    "dim": "data.dim",
    "random_seed": "sampling.random_seed",
    "num_inference_steps": "sampling.num_inference_steps",
}
_UNET = {
    key: f"model.{key}"
    for key in (
        "num_channels attention_levels num_head_channels num_res_blocks norm_num_groups norm_eps cross_attention_dim "
        "input_dim num_classes resblock_updown"
    ).split()
}
_AUTOENCODER = {
    key: f"autoencoder.{key}"
    for key in "in_channels out_channels latent_channels num_channels num_res_blocks norm_num_groups norm_eps".split()
}
_SCHEDULER = {key: f"scheduler.{key}" for key in "num_train_timesteps beta_start beta_end schedule clip_sample".split()}
_TOP = {"text_class_pred_weight": "training.text_class_pred_weight"}

# Known to the reference's files, without an effect on what we build. num_class_hidden never reached the heads
# (docs/explanation/method.md, section 2.3).
_DROPPED = {
    "env": {"tfevent_path", "output_prefix", "imkey"},
    "def": {
        "spatial_dims", "image_channels", "latent_channels", "autoencoder_latent_channels", "base_maisi",
        "use_text_conditioning", "use_text_class_pred", "use_pretrained_unet", "pretrained_unet_path", "freeze_unet",
        "mask_generation_latent_shape", "mask_generation_autoencoder_def", "mask_generation_diffusion_def",
        "mask_generation_scale_factor", "mask_generation_noise_scheduler", "controlnet_def",
    },
    "diffusion_unet_train": {"cache_rate", "imkey", "num_workers"},
    "diffusion_unet_inference": {"imkey", "pirads", "spacing"},  # its spacing is only ever logged
    "diffusion_unet_def": {
        "spatial_dims", "in_channels", "out_channels", "use_flash_attention", "include_pirads_input", "include_spacing_input",
        "with_conditioning", "upcast_attention", "num_class_hidden", "include_fc", "use_combined_linear",
    },
    "autoencoder_def": {
        "spatial_dims", "use_flash_attention", "use_checkpointing", "norm_float16", "num_splits", "dim_split", "print_info",
        "save_mem", "include_fc", "use_combined_linear",
    },
    "noise_scheduler": set(),
}  # fmt: skip
# Only this value is implemented; any other changes the result and is refused.
_REQUIRED = {
    "base_maisi": False,
    "use_pretrained_unet": False,
    "freeze_unet": False,
    "diffusion_unet_def.include_spacing_input": True,
    "autoencoder_def.attention_levels": [False, False, False],
    "autoencoder_def.with_encoder_nonlocal_attn": False,
    "autoencoder_def.with_decoder_nonlocal_attn": False,
    "autoencoder_def.use_convtranspose": False,
}
_TARGETS = {
    "autoencoder_def": {"AutoencoderKlMaisi"},
    "diffusion_unet_def": {row.target for row in VARIANTS.values()},
    "noise_scheduler": {"DDPMScheduler"},
}
_SEQUENCE_NAMES = {"axt2": ["t2w"], "b1600": ["hbv"], "adc": ["adc"], "multi": ["t2w", "hbv", "adc"]}

KEYS = {"diffusion_unet_def", "diffusion_unet_train", "data_base_dir", "autoencoder_def", "model_filename"}


def convert(files: list[tuple[Any, Any]]) -> dict[str, Any]:
    """`[(path, parsed JSON), ...]` -> nested values for `Config`; a later file wins. Raises ConfigError."""
    result: dict[str, Any] = {}
    for path, values in files:
        if not isinstance(values, dict):
            raise ConfigError("a configuration must be one JSON object", path=path, fix="start the file with {")
        for key, value in values.items():
            _convert_key(result, path, values, key, value)
        _convert_start(result, path, values)
    return result


def _convert_key(result: dict[str, Any], path: Any, values: dict[str, Any], key: str, value: Any) -> None:
    sections = {
        "diffusion_unet_train": _TRAIN,
        "diffusion_unet_inference": _INFERENCE,
        "diffusion_unet_def": _UNET,
        "autoencoder_def": _AUTOENCODER,
        "noise_scheduler": _SCHEDULER,
    }
    _refuse_expression(path, key, value)
    if key in sections:
        _convert_section(result, path, values, key, sections[key])
    elif key in _PATHS or key in _TOP:
        _set(result, _PATHS.get(key) or _TOP[key], value)
    elif key == "exp_name":
        _set(result, "name", value)
    elif key == "institute1":  # CCELLA++: train on this institution only
        _set(result, "data.dataset", "Institute1" if value else None)
    elif key in ("use_pretrained_unet", "freeze_unet") and value is True and values.get("use_text_conditioning"):
        pass  # see `_convert_start`; without a report the reference ignores both
    elif key in _DROPPED["env"] | _DROPPED["def"]:
        _require(path, key, value)
    else:
        known = [*sections, *_PATHS, *_TOP, "exp_name", "institute1", *_DROPPED["env"], *_DROPPED["def"]]
        raise ConfigError(f"unknown key '{key}'", path=path, field=key, fix=did_you_mean(key, known))
    if key == "imkey":
        name = str(value)
        if name not in _SEQUENCE_NAMES:
            fix = did_you_mean(name, _SEQUENCE_NAMES)
            raise ConfigError(f"unknown image key '{name:.80}'", path=path, field=key, fix=fix)
        _set(result, "data.sequences", _SEQUENCE_NAMES[name])


def _convert_start(result: dict[str, Any], path: Any, values: dict[str, Any]) -> None:
    """The definition file's keys for a U-Net that starts from weights, or keeps them."""
    if values.get("freeze_unet"):
        _set(result, "training.freeze", ["unet"])
    if values.get("use_pretrained_unet"):
        name = values.get("pretrained_unet_path")
        if not isinstance(name, str):
            fix = "add it, or set use_pretrained_unet to false"
            raise ConfigError("this key is missing", path=path, field="pretrained_unet_path", fix=fix)
        if result.get("paths", {}).get("existing_ckpt_filepath") is None:  # which has all weights, and comes first
            _set(result, "paths.existing_ckpt_filepath", name)
            _set(result, "training.init_skip", ["adapter", "class_heads"])


def _convert_section(
    result: dict[str, Any], path: Any, values: dict[str, Any], section: str, table: dict[str, str]
) -> None:
    body = values[section]
    if not isinstance(body, dict):
        raise ConfigError("this section must be a JSON object", path=path, field=section, fix="write it as {...}")
    for key, value in body.items():
        field = f"{section}.{key}"
        _refuse_expression(path, field, value)
        value = _resolve(path, field, value, values)
        if key == "_target_":
            _check_target(path, section, value)
        elif key in table:
            _set(result, table[key], value)
        elif key in _DROPPED[section] or field in _REQUIRED:
            _require(path, field, value)
        else:
            known = [*table, *_DROPPED[section], *(name.split(".")[-1] for name in _REQUIRED if section in name)]
            raise ConfigError(f"unknown key '{key}'", path=path, field=field, fix=did_you_mean(key, known))
    if section == "diffusion_unet_def":
        _set(result, "model.variant", _variant(path, values))
        channels = _resolve(path, f"{section}.in_channels", body.get("in_channels", 4), values)
        channels = _positive(path, f"{section}.in_channels", channels)
        each = values.get("autoencoder_latent_channels", min(channels, 4))
        each = _positive(path, "autoencoder_latent_channels", each)
        if channels % each:
            why = f"{channels} latent channels are not a multiple of the autoencoder's {each}"
            raise ConfigError(why, path=path, field="latent_channels", fix="check autoencoder_latent_channels")
        _set(result, "model.latent_channels", [each] * (channels // each))
        if channels // each == len(_SEQUENCE_NAMES["multi"]):
            _set(result, "data.sequences", _SEQUENCE_NAMES["multi"])


def _variant(path: Any, values: dict[str, Any]) -> str:
    """The reference's flags and module class, read back as a row of the table."""
    body = values["diffusion_unet_def"]
    target = str(body.get("_target_", "")).rsplit(".", 1)[-1]
    given = bool(body.get("include_pirads_input", False)) and not values.get("use_text_class_pred", False)
    no_class_loss = values.get("text_class_pred_weight", 1.0) == 0
    for row in VARIANTS.values():
        same_class = (row.class_input == "given") == given
        same_loss = target != "CCELLA_LDM" or (row.class_loss_weight == 0) == no_class_loss
        if row.target == target and same_class and same_loss:
            return row.name
    raise ConfigError(
        f"no variant has class {target} with these flags",
        path=path,
        field="diffusion_unet_def.include_pirads_input",
        fix="compare with the shipped definition files",
    )


def _check_target(path: Any, section: str, value: Any) -> None:
    name = str(value).rsplit(".", 1)[-1]
    if name not in _TARGETS[section]:
        fix = f"allowed: {', '.join(sorted(_TARGETS[section]))}"
        raise ConfigError(f"the class '{value}' is not allowed here", path=path, field=f"{section}._target_", fix=fix)


def _resolve(path: Any, field: str, value: Any, values: dict[str, Any]) -> Any:
    if not (isinstance(value, str) and value.startswith("@")):
        return value
    target = values.get(value[1:])
    if field == "autoencoder_def.latent_channels" and value == "@latent_channels":
        target = values.get("autoencoder_latent_channels", target)
    if target is None or isinstance(target, (dict, list)):
        fix = did_you_mean(value[1:], [key for key, entry in values.items() if not isinstance(entry, (dict, list))])
        raise ConfigError(f"'{value}' refers to nothing", path=path, field=field, fix=fix)
    return target


def _positive(path: Any, field: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"{value!r:.80} is not a positive whole number", path=path, field=field, fix="give a number of channels"
        )
    return value


def _refuse_expression(path: Any, field: str, value: Any) -> None:
    if isinstance(value, str) and value.startswith("$"):
        raise ConfigError(
            "expressions are not run from a config file", path=path, field=field, fix="write the plain value"
        )


def _require(path: Any, field: str, value: Any) -> None:
    needed = _REQUIRED.get(field, value)
    same = (
        all(not entry for entry in value)
        if field.endswith("attention_levels") and isinstance(value, list)
        else value == needed
    )
    if not same:
        raise ConfigError(f"{value!r} is not supported", path=path, field=field, fix=f"set it to {needed!r}")


def _set(result: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        result = result.setdefault(parent, {})
    result[last] = value
