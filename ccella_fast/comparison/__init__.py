"""`ccella-fast compare`: variants and seeds through training, synthesis, evaluation and classification, by one protocol."""
