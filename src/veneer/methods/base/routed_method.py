"""A routed method: its change depends on the input, so it lowers to a route instead of a matrix."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from veneer.base_model.sites.linear import LinearSite
from veneer.base_model.sites.site import Site
from veneer.configs.base import TargetedConfig
from veneer.errors import NoMergedFormError
from veneer.methods.base.abilities import RefusesMerge
from veneer.methods.base.method import Method

ConfigT = TypeVar("ConfigT", bound=TargetedConfig)
SettingsT = TypeVar("SettingsT")


class RoutedMethod(Method[ConfigT, SettingsT], RefusesMerge):
    """Lowers to a patch with a route; adapts linear layers if it says nothing else."""

    kinds: ClassVar[tuple[type[Site], ...]] = (LinearSite,)

    def check_mergeable(self, settings: SettingsT, site: Site) -> None:
        raise NoMergedFormError(
            f"{type(self).__name__} decides by the input what it changes, so no weight can hold it.",
            hint="Use the adapter unmerged; merge others by name: merge_adapter([...]).",
        )
