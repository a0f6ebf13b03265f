"""A small decoder in Flax and in PyTorch with one parameter layout."""
