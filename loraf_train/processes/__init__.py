"""Several processes of one run: what the launcher asks for, and how the processes agree.

`launcher` reads accelerate's and torchrun's environment; `group` lets the first process write while the others wait.
Everything above may use it; it knows only `loraf`.
"""
