"""Volumes to feature vectors: pretrained networks, random networks and radiomics, each with all of its preprocessing."""
