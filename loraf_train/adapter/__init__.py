"""The trainable adapter inside a model: its layers, the positions of a task, and the sharded base.

Code that acts on a torch module while it is trained or scored belongs here. It may use `loraf` and `processes`, but no
settings, no data and no order of tasks.
"""
