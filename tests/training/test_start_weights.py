"""Weights that a run starts from: MONAI's network computes the same after the conversion, parts by name, every refusal."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from ccella_fast.checkpoint import export_reference, load_checkpoint
from ccella_fast.config import Config
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.models import build_model
from ccella_fast.models.parts import part_of, subpart_of
from ccella_fast.training.dry_run import describe_run
from ccella_fast.training.start_weights import StartWeights, named_columns, read_start_weights
from maisi_weights import maisi_unet, run_maisi, save_maisi
from training_fixtures import losses, settings, stage_id, train_here, weights, write_prepared

NEW_UNET = {"model__resblock_updown": True, "model__include_fc": True}
ONE = {"max_train_steps": 1, "checkpointing_steps": 1}


def from_file(path, variant="CCELLA", *, skip=(), **changes) -> Config:
    start = {"paths__existing_ckpt_filepath": str(path), "training__init_skip": list(skip)}
    return settings(model__variant=variant, **start, **changes)


def started(config: Config):
    """The model that a run with this configuration starts from, and the one that it would start from without weights."""
    found = []
    for start in (read_start_weights(config), None):
        torch.manual_seed(config.training.seed)
        found.append(build_model(config).eval())
        if isinstance(start, StartWeights):
            start.load_into(found[0])
            assert not start.tensors
    return found


def inputs():
    source = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, 8, generator=source)
    return x, torch.tensor([3, 700]), torch.tensor([[50.0, 50.0, 56.25], [60.0, 70.0, 300.0]])


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_a_published_layout_computes_what_monai_computes(layout, tmp_path):
    unet = maisi_unet(layout)
    config = from_file(save_maisi(tmp_path / "maisi.pt", unet), "MAISI", **(NEW_UNET if layout == "v2" else {}))
    model, scratch = started(config)
    x, timesteps, spacing = inputs()
    expected = run_maisi(unet, x, timesteps, spacing)
    with torch.no_grad():
        found, other = (each(x, timesteps, spacing=spacing).noise for each in (model, scratch))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    # Negative controls: the weights matter, and so do the region and the modality, which were folded.
    wrong = run_maisi(unet, x, timesteps, spacing, region=[0.0, 100.0, 0.0, 0.0], modality=9)
    for difference in (other - expected, wrong - expected):
        assert float(difference.std()) > 1e-3 * float(expected.std())


def test_another_modality_is_taken_where_it_is_asked_for(tmp_path):
    unet = maisi_unet("v2")
    file = save_maisi(tmp_path / "maisi.pt", unet)
    x, timesteps, spacing = inputs()
    for modality in (1, 127):
        model, _ = started(from_file(file, "MAISI", **NEW_UNET, training__init_modality=modality))
        expected = run_maisi(unet, x, timesteps, spacing, modality=modality)
        with torch.no_grad():
            found = model(x, timesteps, spacing=spacing).noise
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    with pytest.raises(CheckpointError, match="128 modalities, and number 128"):
        started(from_file(file, "MAISI", **NEW_UNET, training__init_modality=128))


SKIPPED = ["adapter", "class_heads", "unet.attention", "unet.class_input"]


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_a_model_with_reports_starts_from_a_unet_without(layout, tmp_path):
    """All parts that are not taken are those of a start from scratch, in every bit; all others are the file's."""
    file = save_maisi(tmp_path / "maisi.pt", maisi_unet(layout))
    config = from_file(file, skip=SKIPPED, **(NEW_UNET if layout == "v2" else {}))
    model, scratch = started(config)
    theirs = read_start_weights(config).tensors
    own, new = (named_columns(each.state_dict()) for each in (model, scratch))
    taken = {name for name in own if subpart_of(name) == "unet"}
    assert {subpart_of(name) for name in own} - {"unet"} == set(SKIPPED)
    for name, tensor in own.items():
        assert torch.equal(tensor, (theirs if name in taken else new)[name]), name
    changed = [name for name in taken if not torch.equal(own[name], new[name])]
    assert len(changed) == len(taken) > 30
    assert any("time_emb_proj.weight[class]" in name for name in own) and any(
        "time_emb_proj.weight[spacing]" in name for name in taken
    )


