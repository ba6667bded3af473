"""``make demo-serve``: three clients at once, and a fourth adapter that comes while they are answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from veneer.demo import serve


@pytest.mark.demo
def test_the_demo_of_the_server_runs(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve.main()
    shown = capsys.readouterr().out
    for words in (
        "Serving on http://127.0.0.1",
        "Arr, matey!",
        '{"topic":',
        "was fetched, checked and loaded",
        "a second in all",
    ):
        assert words in shown
