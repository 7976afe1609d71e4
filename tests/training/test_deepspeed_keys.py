"""Every key of a DeepSpeed file acts or is refused by name: the table `KEYS`, row by row.

The effects are those that `deepspeed_effects.py` counts in a small engine: each key once here, and with `-m slow` at every ZeRO
stage and in both precisions.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import pytest

import deepspeed_effects
from ccella_fast.config import make_config
from ccella_fast.errors import ConfigError
from ccella_fast.training.deepspeed_config import merge_deepspeed_config
from ccella_fast.training.deepspeed_keys import BF16_STAGE_1, KEYS, SECTIONS, WHERE, Key, Kind, nested, stages
from soak import trials
from training_fixtures import environment

ZERO = "zero_optimization."
REFUSED = [name for name, key in KEYS.items() if key.kind is None]
FIXED = [name for name, key in KEYS.items() if key.fixed is not Key("").fixed]
ACTING = [name for name in KEYS if name not in REFUSED + FIXED]
# Values that differ from the default, where the kind of the value does not say one.
VALUES: dict[str, Any] = {
    "train_batch_size": 4, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2, "gradient_clipping": 1e-9,
    "optimizer.type": "adam", "optimizer.params.lr": 0.1, "optimizer.params.betas": [0.5, 0.6],
    "optimizer.params.weight_decay": 0.5, "data_types.grad_accum_dtype": "bf16", f"{ZERO}stage": 1,
    f"{ZERO}stage3_param_persistence_threshold": 700, f"{ZERO}stage3_model_persistence_threshold": 100,
    f"{ZERO}stage3_max_live_parameters": 0, f"{ZERO}stage3_max_reuse_distance": 0,
    "log_level": "info", "steps_per_print": 1, "flops_profiler.profile_step": 2, "flops_profiler.module_depth": 0,
    "flops_profiler.top_modules": 3, "flops_profiler.output_file": "FOLDER/flops", "flops_profiler.recompute_fwd_factor": 0.5,
    "comms_logger.prof_ops": ["all_reduce"], "comet.samples_log_interval": 8,
    "tensorboard.output_path": "FOLDER/other", "csv_monitor.output_path": "FOLDER/other",
}  # fmt: skip
# Other keys that make an effect visible: at stage 3 the weights of so small a network are not sharded otherwise.
ALONG: dict[str, dict[str, Any]] = {
    "comms_logger.prof_ops": {"comms_logger.prof_all": False},
    "csv_monitor.enabled": {"csv_monitor.output_path": "FOLDER/csv"},
    "csv_monitor.job_name": {"csv_monitor.output_path": "FOLDER/csv"},
    f"{ZERO}stage3_model_persistence_threshold": {f"{ZERO}stage3_param_persistence_threshold": 700},
    f"{ZERO}stage3_max_reuse_distance": {f"{ZERO}stage3_prefetch_bucket_size": 0},
}
CHECKED_ONLY = ["optimizer.type", "data_types.param_dtype", "bf16.enabled", f"{ZERO}stage"]  # tested by name below


def merge(folder: Path, values: dict[str, Any], **training: Any) -> tuple[Any, dict[str, Any]]:
    file = folder / "ds.json"
    file.write_text(json.dumps(values, indent=1))
    config = make_config({f"training.{key}": value for key, value in training.items()})
    return merge_deepspeed_config(config, file, world_size=1, output_dir=folder, auto_precision=lambda: "fp32")


def message(folder: Path, values: dict[str, Any], **training: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        merge(folder, values, **training)
    assert len(str(caught.value).splitlines()) <= 5 and str(folder / "ds.json") in str(caught.value)
    return str(caught.value)


def other_value(name: str, precision: str = "fp32") -> Any:
    """A valid value of an acting key that is not its default."""
    key = KEYS[name]
    assert key.kind is not None
    if name in ("communication_data_type", "data_types.param_dtype"):
        return {"fp32": "bf16", "bf16": "fp32"}[precision] if name == "communication_data_type" else precision
    if name in VALUES:
        return VALUES[name]
    words = key.kind.words
    if words == "true or false":
        return name != "tensorboard.enabled" if type(key.default) is not bool else not key.default
    return {"text that is not empty": "other", 'one of "none", "cpu"': "cpu"}.get(words, 64)


def setting(place: str, precision: str) -> dict[str, Any]:
    """The keys that select one of DeepSpeed's optimizers."""
    keys = {f"{ZERO}stage": int(place[0]), "bf16.enabled": precision == "bf16"}
    if place == "1" and precision == "bf16":
        keys["data_types.grad_accum_dtype"] = "bf16"
    if place == "3":
        keys[f"{ZERO}stage3_param_persistence_threshold"] = 0
    return keys


