"""The section `scheduler`: what fits together, what a rectified flow changes, and messages about what does not fit."""

from __future__ import annotations

import json

import pytest

from ccella_fast.config import load_config, make_config
from ccella_fast.errors import ConfigError

FLOW = {"scheduler.schedule": "rectified_flow"}


def test_a_flow_changes_the_defaults_of_prediction_and_sampling():
    flow, default = make_config(FLOW), make_config()
    assert (flow.scheduler.prediction, flow.sampling.solver, flow.sampling.num_inference_steps) == (
        "velocity", "euler_flow", 30
    )  # fmt: skip
    assert (default.scheduler.prediction, default.sampling.solver, default.sampling.num_inference_steps) == (
        "epsilon", "ddpm", 1000
    )  # fmt: skip
    given = make_config(FLOW | {"sampling.solver": "heun_flow", "sampling.num_inference_steps": 7})
    assert (given.sampling.solver, given.sampling.num_inference_steps) == ("heun_flow", 7)


@pytest.mark.parametrize("overrides", [{}, FLOW, FLOW | {"scheduler.prediction": "x0"}, {"scheduler.prediction": "v"}])
def test_a_dump_is_an_equal_configuration(tmp_path, overrides):
    config = make_config(overrides)
    (tmp_path / "config.json").write_text(json.dumps(config.dump()))
    assert load_config(tmp_path / "config.json") == config == make_config(base=config)


@pytest.mark.parametrize("section", [{"prediction": "epsilon"}, {"prediction": None}, {}])
def test_files_of_earlier_versions_load_unchanged(tmp_path, section):
    """They state the prediction that was the default."""
    sampling = {"solver": "ddpm", "num_inference_steps": 1000, **section}
    scheduler = {
        "num_train_timesteps": 1000,
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "schedule": "scaled_linear_beta",
    }
    (tmp_path / "config.json").write_text(json.dumps({"sampling": sampling, "scheduler": scheduler}))
    config = load_config(tmp_path / "config.json")
    assert config.scheduler == make_config().scheduler and config.scheduler.prediction == "epsilon"


WRONG = [
    ({"sampling.prediction": "v"}, "sampling.prediction is 'v', but the network is trained to predict 'epsilon'"),
    (FLOW | {"sampling.prediction": "x0"}, "sampling.prediction is 'x0', but the network is trained to predict 'velocity'"),
    (FLOW | {"scheduler.prediction": "epsilon"}, "predict velocity, x0_minus_noise or x0"),
    (FLOW | {"scheduler.prediction": "v"}, "prediction 'v' does not exist for schedule 'rectified_flow'"),
    ({"scheduler.prediction": "velocity"}, "whose networks predict epsilon, v or x0"),
    ({"scheduler.prediction": "x0_minus_noise"}, "whose networks predict epsilon, v or x0"),
    (FLOW | {"sampling.solver": "ddim"}, "sampling.solver 'ddim' solves a noise schedule(.|\n)*euler_flow or heun_flow"),
    ({"scheduler.sample_method": "logit-normal"}, "sample_method has an effect only with schedule 'rectified_flow'"),
    ({"scheduler.use_timestep_transform": False}, "use_timestep_transform has an effect only with"),
    (FLOW | {"scheduler.beta_end": 0.02}, "beta_end has an effect only with schedule 'scaled_linear_beta'"),
    (FLOW | {"training.min_snr_gamma": 5.0}, "training.min_snr_gamma weights the timesteps of a noise schedule"),
    ({"training.min_snr_gamma": 0}, "number greater than 0"),
    ({"training.report_dropout": 1.1}, "from 0.* to 1"),
    ({"training.report_dropout": 0.1, "model.variant": "RADMAISI"}, "RADMAISI does not read the report\n  fix:   set it to 0"),
    ({"training.class_dropout": 0.1}, "CCELLA is not given a class\n  fix:   set it to 0"),
    ({"training.class_dropout": 0.1, "model.variant": "MAISI"}, "MAISI is not given a class"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_what_does_not_fit_is_refused_in_a_sentence(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make_config(overrides)
    assert caught.value.fix and len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize("overrides", [
    {"sampling.prediction": "epsilon"}, {"scheduler.prediction": "v", "sampling.prediction": "v"},
    FLOW | {"scheduler.prediction": "x0_minus_noise", "sampling.solver": "heun_flow"},
    {"training.report_dropout": 1.0}, {"training.min_snr_gamma": 5.0, "scheduler.prediction": "x0"},
    {"training.class_dropout": 0.1, "training.report_dropout": 0.1, "model.variant": "DECOUPLED"},
    {"training.class_dropout": 0.1, "model.variant": "RADMAISI"},
])  # fmt: skip
def test_what_fits_is_accepted(overrides):
    assert make_config(overrides)


def test_a_message_about_two_sections_names_an_override_that_takes_part():
    overrides = ["sampling.solver=ddim", "scheduler.schedule=rectified_flow", "training.seed=1"]
    with pytest.raises(ConfigError, match=r"\(from --set scheduler.schedule=rectified_flow\)") as caught:
        make_config(overrides)
    assert caught.value.fix == "set sampling.solver to euler_flow or heun_flow, or leave it out"


@pytest.mark.parametrize("wrong", ["training.power_ema_snapshot_steps=3", "training.power_ema_widths=[0.1,0.1]"])
def test_of_several_overrides_of_a_section_the_one_that_the_message_names_is_named(wrong):
    for overrides in ([wrong, "training.max_train_steps=4"], ["training.max_train_steps=4", wrong]):
        with pytest.raises(ConfigError) as caught:
            make_config(overrides)
        assert f"(from --set {wrong})" in str(caught.value)


def test_a_message_has_no_markup_of_the_documentation():
    with pytest.raises(ConfigError) as caught:
        make_config(["training.power_ema_snapshot_steps=-1"])
    assert "see docs/how-to/average-weights.md; 0: there are none" in str(caught.value) and "`" not in str(caught.value)
