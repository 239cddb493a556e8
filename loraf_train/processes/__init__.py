"""Several processes of one run: what the launcher requests, and how the processes synchronise.

`launcher` reads the environment that accelerate and torchrun set; `group` lets the first process write while the others
wait. Every other room may use this one, which imports only `loraf`.
"""
