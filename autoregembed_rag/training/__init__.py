"""The two training stages of the paper: information compression, then conditional distribution alignment."""
