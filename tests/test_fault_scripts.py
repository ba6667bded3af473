"""Scripts that each showed a fault, kept beside this repository: none shows its fault any more.

Skipped where they are not. The same cases are in the tests of what was at fault, in this project's own words.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("VENEER_FAULTS", ROOT.parent / "shared" / "faults"))
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"

Check = Callable[[str], bool]


def near(pattern: str, count: int, tolerance: float = 1e-4) -> Check:
    """Whether so many numbers are printed where the pattern has ``#``, all of them about zero."""

    def check(text: str) -> bool:
        found = re.findall(pattern.replace("#", NUMBER), text)
        numbers = [float(one) for group in found for one in ([group] if isinstance(group, str) else group)]
        return len(numbers) == count and max(numbers) < tolerance

    return check


def without(*words: str) -> Check:
    """Whether none of these words is printed."""
    return lambda text: not any(word in text for word in words)


def equal(here: str, there: str, count: int) -> Check:
    """Whether two patterns find the same, so many times each."""

    def check(text: str) -> bool:
        found = re.findall(here, text)
        return len(found) == count and found == re.findall(there, text)

    return check


def holds(*words: str) -> Check:
    """Whether all of these words are printed."""
    return lambda text: all(word in text for word in words)


# What the scripts print that tell by their words, where the fault is mended.
PRINTED: dict[str, list[Check]] = {
    "b01": [near("(?:loaded, diff|apart by) #", 2), holds("pre_classifier.modules_to_save.default.weight")],
    "b02": [near("veneer diff #", 3)],
    "b03": [without("REFUSED"), holds("Qwen2_5_VLForConditionalGeneration", "WhisperForConditionalGeneration")],
    "b04": [near("merged - unmerged #", 3)],
    "b05": [without("REFUSED")],
    "b06": [near("veneer diff #", 2)],
    "b07": [lambda text: set(re.findall(r"CRASH (\w+)", text)) <= {"UnsupportedError"}],
    "b08": [holds("UnknownKeywordError: PeftModel.load_adapter() does not take is_trainble=")],
    "b09": [without("Error", "No adapter loaded")],
    "b10": [near("row 0 wrong by # and the __base__ row by #", 2), holds("AdapterError: model.encoder.layers.1.ffn")],
    "b11": [holds("trained"), without("CRASH")],
    "b12": [without("torch.bfloat16")],
    "b13": [near("veneer (?:merged )?off by #", 2)],
    "b14": [near("in memory # read again # of the effect; missing \\[\\]", 6)],
    "b15": [near("merged in memory #, from disk #", 18)],
    "b16": [without("CRASH")],
    "b17": [near("veneer #", 1), without("REFUSED")],
    "b18": [near("veneer diff #", 3), without("the default for vit")],
    "b19": [equal(r"veneer (\d+)", r"peft (\d+)", 3)],
    "b20": [near("veneer diff # eval", 3), holds("has lora_a, and no lora_b. Copy the file again; MLX-LM saves both")],
    "b21": [equal(r"veneer gradient of (.*)", r"peft gradient of (.*)", 4), without("AssertionError")],
    "b22": [near(r"'#'", 24), near("row wrong by #, __base__'s row by #", 4)],
}


@pytest.fixture(scope="module")
def results() -> dict[str, tuple[int, str]]:
    """Script's name -> its exit code, and what it printed."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fault_scripts", str(FOLDER)]
    own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (code, text) for name, (code, text) in json.loads(done.stdout.splitlines()[-1]).items()}


@pytest.mark.skipif(not SCRIPTS, reason="the scripts are not beside this repository")
@pytest.mark.parametrize("name", SCRIPTS or ["none"])
def test_it_shows_no_fault(name: str, results: dict[str, tuple[int, str]]) -> None:
    code, text = results[name]
    if name.startswith("a"):
        assert code == 0, text
    else:
        assert all(check(text) for check in PRINTED[name]), text
