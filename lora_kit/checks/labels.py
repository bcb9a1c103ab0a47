"""What can be said of a batch before the model sees it: ids, labels, padding, first and last tokens.

On a GPU an id or a label out of range is a device assert, after which the process is of no more use:
these checks come first.
"""

from typing import TYPE_CHECKING, Any

from lora_kit.checks.report import Check, failed, many, passed, share, skipped, warned
from lora_kit.checks.subject import Subject
from lora_kit.checks.tokens import IGNORED, are_ids, out_of_range, padded_by, start_of_text, token_ids
from lora_kit.errors import listing

if TYPE_CHECKING:
    import torch

_SPANS = ("start_positions", "end_positions")


def of_batch(subject: Subject) -> list[Check]:
    """Every check that needs the batch alone."""
    checks = [token_ids(subject), labels(subject)]
    if checks[-1].status == "passed":
        checks += [padding(subject), end_of_text(subject)]
    checks.append(start_of_text(subject))
    return checks


def labels(subject: Subject) -> Check:
    """Labels of the right shape, dtype and range, and at least one in every row."""
    batch = subject.batch
    found = batch.get("labels")
    if found is None:
        others = [key for key in batch if key.endswith(("labels", "_label")) or key == "label" or key in _SPANS]
        if others:
            return passed("labels", f"given as {listing(others)}")
        return failed(
            "labels",
            f"0 of the batch's {len(batch)} entries are labels ({listing(batch)})",
            'batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)'
            if subject.generates
            else 'batch["labels"] = torch.tensor([row["label"] for row in rows])',
        )
    import torch

    if not torch.is_tensor(found):
        return failed(
            "labels",
            f"a {type(found).__name__} of {len(found)}, not a tensor",
            'batch["labels"] = torch.tensor(labels)',
        )
    if subject.record.task == "classification":
        return _class_labels(subject, found)
    if subject.generates or subject.record.task == "token-classification":
        return _token_labels(subject, found)
    return passed("labels", f"{tuple(found.shape)} {_dtype(found)}; not looked into for this model")


def _class_labels(subject: Subject, found: "torch.Tensor") -> Check:
    """As transformers' classifiers decide: one output is regression, integers classes, floats are several each."""
    import torch

    classes = int(getattr(subject.model_config, "num_labels", 0) or 0)
    rows = next((len(v) for v in subject.batch.values() if torch.is_tensor(v) and v.dim()), len(found))
    kind = getattr(subject.model_config, "problem_type", None)
    if kind is None:
        whole = not found.is_floating_point()
        kind = (
            "regression" if classes == 1 else "single_label_classification" if whole else "multi_label_classification"
        )
    shape = f"{tuple(found.shape)} {_dtype(found)}"
    if kind == "regression":
        if not found.is_floating_point():
            return failed(
                "labels",
                f"{shape}: a head with {classes} output is trained on numbers, not on classes",
                'batch["labels"] = batch["labels"].float(), or adapt(path, model_kwargs={"num_labels": classes})',
            )
        if found.numel() != rows * classes:
            return failed("labels", f"{shape} for {rows} rows", f'batch["labels"] = labels.view({rows}, {classes})')
        return passed("labels", f"{rows} numbers from {float(found.min()):.3g} to {float(found.max()):.3g}")
    if kind == "multi_label_classification":
        if tuple(found.shape) != (rows, classes) or not found.is_floating_point():
            return failed(
                "labels",
                f"{shape}; {rows} rows of {classes} classes take one class each, ({rows},) int64, or a 0 or 1 for each "
                f"class, ({rows}, {classes}) float32",
                'batch["labels"] = batch["labels"].long()',
            )
        return passed("labels", f"{rows} rows of {classes}, {share(float(found.float().mean()))} of them set")
    if found.numel() != rows or found.is_floating_point():
        return failed(
            "labels",
            f"{shape}; needed is one class for each of {rows} rows, ({rows},) int64",
            'batch["labels"] = torch.tensor([row["label"] for row in rows])',
        )
    wrong = out_of_range(found, classes, ignored=True)
    if wrong is not None:
        row, value, count = wrong
        return failed(
            "labels",
            f"{many(count, 'label')} outside 0 to {classes - 1}, the first of them {value} in row {row}",
            f'adapt(path, task="classification", model_kwargs={{"num_labels": {max(int(found.max()) + 1, 2)}}})',
        )
    left = int((found != IGNORED).sum())
    if not left:
        return failed(
            "labels",
            f"all {rows} labels are -100: the loss is NaN",
            'batch["labels"] = torch.tensor([row["label"] for row in rows])',
        )
    return passed("labels", f"{left} of {rows} rows, {len(found[found != IGNORED].unique())} of {classes} classes")


