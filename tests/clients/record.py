"""Records the figures of the clients' tests with peft: ``python -m tests.clients.record [ARGUMENTS OF PYTEST]``.

It needs an environment with the clients and peft: ``pip install -c constraints.txt -e .[clients] peft``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from pathlib import Path

VERSIONS = (
    *("accelerate", "bitsandbytes", "datasets", "diffusers", "lm_eval", "peft", "sentence-transformers", "torch"),
    *("transformers", "trl"),
)


def main(arguments: list[str]) -> int:
    """Run the tests with peft, write their figures, and return pytest's exit code."""
    import pytest

    here = Path(__file__).parent
    recorded = here / "recorded.json"
    # A run of all tests forgets those that are gone.
    figures = json.loads(recorded.read_text())["figures"] if arguments else {}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS}
    recorded.write_text(json.dumps({"figures": figures, "versions": versions}, indent=1, sort_keys=True) + "\n")
    os.environ["VENEER_RECORD_CLIENTS"] = "1"
    return int(pytest.main([str(here), *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
