"""One step cache: where the block stack is cut, what a skipped pass gets instead, and the technique around both."""
