"""What the TPU compiler makes of JAX programs, on a machine without the chip.

cli             `fsam profile tpu`; head, step, parameters and scale hold one `--what` each
compiler        compiles a function in a process of its own (compiler_child) and gathers the figures
hlo             XLA's instructions: cycles, bytes, regions
schedules       the bundles of a Pallas kernel; loops: those of XLA's own loops
inserted        kernels that the compiler puts in by itself
collectives     what the chips of a sharded program (scale_child) exchange
head_programs, step_programs    the programs that are compiled
"""
