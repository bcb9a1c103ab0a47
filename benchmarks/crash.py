"""Saving under kill -9, on a full disk, and in the order that the disk sees it.

    python benchmarks/crash.py --output benchmarks/results/crash

* `saves`: a process saves one adapter after the other into one folder, of alternating ranks, and is killed at a random
  moment, again and again. Counted: folders that do not load (unreadable), whose config and tensors are not of
  one save (mixed), and loads that find an older save than the last one reported finished (lost). Beside it, what a tool
  sees that reads PEFT's two files and knows nothing of lora_kit: halves of two saves must never lie there together.
* `training`: `finetune` with a checkpoint at every step is killed at random moments and started again with
  `resume=True` until it is done; the weights at the end must be those of a run that nobody killed, to the last bit.
* `full disk`: saves onto a file system of 256 KiB (as root) and under a limit of file size, larger than fits.
* `order`: system calls of one save, by strace: every file is flushed before the rename that makes it count, the folder
  after it, and nothing of the save before is removed earlier.

A killed process leaves what the kernel has; what a power cut leaves depends on the disk, and only `order` speaks of it.
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
import logging

import provenance
import torch

RANKS = (2, 8, 4)


def base() -> Any:
    """A Llama of 0.1 M parameters, the same at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=160,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    )


def in_a_child(work: Callable[[int], None]) -> tuple[int, int]:
    """(process, reading end of its pipe): a copy of this process that runs `work`, with everything imported already."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    try:
        work(writing)
        os._exit(0)
    except BaseException as error:
        os.write(writing, f"error {type(error).__name__}: {error}\n".encode())
        os._exit(1)


def reap(child: int, reading: int) -> tuple[list[str], int]:
    """What the child reported, and its exit status."""
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        return stream.read().splitlines(), status


def kill_saves(kills: int, folder: Path, seed: int) -> dict[str, int]:
    """Kill a process that saves in a loop, and look at the folder each time."""
    import warnings

    from lora_kit import adapt, load, save
    from lora_kit.storage import units

    warnings.simplefilter("ignore")
    draw = random.Random(seed)
    models = [adapt(base(), "lora", rank=rank) for rank in RANKS]
    counts = dict.fromkeys(("kills", "unreadable", "mixed", "lost", "mixed for others", "while switching"), 0)
    target = folder / "adapter"
    number = [0]

    def save_one(turn: int) -> None:
        model = models[turn % len(models)]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(turn)
        save(model, target)

    def loop(pipe: int) -> None:
        turn = number[0]
        while True:
            turn += 1
            save_one(turn)
            os.write(pipe, f"{turn}\n".encode())

    save_one(0)
    for _ in range(kills):
        child, reading = in_a_child(loop)
        time.sleep(draw.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        lines, _ = reap(child, reading)
        finished = max([int(line) for line in lines if line.isdigit()], default=number[0])
        counts["kills"] += 1
        counts["while switching"] += units.current(target) != target
        rank, values, whole = by_hand(target)
        counts["mixed for others"] += whole and (len(values) != 1 or rank != RANKS[int(next(iter(values))) % 3])
        try:
            found = load(target, base())
        except Exception as error:
            print("unreadable:", error, flush=True)
            counts["unreadable"] += 1
            continue
        held = {float(v) for name, p in found.named_parameters() if "lora_" in name for v in p.unique()}
        turn = int(max(held))
        counts["mixed"] += len(held) != 1 or found.peft_config["default"].r != RANKS[turn % 3]
        counts["lost"] += turn < finished
        number[0] = max(turn, finished)
    return counts


def by_hand(folder: Path) -> tuple[int | None, set[float], bool]:
    """(rank of the config, values of the tensors, whether both files are there), as a tool that knows PEFT's names."""
    from safetensors.torch import load_file

    described, stored = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not described.exists() or not stored.exists():
        return None, set(), False
    rank = json.loads(described.read_text())["r"]
    return rank, {float(v) for tensor in load_file(stored).values() for v in tensor.unique()}, True


