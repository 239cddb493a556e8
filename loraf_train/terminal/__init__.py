"""How results and progress look in a terminal.

Tables, texts of numbers and progress bars, used by commands and by `compare`. Nothing here measures anything.
"""
