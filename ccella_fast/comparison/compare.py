"""`ccella-fast compare`: the experiment of the paper at any size, from studies to a table, as one command that can be resumed.

Every variant is trained with every seed on the same studies; volumes from the reports of test cases are compared with real ones
that no generator has seen, and volumes from the training cases train a classifier, next to controls. Each step is a command of
ccella-fast, so that all of it can be repeated by hand: done/ has the commands, and logs/ what they printed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ccella_fast.checkpoint import checkpoint_folder
from ccella_fast.comparison import protocol as protocols
from ccella_fast.comparison.gates import autoencoder_gate, choose_size, choose_space, is_too_easy, open_real
from ccella_fast.comparison.results import write_results
from ccella_fast.comparison.stages import Stages
from ccella_fast.config import load_config
from ccella_fast.data.checking.findings import STOPPING
from ccella_fast.data.manifest import load_manifest
from ccella_fast.errors import ConfigError
from ccella_fast.evaluation.findings import read_findings
from ccella_fast.evaluation.results import SENSITIVITY
from ccella_fast.folder_kinds import check_output
from ccella_fast.folder_lock import lock_folder
from ccella_fast.models.autoencoder import check_autoencoder, weights_file
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.storage import check_writable, read_json, remove_partial_files, sha256, write_json
from ccella_fast.variants import VARIANTS

logger = logging.getLogger("ccella_fast")
_CLASS_OPTIONS = {"predicted": "--class_override", "given": "--pirads", "none": None}
_REAL_MANIFEST = Path("real/prepared/manifest.json")


def compare(
    out: str | Path,
    *,
    preset: str = "mini",
    config: str | Path,
    data: str | Path | None = None,
    vae: str | Path | None = None,
    init_from: Mapping[str, str | Path] | None = None,
    variants: Sequence[str] | None = None,
    seeds: int | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Run what is missing of a comparison, and write comparison.json, table.md, table.csv, table.tex and report.html.

    Args:
        out: the folder, which keeps everything.
        preset: "smoke", "mini" or "table", which draw phantoms, or "paper", which needs `data`.
        config: the configuration; the presets of phantoms change its grid, its network and its steps.
        data: a folder of studies with the splits train, val and test; val is what distances are measured to.
        vae: an autoencoder, in place of one that is trained on the training studies.
        init_from: variant -> weights that its trainings start from.
        variants: in place of the preset's; the first is compared with the second.
        seeds: trainings of each variant, in place of the preset's.
        jobs: commands at a time, which share the cores. 1 on a GPU.

    Returns:
        The content of comparison.json.

    Raises:
        ConfigError: an argument is invalid, or the folder has another protocol.
        CheckpointError: given weights do not exist or are of another kind.
        CcellaError: a command has failed; its log is named.
    """
    out = Path(out)
    base = Path(config)
    asked = protocols.asked_for(preset, variants=variants, seeds=seeds)
    if (asked["phantom"] is None) == (data is None):
        why = f"the preset {preset} " + ("needs --data" if data is None else "draws its own studies")
        raise ConfigError(why, field="--data", fix="use --preset paper with --data, or another preset without it")
    for name in init_from or {}:
        if name not in asked["variants"]:
            why = f"--init_from names {name}, which is not compared"
            raise ConfigError(why, field="--init_from", fix=f"use one of {', '.join(asked['variants'])}")
    load_config(base)
    asked["config_sha256"] = sha256(base)
    asked["given"] = {"vae": None if vae is None else _identity_of_autoencoder(Path(vae))}
    asked["given"] |= {name: _identity_of_start_weights(Path(path)) for name, path in (init_from or {}).items()}
    check_writable(out, "--out")
    check_output(out, "a comparison", field="--out")
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, "ccella-fast compare"):
        for name in (".", "configs", "done", "features"):  # the other folders are those of commands
            remove_partial_files(out / name, nested=False)
        protocol = protocols.keep(out, asked)
        with Stages(out, jobs) as stages:
            return _Comparison(stages, protocol, base, data, vae, init_from or {}).run()


def _identity_of_autoencoder(path: Path) -> str:
    check_autoencoder(path)
    return sha256(weights_file(path))


def _identity_of_start_weights(path: Path) -> str:
    return sha256(path if path.is_file() else checkpoint_folder(path, field="--init_from") / "manifest.json")


