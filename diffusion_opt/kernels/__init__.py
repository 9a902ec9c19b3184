"""Triton kernels for diffusion transformers, each beside the plain PyTorch that says what it must compute.

One folder is one operation, and its files have the same names everywhere:

    oracle.py                what is computed, in plain PyTorch; also what a CPU runs
    operator.py              the public functions and the torch custom operator: checks, shapes, gradient
    kernel.py                the Triton kernel and its launcher; forward.py and backward.py where there are two

How to read this room, by lesson:

    07  attention from scratch   attention/dense/oracle.py -> attention/softmax_tiles.py -> attention/dense/forward.py
        the gradient             attention/dense/backward.py
        what the compiler made   gate/aot.py -> sass.py -> roofline.py -> report.py; launch.py has the tiles
        without a GPU            runtime.py -> interpreter.py
    08  8 bits                   quantizers/oracle.py -> attention/eight_bit/oracle.py -> attention/eight_bit/forward.py
        4 bits                   quantizers/formats.py -> attention/fp4/oracle.py -> attention/fp4/forward.py
        leaving tiles out        attention/sparse/masks.py -> attention/sparse/oracle.py -> attention/sparse/forward.py
        inside a pipeline        attention/door.py (`attention`, `explain`) -> diffusers_backend.py
    04  training under FP4       attention/fp4/oracle.py (the backward formulas) -> attention/fp4/backward.py
    06  only what changed        attention/region/oracle.py -> attention/region/operator.py
    03  8-bit linear layers      gemm/oracle.py -> gemm/kernel.py
        around attention         fused/modulate, fused/qk_norm_rope: norms, rotations and gates in one pass

Nothing is imported here: Triton exists on Linux only, and decides when a kernel is decorated whether it will be
compiled or interpreted. A folder's own name gives its public functions (`from diffusion_opt.kernels.attention import
attention`), and no kernel module is loaded before a kernel runs.
"""
