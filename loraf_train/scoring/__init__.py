"""Scores of a task set on evaluation data: measuring them, and the table stored with a checkpoint.

`evaluate` scores one set, `table` completes a checkpoint's scores, `continual` defines forgetting and transfer. The
trainer does not know this room, nor this room the trainer.
"""
