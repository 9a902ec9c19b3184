"""What stands around attention in a block, fused into one pass: adaptive norms with gates, and norm with rotation."""
