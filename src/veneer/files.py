"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from veneer.errors import SourceError


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a temporary path beside ``target`` to write to; when the block ends well, it takes ``target``'s place.

    When the block raises, or the process dies, ``target`` is as it was.

    Raises:
        SourceError: nothing can be written there.
    """
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.writing-")
            )
        except OSError as error:
            raise SourceError(
                f"{target} cannot be written: {error.strerror or error}.", hint="Choose another place."
            ) from error
        temporary = Path(folder) / target.name
        yield temporary
        # Some writers choose a stricter mode than the user's.
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
