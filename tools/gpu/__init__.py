"""For a machine with a CUDA GPU: are the kernels right there, and how fast are they? ``python -m tools.gpu.check``."""
