"""What can be wrong with a data set, found in one pass: `ccella-fast check`, the first lines of `prepare` and of training."""
