"""Damaged and hostile folders: what `load` makes of them.

    python benchmarks/damage.py --output benchmarks/results/damage

* `truncated`: every file of a small adapter, cut to every length shorter than its own.
* `flipped`: every single bit of every file.
* `mutated`: configs, headers of safetensors and manifests changed in ways that keep them readable (values of other
  types, huge numbers, deep nesting, endless patterns, missing and made-up fields, offsets, shapes), half of them with
  hashes that fit again, half in a folder without a manifest, as a stranger would make it.

* `whole`: the same for config.json of a whole model, without a manifest.

Counted: loads that succeeded (none may of what was truncated or flipped; a mutation may leave a sound adapter, with
another dropout or another name of the base), that ended in anything but a `LoraKitError`, that do not name the file,
that changed the model handed in; and the slowest case and the largest growth of memory.
"""

import argparse
import copy
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import provenance
import torch

WIDTH = 16


def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )


def small_adapter(folder: Path) -> Path:
    """A LoRA of rank 1 on two matrices."""
    from lora_kit import adapt, save

    return save(adapt(base(), "lora", rank=1, target_modules=["q_proj", "v_proj"]), folder / "adapter")


class Attempts:
    """Loads of one folder onto one model, which must stay as it is."""

    def __init__(self, folder: Path, *, whole: bool = False) -> None:
        self.folder = folder
        self.whole = whole
        self.model = base()
        self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.modules = [(name, type(module)) for name, module in self.model.named_modules()]
        self.counts = dict.fromkeys(("cases", "accepted", "other errors", "no file named", "model changed"), 0)
        self.slowest, self.largest = 0.0, 0
        self.slowest_case: Any = ""

    def one(self, file: str, case: Any = "") -> None:
        from lora_kit import load
        from lora_kit.errors import LoraKitError

        self.counts["cases"] += 1
        held = peak_bytes()
        started = time.perf_counter()
        try:
            load(self.folder, *(() if self.whole else (self.model,)))
            self.counts["accepted"] += 1
            self.model = base()
        except LoraKitError as error:
            self.counts["no file named"] += file not in str(error)
            if len(self.modules) != sum(1 for _ in self.model.modules()):
                self.counts["model changed"] += 1
                self.model = base()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            self.counts["other errors"] += 1
            print("other error:", case, type(error).__name__, str(error)[:200], flush=True)
            self.model = base()
        seconds = time.perf_counter() - started
        if seconds > self.slowest:
            self.slowest, self.slowest_case = seconds, str(case)[:80]
        self.largest = max(self.largest, peak_bytes() - held)

    def end(self) -> dict[str, Any]:
        now = self.model.state_dict()
        same = set(now) == set(self.before) and all(
            torch.equal(now[name], value) for name, value in self.before.items()
        )
        same = same and [(name, type(module)) for name, module in self.model.named_modules()] == self.modules
        self.counts["model changed"] += not same
        return {
            **self.counts,
            "slowest s": round(self.slowest, 3),
            "slowest case": self.slowest_case,
            "largest growth MB": round(self.largest / 1e6, 1),
        }