def test_a_start_without_the_class_input_computes_what_monai_computes_without_a_class(tmp_path):
    """RADMAISI from a U-Net without a class: where the class adds nothing, the output is that of MONAI."""
    unet = maisi_unet("v1")
    config = from_file(save_maisi(tmp_path / "maisi.pt", unet), "RADMAISI", skip=["unet.class_input"])
    model, _ = started(config)
    x, timesteps, spacing = inputs()
    expected = run_maisi(unet, x, timesteps, spacing)
    for name, columns in named_columns(model.state_dict()).items():
        if name.endswith("[class]"):
            columns.zero_()
    with torch.no_grad():
        found = model(x, timesteps, spacing=spacing, pirads=torch.ones(2, 2)).noise
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """A run of CCELLA with averages."""
    folder = tmp_path_factory.mktemp("first") / "model"
    train_here(folder, data, max_train_steps=3)
    return folder


def test_every_form_of_an_own_model_is_the_same_start(run, tmp_path):
    """The averages of a run, of its step, of an exported .pt file, and of a file of safetensors."""
    step = run / "checkpoints" / "step-00000003"
    export_reference(run, tmp_path / "model.pt")
    shutil.copy(step / "ema.safetensors", tmp_path / "ema.safetensors")
    averages = weights(run, 3, "ema")
    for path in (run, step, tmp_path / "model.pt", tmp_path / "ema.safetensors"):
        model, scratch = started(from_file(path))
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, averages[name]), name
    assert not torch.equal(averages["unet.conv_in.conv.weight"], scratch.state_dict()["unet.conv_in.conv.weight"])


@pytest.mark.parametrize(
    ("variant", "skip", "new"),
    [
        ("LAST", ["class_heads"], "classifier.fc1.weight"),
        ("ELLAMAISI", ["class_heads", "unet.class_input"], None),
        ("RADMAISI", ["adapter", "class_heads", "unet.attention"], "middle_block.attention.attn.to_q.bias"),
        ("CCELLA", ["unet"], "unet.middle_block.attention.norm.weight"),
    ],
)
def test_another_variant_takes_the_parts_that_it_shares(run, variant, skip, new):
    config = from_file(run, variant, skip=skip)
    model, scratch = (each.state_dict() for each in started(config))
    averages = weights(run, 3, "ema")
    kept = "adapter" if variant == "CCELLA" else "unet"
    name = "ella.connector.latents" if kept == "adapter" else "unet.conv_in.conv.weight"
    own = name if name in model else name.removeprefix("unet.")
    assert torch.equal(model[own], averages[name]) and not torch.equal(model[own], scratch[own])
    if new is not None:
        assert torch.equal(model[new], scratch[new])


@pytest.mark.parametrize("stage", [0, 3], ids=stage_id)
def test_a_run_starts_from_the_weights_and_records_them(run, data, tmp_path, caplog, stage):
    """The first loss is that of the start weights; the log says what was loaded."""
    caplog.set_level("INFO", logger="ccella_fast")
    start = {
        "paths__existing_ckpt_filepath": str(run),
        "init_skip": ["class_heads"],
        "lr": 1e-12,
        "zero_stage": stage,
        **ONE,
    }
    train_here(tmp_path / "run", data, **start)
    found, averages = weights(tmp_path / "run", 1), weights(run, 3, "ema")
    for name in averages:
        same = torch.allclose(found[name], averages[name], atol=1e-6)
        assert same == (part_of(name) != "class_heads"), name
    train_here(tmp_path / "scratch", data, lr=1e-12, zero_stage=stage, **ONE)
    new = weights(tmp_path / "scratch", 1)
    assert all(torch.allclose(found[name], new[name], atol=1e-6) for name in new if part_of(name) == "class_heads")
    assert losses(tmp_path / "run") != losses(tmp_path / "scratch")
    text = " ".join(caplog.text.split())
    assert "averaged weights of CCELLA after 3 steps" in text and "parameters are new, 10 tensors skipped" in text
    state = json.loads((tmp_path / "run/checkpoints/step-00000001/training_state.json").read_text())
    files = json.loads((run / "checkpoints/step-00000003/manifest.json").read_text())["files"]
    assert state["start_weights"] == {"sha256": files["ema.safetensors"]["sha256"], "skip": ["class_heads"]}
    assert load_checkpoint(tmp_path / "run").step == 1


