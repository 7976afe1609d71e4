"""What start weights, rectified flow and guidance change: `python benchmarks/generator_study.py --out out/study`.

Phantoms of several pools that never mix; one autoencoder for all; generators that differ in one thing and in their seed;
volumes from the reports of cases that no generator has seen; distances and agreement by the metrics of `ccella-fast evaluate`.
Sizes, seeds and margins are in PROTOCOLS and are written to protocol.json before anything is trained. A folder with another
protocol is refused. A study is not changed once it has run: what it leaves undecided is asked again by another one, with
patients and seeds of its own.

About two hours on two cores. An interrupted study continues: finished commands are skipped, and the others resume by
themselves. Writes generator_study.json.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.comparison.gates import autoencoder_gate
from ccella_fast.comparison.protocol import check_same
from ccella_fast.comparison.stages import Stages
from ccella_fast.data.phantom.phantom import VERSION
from ccella_fast.environment import describe_environment
from ccella_fast.evaluation import evaluate, open_volumes
from ccella_fast.evaluation.findings import CaseFindings, read_findings
from ccella_fast.evaluation.results import plain_values
from ccella_fast.evaluation.student import student_quantile
from ccella_fast.folder_lock import lock_folder
from ccella_fast.storage import read_json, write_csv, write_json
from script import make_parser, run_script

BASE = Path(__file__).resolve().parents[1] / "configs" / "demo.json"
FIRST: dict[str, Any] = {
    "phantom_version": VERSION,
    "lesion_size": 1.5,  # of the usual phantom: usual lesions are about one voxel of latents this small
    "pools": {  # number of studies and seed; reports of `real` are the prompts, and its volumes what is compared with
        "train": [400, 301], "other": [400, 302], "real": [400, 303], "autoencoder": [64, 304],
    },
    "config": {  # changes of the demo's
        "data": {"spacing": [2.25, 2.25, 3.0], "dim": [32, 32, 16]},  # 72 mm around the prostate
        "model": {"attention_levels": [False, True, True], "num_head_channels": [0, 32, 32]},
        "vae_training": {"max_train_steps": 1600},
        "training": {"max_train_steps": 6000, "batch_size": 16, "report_dropout": 0.1},
    },
    "flow": {"schedule": "rectified_flow", "use_timestep_transform": False},  # the shift is for large latents
    "fine_tuning_steps": 3000,  # half as many
    "training_seeds": [1, 2, 3],
    "prompts": 120,
    "sampling_seed": 0,  # the same noise in all arms
    "samplers": {"epsilon": ["ddpm", 50], "flow": ["euler_flow", 20]},
    "guidance_scales": [1.5, 2.0, 3.0, 5.0],
    "features": ["taps"],
    "distance": ["fd", "taps-l3"],
    "agreement": ["condition_class", "foci"],
    "judged": {
        "start_weights": "the 95 % interval of the distance relative to that of training from scratch is at most 1",
        "flow": {"margin": 1.1, "rule": "the interval of the distance relative to DDPM is at most the margin"},
        "guidance": {"scale": 2.0, "rule": "the interval of the difference to a scale of 1 is above 0"},
    },
}  # fmt: skip
# The first study left start weights and guidance undecided: its generators hardly followed reports that they had not seen. What
# a report says about a lesion explained 0.6 % of the absolute deviation of their latents at most. In the second, lesions are
# larger and fill more of the field of view (1.6 %), and generators see 1,000 studies 48 times each rather than 400 studies 240
# times each. This was chosen with one generator and phantoms of other seeds (921 to 923).
SECOND: dict[str, Any] = FIRST | {
    "lesion_size": 2.0,
    "pools": {"train": [1000, 311], "other": [1000, 312], "real": [400, 313], "autoencoder": [64, 314]},
    "config": {
        **FIRST["config"],
        "data": {"spacing": [1.8, 1.8, 3.0], "dim": [32, 32, 16]},  # 58 mm around the prostate
        "training": {"max_train_steps": 3000, "batch_size": 16, "report_dropout": 0.1},
    },
    "fine_tuning_steps": 1500,
    "training_seeds": [11, 12, 13, 14],
    "guidance_scales": [2.0, 4.0],
    "judged": {
        "start_weights": {
            "margin": 1.05, "rule": "the interval of the distance relative to training from scratch is at most the margin",
        },
        "flow": FIRST["judged"]["flow"],
        "guidance": {"scale": 4.0, "rule": "the interval of the difference to a scale of 1 is above 0"},
    },
}  # fmt: skip
# The second decided about flow and guidance. In both, the start weights had seen no more studies and no more steps than the
# models that they were compared with. The third asks about start weights alone, in the case that they are for: a few hundred
# studies, and weights from a larger pool that have been trained for longer, as published ones are.
THIRD: dict[str, Any] = SECOND | {
    "pools": {"train": [300, 321], "other": [1000, 322], "real": [400, 323], "autoencoder": [64, 324]},
    "start_weights_steps": 6000,  # twice as many as from scratch
    "training_seeds": [21, 22, 23, 24, 25, 26],
    "samplers": {"epsilon": ["ddpm", 50]},
    "guidance_scales": [],
    "judged": {"start_weights": SECOND["judged"]["start_weights"]},
}  # fmt: skip
PROTOCOLS = {"first": FIRST, "second": SECOND, "third": THIRD}
SMOKE: dict[str, Any] = {
    "pools": {"train": [16, 301], "other": [16, 302], "real": [24, 303], "autoencoder": [8, 304]},
    "config": {
        **FIRST["config"],
        "vae_training": {"max_train_steps": 2},
        "training": {"max_train_steps": 4, "batch_size": 2, "report_dropout": 0.1},
    },
    "fine_tuning_steps": 2, "training_seeds": [1, 2], "prompts": 4,
    "samplers": {"epsilon": ["ddpm", 4], "flow": ["euler_flow", 2]}, "guidance_scales": [2.0, 4.0],
    "features": ["radiomics"], "distance": ["fd", "radiomics"],
}  # fmt: skip


class Arm(NamedTuple):
    """One set of generated volumes.

    Attributes:
        group: what is compared: "scratch", "fine-tuned", "flow" or "flow, guidance S".
        seed: of the training.
        model: the folder of the run.
        sampler: solver and number of steps.
        guidance: the scale.
    """

    group: str
    seed: int
    model: str
    sampler: tuple[str, int]
    guidance: float = 1.0

    @property
    def name(self) -> str:
        """As a folder."""
        return f"{self.group}-{self.seed}".replace(", ", "-").replace(" ", "-")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of everything; about 4 GB")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time, which share the cores (default 2)")
    parser.add_argument("--study", choices=[*PROTOCOLS], default="first", help="which (default first)")
    parser.add_argument("--smoke", action="store_true", help="a few minutes, through all of the code; shows nothing")
    return run_script(parser, run, argv)


def run(arguments: argparse.Namespace) -> int:
    """Run what is missing and write generator_study.json."""
    protocol = PROTOCOLS[arguments.study] | (SMOKE if arguments.smoke else {})
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, "generator_study.py"):
        keep_protocol(out / "protocol.json", protocol)
        with Stages(out, arguments.jobs) as stages:
            generate(stages, protocol)
        findings = read_findings(out / "real/studies/studies.csv")
        record = {
            "what": __doc__.splitlines()[0],
            "protocol": protocol,
            "autoencoder": autoencoder_gate(open_volumes(out / "real/prepared", field="real"), out / "vae", findings),
            "arms": judge_all(out, protocol, findings, arguments.jobs),
            "seconds": stages.seconds(),
            "environment": describe_environment(),
        }
        record["claims"] = claims(record)
        write_json(out / "generator_study.json", plain_values(record))
    for name, claim in record["claims"].items():
        print(
            f"{name}: {claim['verdict']} ({claim['value']:.3f}, {claim['interval'][0]:.3f} to {claim['interval'][1]:.3f})"
        )
    return 0


def keep_protocol(path: Path, protocol: dict[str, Any]) -> None:
    """Write the protocol, or raise ConfigError if the folder has another one."""
    if not path.exists():
        write_json(path, protocol)
    check_same(path, read_json(path), protocol)


def arms(protocol: dict[str, Any]) -> list[Arm]:
    """All sets of volumes."""
    samplers = {name: tuple(sampler) for name, sampler in protocol["samplers"].items()}
    found = []
    for seed in protocol["training_seeds"]:
        found += [Arm(group, seed, f"{group}-{seed}", samplers["epsilon"]) for group in ("scratch", "fine-tuned")]
        if "flow" in samplers:
            flow = Arm("flow", seed, f"flow-{seed}", samplers["flow"])
            scales = protocol["guidance_scales"]
            found += [flow, *(flow._replace(group=f"flow, guidance {scale:g}", guidance=scale) for scale in scales)]
    return sorted(found, key=lambda arm: (arm.seed, arm.group))


# ---- Volumes


def generate(stages: Stages, protocol: dict[str, Any]) -> None:
    """Phantoms, autoencoder, generators and their samples."""
    out = stages.out
    write_configurations(out, protocol)
    pools = protocol["pools"]
    stages.run(
        {
            f"phantom-{name}": [
                "phantom",
                "--out",
                f"{name}/studies",
                "--num_studies",
                count,
                "--seed",
                seed,
                "--lesion_size",
                protocol["lesion_size"],
            ]  # fmt: skip
            for name, (count, seed) in sorted(pools.items(), key=lambda item: -item[1][0])
        }
    )
    stages.run({"images-autoencoder": prepare("autoencoder")})
    stages.run(
        {
            "autoencoder": ["train-vae", "--data", "autoencoder/prepared", "--out", "vae", "--config", "epsilon.json"],
        }
        | {f"prepare-{name}": prepare(name) for name in pools if name != "autoencoder"}
    )
    stages.run({f"encode-{name}": [*prepare(name), "--vae", "vae"] for name in pools if name != "autoencoder"})
    half, seeds = protocol["fine_tuning_steps"], protocol["training_seeds"]
    flows = seeds if "flow" in protocol["samplers"] else []
    longer = ["--max_train_steps", protocol["start_weights_steps"]] if "start_weights_steps" in protocol else []
    stages.run(
        {"start-weights": [*train("epsilon", "other", "start-weights", 0), *longer]}
        | {f"scratch-{seed}": train("epsilon", "train", f"scratch-{seed}", seed) for seed in seeds}
        | {f"flow-{seed}": train("flow", "train", f"flow-{seed}", seed) for seed in flows}
    )
    more = ["--init_from", "models/start-weights", "--max_train_steps", half]
    stages.run(
        {f"fine-tuned-{seed}": [*train("epsilon", "train", f"fine-tuned-{seed}", seed), *more] for seed in seeds}
    )
    write_prompts(out, protocol["prompts"])
    stages.run({f"sample-{arm.name}": sample(arm, protocol["sampling_seed"]) for arm in arms(protocol)})


def write_configurations(out: Path, protocol: dict[str, Any]) -> None:
    """epsilon.json and flow.json: the demo's with the changes of the protocol."""
    config = read_json(BASE)
    for section, values in protocol["config"].items():
        config[section] |= values
    write_json(out / "epsilon.json", config)
    if "flow" not in protocol["samplers"]:
        return
    solver, steps = protocol["samplers"]["flow"]
    config["scheduler"] = protocol["flow"]
    config["sampling"] |= {"solver": solver, "num_inference_steps": steps}
    write_json(out / "flow.json", config)


