"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Base = Annotated[str | None, typer.Option(help="The base: a folder or hub id. By default what the adapter names.")]
Dtype = Annotated[str, typer.Option(help="auto (as on disk), bfloat16, float16 or float32.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Local = Annotated[bool, typer.Option("--local-files-only", help="Use no network.")]