def test_a_resumed_run_needs_no_weights_and_takes_no_others(run, data, tmp_path):
    first = tmp_path / "first.pt"
    export_reference(run, first)
    two = {"max_train_steps": 2, "checkpointing_steps": 1}
    start = {"paths__existing_ckpt_filepath": str(first), "init_skip": ["class_heads"]}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    train_here(whole, data, **start, **two)
    for same in (start, {}):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "checkpoints" / "step-00000002")
        train_here(folder, data, resume="latest", **same, **two)
        assert all(torch.equal(tensor, weights(whole, 2)[name]) for name, tensor in weights(folder, 2).items())
    export_reference(run, tmp_path / "raw.pt", weights="raw")
    other = {**start, "paths__existing_ckpt_filepath": str(tmp_path / "raw.pt")}
    for changed, words in (
        (other, "other weights than these"),
        ({**start, "init_skip": []}, "class_heads skipped, and"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            train_here(folder, data, resume="latest", **changed, **two)
        assert caught.value.field == "--init_from"
    first.unlink()
    assert train_here(folder, data, resume="latest", **start, **two) == 0
    with pytest.raises(ConfigError, match="did not start from weights"):
        train_here(run, data, resume="latest", **other, max_train_steps=3)


REFUSED = [
    # layout or run, variant, skip, settings, words
    ("v1", "CCELLA", [], {}, ["no 'unet.pirads_layer.0.weight'", "adapter, class_heads, unet.attention", "model.variant"]),
    ("v1", "MAISI", [], {"model__num_channels": [16, 16, 16]}, ["[8, 4, 3, 3, 3]", "needs [16, 4, 3, 3, 3]", "num_channels"]),
    ("v1", "MAISI", [], {"model__num_res_blocks": 2}, ["'unet.down_blocks.0.resnets.1.", "model.num_res_blocks"]),
    ("v2", "MAISI", [], {}, ["downsampler", "model.resblock_updown"]),
    ("v2", "MAISI", [], {"model__resblock_updown": True}, ["attn.out_proj", "model.include_fc"]),
    ("run", "MAISI", [], {}, ["--init_skip adapter class_heads unet.attention unet.class_input"]),
    ("run", "CCELLA", [], {"model__num_latents": 8}, ["'ella.connector.latents'", "[4, 32]", "[8, 32]", "num_latents"]),
    ("run", "CCELLA", [], {"model__class_head_dim": 8}, ["cascade_blocks.0.fc1", "[16, 128]", "[8, 128]", "class_head_dim"]),
    ("run", "CCELLA", [], {"model__adapter_heads": 4}, ["model.adapter_heads 2, and 4 is configured"]),
    ("run", "CCELLA", [], {"model__norm_eps": 1e-5}, ["model.norm_eps 1e-06"]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "variant", "skip", "changes", "words"), REFUSED)
def test_what_does_not_fit_is_named_with_its_setting(run, source, variant, skip, changes, words, tmp_path):
    path = run if source == "run" else save_maisi(tmp_path / "maisi.pt", maisi_unet(source))
    with pytest.raises(CheckpointError) as caught:
        read_start_weights(from_file(path, variant, skip=skip, **changes))
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert len(text.splitlines()) <= 5


def test_the_fix_of_the_message_works(tmp_path):
    path = save_maisi(tmp_path / "maisi.pt", maisi_unet("v1"))
    with pytest.raises(CheckpointError) as caught:
        read_start_weights(from_file(path))
    skip = caught.value.fix.partition("--init_skip ")[2].split()
    assert skip == ["adapter", "class_heads", "unet.attention", "unet.class_input"]
    assert read_start_weights(from_file(path, skip=skip)) is not None


def test_damaged_and_unfit_files(run, tmp_path):
    unet = maisi_unet("v1")
    with torch.no_grad():
        unet.conv_in.conv.weight[0, 0, 0, 0, 0] = torch.nan
    save_maisi(tmp_path / "nan.pt", unet)
    (tmp_path / "text.pt").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    save_maisi(tmp_path / "scale.pt", unet, scale_factor=-1.0)
    torch.save({"layer_region": torch.ones(2)}, tmp_path / "other.pt")
    small = maisi_unet("v1").state_dict()
    small["top_region_index_layer.0.weight"] = torch.ones(3, 3)
    save_maisi(tmp_path / "region.pt", unet, unet_state_dict=small)
    for name, words in {
        "nan.pt": "not finite", "text.pt": "not a file that torch.save", "text.safetensors": "cannot be read",
        "scale.pt": "scale factor", "other.pt": "'unet.conv_in.conv.weight'", "absent.pt": "does not exist",
        "region.pt": "MAISI's U-Net", "": "checkpoint",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            read_start_weights(from_file(tmp_path / name, "MAISI"))


@pytest.mark.parametrize("key", ["init_skip", "init_modality"])
def test_settings_of_a_start_without_weights_are_refused(key):
    with pytest.raises(ConfigError, match=f"training.{key} says how") as caught:
        read_start_weights(settings(**{f"training__{key}": ["unet"] if key == "init_skip" else 3}))
    assert caught.value.field == f"training.{key}"


def test_the_dry_run_has_the_table(tmp_path):
    data = write_prepared(tmp_path / "prepared")
    path = save_maisi(tmp_path / "maisi.pt", maisi_unet("v1"))
    config = from_file(path, skip=SKIPPED, training__freeze=["adapter"])
    text = describe_run(config, data=data, run=tmp_path / "run", deepspeed_file=None)
    counts = {}
    for name, parameter in build_model(config).named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    total = sum(counts.values())
    for words in (
        f"{total:,} parameters, of which {total - counts['adapter']:,} are trained", "its body region is the pelvis",
        f"adapter {counts['adapter']:,} parameters are new", "0.8 when they were trained", "56 tensors skipped",
    ):  # fmt: skip
        assert words in " ".join(text.split()), (words, text)


def test_another_objective_is_named(run):
    """An own model says what it was trained to predict."""
    flow = {"scheduler__schedule": "rectified_flow", "scheduler__prediction": "velocity"}
    rows = [dict(read_start_weights(from_file(run, **changed)).table) for changed in ({}, flow)]
    assert "  objective" not in rows[0] and rows[1]["  objective"] == (
        "epsilon of scaled_linear_beta when they were trained; this run's is velocity of rectified_flow"
    )


def test_the_reference_keys_of_a_start(tmp_path):
    """`use_pretrained_unet` with its path, and `freeze_unet`; the env file's weights come first, as in the reference."""
    from ccella_fast.config import load_config
    from training_fixtures import ROOT

    values = json.loads((ROOT / "configs" / "CCELLA_def.json").read_text())
    values |= {"use_pretrained_unet": True, "pretrained_unet_path": "unet.pt", "freeze_unet": True}
    files = [ROOT / "configs" / f"CCELLA_{part}.json" for part in ("env", "config")]
    (tmp_path / "def.json").write_text(json.dumps(values))
    config = load_config([*files, tmp_path / "def.json"])
    assert config.paths.existing_ckpt_filepath == "unet.pt" and config.training.freeze == ["unet"]
    assert config.training.init_skip == ["adapter", "class_heads"]
    env = json.loads(files[0].read_text()) | {"existing_ckpt_filepath": "all.pt"}
    (tmp_path / "env.json").write_text(json.dumps(env))
    config = load_config([tmp_path / "env.json", files[1], tmp_path / "def.json"])
    assert config.paths.existing_ckpt_filepath == "all.pt" and config.training.init_skip == []
    del values["pretrained_unet_path"]
    (tmp_path / "def.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="pretrained_unet_path"):
        load_config([*files, tmp_path / "def.json"])