def prepare(pool: str) -> list[object]:
    """The command that prepares the studies of a pool."""
    return ["prepare", "--data", f"{pool}/studies", "--out", f"{pool}/prepared", "--config", "epsilon.json"]


def train(objective: str, pool: str, name: str, seed: int) -> list[object]:
    """The command that trains a generator on a pool.

    A twelfth of the phantoms has no report, and another one no class; of a thousand, some have the same report by chance.
    """
    return [
        "train", "--config", f"{objective}.json", "--data", f"{pool}/prepared", "--output_dir", f"models/{name}",
        "--seed", seed, "--resume", "--allow", "no_class", "--allow", "no_reports", "--allow", "leakage",
    ]  # fmt: skip


def write_prompts(out: Path, count: int) -> None:
    """prompts.csv: the first cases of the pool `real` that have a report and a class."""
    with open(out / "real/studies/studies.csv", newline="", encoding="utf-8") as table:
        rows = [row for row in csv.DictReader(table) if row["report"] and row["pirads"]][:count]
    write_csv(out / "prompts.csv", ["case", "report"], ([row["case"], row["report"]] for row in rows))


def sample(arm: Arm, seed: int) -> list[object]:
    """The command that generates the volumes of an arm."""
    solver, steps = arm.sampler
    return [
        "sample", "--checkpoint", f"models/{arm.model}", "--report_table", "prompts.csv", "--out", f"samples/{arm.name}",
        "--solver", solver, "--num_inference_steps", steps, "--guidance_scale", arm.guidance, "--seed", seed,
        "--distinct_seeds", "--batch_size", 8,
    ]  # fmt: skip


