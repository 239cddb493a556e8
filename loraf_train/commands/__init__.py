"""One file for each `loraf-train` command: reads arguments, calls a room below, prints.

New subcommands belong here and are named in `loraf_train.cli`. Only this room, `compare` and `terminal` print. What
another program could use as well belongs further down.
"""
