"""The matrix: rows as they finish, going on after an interruption, failures as rows, and the pure report."""

import json
import subprocess
import sys

import peft
import pytest
import tiny

from lora_kit import LoRA, compare
from lora_kit.comparison import matrix, report
from lora_kit.comparison.statistics import summarize
from lora_kit.errors import DataError, OptionError

ROWS = "text,label\n" + "".join(f"w{i % 7} w{i % 5} {'w90' if i % 2 else 'w91'},{i % 2}\n" for i in range(48))


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text(ROWS)
    return file


@pytest.fixture
def bert(models):
    return tiny.on_disk("bert", models)


def test_matrix_end_to_end(bert, data, tmp_path, monkeypatch):
    """Every cell of the registry runs in its own process; a second call runs nothing; a killed one goes on."""
    call = {"output": tmp_path / "out", "epochs": 1, "batch_size": 8, "quantizations": ["16bit", "4bit"]}
    found = compare(bert, str(data), **call)
    assert [(row["method"], row["quantization"]) for row in found.rows] == [
        ("full", "16bit"),
        ("lora", "16bit"),
        ("prefix", "16bit"),
        ("lora", "4bit"),
        ("prefix", "4bit"),
    ]
    assert all(row["status"] == "ok" for row in found.rows), found.rows
    full, lora, prefix = found.rows[:3]
    assert full["trainable_parameters"] == full["total_parameters"] > lora["trainable_parameters"]
    # parameter bytes in float32, gradients and two states of AdamW are the least that full fine-tuning holds
    assert full["peak_bytes"] > 16 * full["total_parameters"]
    assert prefix["peak_bytes"] < full["peak_bytes"] and lora["peak_bytes"] < full["peak_bytes"]
    assert lora["saved_bytes"] < full["saved_bytes"]
    for row in found.rows:
        assert set(row["before"]) == {"accuracy", "precision", "recall", "f1"}
        assert row["steps"] == 6 and row["step_seconds"] > 0 and row["tokens_per_second"] > 0
        assert row["commit"] and row["versions"]["torch"] and row["machine"]["device"]
    folder = tmp_path / "out"
    assert {"report.md", "rows.jsonl", "memory_and_quality.png", "logs"} <= {f.name for f in folder.iterdir()}
    assert (folder / "memory_and_quality.png").read_bytes()[:4] == b"\x89PNG"
    assert "| lora (r 16) | 4 bit |" in (folder / "report.md").read_text()

    # a kill in the middle of a line: that row is run again, the others are not
    lines = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join([*lines[:2], lines[2], lines[3], lines[4][:50]]))
    ran = []
    real = matrix._run
    monkeypatch.setattr(matrix, "_run", lambda spec, *rest: ran.append(spec["method"]) or real(spec, *rest))
    again = compare(bert, str(data), **call)
    assert ran == ["prefix"]
    assert [row["after"] for row in again.rows] == [row["after"] for row in found.rows]

    # other data of the same name is another run
    data.write_text(ROWS.replace("w90", "w92"))
    monkeypatch.setattr(matrix, "_run", lambda spec, *rest: ran.append("new") or {"status": "failed", "reason": "no"})
    compare(bert, str(data), **call)
    assert ran.count("new") == 5


def test_a_cell_that_fails_is_a_row(bert, data, tmp_path, monkeypatch):
    found = compare(
        bert, str(data), methods=[LoRA(rank=100), "prefix"], quantizations=["16bit"], epochs=1, output=tmp_path / "out"
    )
    lora, prefix = found.rows
    assert lora["status"] == "failed" and "rank 100 is larger than the matrix" in lora["reason"]
    assert prefix["status"] == "ok"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "lora 16bit seed 0: failed: rank 100" in text
    assert report.failures(found.rows) == [line for line in report.failures(found.rows) if "rank 100" in line]


def test_a_killed_cell_is_out_of_memory(bert, data, tmp_path, monkeypatch):
    """The system's out-of-memory killer sends signal 9; the matrix goes on."""
    real = subprocess.Popen
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(matrix.subprocess, "Popen", lambda _, **options: real(command, **options))
    found = compare(bert, str(data), methods=["lora"], quantizations=["16bit"], output=tmp_path / "out")
    assert found.rows[0]["status"] == "out of memory" and "killed by the system" in found.rows[0]["reason"]


