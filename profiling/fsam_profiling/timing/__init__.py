"""What steps take on this machine.

step            `fsam profile step`; variants: the steps of every method and of the peers (textbook_jax, textbook_torch)
parameters      `fsam profile parameters`; parameter_steps: the parameter work of a step, and its rivals
trace           `fsam profile trace`; trace_events: time by region in a trace
matmul_rate, torch_flops, peak    the ceiling, the FLOPs and the memory of a step
"""
