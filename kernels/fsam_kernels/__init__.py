"""The operations of a sharpness-aware step: `spec` defines them, and one folder per backend implements them."""
