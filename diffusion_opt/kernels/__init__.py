"""Triton kernels for diffusion transformers, each beside the plain PyTorch that says what it must compute.

Nothing is imported here: Triton exists on Linux only, and decides when a kernel is decorated whether it will be
compiled or interpreted. Import the module of the kernel family you want.
"""
