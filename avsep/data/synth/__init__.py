"""The offline benchmark: phrases played by sampled instruments, with pictures of who plays."""
