"""The project's own rules: style, types, docstrings that run, rooms that import one way, the bundled data."""

import csv
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import lora_kit
from lora_kit.demo import DATA, model_path
from lora_kit.errors import MissingPackageError

ROOT = Path(__file__).parents[1]
MODULES = sorted(m.name for m in pkgutil.walk_packages(lora_kit.__path__, "lora_kit."))


@pytest.mark.parametrize(
    "command", [["ruff", "format", "--check", "."], ["ruff", "check", "."], ["mypy"]], ids=["format", "lint", "types"]
)
def test_style_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    """Each module says what it is, and its examples run."""
    module = importlib.import_module(name)
    if not name.endswith(("lean", "storage", "memory", "checks", "training", "comparison")):
        assert module.__doc__, name
    failures, _ = doctest.testmod(module, extraglobs={"adapt": lora_kit.adapt})
    assert failures == 0


def test_public_names_have_docstrings():
    for name in lora_kit.__all__:
        assert name == "METHODS" or getattr(lora_kit, name).__doc__, name


# what each room may import, from the top down
ROOMS = ["cli", "comparison", "training", "checks storage memory", "adaptation", "methods", "insertion"]
ROOMS += [
    "targets quantization base loading structure sharing stacks probe fingerprint rollback standins attention routing "
    "watching weightless"
]
ROOMS += ["lean"]


def test_imports_point_one_way():
    order = {room: depth for depth, rooms in enumerate(ROOMS) for room in rooms.split()}
    for file in sorted((ROOT / "lora_kit").rglob("*.py")):
        room = file.relative_to(ROOT / "lora_kit").parts[0].removesuffix(".py")
        if room not in order:
            continue
        for found in re.findall(r"^\s*(?:from|import) lora_kit\.(\w+)", file.read_text(), re.M):
            if found in order and found != room:
                assert order[found] >= order[room], f"{file.name} imports {found}"


def test_no_module_hides_a_public_function():
    top = {name.split(".")[1] for name in MODULES if name.count(".") == 1}
    assert not top & set(lora_kit.__all__)


def test_modules_are_short():
    for file in (ROOT / "lora_kit").rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 400, file


def test_no_bare_assert_for_users():
    for file in (ROOT / "lora_kit").rglob("*.py"):
        assert not re.search(r"^\s*assert ", file.read_text(), re.M), file


def read(name):
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_bundled_sentences():
    """At least 900, balanced, a third hard, none twice, none in both parts."""
    train, test = read("train.csv"), read("test.csv")
    rows = train + test
    assert len(rows) >= 900 and len(test) >= 200
    texts = [re.sub(r"\W+", " ", row["text"].lower()).strip() for row in rows]
    assert len(set(texts)) == len(texts)
    for part in (train, test):
        labels = Counter(row["label"] for row in part)
        assert set(labels) == {"positive", "neutral", "negative"} and max(labels.values()) - min(labels.values()) <= 2
        hard = sum(row["kind"] != "plain" for row in part)
        assert hard / len(part) >= 0.32
    assert {row["kind"] for row in rows} == {"plain", "negation", "mixed", "irony", "understatement"}
    assert all(3 <= len(row["text"].split()) <= 40 for row in rows)
    # no template: sentences that share their first three words are rare
    starts = Counter(" ".join(text.split()[:3]) for text in texts)
    assert max(starts.values()) <= 8


def test_demo_model_is_there(monkeypatch):
    assert (Path(model_path()) / "model.safetensors").stat().st_size > 80e6
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lora_kit\[demo\]'"):
        model_path()
