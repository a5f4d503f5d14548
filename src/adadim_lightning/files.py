"""Places where files go."""

import errno
import os
import tempfile
from pathlib import Path


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be written to a folder, which is not made yet if it does not exist.

    Raises:
        OSError: they cannot, with the folder as its file name.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