def with_and_without(name: str, place: str, precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file in which the key acts, and the same file without it."""
    without = {**setting(place, precision), **ALONG.get(name, {})}
    needed = KEYS[name].needs
    while needed and needed != "bf16.enabled":
        without[needed] = other_value(needed)
        needed = KEYS[needed].needs
    if name == "data_types.grad_accum_dtype":
        without.pop(name, None)
    if name == "csv_monitor.enabled":
        return {**without, name: True}, setting(place, precision)
    if name == f"{ZERO}overlap_comm":
        return {**without, name: place not in ("0", "3")}, without  # its default depends on the stage
    return {**without, name: other_value(name, precision)}, without


PLACES = [
    (place, precision)
    for place in WHERE
    for precision in ("fp32", "bf16")
    if place != BF16_STAGE_1 or precision == "bf16"
]


def acts_at(name: str, place: str, precision: str) -> bool:
    """Whether a key has an effect there."""
    return place in KEYS[name].where and not (KEYS[name].needs == "bf16.enabled" and precision == "fp32")


# Rows against DeepSpeed's own classes


def classes_of_deepspeed() -> dict[str, Any]:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor import config as monitor
    from deepspeed.runtime import precision_config as precision
    from deepspeed.runtime.zero import config as zero
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    return {
        "zero_optimization": zero.DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": zero.DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": zero.DeepSpeedZeroOffloadParamConfig,
        "bf16": precision.DeepSpeedBF16Config,
        "fp16": precision.DeepSpeedFP16Config,
        "tensorboard": monitor.TensorBoardConfig,
        "csv_monitor": monitor.CSVConfig,
        "wandb": monitor.WandbConfig,
        "comet": monitor.CometConfig,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }


def constants_of_deepspeed() -> dict[str, set[str]]:
    """The keys of the sections that DeepSpeed reads without a class, from its constants."""
    import re
    from inspect import getsource

    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime import config, constants
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.model_checkpointing import config as checkpointing

    profiler = {
        value for name, value in vars(profiling).items()
        if name.startswith("FLOPS_PROFILER_") and not name.endswith(("_DEFAULT", "_FORMAT"))
    }  # fmt: skip
    source = getsource(config)
    data_types = {getattr(constants, name) for name in re.findall(r"data_types_params.get\((\w+)", source)}
    checkpoint = {getattr(constants, name) for name in re.findall(r"checkpoint_params.get\(\s*(\w+)", source)}
    checkpoint |= set(checkpointing.CHECKPOINT_DEFAULT_DICT)
    return {
        "activation_checkpointing": set(ACT_CHKPT_DEFAULT),
        "flops_profiler": profiler,
        "data_types": data_types,
        "checkpoint": checkpoint,
    }


def names_in(section: str) -> set[str]:
    """Keys and sections of a section of the table."""
    return {
        name.removeprefix(f"{section}.").split(".")[0]
        for name in KEYS.keys() | SECTIONS
        if name.startswith(f"{section}.")
    }


@pytest.mark.parametrize("section", [
    "zero_optimization", "zero_optimization.offload_optimizer", "zero_optimization.offload_param", "bf16", "fp16",
    "tensorboard", "csv_monitor", "wandb", "comet", "comms_logger", "timers.throughput",
])  # fmt: skip
def test_rows_are_the_fields_of_deepspeeds_classes(section):
    """A new key of DeepSpeed fails here; so does a default that it has changed, if the row has one."""
    from deepspeed.runtime.zero.config import OffloadDeviceEnum

    fields = classes_of_deepspeed()[section].model_fields
    by_name = {field.alias or name: field for name, field in fields.items()}
    removed = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
    assert names_in(section) - removed == set(by_name)
    ours = {"timers.throughput.enabled", f"{ZERO}stage3_gather_16bit_weights_on_model_save"}
    for name, field in by_name.items():
        key = KEYS.get(f"{section}.{name}")
        if key and key.default is not Key("").default and f"{section}.{name}" not in ours:
            default = field.get_default(call_default_factory=True)
            default = default.value if isinstance(default, OffloadDeviceEnum) else default
            assert key.default == default, name


@pytest.mark.parametrize("section", ["activation_checkpointing", "flops_profiler", "data_types", "checkpoint"])
def test_rows_are_the_constants_of_sections_without_a_class(section):
    assert names_in(section) == constants_of_deepspeed()[section]


def test_every_top_level_key_of_deepspeed_has_a_row():
    import inspect
    import re

    from deepspeed.runtime import config as module
    from deepspeed.runtime import constants

    source = inspect.getsource(module)
    names = re.findall(r"get_scalar_param\(\s*param_dict,\s*(\w+)", source)
    found = {getattr(constants, name, None) for name in names} | set(module._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    found |= set(re.findall(r"param_dict.get\(['\"](\w+)['\"]", source))
    assert len(found) > 30
    assert found - {None} <= {name.split(".")[0] for name in KEYS}
    assert {f"{ZERO}{name}" for name in module._REMOVED_ZERO_CONFIG_KEYS} <= set(REFUSED)


# Refusals


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_key_is_named_with_reason_and_fix(name, tmp_path):
    for value in ({"enabled": True}, 1, False):
        text = message(tmp_path, nested({name: value}))
        assert name in text and KEYS[name].text in text and KEYS[name].fix in text


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_key_has_one_value(name, tmp_path):
    fixed = KEYS[name].fixed
    section = name.split(".")[0]
    switch = {"activation_checkpointing": True} if section == "activation_checkpointing" else {}
    assert merge(tmp_path, nested({name: fixed}))[0] == merge(tmp_path, switch)[0]
    wrong = [not fixed, str(fixed) + "x"] if type(fixed) is bool else [True, "x", 7, {}, []]
    for value in wrong:
        text = message(tmp_path, nested({name: value}))
        assert f"{name} must be {json.dumps(fixed)}: {KEYS[name].text}" in text


WRONG = [True, -7, 0.5, 2**63, 1e999, float("nan"), "much", "1", "", " ", [], [None], {}, {"value": 1}, ["a", 1]]


@pytest.mark.parametrize("name", ACTING)
def test_a_value_of_another_kind_is_refused(name, tmp_path):
    kind = KEYS[name].kind
    assert kind is not None
    refused = [value for value in WRONG if not _is(kind, value)]
    assert len(refused) >= len(WRONG) - 6
    for value in refused:
        text = message(tmp_path, nested({name: value}))
        assert name in text and f"must be {kind.words}, got" in text


def _is(kind: Kind, value: Any) -> bool:
    """Whether a value is of a kind, from the words of the kind."""
    number, words = type(value) in (int, float) and abs(value) < 1e30, kind.words
    if "true or false" in words:
        return type(value) is bool
    if "whole number" in words:
        return number and value % 1 == 0 and int(words.split()[-1]) <= value < 2**63
    if "number" in words and "list" not in words:
        return number and (value >= 0 or "at least" not in words)
    if "list" in words:
        entries = (int, float) if "numbers" in words else (str,)
        return type(value) is list and all(type(entry) in entries for entry in value)
    if type(value) is str and not value.strip():
        return False
    unquoted = type(value) is float and not abs(value) < 1e999  # Infinity and NaN are text in HJSON
    return (type(value) is str or unquoted) and words == "text that is not empty"


@pytest.mark.parametrize("name", [name for name in KEYS if len(name.rpartition(".")[2]) > 3])
def test_a_misspelt_key_is_refused_with_the_right_one(name, tmp_path):
    section, _, key = name.rpartition(".")
    typo = key[:-3] + key[-2] + key[-3] + key[-1] if key[-2] != key[-3] else key[:-1]
    text = message(tmp_path, nested({f"{section}.{typo}" if section else typo: 1}))
    assert "unknown key" in text and (f"did you mean '{key}'?" in text)


@pytest.mark.parametrize("key", ["zero_optimization.stage", "", "a\nb\nc\nd\ne", "x" * 10_000], ids=lambda key: key[:8])
def test_a_strange_key_is_refused_in_a_short_message(key, tmp_path):
    assert "unknown key" in message(tmp_path, {key: 1}) and len(message(tmp_path, {key: 1})) < 2000
    assert "unknown key" in message(tmp_path, {"bf16": {key: 1}})


@pytest.mark.parametrize("stage", [2, 3])
def test_a_file_for_transformers_needs_two_changes(stage, tmp_path):
    """The files in the documentation of transformers, for stage 2 and 3."""
    cpu = {"device": "cpu", "pin_memory": True}
    sharding = {
        2: {"allgather_partitions": True, "reduce_scatter": True, "reduce_bucket_size": 2e8},
        3: {
            "offload_param": cpu, "sub_group_size": 1e9, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9, "stage3_gather_16bit_weights_on_model_save": True,
        },
    }[stage]  # fmt: skip
    fp16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
            "min_loss_scale": 1}  # fmt: skip
    values = {
        "fp16": fp16,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(["lr", "betas", "weight_decay"], "auto")},
        "zero_optimization": {
            "stage": stage, "offload_optimizer": cpu, "overlap_comm": True, "contiguous_gradients": True, **sharding,
        },
        **dict.fromkeys(["gradient_accumulation_steps", "gradient_clipping", "train_batch_size"], "auto"),
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    }  # fmt: skip
    assert merge(tmp_path, values)[0].training.zero_stage == stage
    warmup = {"type": "WarmupLR", "params": {"warmup_min_lr": "auto"}}
    assert "scheduler" in message(tmp_path, {**values, "scheduler": warmup})
    values["zero_optimization"]["allgather_bucket_size"] = 2e8
    assert "gathered in one operation" in message(tmp_path, values)


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_a_section_must_be_an_object(section, tmp_path):
    for value in ("cpu", 3, [1], True):
        if section != "activation_checkpointing" or value is not True:
            assert f"the section '{section}' must be a JSON object" in message(tmp_path, nested({section: value}))


@pytest.mark.parametrize("unset", [None, "auto"], ids=["null", "auto"])
def test_null_and_auto_are_keys_that_are_not_set(unset, tmp_path):
    plain = merge(tmp_path, {}, batch_size=3, zero_stage=2, precision="bf16")
    for name in [*KEYS, *SECTIONS]:
        assert merge(tmp_path, nested({name: unset}), batch_size=3, zero_stage=2, precision="bf16") == plain, name


@pytest.mark.parametrize("name", [name for name in ACTING if KEYS[name].where != WHERE])
def test_a_key_without_effect_at_a_stage_is_refused_there(name, tmp_path):
    for place, precision in PLACES:
        if acts_at(name, place, precision):
            merge(tmp_path, nested(with_and_without(name, place, precision)[0]))
            continue
        text = message(tmp_path, nested({**setting(place, precision), name: other_value(name)}))
        assert f"{name} has no effect" in text
        if KEYS[name].default is not Key("").default:
            merge(tmp_path, nested({**setting(place, precision), name: KEYS[name].default}))


@pytest.mark.parametrize("name", [name for name in ACTING if KEYS[name].needs and KEYS[name].needs != "bf16.enabled"])
def test_a_key_without_the_key_that_it_needs_is_refused(name, tmp_path):
    needed, stage = KEYS[name].needs, {f"{ZERO}stage": 3}
    text = message(tmp_path, nested({**stage, name: other_value(name)}))
    assert f"{name} has no effect without {needed}" in text and f"set {needed} too" in text
    if needed != "steps_per_print":  # a section that is switched off may keep its other keys
        off = "none" if needed.endswith("device") else False
        merge(tmp_path, nested({**stage, name: other_value(name), needed: off}))


@pytest.mark.parametrize("name", [name for name in KEYS if KEYS[name].prints])
def test_a_key_whose_output_log_level_hides_is_refused(name, tmp_path):
    keys, _ = with_and_without(name, "2", "fp32")
    assert merge(tmp_path, nested(keys))[1]["log_level"] == "info"
    assert merge(tmp_path, nested({**keys, "log_level": "debug"}))[1]["log_level"] == "debug"
    text = message(tmp_path, nested({**keys, "log_level": "warning"}))
    assert "prints at log level info, which log_level 'warning' hides" in text


@pytest.mark.parametrize(("section", "package"), [("wandb", "wandb"), ("comet", "comet_ml")])
def test_a_monitor_without_its_package_is_refused(section, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, deepspeed_effects._monitor_package(package, None))
    merge(tmp_path, {section: {"enabled": True}})
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = message(tmp_path, {section: {"enabled": True}})
    assert f"pip install {package}" in text
    merge(tmp_path, {section: {"enabled": False, "project": "x"}})


def test_param_dtype_must_be_the_precision(tmp_path):
    for precision, other in (("fp32", "bf16"), ("bf16", "fp32")):
        merge(tmp_path, {"data_types": {"param_dtype": precision}}, precision=precision)
        text = message(tmp_path, {"data_types": {"param_dtype": other}}, precision=precision)
        assert f"'{other}', but this run computes in {precision}" in text


def test_nothing_of_torch_or_deepspeed_is_imported(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1, "stage3_max_live_parameters": 1}}))
    code = (
        "import sys; from pathlib import Path; from ccella_fast.config import make_config\n"
        "from ccella_fast.training.deepspeed_config import merge_deepspeed_config as merge\n"
        "from ccella_fast.errors import ConfigError\n"
        "try: merge(make_config(), Path('ds.json'), world_size=1, output_dir=Path(), auto_precision=lambda: 'fp32')\n"
        "except ConfigError as error: assert 'only at 3' in str(error), error\n"
        "else: raise SystemExit('not refused')\n"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True)


@pytest.mark.parametrize("switch", [False, None, {}, "auto", {"profile": None}], ids=str)
def test_activation_checkpointing_without_a_key_is_not_switched_on(switch, tmp_path):
    config, values = merge(tmp_path, {"activation_checkpointing": switch})
    assert config.training.activation_checkpointing is False and "activation_checkpointing" not in values
    kept = merge(tmp_path, {"activation_checkpointing": switch}, activation_checkpointing=True)[0]
    assert kept.training.activation_checkpointing is (switch is not False)


@pytest.mark.parametrize("switch", [True, {"profile": False}, {"partition_activations": False}], ids=str)
def test_activation_checkpointing_with_a_key_is_switched_on(switch, tmp_path):
    assert merge(tmp_path, {"activation_checkpointing": switch})[0].training.activation_checkpointing is True


def test_offloading_replaces_deepspeeds_optimizer_for_stage_1_in_bf16(tmp_path):
    keys = {f"{ZERO}stage": 1, "bf16.enabled": True, f"{ZERO}reduce_bucket_size": 64}
    assert "has no effect at ZeRO stage 1 in bf16" in message(tmp_path, nested(keys))
    merge(tmp_path, nested({**keys, f"{ZERO}offload_optimizer.device": "cpu"}))


def test_stages_in_words():
    assert stages(KEYS[f"{ZERO}sub_group_size"]) == "3"
    assert stages(KEYS[f"{ZERO}overlap_comm"]) == "0, 1 in fp32, 2 or 3"
    assert stages(KEYS["comms_logger.enabled"]) == "1, 2 or 3"


def misspelled(word: str, random: Random) -> str:
    """The word with one letter left out, doubled, replaced, or exchanged with the next."""
    at = random.randrange(len(word))
    there, after = word[at], word[at + 1 :]
    others = [after, 2 * there + after, random.choice(ascii_lowercase) + after, after[:1] + there + after[1:]]
    return word[:at] + random.choice(others)


@pytest.mark.soak
def test_random_misspellings_are_refused_with_the_right_key(tmp_path):
    """Goal R22, of keys and sections."""
    for trial in trials("R22"):
        with trial:
            name = list(KEYS)[trial.number % len(KEYS)]
            words = name.split(".")
            at = trial.random.randrange(len(words))
            right, known = words[at], {other.split(".")[at] for other in KEYS if other.count(".") >= at}
            wrong = right
            while wrong in known or not wrong:
                wrong = misspelled(right, trial.random)
            text = message(tmp_path, nested({".".join([*words[:at], wrong, *words[at + 1 :]]): 1}))
            as_near = {"bf16", "fp16"} if right in ("bf16", "fp16") else {right}
            assert f"unknown key '{wrong}'" in text and any(f"'{each}'" in text for each in as_near), text


# Effects


def observe(folder: Path, files: list[dict[str, Any]], processes: int = 2) -> list[list[dict[str, int]]]:
    """For each file, the observations of all processes, in one launch."""
    cases = {f"file{number}": nested(keys) for number, keys in enumerate(files)}
    (folder / "cases.json").write_text(json.dumps(cases))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, str(Path(deepspeed_effects.__file__)), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads((folder / f"observed-{rank}.json").read_text()) for rank in range(processes)]
    return [[rank[name] for rank in ranks] for name in cases]


def check_effects(folder: Path, places: list[tuple[str, str, str]]) -> None:
    """Every key changes something that is observed at each of its places, and the same file again changes nothing."""
    files: dict[str, dict[str, Any]] = {}
    tried = []
    for name, place, precision in places:
        both = with_and_without(name, place, precision)
        tried.append((name, place, precision, [json.dumps(keys, sort_keys=True) for keys in both]))
        files |= dict(zip(tried[-1][-1], both, strict=True))
    plain = next(iter(files.values()))
    *seen, again = observe(folder, [*files.values(), plain])
    by_file = dict(zip(files, seen, strict=True))
    assert again == seen[0]
    assert not [(name, place, precision) for name, place, precision, (a, b) in tried if by_file[a] == by_file[b]]


def once(name: str) -> tuple[str, str, str]:
    """The place at which a key is tested in the ordinary suite; engines of stage 3 take the longest to build."""
    order = [("2", "bf16"), ("0", "fp32"), ("1", "bf16"), ("3", "fp32")]
    return next((name, *place) for place in order if acts_at(name, *place))


def test_each_key_that_acts_changes_something(tmp_path):
    check_effects(tmp_path, [once(name) for name in ACTING if name not in CHECKED_ONLY])


@pytest.mark.slow
@pytest.mark.parametrize(("place", "precision"), PLACES, ids=lambda value: value.replace(" ", "_"))
def test_each_key_changes_something_wherever_it_acts(place, precision, tmp_path):
    names = [name for name in ACTING if name not in CHECKED_ONLY and acts_at(name, place, precision)]
    check_effects(tmp_path, [(name, place, precision) for name in names])
