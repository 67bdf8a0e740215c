"""Memory that a long run would hold for nothing."""

import ctypes


def give_back() -> None:
    """Hand the system what glibc's allocator keeps between that which is used.

    ``make train`` lets it keep everything, which saves page faults in every step. But batches are of all lengths, and what one
    leaves fits the next less and less: 24 GB after two hundred steps of the demo's drafter, of which it uses five.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # another allocator's business elsewhere
    if trim:
        trim(0)
