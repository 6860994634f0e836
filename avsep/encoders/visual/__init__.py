"""Visual encoders, one family a file."""
