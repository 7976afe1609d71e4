"""Sharing a model on the Hugging Face hub: the folder of `save_pretrained` with a model card, in one commit.

Everything is built and checked before the hub is asked for anything.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ccella_fast
from ccella_fast.config import Config
from ccella_fast.errors import CheckpointError, ConfigError, DataError
from ccella_fast.folder_kinds import folder_kind
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.optional import require
from ccella_fast.report.stored_evaluation import StoredEvaluation, read_evaluation
from ccella_fast.sampling.licenses import License, read_license
from ccella_fast.sampling.model_card import model_card
from ccella_fast.sampling.pretrained import (
    WEIGHT_FILES,
    Provenance,
    SamplerParts,
    is_shared_encoder,
    save_pretrained_files,
    shared_config,
)
from ccella_fast.storage import check_writable

CARD = "README.md"
# Nothing else is uploaded, and nothing else in a repository is replaced.
FILES = {
    CARD, "LICENSE.md", "config.json", "manifest.json", "model.safetensors", "training_state.json",
    "vae/LICENSE.md", "vae/config.json", "vae/manifest.json", "vae/model.safetensors",
}  # fmt: skip


@dataclass(frozen=True)
class Upload:
    """What is shared, where and under which licenses, checked without weights and without the network.

    Attributes:
        repo_id: OWNER/NAME.
        licenses: of the diffusion model and of the autoencoder; None: not stated.
        evaluation: for the card.
        text_encoder: replaces the encoder of the configuration.
        private: whether only the owner can see the repository.
        token: of the hub; None: the one that the machine has stored.
        out: the folder to write to instead of uploading.
    """

    repo_id: str
    licenses: tuple[License | None, License | None]
    evaluation: StoredEvaluation | None
    text_encoder: str | None
    private: bool
    token: str | None
    out: Path | None

    @classmethod
    def check(
        cls,
        repo_id: str,
        *,
        license: str | Path | None = None,
        vae_license: str | Path | None = None,
        evaluation: str | Path | None = None,
        text_encoder: str | None = None,
        private: bool = False,
        token: str | None = None,
        out: str | Path | None = None,
    ) -> Upload:
        """Check the arguments of `FastSampler.push_to_hub`.

        Raises:
            ConfigError: the name, a license or the token is missing or wrong, the hub is offline, or `out` exists.
            DataError: the evaluation is missing or damaged.
        """
        require("huggingface_hub", "sharing a model")
        _check_name(repo_id)
        licenses = read_license(license, field="--license"), read_license(vae_license, field="--vae_license")
        stored = None if evaluation is None else _read_evaluation(Path(evaluation))
        if out is None:
            _check_licenses(licenses)
            _check_access(token)
        else:
            out = Path(out)
            check_writable(out, "--out")
            if out.exists():
                raise ConfigError("this folder already exists", path=out, field="--out", fix="choose another name")
        return cls(repo_id, licenses, stored, text_encoder, private, token, out)

    def run(self, parts: SamplerParts) -> str:
        """Upload the model, or write it to `out`; returns the address or the folder.

        Raises:
            CheckpointError: the model has no autoencoder, or does not come from a checkpoint folder.
            ConfigError: the evaluation is of other weights, the encoder is a folder of this machine, or the hub refuses.
        """
        autoencoder = parts.autoencoder
        if autoencoder is None:
            why = "this model has no autoencoder, so that nobody could decode what it generates"
            raise CheckpointError(why, path=parts.origin.path, fix="give the autoencoder, with --vae or vae=")
        if parts.origin.path is None or not parts.origin.path.is_dir():
            why = "this model does not come from a checkpoint folder, which says its grid, its encoder and its training"
            fix = "share a run folder or step folder, or write one with `save_pretrained`"
            raise CheckpointError(why, path=parts.origin.path, fix=fix)
        if self.evaluation is not None:
            _check_generator(self.evaluation.generator, parts.origin)
            _check_weights(parts, parts.origin.path)
        parts = parts._replace(config=_shared_config(parts.config, self.text_encoder))
        documents = self._documents(parts, autoencoder)
        if self.out is not None:
            save_pretrained_files(self.out, parts, documents)
            return str(self.out)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            save_pretrained_files(folder, parts, documents)
            return _upload(folder, self.repo_id, private=self.private, token=self.token)

    def _documents(self, parts: SamplerParts, autoencoder: Autoencoder) -> dict[str, str]:
        texts = {
            file: license.text
            for file, license in zip(("LICENSE.md", "vae/LICENSE.md"), self.licenses, strict=True)
            if license is not None and license.text is not None
        }
        return {CARD: model_card(parts, autoencoder, self.repo_id, self.licenses, self.evaluation), **texts}


def _check_name(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    fix = "give the owner and a name of letters, digits and - _ . such as my-group/prostate-t2w"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ConfigError(
            f"{repo_id!r:.100} is not the name of a repository on the hub", field="--repo", fix=fix
        ) from None
    if "/" not in repo_id:
        raise ConfigError(f"{repo_id!r:.100} does not name the owner of the repository", field="--repo", fix=fix)


def _check_licenses(licenses: tuple[License | None, License | None]) -> None:
    given = {"--license": licenses[0], "--vae_license": licenses[1]}
    weights = {"--license": "diffusion model", "--vae_license": "autoencoder"}
    if missing := [option for option, license in given.items() if license is None]:
        why = f"no license is stated for the weights of the {' and the '.join(weights[option] for option in missing)}"
        fix = (
            "give an identifier such as cc-by-nc-4.0, or a file with the text; without one, nobody may use the weights"
        )
        raise ConfigError(why, field=", ".join(missing), fix=fix)


def _check_access(token: str | None) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        why = "the hub is switched off on this machine: HF_HUB_OFFLINE is set"
        raise ConfigError(why, field="HF_HUB_OFFLINE", fix="unset it, or write the files with --out FOLDER")
    if (token or get_token()) is None:
        fix = "run `hf auth login` or set HF_TOKEN to a token that may write, or write the files with --out FOLDER"
        raise ConfigError("there is no token of the Hugging Face hub on this machine", field="HF_TOKEN", fix=fix)


def _read_evaluation(folder: Path) -> StoredEvaluation:
    if folder_kind(folder) != "evaluation":
        why = "this is not the folder of an evaluation"
        raise DataError(why, path=folder, field="--evaluation", fix="give the folder that `ccella-fast evaluate` wrote")
    return read_evaluation(folder)


def _check_generator(generator: Mapping[str, Any], origin: Provenance) -> None:
    """Raise ConfigError unless the evaluated volumes were generated by these weights."""
    named = {"weights_sha256": "diffusion model", "vae_sha256": "autoencoder"}
    for key, what in named.items():
        found = generator.get(key)
        if found is None:
            why = f"this evaluation does not say which {what} has generated its volumes"
            fix = "run `ccella-fast evaluate` again, on samples of this model alone; features that it has kept are used again"
            raise ConfigError(why, field="--evaluation", fix=fix)
        if found != origin.metadata[key]:
            why = f"this evaluation is of another {what}: {str(found)[:12]}, and not {origin.metadata[key][:12]} (SHA-256)"
            fix = "share the checkpoint that was evaluated (step folder, --weights, --vae), or evaluate samples of this one"
            raise ConfigError(why, field="--evaluation", fix=fix)


def _check_weights(parts: SamplerParts, folder: Path) -> None:
    """Raise ConfigError unless the weights are still those of the checkpoint, to which the evaluation belongs."""
    from safetensors import safe_open

    state = parts.model.state_dict()
    with safe_open(folder / WEIGHT_FILES[parts.origin.weights], "pt") as file:
        for name, tensor in state.items():
            stored = file.get_tensor(name)
            if stored.dtype != tensor.dtype or not stored.equal(tensor.cpu()):
                why = f"the weights '{name}' are not those of the checkpoint that was evaluated: they were rounded or changed"
                fix = 'load the sampler with dtype="float32" and share it as it is, or leave the evaluation out'
                raise ConfigError(why, path=folder, field="evaluation", fix=fix)


def _shared_config(config: Config, text_encoder: str | None) -> Config:
    """The configuration for others. Raises ConfigError if they do not have the text encoder."""
    shared = shared_config(config, text_encoder)
    encoder = shared.text.encoder
    if shared.model.traits.text and not is_shared_encoder(encoder):
        why = "the text encoder of this model is a folder of this machine, which others do not have"
        fix = "add --text_encoder with its name on the hub, such as google/flan-t5-xxl"
        raise ConfigError(why, path=encoder, field="text.encoder", fix=fix)
    return shared


def _upload(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload the files of a folder in one commit, and return the address of the repository."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    assert files.keys() <= FILES, f"not to be shared: {sorted(files.keys() - FILES)}"
    api = HfApi(token=token, library_name="ccella_fast", library_version=ccella_fast.__version__)
    with _client_errors(repo_id):
        ModelCard.load(
            files[CARD]
        ).validate()  # by the hub, which refuses wrong metadata only after the repository exists
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        found = api.model_info(repo_id)
    existing = {file.rfilename for file in found.siblings or ()}
    _check_repository(repo_id, existing, wants_private=private, is_private=bool(found.private))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, path) for name, path in files.items()
    ]
    operations += [CommitOperationDelete(name) for name in sorted(existing & FILES - files.keys())]
    with _client_errors(repo_id):  # not `upload_folder`, which may make several commits: no one may see half of a model
        api.create_commit(repo_id, operations, commit_message=f"Upload with ccella_fast {ccella_fast.__version__}")
    return str(url)


def _check_repository(repo_id: str, existing: set[str], *, wants_private: bool, is_private: bool) -> None:
    """Raise ConfigError for a repository that is public and should not be, or that holds something else."""
    if wants_private and not is_private:
        why = f"the repository {repo_id} exists and is public"
        raise ConfigError(
            why, field="--private", fix="make it private in its settings on the hub, or choose another name"
        )
    content = existing - {".gitattributes", CARD, "LICENSE", "LICENSE.md"}
    if content and not {"manifest.json", "training_state.json"} <= content:
        why = f"the repository {repo_id} holds another model or data, such as {min(content)!r:.80}"
        raise ConfigError(why, field="--repo", fix="choose another name")


@contextmanager
def _client_errors(repo_id: str) -> Iterator[None]:
    """Convert what the client of the hub raises. A commit that fails changes nothing, but the repository may exist already."""
    try:
        yield
    except Exception as error:  # the client raises many types of errors; each means that nothing was uploaded
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"the upload to {repo_id} failed: {' '.join(str(error).split()):.200}"
        fix = "check the network and the name, and run the same command again"
        if status == 401:
            why, fix = "the hub does not accept the token of this machine", "run `hf auth login`, or set HF_TOKEN"
        elif status == 403:
            why = f"the token of this machine may not write to {repo_id}"
            fix = "check the owner, and use a token that may write: https://huggingface.co/settings/tokens"
        raise ConfigError(why, field="--repo", fix=fix) from None
