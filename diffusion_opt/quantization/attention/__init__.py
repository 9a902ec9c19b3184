"""Attention in few bits, and the gradient that goes with it."""