def peak_bytes() -> int:
    """The most that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def truncated(folder: Path, step: int) -> dict[str, Any]:
    """Every `step`-th length of every file."""
    adapter = small_adapter(folder)
    attempts = Attempts(adapter)
    for file in sorted(adapter.iterdir()):
        content = file.read_bytes()
        for length in range(0, len(content), step):
            file.write_bytes(content[:length])
            attempts.one(file.name, length)
        file.write_bytes(content)
    return attempts.end()


def flipped(folder: Path, step: int) -> dict[str, Any]:
    """Every `step`-th bit of every file."""
    adapter = small_adapter(folder)
    attempts = Attempts(adapter)
    for file in sorted(adapter.iterdir()):
        content = bytearray(file.read_bytes())
        for bit in range(0, 8 * len(content), step):
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
            attempts.one(file.name, bit)
            content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
    return attempts.end()


def strange_values(draw: random.Random) -> Any:
    nested: Any = 0
    for _ in range(draw.choice((3, 60))):
        nested = [nested]
    return draw.choice(
        [
            *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, -(10**9), 1e308, 0.5, -0.0),
            *(
                "",
                "x",
                "q_proj",
                "../../etc/passwd",
                "a" * 20_000,
                "(a+)+$",
                "(.*a){25}",
                ".*",
                "[",
                "\x00",
                "LORA",
                "é" * 9,
            ),
            *([], [""], ["q_proj"], [0], [None], [["q_proj", 3]], ["(x+x+)+y"], {}, {"q_proj": 10**9}, {"(a|a)*b": 2}),
            *({"a": {"b": {}}}, nested, [10**9], [[0, 10**9]], {"": ""}, "os", "torch.nn.Linear", "http://127.0.0.1/x"),
        ]
    )


def mutate(content: Any, draw: random.Random, fields: list[str]) -> Any:
    """A JSON object with one to three things about it changed."""
    changed = copy.deepcopy(content)
    for _ in range(draw.randint(1, 3)):
        place = changed
        keys = list(place)
        # go down into what is nested, half of the time
        while keys and draw.random() < 0.5:
            below = place[draw.choice(keys)] if isinstance(place, dict) else None
            if not isinstance(below, dict) or not below:
                break
            place, keys = below, list(below)
        kind = draw.random()
        if kind < 0.15 and keys:
            del place[draw.choice(keys)]
        elif kind < 0.35:
            place[draw.choice([*fields, "made_up", "trust_remote_code", "auto_map"])] = strange_values(draw)
        elif keys:
            place[draw.choice(keys)] = strange_values(draw)
    return changed


def mutated(folder: Path, count: int, seed: int) -> dict[str, Any]:
    from peft import LoraConfig
    from peft.utils import PeftType

    from lora_kit.storage import manifest

    draw = random.Random(seed)
    adapter = small_adapter(folder)
    files = {file.name: file.read_bytes() for file in adapter.iterdir()}
    facts = json.loads(files[manifest.NAME])
    own = [key for key in facts if key not in ("format", "versions", "files", "sha256")]
    config = json.loads(files["adapter_config.json"])
    fields = [*LoraConfig.__dataclass_fields__, "num_virtual_tokens", "token_dim", "num_layers", "tokenizer_kwargs"]
    attempts = Attempts(adapter)
    for case in range(count):
        for name, content in files.items():
            (adapter / name).write_bytes(content)
        what = draw.choice(("config", "config", "header", "manifest"))
        sealed = draw.random() < 0.5
        if what == "config":
            changed = mutate(config, draw, fields)
            if isinstance(changed, dict) and draw.random() < 0.1:
                changed["peft_type"] = draw.choice([kind.value for kind in PeftType])
            (adapter / "adapter_config.json").write_text(json.dumps(changed))
        elif what == "header":
            (adapter / "adapter_model.safetensors").write_bytes(header(files["adapter_model.safetensors"], draw))
        facts_now = {key: facts[key] for key in own}
        if what == "manifest":
            facts_now = mutate(facts_now, draw, own)
        (adapter / manifest.NAME).unlink()
        if sealed or what == "manifest":
            if isinstance(facts_now, dict):
                (adapter / manifest.NAME).write_text("{}")
                try:
                    manifest.write(adapter, facts_now)
                except ValueError:  # a number that JSON has not
                    pass
        attempts.one("adapter", (case, what))
    return attempts.end()


def mutated_whole(folder: Path, count: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    target = folder / "whole"
    base().save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    attempts = Attempts(target, whole=True)
    for case in range(count):
        (target / "config.json").write_text(
            json.dumps(mutate(config, draw, [*config, "auto_map", "quantization_config"]))
        )
        attempts.one("whole", case)
    return attempts.end()


def header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header."""
    length = int.from_bytes(content[:8], "little")
    found = json.loads(content[8 : 8 + length])
    kind = draw.random()
    if kind < 0.2:  # another length
        return draw.choice((0, 1, 2**63, 10**8 + 1, length - 1, length + 1, 2**32)).to_bytes(8, "little") + content[8:]
    name = draw.choice([key for key in found if key != "__metadata__"])
    entry = found[name]
    if kind < 0.4:
        entry["shape"] = draw.choice(
            [[], [0], [2**40, 2**40], [1, -1], [entry["shape"][0]], "x", [1.5], entry["shape"][::-1]]
        )
    elif kind < 0.6:
        entry["dtype"] = draw.choice(["F64", "F16", "BF16", "I64", "U8", "BOOL", "", "F8_E4M3", None, 7])
    elif kind < 0.8:
        entry["data_offsets"] = draw.choice(
            [[0, 0], [0, 2**62], [-1, 4], [4, 0], [], [0], "x", entry["data_offsets"][::-1]]
        )
    else:
        found[draw.choice([*found, "x" * 5000, "", "../x", "base_model.model.lm_head.weight"])] = found.pop(name)
    text = json.dumps(found).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def parts(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in options.parts:
        folder = scratch / name
        folder.mkdir()
        started = time.perf_counter()
        if name == "mutated":
            found = mutated(folder, options.mutations, options.seed)
        elif name == "whole":
            found = mutated_whole(folder, options.mutations // 10, options.seed)
        else:
            found = (truncated if name == "truncated" else flipped)(folder, options.step)
        yield name, {**found, "seconds in all": round(time.perf_counter() - started)}


def report(found: dict[str, dict[str, Any]], about: str) -> str:
    names = list(dict.fromkeys(key for facts in found.values() for key in facts))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {part} | " + " | ".join(str(facts.get(n, "")) for n in names) + " |" for part, facts in found.items()]
    return "# Damaged and hostile folders\n\n" + "\n".join(lines) + f"\n\n{about}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=20_000)
    parser.add_argument("--step", type=int, default=1, help="every so many-th length and bit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", default=["truncated", "flipped", "mutated", "whole"])
    parser.add_argument("--output", default="runs/damage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lora_kit").setLevel("ERROR")
    warnings.simplefilter("ignore")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, facts in parts(options, Path(scratch)):
            found[name] = facts
            print(name, json.dumps(facts), flush=True)
    facts = provenance.facts("cpu")
    output = Path(options.output)
    provenance.write_rows(output / "counts.jsonl", [{"part": k, **v} for k, v in found.items()], facts)
    about = f"Every {options.step}. length and bit, seed {options.seed}; {provenance.sentence(facts)}"
    (output / "report.md").write_text(report(found, about))


if __name__ == "__main__":
    sys.exit(main())