class _Comparison:
    """The steps of a comparison.

    Args:
        stages: the commands of the folder.
        protocol: the content of protocol.json.
        base: the configuration.
        data: the user's studies; None for phantoms.
        vae: as for `compare`.
        init_from: as for `compare`.
    """

    def __init__(
        self,
        stages: Stages,
        protocol: dict[str, Any],
        base: Path,
        data: str | Path | None,
        vae: str | Path | None,
        init_from: Mapping[str, str | Path],
    ):
        self.stages, self.out, self.protocol, self.base, self.data = stages, stages.out, protocol, base, data
        self.init_from = init_from
        self.asked: dict[str, Any] = protocol["asked"]
        self.vae = None if vae is None else str(Path(vae).resolve())
        self.runs = [(variant, seed) for seed in self.asked["training_seeds"] for variant in self.asked["variants"]]

    def run(self) -> dict[str, Any]:
        """All steps."""
        self._write_configurations()
        if self.protocol["decided"] is None:
            self.protocol = protocols.freeze(self.out, self.protocol, self._decide())
        decided = self.protocol["decided"]
        if decided["real_sha256"] != sha256(self.out / _REAL_MANIFEST):
            why = "the real studies are no longer those for which the protocol was written"
            raise ConfigError(why, path=self.out / _REAL_MANIFEST, fix="choose another --out")
        self.vae = self.vae or decided["autoencoder"]["folder"]
        logger.info("protocol %s", protocols.digest(self.protocol))
        self._generate()
        self._classify()
        return write_results(self.out, self.protocol, self.runs, self.stages.seconds(), self.out / self.vae)

    # ---- Real studies

    def _write_configurations(self) -> None:
        """The configuration of each variant."""
        (self.out / "configs").mkdir(exist_ok=True)
        for variant in self.asked["variants"]:
            config = read_json(self.base)
            for section, values in self.asked["config"].items():
                config[section] = config.get(section, {}) | values
            config["model"] = config.get("model", {}) | {"variant": variant}
            write_json(self.out / "configs" / f"{variant}.json", config)

    def _decide(self) -> dict[str, Any]:
        """What is decided on real studies alone."""
        decided: dict[str, Any] = {}
        if self.data is None:
            decided |= self._draw_phantoms()
        self.stages.run({"images-real": self._prepare("real")})
        count, features = self.asked["sensitivity_volumes"], self.asked["features"]
        words = ["sensitivity", "--real", "real/prepared:val", "--out", "sensitivity", "--num_volumes", count]
        self.stages.run({"sensitivity": [*words, "--features", *features]})
        decided["autoencoder"] = self._choose_autoencoder()
        gates = read_json(self.out / "sensitivity" / SENSITIVITY)["gates"]
        decided["space"] = choose_space(gates, self.asked["spaces"]) or self.asked["spaces"][0]
        decided["passed"] = {str(gate["space"]): bool(gate["passed"]) for gate in gates}
        decided["real_sha256"] = sha256(self.out / _REAL_MANIFEST)
        return decided

    def _draw_phantoms(self) -> dict[str, Any]:
        """The difficulty and the number of training studies; the studies that follow from them."""
        phantom = self.asked["phantom"]
        for number, difficulty in enumerate(phantom["difficulties"]):
            accuracies = self._calibrate(number, difficulty)
            if not is_too_easy(accuracies, self.asked["wanted_accuracy"]):
                break
        size = choose_size(accuracies, self.asked["wanted_accuracy"], self.asked["nearest_accuracy"])
        real = phantom["real"] | {"train": -(-size * 12 // 11)}  # one phantom in twelve has no class
        self.stages.run(
            {
                "phantom-real": _draw("real", real, difficulty),
                "phantom-autoencoder": _draw("autoencoder", phantom["autoencoder"], difficulty),
            }
        )
        return {"difficulty": difficulty, "accuracy_by_size": {str(n): a for n, a in accuracies.items()}, "size": size}

    def _calibrate(self, number: int, difficulty: Mapping[str, float]) -> dict[int, float]:
        """Number of training studies -> mean accuracy of classifiers, on phantoms that serve for nothing else."""
        pool = f"calibration-{number}"
        self.stages.run({f"phantom-{pool}": _draw(pool, self.asked["phantom"]["calibration"], difficulty)})
        self.stages.run({f"prepare-{pool}": self._prepare(pool)})
        folders = {size: f"{pool}/classify-{size}" for size in self.asked["sizes"]}
        self.stages.run(
            {
                f"{pool}-classify-{size}": [
                    "classify",
                    "--real",
                    f"{pool}/prepared",
                    "--arms",
                    "r",
                    "--num_real",
                    size,
                    "--out",
                    folder,
                    "--seeds",
                    self.asked["calibration_seeds"],
                    *_options(self.asked["classifier"]),
                ]
                for size, folder in folders.items()
            }  # fmt: skip
        )
        found = {size: read_json(self.out / folder / "classify.json")["jobs"] for size, folder in folders.items()}
        return {size: round(mean(job["test"]["accuracy"] for job in jobs), 4) for size, jobs in found.items()}

    def _choose_autoencoder(self) -> dict[str, Any]:
        """The autoencoder, trained longer if it does not keep what shows the class; latents of the real studies."""
        pool, findings = "real", None
        if self.data is None:
            pool, findings = "autoencoder", read_findings(self.out / "real/studies/studies.csv")
            self.stages.run({"images-autoencoder": self._prepare(pool)})
        longer = self.asked["longer_autoencoder_steps"]
        steps = {"vae": None} | ({} if longer is None else {"vae-longer": longer})
        for folder, number in steps.items() if self.vae is None else [(self.vae, None)]:
            if self.vae is None:
                more = [] if number is None else ["--set", f"vae_training.max_train_steps={number}"]
                train = ["train-vae", "--data", f"{pool}/prepared", "--out", folder, *self._config(), *more]
                self.stages.run({f"train-{folder}": train})
            encode = [*self._prepare("real"), "--vae", folder, *(["--overwrite"] if number is not None else [])]
            self.stages.run({f"latents-{Path(folder).name}": encode})
            gate = autoencoder_gate(open_real(self.out / "real" / "prepared", "val"), self.out / folder, findings)
            if gate["gate_open"]:
                break
        shown = {name: gate[name] for name in ("psnr", "accuracy_ratio", "gate_open")}
        return {"folder": None if self.vae is not None else folder, **shown}

    def _prepare(self, pool: str) -> list[object]:
        is_given = pool == "real" and self.data is not None
        source = Path(str(self.data)).resolve() if is_given else f"{pool}/studies"
        words = ["prepare", "--data", source, "--out", f"{pool}/prepared", "--workers", self.stages.cores]
        return [*words, *self._config()]

    def _config(self, variant: str | None = None) -> list[object]:
        return ["--config", f"configs/{variant or self.asked['variants'][0]}.json"]

    # ---- Generators

    def _generate(self) -> None:
        """Train every generator; its volumes from training and from test cases; how far these are from real ones."""
        self.stages.run({f"train-{_name(*run)}": self._train(*run) for run in self.runs})
        # Volumes that classifiers are trained on are of another noise for each seed: their spread includes that of sampling.
        splits = {
            "train": lambda seed: ["--per_case", 1, *_options(self.asked["sampling"] | {"seed": seed})],
            "test": lambda _: ["--per_class", self.asked["prompts_per_class"], *_options(self.asked["sampling"])],
        }
        self.stages.run(
            {
                f"synthesize-{_name(*run)}-{split}": [
                    "synthesize",
                    "--checkpoint",
                    f"models/{_name(*run)}",
                    "--data",
                    "real/prepared",
                    "--split",
                    split,
                    "--out",
                    f"synthetic/{_name(*run)}-{split}/studies",
                    *options(run[1]),
                ]
                for run in self.runs
                for split, options in splits.items()
            }  # fmt: skip
        )
        self.stages.run(
            {
                f"prepare-{_name(*run)}-{split}": self._prepare(f"synthetic/{_name(*run)}-{split}")
                for run in self.runs
                for split in splits
            }
        )
        for run in self.runs:  # so that the page of each evaluation knows which features can judge
            if not (gates := self.out / "evaluation" / _name(*run) / SENSITIVITY).exists():
                gates.parent.mkdir(parents=True, exist_ok=True)
                write_json(gates, read_json(self.out / "sensitivity" / SENSITIVITY))
        self.stages.run({f"evaluate-{_name(*run)}": self._evaluate(*run) for run in self.runs})
        if self.data is None:
            self._change_classes()

    def _train(self, variant: str, seed: int) -> list[object]:
        start = self.init_from.get(variant)
        more = [] if start is None else ["--init_from", Path(start).resolve()]
        # Some phantoms lack a report or a class on purpose, and of a thousand, some have the same report by chance.
        more += [word for name in STOPPING for word in ("--allow", name)] if self.data is None else []
        return ["train", *self._config(variant), "--data", "real/prepared", "--output_dir", f"models/{_name(variant, seed)}",
                "--seed", seed, "--resume", *more]  # fmt: skip

    def _evaluate(self, variant: str, seed: int) -> list[object]:
        """Features of real volumes are shared. The limit of the autoencoder is the same for all, and comes with the first."""
        words: list[object] = [
            "evaluate", "--real", "real/prepared:val", "--synthetic", f"synthetic/{_name(variant, seed)}-test/prepared",
            "--train", "real/prepared:train", "--out", f"evaluation/{_name(variant, seed)}", "--cache", "features",
            "--features", *self.asked["features"], "--metrics", *self.asked["metrics"],
        ]  # fmt: skip
        if (variant, seed) == self.runs[0]:
            words += ["--vae", self.vae]
        return [*words, *(["--findings", "real/studies/studies.csv"] if self.data is None else [])]

    def _change_classes(self) -> None:
        """Volumes of both classes from the same noise and report, of each variant that is given a class, and what differs.

        The reports are those of the autoencoder's phantoms, which no generator was trained on. One seed has to do.
        """
        runs = [run for run in self.runs if run[1] == self.runs[0][1] and _CLASS_OPTIONS[VARIANTS[run[0]].class_input]]
        self.stages.run(
            {f"sample-{_name(*run)}-{name}": self._sample(*run, name) for run in runs for name in CLASS_NAMES}
        )
        commands: dict[str, list[object]] = {}
        for run in runs:
            before, after = (f"samples/{_name(*run)}-{name}" for name in CLASS_NAMES)
            commands[f"evaluate-{_name(*run)}-class"] = [
                "evaluate", "--real", "real/prepared:val", "--synthetic", before, "--counterfactual", after,
                "--out", f"evaluation/{_name(*run)}-class", "--cache", "features",
                "--features", "random", "--metrics", "condition",
            ]  # fmt: skip
        self.stages.run(commands)

    def _sample(self, variant: str, seed: int, name: str) -> list[object]:
        traits, number = VARIANTS[variant], self.asked["phantom"]["autoencoder"]["train"]
        prompts = ["--report_table", "autoencoder/studies/studies.csv", "--distinct_seeds"]
        return [
            "sample", "--checkpoint", f"models/{_name(variant, seed)}", "--out", f"samples/{_name(variant, seed)}-{name}",
            _CLASS_OPTIONS[traits.class_input], name, *(prompts if traits.text else ["--num_samples", number]),
            *_options(self.asked["sampling"]),
        ]  # fmt: skip

    # ---- Classifiers

    def _classify(self) -> None:
        """The arms with the first variant, and for the table real + synthetic with each of the others."""
        first, second, *others = self.asked["variants"]
        common: list[object] = ["--seeds", self.asked["classifier_seeds"], *_options(self.asked["classifier"])]
        commands: dict[str, list[object]] = {
            "classify": [
                "classify", "--real", "real/prepared", "--synthetic", *self._prepared(first),
                "--baseline", *self._prepared(second), "--vae", self.vae, "--arms", *self._arms(),
                "--margin", 100 * self.asked["margin"], "--out", "classify", *common,
            ]
        }  # fmt: skip
        for variant in others:
            commands[f"classify-{variant}"] = [
                "classify", "--real", "real/prepared", "--synthetic", *self._prepared(variant), "--arms", "rs",
                "--out", f"classify-{variant}", *common,
            ]  # fmt: skip
        self.stages.run(commands, shared=True)

    def _arms(self) -> list[str]:
        """The arms, without those of predicted classes if a generator of the first variant predicts one class for all."""
        for folder in self._prepared(self.asked["variants"][0]):
            predicted = {
                str(case.class_predicted) for case in load_manifest(self.out / folder).cases if case.class_predicted
            }
            if len(predicted) < 2:
                logger.warning("%s: predicted classes are all the same or missing; their arms are left out", folder)
                return [arm for arm in self.asked["arms"] if not arm.endswith("l")]
        return list(self.asked["arms"])

    def _prepared(self, variant: str) -> list[str]:
        return [f"synthetic/{_name(variant, seed)}-train/prepared" for seed in self.asked["training_seeds"]]


def _name(variant: str, seed: int) -> str:
    return f"{variant}-{seed}"


def _options(values: Mapping[str, Any]) -> list[object]:
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def _draw(pool: str, studies: Mapping[str, int], difficulty: Mapping[str, float]) -> list[object]:
    counts = [studies.get(split, 0) for split in ("train", "val", "test")]
    return [
        "phantom",
        "--out",
        f"{pool}/studies",
        "--splits",
        *counts,
        "--seed",
        studies["seed"],
        *_options(difficulty),
    ]
