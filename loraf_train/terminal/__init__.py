"""Tables, number formats and progress bars for the terminal, used by commands and by `compare`.

Nothing here measures anything.
"""
