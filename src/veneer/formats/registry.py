"""Lists the formats of adapter files, and recognises the format of a file or folder. Imports no torch."""

from __future__ import annotations

from veneer.errors import UsageError, did_you_mean
from veneer.files.source import Source
from veneer.formats.comfyui import ComfyuiFormat
from veneer.formats.diffusers import DiffusersFormat
from veneer.formats.format import Format
from veneer.formats.gguf import GgufFormat
from veneer.formats.kohya import KohyaFormat
from veneer.formats.litgpt import LitgptFormat
from veneer.formats.lycoris import LycorisFormat
from veneer.formats.mlx import MlxFormat
from veneer.formats.mlx_vlm import MlxVlmFormat
from veneer.formats.peft import PeftFormat
from veneer.formats.serving import ServingFormat
from veneer.formats.torchtune import TorchtuneFormat
from veneer.formats.unreadable import UNREADABLE

# In the order in which they are asked whether a file is theirs.
ALL: tuple[Format, ...] = (
    TorchtuneFormat(),  # whose files can lie in a folder with PEFT's config
    PeftFormat(),
    ServingFormat(),
    MlxFormat(),
    MlxVlmFormat(),
    GgufFormat(),
    DiffusersFormat(),
    ComfyuiFormat(),
    KohyaFormat(),
    LycorisFormat(),
    LitgptFormat(),
    *UNREADABLE,
)


def recognise(source: Source) -> Format | None:
    """Return the format of the adapter at a source; ``None`` where no format is recognised."""
    return next((adapter_format for adapter_format in ALL if adapter_format.recognise(source)), None)


def targets() -> list[str]:
    """Return the names of the formats that can be written."""
    return [adapter_format.name for adapter_format in ALL if adapter_format.writes]


def target(name: str) -> Format:
    """Return the format to write, by its name.

    Raises:
        UsageError: there is none of that name, or it can only be read.
    """
    for adapter_format in ALL:
        if adapter_format.name == name and adapter_format.writes:
            return adapter_format
    raise UsageError(
        f"{name!r} is no format that can be written.",
        hint=f"{did_you_mean(name, targets())}There are: {', '.join(targets())}.",
    )
