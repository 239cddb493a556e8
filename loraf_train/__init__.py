"""`loraf-train`: trains LoRAF checkpoints, scores, inspects and exports them."""