def _token_labels(subject: Subject, found: "torch.Tensor") -> Check:
    ids: Any = subject.batch.get("input_ids")
    shape = f"{tuple(found.shape)} {_dtype(found)}"
    alike = not subject.encodes_and_decodes and are_ids(ids)
    if found.is_floating_point() or found.dim() != 2 or (alike and found.shape != ids.shape):
        wanted = f"{tuple(ids.shape)} int64, one a token" if alike else "(rows, tokens) int64"
        return failed("labels", f"{shape}; needed is {wanted}", 'batch["labels"] = batch["input_ids"].clone()')
    classes = _outputs(subject)
    wrong = out_of_range(found, classes, ignored=True) if classes else None
    if classes and wrong is not None:
        row, value, count = wrong
        return failed(
            "labels",
            f"{many(count, 'label')} outside 0 to {classes - 1}, the first of them {value} in row {row}; what is not "
            "to be trained is -100",
            'batch["labels"] = labels.masked_fill(labels < 0, -100)'
            if value < 0
            else "model.resize_token_embeddings(len(tokenizer)), before adapt()",
        )
    # a decoder predicts the next token: the first label of a row is nobody's next one
    targets = found[:, 1:] if subject.generates and not subject.encodes_and_decodes else found
    trained = (targets != IGNORED).sum(1)
    empty = (trained == 0).nonzero().flatten().tolist()
    if empty:
        what = "every row" if len(empty) == len(found) else f"row {listing(empty, 4)}"
        return failed(
            "labels",
            f"{what} of {len(found)} has no token to learn: all {targets.shape[1]} labels are -100",
            "leave such rows out, or keep the answer when cutting: tokenizer(text, truncation=True, max_length=longer)",
        )
    mask: Any = subject.batch.get("attention_mask")
    known = alike and mask is not None and mask.shape == found.shape
    sizes = mask.sum(1) if known else found.new_full((len(found),), found.shape[1])
    if subject.encodes_and_decodes:
        sizes = trained
    middle, of = int(trained.median()), int(sizes.median())
    part = float(trained.sum()) / max(float(sizes.sum()) - (len(found) if targets is not found else 0), 1)
    return passed("labels", f"trained tokens in a row: median {middle} of {of} ({share(min(part, 1.0))} of all)")


def padding(subject: Subject) -> Check:
    """No padding among the targets."""
    found: Any = subject.batch.get("labels")
    mask: Any = subject.batch.get("attention_mask")
    if found is None or found.dim() != 2 or found.is_floating_point():
        return skipped("padding", "labels are not one a token")
    if subject.encodes_and_decodes:
        pad, eos = subject.special("pad"), subject.special("eos")
        trained = sum(padded_by(row, pad, eos) for row in found)
        if trained:
            return failed(
                "padding",
                f"{trained} of {found.numel()} labels are padding at the end of a row (token {listing(sorted(pad))})",
                f'batch["labels"] = batch["labels"].masked_fill(batch["labels"] == {min(pad)}, -100)',
            )
        return passed("padding", f"0 of {found.numel()} labels are padding")
    if mask is None or mask.shape != found.shape:
        return skipped("padding", "no attention_mask of the labels' shape")
    trained = int(((mask == 0) & (found != IGNORED)).sum())
    hidden = int((mask == 0).sum())
    if trained:
        return failed(
            "padding",
            f"{trained} of {hidden} padded positions have a label",
            'batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)',
        )
    return passed("padding", f"0 of {hidden} padded positions have a label")


def end_of_text(subject: Subject) -> Check:
    """The end token is learned, although it may be the padding token too."""
    name = "end of text"
    found: Any = subject.batch.get("labels")
    ids: Any = subject.batch.get("input_ids")
    if not subject.generates or found is None or not are_ids(ids):
        return skipped(name, "not a model that writes text")
    eos, pad = subject.special("eos"), subject.special("pad")
    if not eos:
        return skipped(name, "no end token is known; pass tokenizer=")
    targets = sum(int((found == token).sum()) for token in eos)
    inputs = sum(int((ids == token).sum()) for token in eos)
    if targets or not (eos & pad) or not inputs or subject.encodes_and_decodes:
        return passed(name, f"token {listing(sorted(eos))} is a target {targets} times")
    return warned(
        name,
        f"the end token {listing(sorted(eos & pad))} is a target in 0 of {len(found)} rows and stands {inputs} times "
        "in the input, because it is the padding token too: the model will not learn to stop",
        'end every text with tokenizer.eos_token, and mask by the mask, not by the token: batch["labels"] = '
        'batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)',
    )


def _outputs(subject: Subject) -> int | None:
    """How many labels there are: the rows of the output head."""
    if not subject.generates:
        return int(getattr(subject.model_config, "num_labels", 0) or 0) or None
    getter = getattr(subject.base, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return getattr(head, "out_features", None) or getattr(subject.text_config, "vocab_size", None)


def _dtype(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")
