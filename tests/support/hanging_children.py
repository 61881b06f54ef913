"""Child processes that never answer, as on a machine that is too busy to start them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE, Popen

import pytest

from llamaclust.model.child_process import BoundedChild


@contextmanager
def children_hang() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundedChild, "_popen", lambda _: Popen(["sleep", "60"], stdin=PIPE, stdout=PIPE))
        yield
