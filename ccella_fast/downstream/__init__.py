"""The downstream experiment: does a classifier learn more from generated studies? `ccella-fast classify`."""
