"""Configuration: both file forms, refusals, overrides."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from ccella_fast import load_config
from ccella_fast.config import Config, make_config
from ccella_fast.errors import ConfigError
from ccella_fast.variants import VARIANTS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def reference_files(variant: str) -> list[Path]:
    return [CONFIGS / f"{variant}_{part}.json" for part in ("env", "config", "def")]


def write(folder: Path, values: object) -> Path:
    path = folder / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_files_of_every_variant(variant):
    config = load_config(reference_files(variant))
    assert config.model.variant == variant and config.name == variant
    assert config.training.batch_size == 8 and config.training.lr == 1e-4 and config.training.n_epochs == 400
    assert config.data.dim == [256, 256, 128] and config.check_grid() == [64, 64, 32]
    assert config.data.spacing == [0.5, 0.5, 0.5625]  # the reference's inference.spacing is only logged
    assert config.class_loss_weight == VARIANTS[variant].class_loss_weight
    assert config.paths.model_filename == f"{variant}.pt" and config.sampling.num_inference_steps == 1000


UNREAD = {
    "paths": ["data_base_dir", "train_json", "test_json", "output_dir", "trained_autoencoder_path"],
    "sampling": ["random_seed"],
}


def test_settings_that_nothing_reads_are_ignored_with_one_warning(tmp_path, caplog):
    """Those of the reference's files and of configurations that earlier releases stored."""
    paths = reference_files("CCELLA")
    values = json.loads(paths[1].read_text())
    values["diffusion_unet_inference"]["random_seed"] = 7
    changed = tmp_path / "CCELLA_config.json"
    changed.write_text(json.dumps(values))
    for _ in range(2):
        config = load_config([paths[0], changed, paths[2]])
    assert len(caplog.messages) == 1 and all(key in caplog.text for keys in UNREAD.values() for key in keys)
    assert "(use --seed)" in caplog.text and "embedding_base_dir" not in caplog.text
    assert config == load_config(paths)
    assert not any(key in config.dump()[section] for section, keys in UNREAD.items() for key in keys)

    caplog.clear()
    stored = config.dump()
    stored["paths"] |= dict.fromkeys(UNREAD["paths"])
    stored["sampling"]["random_seed"] = 0
    assert load_config(write(tmp_path, stored)) == config and not caplog.messages  # defaults, spelt out
    stored["sampling"]["random_sed"] = 0
    with pytest.raises(ConfigError, match="unknown key 'random_sed'"):
        load_config(write(tmp_path, stored))


def test_ccella_plus_plus_definition(tmp_path):
    values = json.loads((CONFIGS / "CCELLA_def.json").read_text())
    values |= {"latent_channels": 12, "autoencoder_latent_channels": 4}
    values["autoencoder_def"]["latent_channels"] = "@autoencoder_latent_channels"
    config = load_config([write(tmp_path, values)])
    assert config.model.latent_channels == [4, 4, 4] and config.autoencoder.latent_channels == 4
    assert config.data.sequences == ["t2w", "hbv", "adc"]


def test_dump_reads_back_equal(tmp_path):
    config = load_config(reference_files("SHARED"), ["training.lr=3e-4", "data.dim=[96,96,32]"])
    assert load_config(write(tmp_path, config.dump())) == config
    assert load_config(write(tmp_path, config.dump()), {"training.lr": 1e-3}) != config


