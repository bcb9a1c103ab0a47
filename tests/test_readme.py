"""The README holds: its first lines run, its tables are the registry's and the results', its commands are CI's."""

import json
import re
from pathlib import Path

import pytest
import tiny
import torch

import lora_kit
from lora_kit import METHODS
from lora_kit.comparison import report

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_opening_lines_run(models):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    names = {}
    exec(code.replace("Qwen/Qwen3-8B", tiny.on_disk("llama", models)), names)
    names["model"](**tiny.batch("llama")).loss.backward()
    names["optimizer"].step()
    assert isinstance(names["optimizer"], torch.optim.AdamW)


def test_the_methods_are_the_registry():
    def yes(value):
        return "yes" if value else "no"

    table = re.search(r"<!-- methods:.*?-->\n(.*?)<!-- /methods -->", README, re.S).group(1)
    expected = [
        f'| `"{word}"` | {m.summary} | {yes(m.quantizable)} | {yes(m.mergeable)} | {m.paper} |'
        for word, m in METHODS.items()
    ]
    assert table.splitlines()[2:] == expected


def test_every_public_name_is_described():
    for name in set(lora_kit.__all__) - {"METHODS", "LoraKitError", "Full", "Prefix"}:
        assert name in README, name


def test_tables_are_the_results():
    """A figure in the README stands in the committed report, line for line."""
    tables = re.findall(r"<!-- table: (\S+) -->\n(.*?)<!-- /table -->", README, re.S)
    assert len(tables) == 16
    for source, table in tables:
        assert table.strip() and table.strip() in (ROOT / source).read_text(), source


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "benchmarks" / "results").glob("*/rows.jsonl")), ids=lambda f: f.parent.name
)
def test_reports_are_made_from_their_rows(folder):
    """No figure was written by hand, every run finished, and no path of a machine is in the rows."""
    rows = [json.loads(line) for line in folder.read_text().splitlines()]
    assert all(row["status"] == "ok" and row["commit"] and row["versions"] and row["machine"] for row in rows)
    assert (folder.parent / "report.md").read_text() == report.markdown(rows, "memory_and_quality.png")
    assert not any(str(row[key]).startswith("/") for row in rows for key in ("model", "data", "test_data"))


def test_the_commands_are_ci():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.S)
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/lora-kit compare") and commands[1].endswith(
        "-m pytest -q -n 2 --dist loadfile"
    )
    assert all(
        c.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ") for c in commands
    )
    assert "grep -m 1 -E '^python3 -m venv .*pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def test_links_lead_somewhere():
    for file in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / file).read_text()):
            assert (ROOT / file).parent.joinpath(link).exists(), (file, link)
