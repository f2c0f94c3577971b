"""Files that appear whole or not at all."""

import os
import threading
from pathlib import Path


def write_whole(path: str | os.PathLike, content: bytes | str, is_synced: bool = True) -> None:
    """Write a file, or replace it; text is written as UTF-8.

    Args:
        path: where to; the folder must exist.
        content: all of the file.
        is_synced: whether to wait until the disk has it, so that it outlives a loss of power.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    path = Path(path)
    # A name of its own, so that two programs may fill the same folder.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            if is_synced:
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