def test_single_file_keeps_defaults(tmp_path):
    config = load_config(write(tmp_path, {"training": {"lr": 0.5}}))
    assert config.training.lr == 0.5 and config.model == Config().model


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"trainin": {}}, "trainin", "did you mean 'training'?"),
        ({"training": {"batchsize": 2}}, "training.batchsize", "did you mean 'batch_size'?"),
        ({"training": {"lr": -1}}, "training.lr", "greater than 0"),
        ({"training": {"lr": float("nan")}}, "training.lr", ""),
        ({"model": {"variant": "CCELA"}}, "model.variant", "did you mean 'CCELLA'?"),
        ({"model": {"num_channels": [60, 64, 64, 64]}}, "model", "not divisible by norm_num_groups"),
        ({"model": {"attention_levels": [True]}}, "model", "one entry per level"),
        ({"data": {"sequences": ["t2w", "adc"]}}, None, "one entry per sequence"),
        ({"data": {"sequences": ["t2"]}}, "data.sequences.0", "t2w"),
        ({"sampling": {"solver": "dpm"}}, "sampling.solver", "ddim"),
        ({"vae_training": {"warmup_fraction": 1}}, "vae_training.warmup_fraction", "less than 1"),
        ({"vae_training": {"max_warmup_steps": 0}}, "vae_training.max_warmup_steps", "greater than 0"),
        ({"vae_training": {"final_lr_fraction": 1.5}}, "vae_training.final_lr_fraction", "from 0 to 1"),
        ({"vae_training": {"weight_decay": -0.1}}, "vae_training.weight_decay", "at least 0"),
        ({"vae_training": {"adam_betas": [0.9, 1]}}, "vae_training.adam_betas.1", "less than 1"),
        ({"vae_training": {"max_grad_norm": 0}}, "vae_training.max_grad_norm", "greater than 0"),
        (
            {"vae_training": {"checkpointing_seconds": -1}},
            "vae_training.checkpointing_seconds",
            "at least 0",
        ),
        ({"scheduler": {"beta_end": 2.0}}, "scheduler.beta_end", "less than 1"),
        ({"training": {"a\nb\nc\nd": 1}}, "training.a\nb\nc\nd", "unknown key 'a b c d'"),
    ],
)
def test_refusals_name_field_and_fix(tmp_path, change, field, words):
    path = write(tmp_path, change)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert caught.value.field == field and str(path) in message and words in message and "fix:" in message
    assert len(message.splitlines()) <= 5


def test_malformed_json_names_line_and_column(tmp_path):
    with pytest.raises(ConfigError, match="line 2, column 3"):
        load_config(write(tmp_path, "{\n  training: 1}"))
    with pytest.raises(ConfigError, match="'a' appears twice"):
        load_config(write(tmp_path, '{"a": 1, "a": 2}'))
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config(write(tmp_path, "[" * 200_000))


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("diffusion_unet_def", "_target_", "os.system", "not allowed"),
        ("diffusion_unet_def", "num_res_blocks", "$__import__('os').system('true')", "not run"),
        ("diffusion_unet_def", "num_chanels", [64], "did you mean 'num_channels'?"),
        ("diffusion_unet_def", "in_channels", "@nothing", "refers to nothing"),
        ("autoencoder_def", "use_convtranspose", True, "not supported"),
        ("autoencoder_def", "attention_levels", [False, True, False], "not supported"),
        ("noise_scheduler", "_target_", "monai.networks.schedulers.pndm.PNDMScheduler", "allowed: DDPMScheduler"),
    ],
)
def test_reference_files_run_nothing_and_drop_nothing(tmp_path, section, key, value, words):
    values = json.loads((CONFIGS / "CCELLA_def.json").read_text())
    values[section][key] = value
    with pytest.raises(ConfigError) as caught:
        load_config([write(tmp_path, values)])
    assert words in str(caught.value) and caught.value.field == f"{section}.{key}"


