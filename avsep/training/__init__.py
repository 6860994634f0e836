"""Training: the task loop, its optimisers, batches and logs."""