def tokenizer() -> Any:
    """Words `w0` … to ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<s>", "</s>"]
    words = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(156))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def kill_training(kills: int, folder: Path, seed: int) -> dict[str, Any]:
    """Kill a run and start it again, until enough kills were survived; compare the weights with an unbroken run's."""
    import transformers
    from datasets import Dataset

    from lora_kit import adapt, finetune
    from lora_kit.storage.stored import read

    transformers.utils.logging.disable_progress_bar()
    draw = random.Random(seed)
    words = [[" ".join(f"w{draw.randint(0, 155)}" for _ in range(draw.randint(2, 9))) for _ in "pc"] for _ in range(48)]
    data = Dataset.from_list([{"prompt": p, "completion": c} for p, c in words])

    def run(output: Path) -> None:
        model = adapt(base(), "lora", rank=4, dropout=0.1)
        options = {"epochs": 2, "batch_size": 4, "max_length": 24, "tokenizer": tokenizer(), "test_rows": 2}
        finetune(
            model, data, output=output, save_every=1, resume=True, training_arguments={"disable_tqdm": True}, **options
        )

    def child(output: Path) -> Callable[[int], None]:
        def work(pipe: int) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            torch.manual_seed(seed)
            run(output)

        return work

    started = time.perf_counter()
    unbroken = folder / "unbroken"
    lines, status = reap(*in_a_child(child(unbroken)))
    if status:
        raise SystemExit(f"the unbroken run failed: {lines}")
    alone = time.perf_counter() - started
    wanted = read(unbroken)
    counts = dict.fromkeys(("kills", "failed resumes", "runs", "other weights"), 0)
    while counts["kills"] < kills:
        output = folder / f"run-{counts['runs']}"
        while True:
            process, reading = in_a_child(child(output))
            deadline = time.perf_counter() + draw.uniform(0.1, 0.8) * alone
            while (
                time.perf_counter() < deadline
                and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.002)
            os.kill(process, signal.SIGKILL)
            lines, status = reap(process, reading)
            if os.WIFSIGNALED(status):
                counts["kills"] += 1
                continue
            if status:
                print("failed:", lines, flush=True)
                counts["failed resumes"] += 1
                shutil.rmtree(output)
            break
        if not status:
            got = read(output)
            same = set(got) == set(wanted) and all(torch.equal(got[name], wanted[name]) for name in wanted)
            counts["other weights"] += not same
        counts["runs"] += 1
        shutil.rmtree(output, ignore_errors=True)
    return {**counts, "seconds of an unbroken run": round(alone, 2)}


def full_disk(folder: Path) -> dict[str, Any]:
    """Save onto 256 KiB, and under a limit of file size, what does not fit; then what was there must still load."""
    from lora_kit import adapt, load, save
    from lora_kit.errors import StorageError
    from lora_kit.storage import save as saving

    small, large = adapt(base(), "lora", rank=2), adapt(base(), "lora", rank=32)
    found: dict[str, Any] = {}

    def attempt(target: Path) -> str:
        save(small, target)
        before = {file.name: file.read_bytes() for file in target.iterdir()}
        try:
            save(large, target)
        except StorageError as error:
            kept = {file.name: file.read_bytes() for file in target.iterdir()} == before
            return f"refused, what was there {'is' if kept else 'is NOT'} as it was: {str(error).partition('; ')[0]}"
        return "NOT refused"

    mount = folder / "small-disk"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mount], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        try:
            found["tmpfs of 256 KiB"] = attempt(mount / "adapter")
            # and where the size is not known beforehand, so that the disk is full in the middle
            known, saving.bytes_of = saving.bytes_of, lambda model: 0
            try:
                found["the same, found out while writing"] = attempt(mount / "adapter")
            finally:
                saving.bytes_of = known
            load(mount / "adapter", base())
        finally:
            subprocess.run(["umount", mount], check=True)
    else:
        found["tmpfs of 256 KiB"] = "not run: mounting needs root"

    def limited(pipe: int) -> None:
        target = folder / "limited"
        save(small, target)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        os.write(pipe, attempt(target).encode())

    lines, _ = reap(*in_a_child(limited))
    found["files of at most 100,000 bytes"] = " ".join(lines)
    load(folder / "limited", base())
    return found


