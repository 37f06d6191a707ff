"""`impasto bench`: what training costs here, as ratios to the loop that a plain script runs and to what the machine can do."""
