"""Ways to apply a task set while generating."""
