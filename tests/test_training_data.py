"""Rows from every format, splits, token ids and labels; each refusal names what was found and what is wanted."""

import csv
import itertools
import json

import datasets
import pytest
import tiny
import torch

from lora_kit.errors import DataError, OptionError
from lora_kit.training import data
from lora_kit.training.batching import Collator, LengthGroups, padding_id

LABELLED = [{"text": f"w{i} w{i + 1}", "label": "good" if i % 2 else "bad"} for i in range(30)]


def write(folder, name, rows):
    file = folder / name
    if name.endswith(".csv"):
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".jsonl"):
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    elif name.endswith(".json"):
        file.write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(file)
    return file


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json", "rows.parquet"])
def test_formats_agree(name, tmp_path):
    found = data.read(write(tmp_path, name, LABELLED))
    assert found.kind == "classification" and found.labels == ("bad", "good")
    assert len(found.train) == 27 and len(found.test) == 3
    texts = [row["text"] for row in found.train + found.test]
    assert sorted(texts) == sorted(row["text"] for row in LABELLED)
    again = data.read(str(tmp_path / name))
    assert again == found


def test_dataset_objects_agree(tmp_path):
    dataset = datasets.Dataset.from_list(LABELLED)
    expected = data.read(write(tmp_path, "rows.csv", LABELLED))
    assert data.read(dataset) == expected
    assert data.read(LABELLED) == expected
    named = dataset.cast_column("label", datasets.ClassLabel(names=["good", "bad"]))
    assert data.read(named).labels == ("bad", "good")
    both = datasets.DatasetDict(train=dataset, test=dataset.select(range(4)))
    found = data.read(both)
    assert len(found.train) == 30 and len(found.test) == 4


def test_folder_with_train_and_test(tmp_path):
    write(tmp_path, "train.csv", LABELLED)
    write(tmp_path, "test.csv", LABELLED[:5])
    found = data.read(tmp_path, train_rows=7, test_rows=2)
    assert [row["text"] for row in found.train] == [row["text"] for row in LABELLED[:7]]
    assert len(found.test) == 2


def test_numeric_labels_are_in_numeric_order(tmp_path):
    rows = [{"text": "w1", "label": str(i % 12)} for i in range(24)]
    assert data.read(write(tmp_path, "rows.csv", rows)).labels == tuple(str(i) for i in range(12))


def test_csv_keeps_commas_newlines_and_the_word_null(tmp_path):
    rows = [{"text": 'a, "b"\nc', "label": "x"}, {"text": "NA", "label": "null"}] * 3
    found = data.read(write(tmp_path, "rows.csv", rows))
    assert {row["text"] for row in found.train + found.test} == {'a, "b"\nc', "NA"}
    assert found.labels == ("null", "x")


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"w{i % 100} w{i % 50}\n" for i in range(400)))
    found = data.read(tmp_path / "book.txt")
    assert found.kind == "document" and len(found.train) == len(found.test) == 1
    assert found.train[0]["text"].endswith("\n")
    train, test = data.tokenize(found, tiny.tokenizer(), task="causal-lm", max_length=32)
    assert all(len(row["input_ids"]) == 32 and row["labels"] == row["input_ids"] for row in train + test)
    whole = tiny.tokenizer()(found.train[0]["text"])["input_ids"]
    assert [i for row in train for i in row["input_ids"]] == whole[: len(train) * 32]


@pytest.mark.parametrize(
    ("rows", "phrase"),
    [
        ([{"review": "good", "stars": 5}] * 3, "has the columns review, stars; wanted: text and label; prompt and"),
        ([{"text": "a", "label": 1}] * 3, "all 2 training rows have the label"),
        ([{"text": "", "label": 1}, {"text": "b", "label": 0}] * 20, "has no text"),
        ([{"text": str(i), "label": i} for i in range(60)], "holds no classes"),
        ([{"text": "only one"}], "one row only"),
        ([], "accepted: the path of a file"),
        (3, "data is a int; accepted: the path of a file"),
    ],
)
def test_rows_that_are_refused(rows, phrase):
    with pytest.raises(DataError, match=phrase):
        data.read(rows)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no file or folder .*nothing\.csv"):
        data.read(tmp_path / "nothing.csv")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"ending \.xlsx; accepted: \.csv"):
        data.read(tmp_path / "a.xlsx")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(DataError, match="is not JSON lines"):
        data.read(tmp_path / "b.jsonl")
    (tmp_path / "c.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        data.read(tmp_path / "c.csv")
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        data.read(tmp_path / "d")
    with pytest.raises(DataError, match="could not be read from the hub"):
        data.read("nobody/no-such-data")
    with pytest.raises(OptionError, match="train_rows must be an integer of at least 1"):
        data.read(LABELLED, train_rows=0)
    with pytest.raises(DataError, match="label ugly, which no training row has"):
        data.read(LABELLED, test=[{"text": "w1", "label": "ugly"}])


# --- tokens and labels ----------------------------------------------------------------------------------------------


def tokens(rows, task, **options):
    found = data.read(rows, test=rows)
    return data.tokenize(found, tiny.tokenizer(), task=task, **{"max_length": 64, **options})[0]


def ids(text):
    return tiny.tokenizer()(text)["input_ids"]


def test_prompts_are_not_learnt_and_the_end_is():
    row = tokens([{"prompt": "w1 w2 w3", "completion": "w4 w5"}] * 2, "causal-lm")[0]
    assert row["input_ids"] == [*ids("w1 w2 w3"), *ids("w4 w5"), 3]
    assert row["labels"] == [-100, -100, -100, *ids("w4 w5"), 3]


def test_plain_text_ends_once():
    assert tokens([{"text": "w1 w2"}] * 2, "causal-lm")[0]["labels"] == [*ids("w1 w2"), 3]
    assert tokens([{"text": "w1 w2 </s>"}] * 2, "causal-lm")[0]["input_ids"] == [*ids("w1 w2"), 3]


def test_pairs_for_an_encoder_decoder():
    row = tokens([{"prompt": "w1 w2 w3", "completion": "w4"}] * 2, "seq2seq-lm")[0]
    assert row["input_ids"] == ids("w1 w2 w3") and row["labels"] == [*ids("w4"), 3]


def test_only_the_assistant_is_learnt():
    chat = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5 w6"},
    ]
    row = tokens([{"messages": chat}] * 2, "causal-lm")[0]
    learnt = [i for i in row["labels"] if i != -100]
    assert learnt == [*ids("w3"), 3, *ids("w5 w6"), 3]
    assert len(row["labels"]) == len(row["input_ids"])
    with pytest.raises(DataError, match="no assistant turn"):
        tokens([{"messages": chat[:1]}] * 2, "causal-lm")