def order(folder: Path) -> dict[str, Any]:
    """The system calls of a second save into a folder, as far as they decide what a power cut leaves."""
    if shutil.which("strace") is None:
        return {"order": "not run: there is no strace"}
    log = folder / "calls.txt"
    calls = "mkdir,fsync,rename,renameat,renameat2,unlink,unlinkat,link,linkat,openat"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import crash\nfrom lora_kit import adapt, save\n"
        "save(adapt(crash.base(), 'lora', rank=2), sys.argv[2])\n"
        "save(adapt(crash.base(), 'lora', rank=4), sys.argv[2])\n"
    )
    traced = ["strace", "-f", "-y", "-e", f"trace={calls}", "-o", log]
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(folder / "ordered")]
    subprocess.run([*traced, *command], check=True, capture_output=True)
    lines = [line for line in log.read_text().splitlines() if f"{folder}/ordered" in line and " = -1 " not in line]
    switch = [i for i, line in enumerate(lines) if "rename" in line and '.lora_kit-new"' in line][1]
    start = [i for i, line in enumerate(lines) if "mkdir" in line and "writing-" in line][1]
    before, after = lines[start:switch], lines[switch + 1 :]
    written = sorted(file.name for file in (folder / "ordered").iterdir())
    flushed = [n for n in written if any(re.search(rf"fsync\(\d+<[^>]*writing-\d+/{re.escape(n)}>", c) for c in before)]
    changing = [i for i, line in enumerate(after) if re.search(r"(unlink|rename|link)(at|at2)?\(", line)]
    folder_flush = [i for i, line in enumerate(after) if re.search(r"fsync\(\d+<[^>]*/ordered>", line)]
    return {
        "files flushed before the switch": f"{len(flushed)} of {len(written)}",
        "staging folder flushed before the switch": any(re.search(r"fsync\(\d+<[^>]*writing-\d+>", c) for c in before),
        "folder flushed before anything else is changed": folder_flush[0] < changing[0],
        "removed or replaced before the switch": sum("unlink" in c and "writing-" not in c for c in before),
    }


def report(found: dict[str, dict[str, Any]], about: str) -> str:
    lines = []
    for part, facts in found.items():
        lines += [
            f"## {part}",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in facts.items()),
            "",
        ]
    return "# Saving, killed\n\n" + "\n".join(lines) + f"\n{about}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--training-kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", default=["saves", "training", "full disk", "order"])
    parser.add_argument("--output", default="runs/crash")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lora_kit").setLevel("ERROR")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for part in options.parts:
            folder = Path(scratch) / part.replace(" ", "-")
            folder.mkdir()
            if part == "saves":
                found[part] = kill_saves(options.kills, folder, options.seed)
            elif part == "training":
                found[part] = kill_training(options.training_kills, folder, options.seed)
            elif part == "full disk":
                found[part] = full_disk(folder)
            else:
                found[part] = order(folder)
            found[part] = {k: str(v).replace(scratch, "…") if isinstance(v, str) else v for k, v in found[part].items()}
            print(part, json.dumps(found[part], indent=1), flush=True)
    facts = provenance.facts("cpu")
    output = Path(options.output)
    provenance.write_rows(output / "counts.jsonl", [{"part": k, **v} for k, v in found.items()], facts)
    (output / "report.md").write_text(report(found, f"Seed {options.seed}; {provenance.sentence(facts)}"))


if __name__ == "__main__":
    sys.exit(main())
