"""`fsam sharpness`: what is sharp in a trained model, the logits or the function.

numerics (eigenvalues, traces, densities from products alone) ← measure ← cli; subjects (runs and models) and report
beside them.
"""
