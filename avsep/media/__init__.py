"""Sound and frames as files, and what is seen in them."""
