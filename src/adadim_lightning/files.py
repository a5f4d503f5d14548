"""Places where files go, and words as a shell reads them."""

import errno
import os
import re
import shlex
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


def shell_word(text: str) -> str:
    """Quote a text as one word of a shell, in double quotes where it has single ones of its own."""
    if "'" in text and not re.search(r'["\\$`!]', text):
        return f'"{text}"'
    return shlex.quote(text)
