"""The command line reads well, lists what exists, and ends with one line on a mistake."""

import inspect
import os
import re
import subprocess
import sys

import pytest
import tiny

from lora_kit import cli


def run(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "lora_kit.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_help_lists_what_is_built():
    out, _ = run("--help")
    commands = re.findall(r"^  (\w+)", out.partition("Commands:")[2], re.M)
    assert commands == ["compare", "finetune", "verify", "merge", "plan", "inspect"]
    assert "--version" in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_explains_every_option(verb):
    """Each argument of the function is there with its docstring's words; nothing internal shows."""
    out, _ = run(verb, "--help")
    function = cli.VERBS[verb]
    flat = " ".join(out.split())
    assert " ".join(inspect.getdoc(function).splitlines()[0].split()) in flat
    for name, text in cli._argument_helps(function).items():
        if name in cli._PROGRAM_ONLY:
            assert f"--{name}" not in out
            continue
        flag = name if f" {name} " in flat else f"--{name.replace('_', '-')}"
        assert flag in out, name
        assert " ".join(text.split())[:40] in flat, name
    assert "Annotated" not in out and "inspect._" not in out


def test_version():
    assert run("--version")[0].startswith("lora_kit 0.")


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["compare", "--methods", "lara"], "lora-kit: unknown method 'lara'; accepted: full, lora, prefix"),
        (["compare", "--data", "none.csv"], "lora-kit: there is no file or folder none.csv"),
        (["finetune", "no/model", "none.csv"], "lora-kit: there is no file or folder none.csv"),
        (["finetune", "x", "y.csv", "--options", "rank"], "lora-kit: --options has 'rank'; needed is name=value"),
        (["merge", "nothing", "out"], "lora-kit: nothing is no folder"),
    ],
)
def test_mistakes_end_with_one_line(arguments, phrase):
    _, errors = run(*arguments, code=1)
    assert phrase in errors and "Traceback" not in errors


def test_finetune_and_merge(models, tmp_path):
    path = tiny.on_disk("llama", models)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2", "completion": "w3"}\n' * 30)
    out, errors = run(
        "finetune",
        path,
        tmp_path / "rows.jsonl",
        "--options",
        "rank=4,dropout=0.1",
        "--epochs",
        1,
        "--output",
        tmp_path / "a",
    )
    assert "loss" in out and "lora (r 4)" in errors
    assert "rank 0" not in out
    out, _ = run("merge", tmp_path / "a", tmp_path / "merged")
    assert "of the adapter's effect" in out and (tmp_path / "merged" / "model.safetensors").exists()
    out, _ = run("inspect", tmp_path / "a")
    assert "whole, 6 files match their SHA-256" in out and "vLLM: ok with --enable-lora --max-lora-rank 8" in out
    (tmp_path / "a" / "README.md").write_text("changed")
    _, errors = run("inspect", tmp_path / "a", code=1)
    assert "README.md does not match its recorded SHA-256" in errors


def test_verify(models, tmp_path):
    path = tiny.on_disk("llama", models)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2", "completion": "w3"}\n' * 30)
    out, _ = run("verify", path, tmp_path / "rows.jsonl", "--options", "rank=4")
    assert "✓ gradients        28 of 28 trained tensors have one" in out and "0 failed" not in out
    out, _ = run("verify", path, tmp_path / "rows.jsonl", "--learning-rate", 50, code=1)
    assert "✗ learning rate" in out and "param_groups(model)" in out


def test_values_become_what_the_function_takes():
    assert cli._options("rank=4, dropout=0.5,init=zero,rslora=True") == {
        "rank": 4,
        "dropout": 0.5,
        "init": "zero",
        "rslora": True,
    }
    assert cli._options(None) == {}
