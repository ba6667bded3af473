"""LyCORIS' format: kohya's file, with the tensors of LoHa, LoKr, (IA)3 and DoRA too."""

from __future__ import annotations

from typing import ClassVar

from veneer.files.source import Source
from veneer.formats.kohya import KohyaFormat, network_keys


class LycorisFormat(KohyaFormat):
    """LyCORIS' format. It is asked after kohya's, which is a part of it."""

    name: ClassVar[str] = "lycoris"
    title: ClassVar[str] = "LyCORIS"
    network: ClassVar[str] = "lycoris.kohya"

    def recognise(self, source: Source) -> bool:
        """Tell by the beginnings of the keys."""
        return bool(network_keys(source))
