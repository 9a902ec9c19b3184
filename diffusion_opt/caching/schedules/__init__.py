"""Which steps to compute, decided before the run: by search, under a bound on the error, or compiled."""
