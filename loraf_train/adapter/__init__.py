"""The trainable adapter inside a model: layers, masks, and the sharded base beside which they stand.

What acts on a torch module while it trains or is scored belongs here. Knows `loraf` and processes; knows nothing of
settings, data or the order of tasks.
"""
