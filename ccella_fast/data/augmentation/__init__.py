"""Random views of volumes: what is drawn, and the engines that apply it."""
