"""The import hook: peft's modules, names and metadata are Veneer's; what is missing says so; it can be undone."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest

from tests.as_peft.process import printed, run


def test_it_has_the_metadata_of_peft() -> None:
    lines = printed("""
        import importlib.metadata
        import peft
        from transformers.utils import is_peft_available
        print(peft.__version__, importlib.metadata.version("peft"), is_peft_available(), peft.PeftModel.__module__)
        print("peft" in [d.metadata["Name"] for d in importlib.metadata.distributions()])
        print("peft" in importlib.metadata.packages_distributions())
    """)
    assert lines == [f"{peft.__version__} {peft.__version__} True veneer.peft_model.peft_model", "True", "True"]


def test_transformers_looks_again() -> None:
    done = run(
        """
        import importlib.util
        from transformers.utils import is_peft_available
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: None if name == "peft" else find(name, *more)
        print(is_peft_available())
        importlib.util.find_spec = find
        import veneer.as_peft
        print(is_peft_available())
        """,
        "-c",
    )
    assert (done.returncode, done.stdout.split()) == (0, ["False", "True"])


def test_importing_it_imports_no_torch() -> None:
    assert printed("import sys, peft\nprint('torch' in sys.modules)") == ["False"]


def test_all_public_names_of_peft_are_there() -> None:
    lines = printed("import peft; print(*sorted(n for n in peft.__all__ if not n.startswith('_')))")
    assert lines[0].split() == sorted(peft.__all__)


def test_all_modules_and_their_names_exist() -> None:
    lines = printed("""
        import importlib
        from veneer.as_peft.names import MODULES
        for module, names in MODULES.items():
            for name in names:
                getattr(importlib.import_module(module), name)
        print(len(MODULES))
    """)
    assert int(lines[0]) > 190


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("from peft.utils.other import nothing", "peft.utils.other.nothing"),
        ("import peft.tuners.nothing", "peft.tuners.nothing"),
        ("import peft; peft.nothing", "peft.nothing"),
    ],
)
def test_a_missing_name_is_told_with_where_to_ask(statement: str, name: str) -> None:
    done = run(f"import veneer.as_peft; {statement}", "-c")
    assert done.returncode == 1
    assert f"has no {name}. docs/from-peft.md lists what it has" in done.stderr.splitlines()[-1]


def test_a_missing_name_can_be_asked_for() -> None:
    assert printed("import peft; print(hasattr(peft, 'nothing'), getattr(peft, 'nothing', 0))") == ["False 0"]


def test_it_says_when_peft_itself_is_imported_already() -> None:
    done = run("import peft, veneer.as_peft", "-c")
    assert done.returncode == 1
    assert "peft itself is imported already" in done.stderr.splitlines()[-1]


def test_it_can_be_undone() -> None:
    lines = printed("""
        import peft
        veneer.as_peft.undo()
        import peft
        print(peft.PeftModel.__module__)
        veneer.as_peft.undo()
    """)
    assert lines == ["peft.peft_model"]


def test_a_script_is_run_with_its_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys, peft, os\nimport beside\nprint(json.dumps([sys.argv[1:], peft.__name__, __name__,"
        " peft.PeftModel.__module__, os.environ['VENEER_AS_PEFT']]))"
    )
    (tmp_path / "beside.py").write_text("")
    done = run(str(script), "-m", "veneer.as_peft")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], "peft", "__main__", "veneer.peft_model.peft_model", "1"]


@pytest.mark.parametrize("arguments", ["", "nowhere.py"])
def test_a_wrong_call_is_told_in_one_line(arguments: str) -> None:
    done = run(arguments, "-m", "veneer.as_peft")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "usage: python -m veneer.as_peft" in done.stderr
