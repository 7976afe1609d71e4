"""Random augmentation of volumes: its parameters, and the engines that apply it."""
