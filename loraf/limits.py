"""Bounds of what a checkpoint may state. Checked before anything is computed or allocated from such a number.

A checkpoint may come from anyone, and its digests prove only that nobody changed it afterwards. So a number means
nothing until it is within its bound here, and nothing large is built from it until it agrees with the model.
"""

MAX_RANK = 1 << 12  # more than any layer needs; the kernels count a row's values in 16 bits
MAX_DIMENSION = 1 << 24  # d_out and d_in of a module
MAX_ENTRIES = 1 << 31  # of one A or B, exclusive: positions are 32-bit integers
MAX_MODULES = 1 << 17
MAX_TASKS = 1 << 12
MAX_SETS = 1 << 12  # named sets
MAX_COUNT = 1 << 53  # of examples, steps and the like: every reader's numbers are exact up to here
MAX_FACTOR = 1e20  # of alpha and 1/init_std; keeps float32 products finite and normal
MAX_NAME = 1024  # characters of a module's or model's name, a path, a metric
MAX_TEXT = 1 << 20  # characters of a template
MAX_MANIFEST_BYTES = 1 << 26
MAX_HEADER_BYTES = 1 << 26  # of a safetensors file that this project reads


def header_bytes(tensors: int, longest_name: int) -> int:
    """Returns the most bytes that a safetensors header of so many tensors takes, with room for metadata and spaces."""
    # A name may be written in escapes, six characters each; shape and offsets are few numbers of at most 20 digits.
    return min(MAX_HEADER_BYTES, (1 << 16) + tensors * (6 * longest_name + 256))


def statistics_bytes(rows: int, modules: int, rank: int) -> int:
    """Returns the most bytes that a task's statistics may take.

    That is 8 bytes for each entry of `rank + 64` vectors over the rows and the columns of every B, and a header. It is
    several times what statistics take.

    Args:
        rows: of all modules together.
    """
    return 8 * (rows + modules * rank) * (rank + 64) + MAX_HEADER_BYTES + 8


def index_bytes(size: int) -> int:
    """Returns the bytes of the smallest index type that numbers 0 … size − 1; see `matrices.sparse.index_dtype`."""
    return 1 if size <= 1 << 8 else 2 if size <= 1 << 16 else 4
