"""The examples run as a user would run them, and learn."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from lora_kit import METHODS

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_sentiment_in_a_bare_loop(tmp_path):
    out = run("sentiment_bare_loop.py", "--rows", 160, "--epochs", 3, "--output", tmp_path / "out")
    before = float(re.search(r"accuracy before: ([\d.]+)", out).group(1))
    after = [float(found) for found in re.findall(r", accuracy ([\d.]+)", out)]
    assert len(after) == 3 and after[-1] > before + 0.15 and "saved in" in out


@pytest.mark.parametrize(
    ("method", "base"), [("lora", "4bit"), *((m, None) for m in METHODS)], ids=lambda value: str(value)
)
def test_text_generation_under_trainer(method, base, models, tmp_path):
    arguments = ["--model", tiny.on_disk("llama", models), "--method", method, "--rows", 16, "--epochs", 1, "--cpu"]
    if base:
        arguments += ["--quantization", base]
    out = run("text_generation_trainer.py", *arguments, "--output", tmp_path / "out")
    assert "it writes:" in out
