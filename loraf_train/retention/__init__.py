"""Keeps what earlier tasks answer while later ones train, without their data.

When a task ends, its statistics are gathered: how its logits depend on each module's B. From them follows by how much a
later task changes the earlier one's logits; a penalty on that is steered towards a budget.
"""
