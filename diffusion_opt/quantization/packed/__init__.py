"""Packed weights on disk: how a layer is encoded, how a pipeline is saved and opened, and what others can read."""