# ---- Numbers


def judge_all(out: Path, protocol: dict[str, Any], findings: CaseFindings, jobs: int) -> list[dict[str, Any]]:
    """The rows of all arms, some at a time. The first is alone: the others find the features of the real volumes."""
    first, *others = arms(protocol)
    rows = [judge(first, out, protocol, findings)]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return rows + list(pool.map(partial(judge, out=out, protocol=protocol, findings=findings), others))


def judge(arm: Arm, out: Path, protocol: dict[str, Any], findings: CaseFindings) -> dict[str, Any]:
    """The rows of an evaluation of an arm, from its file if there is one."""
    path = out / "evaluation" / f"{arm.name}.json"
    if not path.exists():
        print(f"{time.strftime('%H:%M:%S')} evaluate-{arm.name}", flush=True)
        result = evaluate(
            real=open_volumes(out / "real/prepared", field="real"),
            synthetic=open_volumes(out / "samples" / arm.name, field="samples"),
            train=open_volumes(f"{out / 'train/prepared'}:train", field="train"),
            findings=findings, features=protocol["features"], metrics=["fd", "kid", "condition"], cache=out / "features",
        )  # fmt: skip
        path.parent.mkdir(exist_ok=True)
        rows = [
            {name: asdict(row)[name] for name in ("metric", "features", "value", "floor", "guards", "details")}
            for row in result.rows
        ]
        write_json(path, plain_values({"protocol_sha256": result.protocol_sha256, "rows": rows}))
    return {"group": arm.group, "seed": arm.seed, "guidance": arm.guidance, **read_json(path)}


