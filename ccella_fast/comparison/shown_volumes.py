"""The volumes that the page of a comparison shows: of the same prompts side by side, and of the same noise for both classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ccella_fast.evaluation import open_volumes
from ccella_fast.evaluation.counterfactuals import pair_samples
from ccella_fast.evaluation.reconstruction import reconstructions
from ccella_fast.evaluation.volumes import Volume, VolumeSet
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.processes import resolve_device
from ccella_fast.report.evaluation_figures import Pair
from ccella_fast.report.figures import Panel

_PER_CLASS = 2
_PAIRS = 4


def same_prompts(out: Path, asked: Mapping[str, Any], vae: Path) -> list[list[Panel]]:
    """For some test studies of both classes: the study, its reconstruction, and what each variant generates from it.

    Those of the first seed, from studies that all variants have generated a volume from.

    Args:
        out: the folder of the comparison.
        asked: what the protocol asks for.
        vae: the autoencoder.
    """
    seed = asked["training_seeds"][0]
    real = _first_sequence(open_volumes(f"{out / 'real' / 'prepared'}:test", field="real"))
    made = {
        variant: _first_sequence(
            open_volumes(out / "synthetic" / f"{variant}-{seed}-test" / "prepared", field="synthetic")
        )
        for variant in asked["variants"]
    }
    # A volume's prompt is the study that it was generated from.
    by_prompt = {
        variant: {source.prompt: place for place, source in reversed(list(enumerate(volumes.sources)))}
        for variant, volumes in made.items()
    }
    shared = [place for place, source in enumerate(real.sources) if all(source.id in of for of in by_prompt.values())]
    decoded = reconstructions(real, vae, device=str(resolve_device(None)))
    columns = []
    for name in CLASS_NAMES:
        for place in [place for place in shared if real.sources[place].pirads == name][:_PER_CLASS]:
            case = real.sources[place].id
            volumes = {f"real, {name}": real[place], "reconstructed": decoded[place]}
            volumes |= {variant: made[variant][by_prompt[variant][case]] for variant in made}
            columns.append([_panel(volume, title) for title, volume in volumes.items()])
    return columns


def other_class(out: Path, runs: Sequence[tuple[str, int]]) -> dict[str, list[Pair]]:
    """Volumes of the same noise and report that were asked for either class, of each generator that has made such."""
    found = {}
    for variant, seed in runs:
        folders = [out / "samples" / f"{variant}-{seed}-{name}" for name in CLASS_NAMES]
        if not all(folder.is_dir() for folder in folders):
            continue
        first, second = (_first_sequence(open_volumes(folder, field="samples")) for folder in folders)
        second = pair_samples(first, second, field="samples")
        place = {source.id: number for number, source in enumerate(first.sources)}
        found[f"{variant}, seed {seed}"] = [
            _pair(first[place[second.sources[number].id]], second[number], number + 1)
            for number in range(min(_PAIRS, len(second)))
        ]
    return found


def _pair(first: Volume, second: Volume, number: int) -> Pair:
    # Minus the first, so that what the class adds is red.
    title = f"Asked for {second.pirads}  |  {first.pirads}  |  difference"
    return Pair(second.array, first.array, first.spacing, title, f"report and noise {number}")


def _first_sequence(volumes: VolumeSet) -> VolumeSet:
    return volumes.of_sequence(volumes.sequences[0])


def _panel(volume: Volume, title: str) -> Panel:
    return Panel(volume.array, volume.spacing, title)
