"""One file for each `loraf-train` command: takes the parsed arguments, calls a room below, prints.

A new subcommand gets a file here and its arguments in `loraf_train.cli`. Only this room, `compare` and `terminal`
print; what another program could use as well belongs in a room below.
"""
