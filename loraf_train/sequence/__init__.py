"""A whole run: task after task into one checkpoint, and everything that is checked before it starts.

preflight (every mistake, before anything is trained) → runner (calibrate, train, commit) → resume (continues an
interrupted task). The order of training, and what a checkpoint records of it, belong here.
"""