# ---- Claims


def claims(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the protocol wants to know: value, interval of 95 % over the training seeds (Student), and yes, no or undecided."""
    protocol = record["protocol"]
    judged, seeds = protocol["judged"], protocol["training_seeds"]
    found = {(arm["group"], arm["seed"]): arm for arm in record["arms"]}

    def values(group: str, metric: str) -> list[float]:
        return [value_of(found[group, seed], protocol[metric]) for seed in seeds]

    result = {}
    for name, group in (("start_weights", "fine-tuned"), ("flow", "flow")):
        if name in judged:
            pairs = zip(values(group, "distance"), values("scratch", "distance"), strict=True)
            most = math.log(margin_of(judged[name]))
            result[name] = _claim(
                [math.log(one / other) for one, other in pairs],
                lambda low, high, most=most: (high <= most, low > most),
                math.exp,
            )
    if "guidance" in judged:
        guided = values(f"flow, guidance {judged['guidance']['scale']:g}", "agreement")
        gains = [one - other for one, other in zip(guided, values("flow", "agreement"), strict=True)]
        result["guidance"] = _claim(gains, lambda low, high: (low > 0, high <= 0), float)
    return result


def margin_of(judged: Any) -> float:
    """The largest relative distance that counts as reached; the first study's of start weights, in words alone, is 1."""
    return judged["margin"] if isinstance(judged, dict) else 1.0


def value_of(arm: dict[str, Any], metric: Sequence[str]) -> float:
    """NaN if it is not defined: a head that was hardly trained, as in the smoke study, asks for one class alone."""
    values = [row["value"] for row in arm["rows"] if [row["metric"], row["features"]] == list(metric)]
    return math.nan if not values or values[0] is None else values[0]


def _claim(
    values: list[float], decide: Callable[[float, float], tuple[bool, bool]], shown: Callable[[float], float]
) -> dict[str, Any]:
    mean, half = (
        np.mean(values),
        student_quantile(0.025, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)),
    )
    yes, no = decide(mean - half, mean + half)
    return {
        "by_seed": [shown(value) for value in values], "value": shown(mean),
        "interval": [shown(mean - half), shown(mean + half)],
        "verdict": "yes" if yes else "no" if no else "undecided",
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
