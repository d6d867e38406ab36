"""What the tests of both compiled backends look at."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The walks of this test, whose sheets can be looked at afterwards where they were traced."""
    from rectgrad_ref.executors.lowered import Walk

    kept: list[Any] = []
    result = Walk.result

    def kept_result(self: Any, observe: Any) -> Any:
        kept.append(self)
        return result(self, observe)

    monkeypatch.setattr(Walk, "result", kept_result)
    return kept
