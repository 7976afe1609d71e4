"""Saving and loading of the autoencoder as a folder that contains its configuration, its weights and their SHA-256."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ccella_fast.config import AutoencoderConfig
from ccella_fast.errors import CheckpointError
from ccella_fast.folder_kinds import check_folder
from ccella_fast.models.autoencoder.network import Autoencoder
from ccella_fast.models.weights import load_weights, plain_tensors, read_pt
from ccella_fast.storage import atomic_path, read_json, sha256, write_json

FORMAT = {"format": "ccella_fast.autoencoder", "version": 1}


def save_autoencoder(vae: Autoencoder, folder: str | Path) -> None:
    """Write the autoencoder to `folder`.

    The folder contains config.json, model.safetensors (float32, with the tensor names of the reference implementation) and
    manifest.json, which is written last and holds the SHA-256 of the other two.
    """
    folder = Path(folder)
    write_json(folder / "config.json", vae.config.model_dump(mode="json"))
    tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in vae.state_dict().items()}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    hashes = {name: sha256(folder / name) for name in ("config.json", "model.safetensors")}
    write_json(folder / "manifest.json", {**FORMAT, "sha256": hashes})


def load_autoencoder(path: str | Path, config: AutoencoderConfig | None = None) -> Autoencoder:
    """Load an autoencoder.

    Args:
        path: a folder written by `save_autoencoder`, a folder that contains such a folder as `vae/`, or a `.pt` file with the
            state dict of the reference implementation.
        config: the expected configuration. A `.pt` file has none and is loaded with this one (default: the sizes of MAISI).

    Returns:
        The autoencoder on the CPU, in evaluation mode, without gradients.

    Raises:
        CheckpointError: weights are missing, damaged or of another architecture.
    """
    path = Path(path)
    check_autoencoder(path)
    if path.is_file():
        config = config or AutoencoderConfig()
        tensors = plain_tensors(read_pt(path), path=path)
    else:
        file = weights_file(path)
        config = _read_config(file.parent, config)
        tensors = _read_safetensors(file)
    vae = Autoencoder(config)
    load_weights(vae, tensors, path=path, what="this autoencoder")
    return vae.eval().requires_grad_(False)


def check_autoencoder(path: Path) -> None:
    """Raise CheckpointError if `path` does not exist or is a folder of another kind. For use before long work."""
    if not path.exists():
        fix = "check the path, or run `ccella-fast train-vae` first"
        raise CheckpointError("this path does not exist; an autoencoder is needed", path=path, fix=fix)
    if path.is_dir():
        check_folder(weights_file(path).parent, "autoencoder", error=CheckpointError)


def weights_file(path: str | Path) -> Path:
    """Return the weight file that `load_autoencoder(path)` reads."""
    path = Path(path)
    if path.is_file():
        return path
    return (path / "vae" if (path / "vae").is_dir() else path) / "model.safetensors"


def _read_config(folder: Path, expected: AutoencoderConfig | None) -> AutoencoderConfig:
    """Read the configuration, after verifying the manifest and the SHA-256 of both files."""
    manifest = read_json(folder / "manifest.json", error=CheckpointError)
    if not isinstance(manifest, dict) or {key: manifest.get(key) for key in FORMAT} != FORMAT:
        fix = "use a folder that was written by `ccella-fast train-vae`"
        raise CheckpointError("this is not the manifest of an autoencoder", path=folder / "manifest.json", fix=fix)
    hashes = manifest.get("sha256")
    for name in ("config.json", "model.safetensors"):
        file = folder / name
        if not file.is_file():
            raise CheckpointError("this file is missing", path=file, fix="copy the whole folder again")
        if not isinstance(hashes, dict) or sha256(file) != hashes.get(name):
            why = "this file is damaged: its SHA-256 differs from that in the manifest"
            raise CheckpointError(why, path=file, fix="copy the file again")
    stored = read_json(folder / "config.json", error=CheckpointError)
    try:
        config = AutoencoderConfig.model_validate(stored)
    except ValueError as error:
        first = str(error).splitlines()[0]
        why = f"this is not the configuration of an autoencoder: {first}"
        raise CheckpointError(why, path=folder / "config.json") from None
    for key, value in (expected or config).model_dump().items():
        if getattr(config, key) != value:
            why = f"these weights have {key} {getattr(config, key)}, but the configuration has {value}"
            fix = "use the configuration that they were trained with, or train another autoencoder"
            raise CheckpointError(why, path=folder, field=f"autoencoder.{key}", fix=fix)
    return config


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        why = f"this is not a readable safetensors file: {error}"
        raise CheckpointError(why, path=file, fix="copy the file again") from None
