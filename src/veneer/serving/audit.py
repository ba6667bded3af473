"""Writes the audit log: a line of JSON for each change of the registry, and for each answer."""

from __future__ import annotations

import json
import logging
import logging.handlers
from datetime import datetime, timezone
from pathlib import Path

from veneer.files.atomic_write import writing

LOGGER = logging.getLogger("veneer.serve.audit")


def audit(event: str, **facts: object) -> None:
    """Write a line: when, what, and the facts; never a prompt, an answer or a key."""
    if LOGGER.isEnabledFor(logging.INFO):
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        LOGGER.info(json.dumps({"time": now, "event": event, **facts}, default=str))


def log_to(path: Path) -> logging.Handler:
    """Append the audit log to a file, which may be rotated while the server runs.

    Raises:
        OutputError: it cannot be written.
    """
    with writing(path):
        handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    return handler
