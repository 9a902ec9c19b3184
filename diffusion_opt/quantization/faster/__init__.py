"""Linear layers that are really faster: INT8 on a CPU, INT8 and FP8 on a GPU, bfloat16 on either."""
