"""The garbage collector around start and end of the process.

Imports and loading make millions of objects that live as long as the process. Searching among them for garbage, while
they come and once more when the interpreter ends, costs a third of a short run and finds nothing.
"""

import gc


def postpone() -> None:
    """Call before heavy imports."""
    gc.disable()


def begin() -> None:
    """Call when everything is loaded: collects from now on, but never looks at what was there before."""
    gc.freeze()
    gc.enable()


def leave_to_the_system() -> None:
    """Call last: memory goes back with the process, object by object it would take a second."""
    gc.freeze()
