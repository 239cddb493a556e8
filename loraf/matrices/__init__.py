"""The two matrices of a module: the frozen projection A, made from a seed, and one task's sparse B.

native.py calls the compiled library of csrc/, which computes the same as NumPy, several times as fast.
"""
