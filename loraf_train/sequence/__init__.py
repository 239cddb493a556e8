"""A whole run: task after task into one checkpoint, and what has to be in order before one begins.

preflight (every mistake, before anything is trained) → runner (calibrate, train, commit) → resume (an interrupted task
goes on). The order of training, and what a checkpoint records of it, belong here.
"""
