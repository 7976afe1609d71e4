"""The model card of a shared model, README.md on the Hugging Face hub: facts of its configuration, checkpoint and evaluation.

Nothing in it is taken from reports, file names or ids. The metadata at its top is what the hub reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ccella_fast.config import Config
from ccella_fast.diffusion.objective import process_in_words
from ccella_fast.diffusion.prediction import IN_WORDS
from ccella_fast.evaluation.results import COLUMNS, cells
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.quantities import counted
from ccella_fast.report.stored_evaluation import MetricRow, StoredEvaluation, guard_sentence
from ccella_fast.report.verdicts import verdicts
from ccella_fast.sampling.licenses import NOT_STATED, License, card_license
from ccella_fast.sampling.pretrained import SamplerParts
from ccella_fast.sampling.trained_on import class_head_state, trained_spacings

_TAGS = ["ccella", "medical", "mri", "prostate", "3d", "latent-diffusion", "synthetic-data"]
_AVERAGED = {
    True: "moving average",
    False: "not averaged",
    None: "the checkpoint does not say whether they are averages",
}
_PAPER = "https://arxiv.org/abs/2506.10230"


def model_card(
    parts: SamplerParts,
    autoencoder: Autoencoder,
    repo_id: str,
    licenses: tuple[License | None, License | None],
    evaluation: StoredEvaluation | None,
) -> str:
    """The text of README.md.

    Args:
        parts: the model.
        autoencoder: that of the model.
        repo_id: where the model is shared, OWNER/NAME.
        licenses: of the diffusion model and of the autoencoder; None: not stated.
        evaluation: of volumes that these weights have generated.
    """
    name = repo_id.partition("/")[2]
    sections = [
        f"# {name}\n\n{_summary(parts.config)}",
        f"## Model\n\n{_model(parts)}",
        f"## Training data\n\n{_training_data(parts)}",
        f"## Licenses\n\n{_weight_files(parts, autoencoder, licenses)}",
        f"## Evaluation\n\n{_evaluation(evaluation)}",
        f"## Intended use and limits\n\n{_intended_use(evaluation)}",
        f"## How to use it\n\n{_how_to_use(parts.config, repo_id)}",
        f"## Citation\n\n{_CITATION}",
    ]
    return f"---\n{_metadata(parts.config, repo_id, licenses, evaluation)}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(
    config: Config,
    repo_id: str,
    licenses: tuple[License | None, License | None],
    evaluation: StoredEvaluation | None,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = "text-to-3d" if config.model.traits.text else "unconditional-image-generation"
    name = repo_id.partition("/")[2]
    values: dict[str, Any] = {"library_name": "ccella_fast", "pipeline_tag": task, "tags": _TAGS}
    values |= card_license(*licenses, page=f"https://huggingface.co/{repo_id}")
    if evaluation is not None:
        real = f"{evaluation.word}s"
        results = [
            EvalResult(task, "custom", real, row.metric, row.value, metric_name=_row_name(row))
            for row in evaluation.rows
            if row.value is not None
        ]
        values |= {"model_name": name, "eval_results": results} if results else {}
    return ModelCardData(**values).to_yaml()


def _row_name(row: MetricRow) -> str:
    """What the hub shows next to the value, which says little without its floor."""
    floor = None if row.floor is None else f"floor {row.floor:.4g}"
    return ", ".join(filter(None, (row.metric, row.features, row.sequence, floor)))


def _summary(config: Config) -> str:
    traits, sequences = config.model.traits, " and ".join(config.data.sequences)
    condition = "from the text of a radiology report" if traits.text else "without a report"
    return (
        f"This latent diffusion model generates synthetic 3D prostate MRI ({sequences}) {condition}. Its architecture is the "
        f"variant {traits.name} of [CCELLA]({_PAPER}), in ccella_fast."
    )


def _model(parts: SamplerParts) -> str:
    config, state = parts.config, parts.state
    model, data, vae, grid = config.model, config.data, config.autoencoder, config.check_grid()
    report = ["the report"] if model.traits.text else []
    classes = {"predicted": ["the PI-RADS class that is predicted from it"], "given": ["the PI-RADS class"], "none": []}
    inputs = [*report, *classes[model.traits.class_input], "the voxel size"]
    facts = {
        "Inputs": ", ".join(inputs),
        "Output": f"{_times(data.dim)} voxels of {_times(data.spacing)} mm along R, A, S, of each sequence",
        "Sequences": ", ".join(data.sequences),
        "Latent": f"{sum(model.latent_channels)} channels, {_times(grid)} voxels",
        "U-Net": f"{_list(model.num_channels)} channels, {counted(model.num_res_blocks, 'residual block')} per level",
        "Autoencoder": f"{_list(vae.num_channels)} channels, each axis divided by {vae.factor}",
        "Noise": process_in_words(config.scheduler, grid),
        "Prediction": IN_WORDS[config.scheduler.prediction],
        "Default sampling": counted(config.sampling.num_inference_steps, "step") + f" of {config.sampling.solver}",
        "Weights": f"{_AVERAGED[parts.origin.averaged]}, after {counted(state['step'], 'training step')}",
    }
    if start := parts.origin.start_weights:
        left_out = f", without {_list(start['skip'])}" if start["skip"] else ""
        facts["Started from"] = f"weights with the SHA-256 {start['sha256']}{left_out}, whose license applies too"
    if model.traits.text:
        facts["Text encoder"] = f"{config.text.encoder}, {config.text.max_length} tokens"
    dropped = {"report": config.training.report_dropout, "class": config.training.class_dropout}
    if any(dropped.values()):
        shares = " and ".join(f"without the {name}: {share:.0%}" for name, share in dropped.items() if share)
        facts["Guidance"] = f"trained for it, with samples {shares}"
    head = class_head_state(config, parts.origin.trained_on)
    if head is not None:
        about = {
            "trained": "trained on both classes",
            "untrained": "not trained: its prediction means nothing",
            "unknown": "the checkpoint does not say whether it was trained",
        }
        facts["Class head"] = about[head]
    return _table(["", ""], [[name, value] for name, value in facts.items()])


def _training_data(parts: SamplerParts) -> str:
    config, trained_on = parts.config, parts.origin.trained_on
    lines = ["The checkpoint does not say how many studies it was trained on."]
    if trained_on is not None:
        negative, positive = trained_on["classes"]
        low, high = (_times(spacing) for spacing in trained_spacings(config, trained_on))
        lines = [
            f"{counted(negative + positive, 'study', 'studies')} with a report and a PI-RADS class: {negative} of PI-RADS 1 "
            f"and 2, {positive} of PI-RADS 3 to 5. Studies that lack one of these are not counted.",
            f"Voxels of {low if low == high else f'{low} to {high}'} mm along R, A, S, after augmentation if there was any.",
        ]
    lines += [
        f"Each volume was brought to {_times(config.data.dim)} voxels with intensities in [0, 1].",
        "The checkpoint does not record where the studies come from, whose they are, and who has approved their use.",
    ]
    return " ".join(lines)


def _weight_files(
    parts: SamplerParts, autoencoder: Autoencoder, licenses: tuple[License | None, License | None]
) -> str:
    networks: list[tuple[str, str, nn.Module]] = [
        ("", "diffusion model", parts.model),
        ("vae/", "autoencoder", autoencoder),
    ]
    rows = [
        [f"`{folder}model.safetensors`", what, f"{_count(network):,}", _license(license, f"{folder}LICENSE.md")]
        for (folder, what, network), license in zip(networks, licenses, strict=True)
    ]
    table = _table(["file", "weights of", "parameters", "license"], rows)
    text = parts.config.text.encoder
    if not parts.config.model.traits.text:
        return table
    return f"{table}\n\nThe text encoder, {text}, is not part of this repository, and has a license of its own."


def _license(license: License | None, file: str) -> str:
    if license is None:
        return f"**{NOT_STATED}**"
    return license.name if license.text is None else f"[{license.name}]({file})"


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _evaluation(evaluation: StoredEvaluation | None) -> str:
    if evaluation is None:
        return (
            "There is no evaluation: nothing here says whether the volumes are good or new, or show what was asked for."
        )
    how = evaluation.generator
    settings = f" with {how['num_inference_steps']} steps of {how['solver']}" if "solver" in how else ""
    if "autoguidance" in how:
        settings += ", guided by a weaker model that is not part of this repository"
    lines = [
        f"Volumes that these weights generated{settings}, compared with {evaluation.word}s by `ccella-fast evaluate` "
        f"(protocol {evaluation.protocol_sha256[:12]}). {_held_out(evaluation)}",
        "\n".join(f"* **{each.question}** {each.answer}: {each.sentence}" for each in verdicts(evaluation)),
        _table(list(COLUMNS), [cells(row) for row in evaluation.rows]),
        "*floor*: the same metric between two halves of the real volumes. *ratio*: value at equal n over floor; 1 is as good "
        "as real. *limit*: real volumes after the autoencoder. *n*: real + generated.",
    ]
    guards = dict.fromkeys(guard for row in evaluation.rows for guard in row.guards)
    lines += ["\n".join(f"* `{guard}`: {guard_sentence(guard)}" for guard in guards)] if guards else []
    return "\n\n".join(lines)


def _held_out(evaluation: StoredEvaluation) -> str:
    if evaluation.protocol.get("standardised_by") == "train":
        return f"No {evaluation.word} is among the training volumes that it was given."
    return f"It was given no training volumes to find out whether these {evaluation.word}s are among them."


def _intended_use(evaluation: StoredEvaluation | None) -> str:
    looked = evaluation is not None and any(row.metric == "copies" for row in evaluation.rows)
    copies = "The evaluation above says whether this one does" if looked else "This was not looked for in this model"
    lines = [
        "For research: methods of image analysis, augmentation of training data, teaching.",
        "**Not for clinical use.** Every volume is synthetic: it shows no patient, and must not be the basis of a decision.",
        "A volume need not show what was asked for.",
        f"A generative model can reproduce studies that it was trained on. {copies}. Treat the weights like those studies.",
        "The model has learned from the scanners and the population of its training data. It may fail for others.",
    ]
    return "\n".join(f"* {line}" for line in lines)


def _how_to_use(config: Config, repo_id: str) -> str:
    traits = config.model.traits
    inputs = ['reports=["PI-RADS 5 lesion, left"]'] if traits.text else []
    inputs += ['pirads="pos"'] if traits.class_input == "given" else []
    return f"""With ccella_fast and its extra `commands`:

```python
import ccella_fast

sampler = ccella_fast.FastSampler.from_pretrained("{repo_id}")
result = sampler({", ".join([*inputs, "seeds=[0]"])})
result.save("samples")  # NIfTI files, each with a JSON file that says how it was generated
```"""


_CITATION = f"""Grabke, Haider, Taati: *Prompt-Guided Latent Diffusion with Predictive Class Conditioning for 3D Prostate MRI
Generation*, [arXiv 2506.10230]({_PAPER}); IEEE TBME, doi 10.1109/TBME.2025.3648426."""


def _times(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


def _list(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
