"""`loraf-serve`: serves LoRAF checkpoints over gRPC, the task set chosen by each request."""
