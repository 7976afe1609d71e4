"""The autoencoder: its network, its folder of weights, and exact decoding and encoding in slabs."""

from __future__ import annotations

from ccella_fast.models.autoencoder.network import Autoencoder, load_autoencoder, save_autoencoder

__all__ = ["Autoencoder", "load_autoencoder", "save_autoencoder"]