def test_cutting_is_said_and_keeps_what_closes(capfd):
    made = tiny.tokenizer()
    made.add_special_tokens({"sep_token": "</s>"})
    rows = data.Rows("classification", [{"text": "w1 w2 w3 w4 </s>", "label": 0}], [{"text": "w1 </s>", "label": 1}])
    train, _ = data.tokenize(rows, made, task="classification", max_length=3)
    assert train[0]["input_ids"] == [*ids("w1 w2"), 3] and train[0]["length"] == 3
    assert "1 of 1 training rows are cut to max_length=3 tokens (the longest has 5)" in capfd.readouterr().err
    with pytest.raises(DataError, match="nothing to learn within max_length=3"):
        tokens([{"prompt": "w1 w2 w3 w4", "completion": "w5"}] * 2, "causal-lm", max_length=3)


def test_data_for_another_task():
    with pytest.raises(DataError, match="classification data is for a model of the task classification; this one"):
        tokens(LABELLED, "causal-lm")
    with pytest.raises(DataError, match="messages need a tokenizer with a chat template"):
        made = tiny.tokenizer()
        made.chat_template = None
        rows = data.read([{"messages": [{"role": "assistant", "content": "w1"}]}] * 3)
        data.tokenize(rows, made, task="causal-lm", max_length=8)


# --- batches --------------------------------------------------------------------------------------------------------


def test_padding_that_is_the_end_token_still_teaches_the_end():
    """The mask comes from lengths: with padding = </s>, the true </s> is learnt and the padding is not."""
    made = tiny.tokenizer()
    made.pad_token = made.eos_token
    assert padding_id(made) == 3
    rows = [{"input_ids": [5, 6, 3], "labels": [-100, 6, 3]}, {"input_ids": [7, 3], "labels": [7, 3]}]
    batch = Collator(padding_id(made))(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 3], [7, 3, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 3], [7, 3, -100]]


def test_padding_changes_no_loss():
    """A row's loss is the same alone and padded in a batch."""
    model = tiny.build("llama").eval()
    rows = [{"input_ids": [5, 6, 7, 8, 3], "labels": [5, 6, 7, 8, 3]}, {"input_ids": [9, 3], "labels": [9, 3]}]
    with torch.no_grad():
        alone = [model(**Collator(3)([row])).loss for row in rows]
        together = model(**Collator(3)(rows)).loss
    torch.testing.assert_close(together, (alone[0] * 4 + alone[1] * 1) / 5, rtol=1e-5, atol=1e-6)


def test_labels_of_a_classifier():
    batch = Collator(0)([{"input_ids": [5], "labels": 2}, {"input_ids": [5, 6], "labels": 0}])
    assert batch["labels"].tolist() == [2, 0]


@pytest.mark.parametrize("count", [1, 7, 16, 50, 403])
def test_length_groups(count):
    """Every row once an epoch, the longest first, little padding, and another order of batches each epoch."""
    lengths = [3 + (i * 37) % 61 for i in range(count)]
    groups = LengthGroups(lengths, batch_size=8, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        groups.set_epoch(epoch)
        order = list(groups)
        assert sorted(order) == list(range(count)) and len(groups) == count
        orders.append(order)
        batches = [order[i : i + 8] for i in range(0, count, 8)]
        if count >= 8:
            assert max(lengths[i] for i in batches[0]) == max(lengths)
        padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
        assert count < 400 or sum(lengths) / padded > 0.85
    assert orders[0] == orders[2] and (count < 50 or orders[0] != orders[1])
    if count == 403:  # length does not run downhill
        firsts = [lengths[batch[0]] for batch in batches[1:-1]]
        assert sum(a > b for a, b in itertools.pairwise(firsts)) < 0.75 * len(firsts)
