"""What each kernel family must compute, in plain PyTorch: the oracles of the tests, and the path of a CPU.

Nothing here imports Triton, and nothing is imported here: take the module of the family you want.
"""
