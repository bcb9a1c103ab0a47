"""Rows from a file, a folder, a `datasets.Dataset` or the hub, and tokens from rows.

Four kinds of rows are known, by their columns: `text` + `label` (classification), `prompt` + `completion`, `messages`
(chat), and `text` alone (language modelling; a plain text file is one long text). Other columns are ignored.
"""

import csv
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_kit.errors import DataError, MissingPackageError, OptionError, listing
from lora_kit.messages import say

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["classification", "prompt", "chat", "text", "document"]
Row = dict[str, Any]

WANTED = "text and label; prompt and completion; messages; or text alone"
ENDINGS = (".csv", ".jsonl", ".json", ".parquet", ".txt")
HELD_OUT = 0.1
IGNORED = -100
"""Label of a token that is not part of the loss."""


@dataclass(frozen=True)
class Rows:
    """Labelled or plain rows, split into those to train on and those to measure on."""

    kind: Kind
    train: list[Row]
    test: list[Row]
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of their ids; rows hold the id."""

    def texts(self, count: int) -> list[str]:
        """Some texts of the task, from the training rows."""
        if self.kind == "chat":
            return [str(row["messages"][0]["content"]) for row in self.train[:count]]
        if self.kind == "document":
            return [str(self.train[0]["text"])[: 200 * count]]
        return [str(row["prompt" if self.kind == "prompt" else "text"]) for row in self.train[:count]]


def read(
    data: Any,
    *,
    test: Any = None,
    train_rows: int | None = None,
    test_rows: int | None = None,
    seed: int = 0,
) -> Rows:
    """Read rows and split them.

    Args:
        data: path of a CSV, JSON lines, Parquet or plain text file; a folder with `train.*` and perhaps `test.*`; a
            `datasets.Dataset` or `DatasetDict`; or a hub id.
        test: the same for rows to measure on. None: the folder's or dataset's own, else a tenth of the rows (at least
            one), drawn by `seed`; of a text file the last tenth.
        train_rows: use the first so many training rows (of a text file: characters) only.
        test_rows: the same for rows to measure on.

    Raises:
        DataError: a file that is not there or cannot be read, columns that are not understood, empty texts or labels.
    """
    train, held_out = _open(data)
    if test is not None:
        held_out = _open(test)[0]
    kind = _kind(train, str(data) if isinstance(data, str | Path) else type(data).__name__)
    if held_out is not None and _kind(held_out, "the test data") != kind:
        raise DataError(f"training data is {kind} data, test data is not: {listing(_columns(held_out))}.")
    if held_out is None:
        train, held_out = _split(train, kind, seed)
    for name, value in (("train_rows", train_rows), ("test_rows", test_rows)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise OptionError(f"{name} must be an integer of at least 1, got {value!r}.")
    train, held_out = _first(train, kind, train_rows), _first(held_out, kind, test_rows)
    _refuse_empty(train, kind, "training")
    _refuse_empty(held_out, kind, "test")
    if kind != "classification":
        return Rows(kind, train, held_out)
    names = _label_names(train, data)
    ids = {name: i for i, name in enumerate(names)}
    return Rows(kind, _numbered(train, ids, "training"), _numbered(held_out, ids, "test"), names)


def _open(data: Any) -> tuple[list[Row], list[Row] | None]:
    """(rows, test rows or None)."""
    if isinstance(data, str | Path):
        path = Path(data).expanduser()
        if path.is_dir():
            return _open_folder(path)
        if path.is_file():
            return _open_file(path), None
        if path.suffix in ENDINGS or path.is_absolute() or str(data).startswith((".", "~")):
            raise DataError(f"there is no file or folder {path}. Give an existing one, or a hub id.")
        return _open_hub(str(data))
    datasets = _datasets()
    if isinstance(data, datasets.DatasetDict):
        return _splits(dict(data))
    if isinstance(data, datasets.Dataset):
        return _rows_of(data), None
    if isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
        return [dict(row) for row in data], None
    raise DataError(
        f"data is a {type(data).__name__}; accepted: the path of a file ({listing(ENDINGS)}) or folder, a hub id, a "
        "datasets.Dataset or DatasetDict, or a list of dicts."
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingPackageError("reading data needs the package datasets: pip install 'lora_kit[train]'") from None
    return datasets


def _open_hub(name: str) -> tuple[list[Row], list[Row] | None]:
    datasets = _datasets()
    try:
        found = datasets.load_dataset(name)
    except Exception as error:  # the hub client raises many types; whatever it was, the rows are not there
        raise DataError(f"{name!r} is no file, no folder, and could not be read from the hub: {error}") from None
    return _splits(dict(found))


def _splits(splits: "dict[str, Dataset]") -> tuple[list[Row], list[Row] | None]:
    if "train" not in splits:
        raise DataError(f"the dataset has the splits {listing(splits)}; one called train is needed.")
    # a test split without labels (a competition's) is of no use here
    usable = [n for n in ("test", "validation") if n in splits and set(splits[n][:100].get("label", [0])) != {-1}]
    return _rows_of(splits["train"]), _rows_of(splits[usable[0]]) if usable else None


def _rows_of(dataset: "Dataset") -> list[Row]:
    names = getattr(dataset.features.get("label"), "names", None)
    rows = [dict(row) for row in dataset]
    return [row | {"label": names[row["label"]]} for row in rows] if names else rows


def _open_folder(folder: Path) -> tuple[list[Row], list[Row] | None]:
    files = {f.stem: f for f in sorted(folder.iterdir()) if f.suffix in ENDINGS}
    if "train" in files:
        test = files.get("test") or files.get("validation")
        return _open_file(files["train"]), _open_file(test) if test else None
    if len(files) == 1:
        return _open_file(next(iter(files.values()))), None
    held = listing(file.name for file in files.values()) or "no data file"
    raise DataError(
        f"the folder {folder} holds {held}; needed is a file called "
        f"train ({listing('train' + e for e in ENDINGS)}), or a single file."
    )


def _open_file(file: Path) -> list[Row]:
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(file).to_pylist()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start:,}); save it as UTF-8.") from None
    if file.suffix == ".txt":
        return [{"text": text, "document": True}]
    if file.suffix == ".csv":
        return [dict(row) for row in csv.DictReader(text.splitlines(keepends=True))]
    if file.suffix in (".jsonl", ".json"):
        return _json_rows(file, text)
    raise DataError(f"{file} has the ending {file.suffix or '(none)'}; accepted: {listing(ENDINGS)}.")


def _json_rows(file: Path, text: str) -> list[Row]:
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{file} is not JSON lines: {error}.") from None
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: each line must be a JSON object with named fields.")
    return rows


def _columns(rows: list[Row]) -> list[str]:
    return [str(name) for name in rows[0]] if rows else []


def _kind(rows: list[Row], source: str) -> Kind:
    if not rows:
        raise DataError(f"{source} has no rows.")
    columns = set(_columns(rows))
    if "document" in columns and len(rows) == 1:
        return "document"
    if {"text", "label"} <= columns:
        return "classification"
    if {"prompt", "completion"} <= columns:
        return "prompt"
    if "messages" in columns:
        return "chat"
    if "text" in columns:
        return "text"
    raise DataError(f"{source} has the columns {listing(_columns(rows))}; wanted: {WANTED}. Rename the columns.")


def _split(rows: list[Row], kind: Kind, seed: int) -> tuple[list[Row], list[Row]]:
    if kind == "document":
        text = rows[0]["text"]
        # end the training part at a line's end, so that no word is cut in two
        at = text.rfind("\n", 0, int(len(text) * (1 - HELD_OUT))) + 1 or int(len(text) * (1 - HELD_OUT))
        return [{"text": text[:at]}], [{"text": text[at:]}]
    if len(rows) < 2:
        raise DataError("there is one row only, so none can be held out to measure on; give test data of its own.")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held = set(order[: max(1, round(len(rows) * HELD_OUT))])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def _first(rows: list[Row], kind: Kind, count: int | None) -> list[Row]:
    if count is None:
        return rows
    return [{"text": rows[0]["text"][:count]}] if kind == "document" else rows[:count]


def _refuse_empty(rows: list[Row], kind: Kind, part: str) -> None:
    needed = {"classification": ("text", "label"), "prompt": ("prompt", "completion"), "chat": ("messages",)}
    for column in needed.get(kind, ("text",)):
        for index, row in enumerate(rows):
            value = row.get(column)
            if value is None or (column != "prompt" and hasattr(value, "__len__") and len(value) == 0):
                raise DataError(f"{part} row {index + 1} has no {column}. Remove the row, or fill it.")


def _label_names(rows: list[Row], data: Any) -> tuple[str, ...]:
    found = {str(row["label"]) for row in rows}
    if len(found) < 2:
        raise DataError(f"all {len(rows)} training rows have the label {listing(found)!r}; at least two are needed.")
    if len(found) > len(rows) / 2 and len(found) > 20:
        raise DataError(f"{len(found)} different labels in {len(rows)} rows: the column label holds no classes.")
    numeric = all(name.lstrip("-").isdigit() for name in found)
    return tuple(sorted(found, key=int if numeric else str))


def _numbered(rows: list[Row], ids: dict[str, int], part: str) -> list[Row]:
    unknown = {str(row["label"]) for row in rows} - set(ids)
    if unknown:
        raise DataError(f"{part} rows have the label {listing(sorted(unknown))}, which no training row has.")
    return [row | {"label": ids[str(row["label"])]} for row in rows]


def tokenize(rows: Rows, tokenizer: Any, *, task: str, max_length: int) -> tuple[list[Row], list[Row]]:
    """Token ids and labels: (train, test), each row with `input_ids`, `labels` and `length`.

    Only what the model should learn to produce is a label: completions, the assistant's turns with the token that ends
    them, every token of plain text. Rows longer than `max_length` tokens are cut at the end, and that is said.

    Raises:
        DataError: data of this kind is not for a model of this task; a chat without a template.
    """
    makers: dict[tuple[str, str], Callable[[Row], Row]] = {
        ("classification", "classification"): lambda row: _classification(row, tokenizer),
        ("prompt", "causal-lm"): lambda row: _prompt(row, tokenizer),
        ("prompt", "seq2seq-lm"): lambda row: _pair(row, tokenizer, max_length),
        ("chat", "causal-lm"): lambda row: _chat(row, tokenizer),
        ("text", "causal-lm"): lambda row: _text(row, tokenizer),
        ("document", "causal-lm"): lambda row: _text(row, tokenizer, end=False),
    }
    maker = makers.get((rows.kind, task))
    if maker is None:
        fits = [wanted for kind, wanted in makers if kind == rows.kind]
        raise DataError(f"{rows.kind} data is for a model of the task {listing(fits)}; this one is for {task}.")
    if rows.kind == "document":
        blocks, held_out = (_blocks(maker(part[0]), max_length) for part in (rows.train, rows.test))
        if not blocks or not held_out:
            raise DataError(f"the text is shorter than two blocks of {max_length} tokens; choose a smaller max_length.")
        return blocks, held_out
    closing = {tokenizer.sep_token_id, tokenizer.eos_token_id} - {None}
    train, test = ([maker(row) for row in part] for part in (rows.train, rows.test))
    return _cut(train, max_length, closing, "training"), _cut(test, max_length, closing, "test")


def _classification(row: Row, tokenizer: Any) -> Row:
    return {"input_ids": tokenizer(str(row["text"]))["input_ids"], "labels": row["label"]}


def _text(row: Row, tokenizer: Any, *, end: bool = True) -> Row:
    ids = (
        _close(tokenizer(str(row["text"]))["input_ids"], tokenizer) if end else tokenizer(str(row["text"]))["input_ids"]
    )
    return {"input_ids": ids, "labels": list(ids)}


def _prompt(row: Row, tokenizer: Any) -> Row:
    prompt = tokenizer(str(row["prompt"]))["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]  # some tokenizers end every text; the answer is still to come
    answer = _close(tokenizer(str(row["completion"]), add_special_tokens=False)["input_ids"], tokenizer)
    return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}


def _pair(row: Row, tokenizer: Any, max_length: int) -> Row:
    answer = _close(tokenizer(text_target=str(row["completion"]))["input_ids"], tokenizer)
    return {"input_ids": tokenizer(str(row["prompt"]))["input_ids"], "labels": answer[:max_length]}


def _chat(row: Row, tokenizer: Any) -> Row:
    """All turns, with labels on the assistant's only."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "messages need a tokenizer with a chat template, and this one has none. Set tokenizer.chat_template, or "
            "give prompt and completion."
        )
    messages = row["messages"]

    def ids(upto: int, *, prompt: bool) -> list[int]:
        return tokenizer.apply_chat_template(
            messages[:upto], add_generation_prompt=prompt, tokenize=True, return_dict=False
        )

    whole = ids(len(messages), prompt=False)
    labels = [IGNORED] * len(whole)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, stop = len(ids(turn, prompt=True)), len(ids(turn + 1, prompt=False))
        if ids(turn + 1, prompt=False) != whole[:stop]:
            raise DataError(
                "the chat template rewrites earlier turns when a later one is added; give prompt/completion."
            )
        labels[start:stop] = whole[start:stop]
    if set(labels) == {IGNORED}:
        raise DataError("a conversation has no assistant turn to learn from.")
    return {"input_ids": whole, "labels": labels}


