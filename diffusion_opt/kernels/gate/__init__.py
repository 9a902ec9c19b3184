"""The compile gate: every kernel compiled for five GPU generations without a GPU, and read."""
