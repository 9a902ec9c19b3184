"""Each number format in a few lines, to read; equal to modelopt's own arithmetic bit for bit (tests show it)."""
