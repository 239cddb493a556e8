"""Scores of a task set on evaluation data: measuring them, and the table stored with a checkpoint.

`evaluate` scores one set, `table` completes a checkpoint's scores, `continual` defines forgetting and transfer. This
folder and the trainer do not import each other.
"""
