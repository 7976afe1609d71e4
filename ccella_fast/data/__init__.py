"""Studies: reading, preparation, augmentation and loading."""
