"""The trainers: data, models, one loop for JAX and PyTorch, checkpoints, and the `fsam` command."""
