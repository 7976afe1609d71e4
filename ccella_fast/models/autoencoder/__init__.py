"""The autoencoder: its network, its weight folder, and exact decoding and encoding in slabs."""

from __future__ import annotations

from ccella_fast.models.autoencoder.folder import check_autoencoder, load_autoencoder, save_autoencoder, weights_file
from ccella_fast.models.autoencoder.network import Autoencoder

__all__ = ["Autoencoder", "check_autoencoder", "load_autoencoder", "save_autoencoder", "weights_file"]