def test_every_number_of_the_references_files_arrives(tmp_path):
    """Other values than the reference's, so that none can be a default of ours."""
    names = "embedding_base_dir model_dir model_filename existing_ckpt_filepath"
    given = {
        None: {"exp_name": "mine", "institute1": True, **{name: f"of/{name}" for name in names.split()}},
        "diffusion_unet_train": {"batch_size": 3, "lr": 0.5, "n_epochs": 7},
        "diffusion_unet_inference": {"dim": [64, 96, 32], "num_inference_steps": 77},
        "diffusion_unet_def": {
            "num_channels": [48, 96], "attention_levels": [True, False], "num_head_channels": [16, 24], "num_res_blocks": 1,
            "norm_num_groups": 24, "norm_eps": 0.25, "cross_attention_dim": 40, "input_dim": 56, "num_classes": 2,
        },
        "autoencoder_def": {
            "num_channels": [6, 12], "num_res_blocks": [3, 4], "norm_num_groups": 3, "norm_eps": 0.125,
        },
        "noise_scheduler": {
            "num_train_timesteps": 50, "beta_start": 0.01, "beta_end": 0.02,
        },
    }  # fmt: skip
    files = [json.loads(path.read_text()) for path in reference_files("CCELLA")]
    for section, changes in given.items():
        values = next(values for values in files if section is None or section in values)
        (values if section is None else values[section]).update(changes)
    paths = [tmp_path / f"{number}.json" for number in range(3)]
    for path, values in zip(paths, files, strict=True):
        path.write_text(json.dumps(values))
    config = load_config(paths).dump()
    sections = {
        "diffusion_unet_train": ["training"], "diffusion_unet_inference": ["data", "sampling"],
        "diffusion_unet_def": ["model"], "autoencoder_def": ["autoencoder"], "noise_scheduler": ["scheduler"],
    }  # fmt: skip
    for section, names_of_ours in sections.items():
        ours = {key: value for name in names_of_ours for key, value in config[name].items()}
        assert {key: ours[key] for key in given[section]} == given[section]
    assert config["paths"] == {name: f"of/{name}" for name in names.split()}
    assert config["name"] == "mine" and config["data"]["dataset"] == "Institute1"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "base_maisi", True),
        ("diffusion_unet_def", "include_spacing_input", False),
        ("autoencoder_def", "with_encoder_nonlocal_attn", True),
        ("autoencoder_def", "with_decoder_nonlocal_attn", True),
    ],
)
def test_what_would_be_another_network_is_refused(tmp_path, section, key, value):
    values = json.loads((CONFIGS / "CCELLA_def.json").read_text())
    body = values[section] if section else values
    body[key] = not value
    load_config([write(tmp_path, values)])
    body[key] = value
    with pytest.raises(ConfigError, match=f"set it to {not value}"):
        load_config([write(tmp_path, values)])


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("diffusion_unet_def", "in_channels", "many"),
        ("diffusion_unet_def", "in_channels", 0),
        (None, "autoencoder_latent_channels", 0),
        (None, "imkey", ["axt2"]),
        (None, "imkey", 3),
    ],
)
def test_reference_files_with_values_of_a_wrong_type(tmp_path, section, key, value):
    values = json.loads((CONFIGS / "CCELLA_def.json").read_text())
    (values[section] if section else values)[key] = value
    with pytest.raises(ConfigError) as caught:
        load_config([write(tmp_path, values)])
    assert caught.value.field == (f"{section}.{key}" if section else key)


def test_the_three_files_in_any_order_and_a_list_of_one():
    files = reference_files("DECOUPLED")
    assert len({json.dumps(load_config(list(order)).dump()) for order in itertools.permutations(files)}) == 1
    assert load_config(files[:1]).name == "DECOUPLED" and load_config(files[:2]).model.variant == "CCELLA"
    assert load_config([CONFIGS / "demo.json"]) == load_config(CONFIGS / "demo.json")
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config([])


def test_paths_that_hold_no_file(tmp_path):
    path = write(tmp_path, {})
    for wrong in (tmp_path, path / "inside", "x" * 5000):
        with pytest.raises(ConfigError, match="fix:"):
            load_config(wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_channels": [], "attention_levels": [], "num_head_channels": []}, "at least 1"),
        ({"latent_channels": []}, "at least 1"),
        ({"adapter_time_dim": 33}, "33 is odd"),
        # The middle block attends whatever the levels do.
        ({"attention_levels": [False] * 4, "num_head_channels": [0] * 4}, "num_head_channels 0"),
    ],
)
def test_sizes_that_build_no_network_are_refused(change, words):
    from ccella_fast.config import make_config

    with pytest.raises(ConfigError, match=words):
        make_config({f"model.{key}": value for key, value in change.items()})


def test_grid_that_does_not_divide_is_refused_with_near_sizes():
    config = load_config(reference_files("CCELLA"), {"data.dim": [256, 250, 128]})
    with pytest.raises(ConfigError, match=r"\[256, 224, 128\] or \[256, 256, 128\]"):
        config.check_grid()


def test_overrides_need_a_value_and_a_section(tmp_path):
    path = write(tmp_path, {"training": {"lr": 0.5}})
    with pytest.raises(ConfigError, match="has no value"):
        load_config(path, ["training.lr"])
    with pytest.raises(ConfigError, match="not a section"):
        load_config(path, ["training.lr.x=1"])


def test_the_callers_dictionary_is_not_changed():
    training = {"precision": "fp32"}
    assert make_config({"training": training, "training.precision": "bf16"}).training.precision == "bf16"
    assert training == {"precision": "fp32"}
