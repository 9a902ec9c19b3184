"""Where the block stack begins and ends, one small class for each family; `models.block_stack` opens them."""
