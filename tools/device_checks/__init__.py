"""The sections of `tools/device_check.py`, one module each; products, weights and logits are those of correctness."""
