"""Sound and pictures as files, and what is seen in them."""
