"""Whether a file can be written at the end of long work, found out before it begins.

May live here: that question. May not: what is written, and options.
"""

from __future__ import annotations

import os


def unwritable(path: str) -> str:
    """Say why a file could not be written, in the system's words; "" if it can be. Leaves files as they are."""
    new = not os.path.lexists(path)
    if not new and not os.path.isfile(path) and not os.path.isdir(path):
        return ""  # a pipe or a device: its reader would see it closed
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666))
    except OSError as error:
        return os.strerror(error.errno or 0)
    if new:
        os.unlink(path)
    return ""