def test_out_of_memory_is_told_from_other_failures():
    import torch

    from lora_kit.comparison.cell import failure

    assert failure(torch.OutOfMemoryError("CUDA out of memory"))["status"] == "out of memory"
    assert failure(RuntimeError("DefaultCPUAllocator: can't allocate memory"))["status"] == "out of memory"
    assert failure(MemoryError())["status"] == "out of memory"
    assert failure(RuntimeError("shape"))["status"] == "failed"


def test_refusals_come_before_any_run(bert, data, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "_run", lambda *a: pytest.fail("a run was started"))
    call = {"output": tmp_path / "out"}
    for error, phrase, options in (
        (OptionError, "unknown method 'lara'", {"methods": ["lara"]}),
        (OptionError, "unknown base '4-bit'.*'4bit'", {"quantizations": ["4-bit"]}),
        (OptionError, "full fine-tuning runs on the base 16bit only", {"methods": ["full"], "quantizations": ["4bit"]}),
        (OptionError, "at least one method", {"methods": []}),
        (OptionError, "methods holds a VeraConfig; accepted: the words full, lora", {"methods": [peft.VeraConfig()]}),
        (OptionError, "seeds must be an integer of at least 1", {"seeds": 0}),
        (OptionError, "epochs must be above 0", {"epochs": 0}),
        (OptionError, "batch_size must be", {"batch_size": 0}),
        (OptionError, "unknown dtype 'bf16'", {"dtype": "bf16"}),
        (DataError, "no file or folder", {"data": str(tmp_path / "none.csv")}),
    ):
        with pytest.raises(error, match=phrase):
            compare(bert, **{"data": str(data), **call, **options})
    assert not (tmp_path / "out").exists()


def row(method, base, seed, after, before=3.0, metric="loss", **more):
    return {
        "status": "ok",
        "method": method,
        "size": "r 16",
        "options": {},
        "quantization": base,
        "seed": seed,
        "metric": metric,
        "before": {metric: before},
        "after": {metric: after},
        "peak_bytes": 2e6,
        "step_seconds": 0.01,
        "tokens_per_second": 1000.0,
        "train_seconds": 3.0,
        "trainable_parameters": 5,
        "total_parameters": 100,
        "saved_bytes": 1e6,
        **more,
    }


def test_summary_by_hand():
    rows = [
        row("full", "16bit", 0, 2.0),
        row("full", "16bit", 1, 2.2),
        row("lora", "4bit", 0, 2.4, before=3.1),
        row("lora", "4bit", 1, 2.6, before=3.1),
        {**row("prefix", "16bit", 0, 0), "status": "failed", "reason": "x"},
    ]
    full, lora = summarize(rows)
    assert full.after == pytest.approx(2.1) and full.spread == pytest.approx(0.1 * 2**0.5) and full.runs == 2
    # from full's start of 3.0: full gains 0.9, LoRA 0.5
    assert full.share == pytest.approx(1) and lora.share == pytest.approx(0.5 / 0.9)
    assert summarize(rows[2:])[0].share is None
    assert summarize(rows[:1])[0].spread is None
    headings, lines = report.columns(rows)
    assert headings[5] == "of full's gain" and lines[1][5] == "56 %"
    assert lines[1][:2] == ["lora (r 16)", "4 bit"] and lines[1][4] == "2.500 ± 0.141"


def test_reading_rows_passes_over_a_broken_line(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"key": 1}) + "\n" + '{"key": 2, "stat')
    assert matrix._read(file) == [{"key": 1}]


def test_a_narrow_terminal_gets_fewer_whole_columns():
    """Nothing is cut to dots: columns are left out, and that is said."""
    import io

    from rich.console import Console

    version = {
        "versions": {"torch": "2"},
        "commit": "c",
        "machine": {"device": "d", "threads": 1, "cores": 2, "python": "3"},
    }
    more = {
        **version,
        "model": "m",
        "data": "d",
        "train_rows_used": 1,
        "test_rows_used": 1,
        "epochs": 1,
        "batch_size": 1,
    }
    more |= {"max_length": 1, "dtype": "bfloat16", "learning_rate": 0.1, "peak_of": "live tensors"}
    rows = [row("full", "16bit", 0, 2.0, **more), row("lora", "4bit", 0, 2.2, **more)]
    for width, missing in ((80, True), (200, False)):
        out = io.StringIO()
        report.terminal(rows, Console(file=out, width=width))
        text = out.getvalue()
        assert "…" not in text and "lora (r 16)" in text and "peak MB" in text
        assert ("More columns are in report.md" in text) == missing
        assert ("saved MB" in text) != missing