def _close(ids: list[int], tokenizer: Any) -> list[int]:
    """End a text with the end-of-sequence token, once, so that the model learns to stop."""
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _blocks(row: Row, size: int) -> list[Row]:
    """One long text as consecutive blocks of `size` tokens; a shorter rest is dropped."""
    ids = row["input_ids"]
    cut = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    return [{"input_ids": block, "labels": list(block), "length": size} for block in cut]


def _cut(rows: Sequence[Row], max_length: int, closing: set[int], part: str) -> list[Row]:
    """Rows of at most `max_length` tokens; an input that is only read keeps its closing special token."""
    long = sum(len(row["input_ids"]) > max_length for row in rows)
    if long:
        longest = max(len(row["input_ids"]) for row in rows)
        say(f"{long} of {len(rows)} {part} rows are cut to max_length={max_length} tokens (the longest has {longest})")
    cut = []
    for index, row in enumerate(rows):
        ids, labels = row["input_ids"][:max_length], row["labels"]
        if isinstance(labels, list) and len(labels) == len(row["input_ids"]):
            labels = labels[:max_length]
            if all(label == IGNORED for label in labels[1:]):
                raise DataError(
                    f"{part} row {index + 1} has nothing to learn within max_length={max_length} tokens (its prompt "
                    "alone is that long). Raise max_length, or shorten the prompt."
                )
        elif len(row["input_ids"]) > max_length and row["input_ids"][-1] in closing:
            ids = [*ids[:-1], row["input_ids"][-1]]
        cut.append({"input_ids": ids, "labels": labels, "length": len(ids)})
    return cut
