"""The operations of a sharpness-aware step. `spec` says what each computes; a folder per backend computes it."""
