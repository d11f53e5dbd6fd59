"""The verbs of `Host` by which VMs begin from the memory of others; what they do is in `fork.py` and `templates.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from polyvisor.operation import Progress, silent
from polyvisor.status import Forked, StoredTemplate

if TYPE_CHECKING:
    from polyvisor.host.host import Host


class Forker:
    """A part of `Host`."""

    @property
    def _itself(self) -> Host:
        return cast("Host", self)

    async def fork(self, name: str, names: Sequence[str], progress: Progress = silent) -> Forked:
        from polyvisor.host.fork import fork

        return await fork(self._itself, name, names, progress)

    async def template_create(self, name: str, vm: str, progress: Progress = silent) -> StoredTemplate:
        from polyvisor.host import templates

        return await templates.create(self._itself, name, vm, progress)

    async def template_list(self) -> list[StoredTemplate]:
        from polyvisor.host import templates

        return templates.listed(self._itself)

    async def template_remove(self, name: str) -> None:
        from polyvisor.host import templates

        await templates.remove(self._itself, name)

    async def template_warm(
        self, name: str, number: int = 0, names: Sequence[str] = (), progress: Progress = silent
    ) -> StoredTemplate:
        from polyvisor.host import from_template

        return await from_template.warm_up(self._itself, name, names, number, progress)

    async def run_from(
        self, template: str, names: Sequence[str] = (), number: int = 1, progress: Progress = silent
    ) -> Forked:
        from polyvisor.host import from_template

        return await from_template.run(self._itself, template, names, number, progress)
