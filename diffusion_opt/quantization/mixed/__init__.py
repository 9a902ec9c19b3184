"""A format for each layer: how much each layer minds, and how bits are given out under a budget."""
