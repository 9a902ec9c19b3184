"""What a rule learns from recorded generations, and the run that a calibration belongs to."""
