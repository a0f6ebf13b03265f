"""What the GPU compilers make of the Triton kernels, on a machine without the card.

cli             `fsam profile gpu`; kernels (the head's), parameters, passes and step hold one `--what` each
passes          counts the bytes of PyTorch's own operations as they are called
launches        every launch of the head's kernels, recorded; parameter_launches: those of the parameter operations
code            compiles a launch, and reads registers, spills, widths and matrix instructions
traffic         counts the bytes of a launch: llvm parses the generated code, programs executes it for its addresses
"""
