"""The autoencoder: its network, its weight folder, and exact decoding and encoding in slabs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ccella_fast.lazy_names import lazy_names

if TYPE_CHECKING:
    from ccella_fast.models.autoencoder.folder import (
        check_autoencoder,
        load_autoencoder,
        save_autoencoder,
        weights_file,
    )
    from ccella_fast.models.autoencoder.network import Autoencoder

__all__ = ["Autoencoder", "check_autoencoder", "load_autoencoder", "save_autoencoder", "weights_file"]

_HOMES = {
    "Autoencoder": "network",
    "check_autoencoder": "folder",
    "load_autoencoder": "folder",
    "save_autoencoder": "folder",
    "weights_file": "folder",
}
__getattr__ = lazy_names(__name__, _HOMES)
