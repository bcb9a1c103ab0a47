"""Which of transformers' architectures train, by method and base: one tiny random model each, one process a cell.

    python benchmarks/coverage.py                                      # everything, resumed where it stopped (1 h)
    python benchmarks/coverage.py --library peft                       # plain PEFT with "all-linear", same checks
    python benchmarks/coverage.py --tasks causal-lm --archs mixtral    # one architecture, in seconds
    python benchmarks/coverage.py --report                             # the table from the rows at hand

A cell is ok when no exception is raised and every check below holds; `CHECKS` has them in words. Tiny random weights
say that shapes, gradients and files are right, nothing about quality.
"""

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

for _name, _value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}.items():
    os.environ.setdefault(_name, _value)
warnings.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import architectures as tiny  # noqa: E402 (the settings above must come first)
import torch  # noqa: E402

MODES = ("lora", "lora-checkpointing", "lora-4bit", "lora-8bit", "full", "prefix", "prefix-checkpointing")
VIRTUAL_TOKENS = 4
# architectures in which no token attends to another: a prefix has no place
WITHOUT_ATTENTION = ("falcon_mamba", "fnet", "mamba", "mamba2", "rwkv")
FIRST_TASKS = ("causal-lm", "seq2seq-lm", "classification")
OTHER_TASKS = ("token-classification", "question-answering", "image-text", "speech")
CLOSE = 1e-4
SCHEDULE = ((5, 1.0), (20, 2.0), (20, 0.1))  # steps and learning rates to try before a loss is called stuck
CHECKS = {
    "trains": "finite loss, some trained tensor gets a gradient",
    "frozen": "every frozen tensor is bit-identical after training",
    "falls": "the evaluation loss falls within 5 steps of AdamW, or up to 45 before it is called stuck",
    "reloads": "save, then load on a fresh base: equal logits (1e-4)",
    "every adapter": "every adapter whose weight would get a gradient in full fine-tuning gets one",
    "evaluation": "an evaluation in the middle changes no gradient",
    "checkpointing": "with checkpointing the gradients equal those without (1e-3), where transformers has it",
    "lean": "with the lean step off, low-memory, and with dropout in both, the same gradients (1e-3; 4 and 8 bit 3e-2)",
    "coverage": "95 % of the language model's matmul weights adapted, or a stated reason for each that is not",
    "quantized": "in 4 and 8 bit: 90 % of the matmul weights quantized, or a stated reason for each that is not",
    "plain PEFT": "a prefix that is said to be readable by plain PEFT gives equal logits there (1e-4)",
    "merges": "merged in memory: equal logits (1e-3)",
}
# parameters of two dimensions that are no matrices: added or multiplied element by element
NO_MATRIX = ("bias", "A_log", "embed", "pos", "scale", "probe", "query", "norm", "time_", "token", "static")
# what "ok" meant when plain PEFT was first measured: the stricter checks came later
LENIENT = ("trains", "frozen", "falls", "reloads", "checkpointing")


class LoraKit:
    """`adapt`, `save`, `load`."""

    def adapt(self, fresh: Callable[[], Any], mode: str, folder: Path, cls: type) -> Any:
        from lora_kit import adapt

        method = mode.split("-")[0]
        options = {"num_virtual_tokens": VIRTUAL_TOKENS} if method == "prefix" else {}
        return adapt(fresh(), method, quantization=_bits(mode), **options)

    def save(self, model: Any, folder: Path) -> None:
        from lora_kit import save

        save(model, folder)

    def load(self, fresh: Callable[[], Any], mode: str, folder: Path, cls: type, base: Path) -> Any:
        from lora_kit import load

        if mode == "full":
            return load(folder)
        return load(folder, fresh(), quantization=_bits(mode))

    def left_out(self, model: Any) -> dict[str, str]:
        return model.lora_kit_record.left_out

    def unquantized(self, model: Any) -> dict[str, str]:
        return model.lora_kit_record.unquantized


class Peft:
    """Plain PEFT with `target_modules="all-linear"` and its k-bit preparation, on transformers' quantized loading."""

    def __init__(self, task: str):
        from lora_kit.targets import PEFT_TASKS

        self.task = PEFT_TASKS.get(task)

    def _base(self, fresh: Callable[[], Any], mode: str, folder: Path, cls: type) -> Any:
        if _bits(mode) is None:
            return fresh()
        from transformers import BitsAndBytesConfig

        config = {
            "4bit": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            ),
            "8bit": BitsAndBytesConfig(load_in_8bit=True),
        }[_bits(mode)]
        model = cls.from_pretrained(folder, quantization_config=config, device_map="cpu", dtype=torch.float32)
        if not any(type(m).__name__ in ("Linear4bit", "Linear8bitLt") for m in model.modules()):
            raise RuntimeError("no module was quantized")
        return model

    def adapt(self, fresh: Callable[[], Any], mode: str, folder: Path, cls: type) -> Any:
        import peft

        model = self._base(fresh, mode, folder, cls)
        if mode == "full":
            return model
        if _bits(mode):
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if mode.startswith("prefix"):
            config = peft.PrefixTuningConfig(task_type=self.task, num_virtual_tokens=VIRTUAL_TOKENS)
            return peft.get_peft_model(model, config)
        return peft.get_peft_model(model, peft.LoraConfig(task_type=self.task, target_modules="all-linear"))

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, fresh: Callable[[], Any], mode: str, folder: Path, cls: type, base: Path) -> Any:
        import peft

        if mode == "full":
            return cls.from_pretrained(folder, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(self._base(fresh, mode, base, cls), folder)

    def left_out(self, model: Any) -> dict[str, str]:
        return {}

    def unquantized(self, model: Any) -> dict[str, str]:
        return {}


def _bits(mode: str) -> str | None:
    return next((word for word in ("4bit", "8bit") if mode.endswith(word)), None)


class Cell:
    """One architecture in one mode; `run` returns a row."""

    def __init__(self, recipe: tiny.Recipe, library: str, mode: str, folder: Path):
        self.recipe, self.mode, self.folder = recipe, mode, folder
        self.library = LoraKit() if library == "lora_kit" else Peft(recipe.task)
        self.row: dict[str, Any] = {"status": "error", "stage": "base"}
        self.failed: list[str] = []

    def check(self, name: str, holds: bool) -> None:
        if not holds:
            self.failed.append(name)

    def run(self) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            self._run()
            self.row |= {"status": "failed" if self.failed else "ok", "failed": self.failed, "stage": ""}
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            first = (str(error).strip().splitlines() or [""])[0].replace(str(self.folder), "…")
            self.row["reason"] = f"{type(error).__name__}: {first}"[:300]
            self.row["failed"] = self.failed
            self.row["where"] = f"{Path(where.filename).name}:{where.lineno} {where.name}"
            nowhere = self.recipe.architecture in WITHOUT_ATTENTION and self.mode.startswith("prefix")
            if isinstance(error, Unsupported) or nowhere:
                self.row["status"] = "unsupported"
        return {**self.row, "seconds": round(time.perf_counter() - start, 2)}

    def _run(self) -> None:
        row, mode, batch = self.row, self.mode, self.recipe.batch
        base = self.recipe.build()
        kept = {name: value.clone() for name, value in base.state_dict().items()}
        cls = type(base)

        def fresh() -> Any:
            model = self.recipe.build()
            model.load_state_dict(kept)
            return model

        on_disk = self.folder / "base"
        if not on_disk.exists() and isinstance(self.library, Peft) and _bits(mode):
            base.save_pretrained(on_disk)
        if mode.endswith("-checkpointing") and not base.supports_gradient_checkpointing:
            raise Unsupported("transformers has no gradient checkpointing for this class")
        wanted = self._weights_with_gradients(base) if mode.startswith("lora") else set()
        row["stage"] = "adapt"
        model = self.library.adapt(fresh, mode, on_disk, cls)
        if mode == "full":
            model.float()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        adapters = [name for name in trained if mode == "full" or "lora_" in name or "prompt_encoder" in name]
        frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        if mode.startswith("lora"):
            self._coverage(model, base)
        row["stage"] = "train"
        before = self._evaluate(model)
        rate = 1e-3 if mode == "full" else 1e-2
        reached: set[str] = set()
        for steps, factor in SCHEDULE:
            got, after = self._train(model, trained, steps, factor * rate)
            reached |= got
            if after < before - 1e-6:
                break
        row |= {"loss_before": before, "loss_after": after, "adapter_tensors": len(adapters)}
        self.check("trains", any(name in reached for name in adapters))
        self.check("falls", after < before - 1e-6)
        if mode.startswith("prefix"):
            self._prefix(model)
        elif mode != "full":
            silent = [name for name in adapters if name not in reached and _weight_of(name) in wanted]
            row["without_gradient"] = sorted({_short(name) for name in silent})[:6]
            self.check("every adapter", not silent)
        now = dict(model.named_parameters())
        changed = [name for name, value in frozen.items() if name in now and not torch.equal(value, now[name])]
        row["changed"] = changed[:4]
        self.check("frozen", not changed)
        row["stage"] = "gradients"
        first, noise = self._gradients(model, trained)
        row["stage"] = "save"
        model.eval()
        expected = tiny.logits_of(model, batch)
        saved = self.folder / mode
        self.library.save(model, saved)
        row["stage"] = "load"
        again = self.library.load(fresh, mode, saved, cls, on_disk)
        again.eval()
        row["reload_difference"] = float((tiny.logits_of(again, batch) - expected).abs().max())
        self.check("reloads", row["reload_difference"] <= CLOSE)
        row["stage"] = "evaluation"  # there has been one by now
        row["evaluation_difference"] = _distance(first, self._gradient(model, trained))
        self.check("evaluation", row["evaluation_difference"] <= 10 * noise + 1e-6)
        if row.get("plain_peft") == "equal":
            row["stage"] = "plain PEFT"
            self._in_plain_peft(fresh, saved, expected)
        if mode == "lora":
            row["stage"] = "merge"
            model.eval()
            merged = model.merge_and_unload().eval()
            row["merge_difference"] = float((tiny.logits_of(merged, batch) - expected).abs().max())
            self.check("merges", row["merge_difference"] <= 1e-3)

    def _weights_with_gradients(self, base: Any) -> set[str]:
        """Modules of the untouched model with a parameter that full fine-tuning gives a gradient."""
        base.train()
        torch.manual_seed(0)
        tiny.loss(base, self.recipe.batch)[0].backward()
        found = {
            name.rpartition(".")[0]
            for name, p in base.named_parameters(remove_duplicate=False)
            if p.dim() > 1 and p.grad is not None and p.grad.any()
        }
        base.zero_grad()
        return found

    def _train(self, model: Any, trained: dict[str, Any], steps: int, rate: float) -> tuple[set[str], float]:
        """(tensors that got a gradient, lowest evaluation loss after a step)."""
        reached: set[str] = set()
        lowest = float("inf")
        optimizer = torch.optim.AdamW(list(trained.values()), lr=rate)
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            value, _output = tiny.loss(model, self.recipe.batch)
            if not torch.isfinite(value):
                raise RuntimeError(f"the loss is {float(value)}")
            value.backward()
            for name, parameter in trained.items():
                if parameter.grad is not None:
                    largest = float(parameter.grad.abs().max())
                    if largest != largest:
                        raise RuntimeError(f"the gradient of {name} is not a number")
                    if largest > 0:
                        reached.add(name)
            optimizer.step()
            lowest = min(lowest, self._evaluate(model))
        return reached, lowest

    def _evaluate(self, model: Any) -> float:
        # bitsandbytes' packing at the first evaluation is what "evaluation" checks: plain 4-bit layers would not train
        model.train(isinstance(self.library, Peft) and _bits(self.mode) == "4bit")
        torch.manual_seed(0)
        with torch.no_grad():
            value = float(tiny.loss(model, self.recipe.batch)[0])
        model.train()
        return value

    def _gradient(self, model: Any, trained: dict[str, Any]) -> dict[str, torch.Tensor]:
        model.zero_grad(set_to_none=True)
        model.train()
        torch.manual_seed(0)
        tiny.loss(model, self.recipe.batch)[0].backward()
        return {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}

    def _gradients(self, model: Any, trained: dict[str, Any]) -> tuple[dict[str, torch.Tensor], float]:
        """(gradients, how far two passes are apart); with checkpointing they must be the same."""
        first = self._gradient(model, trained)
        noise = _distance(first, self._gradient(model, trained))
        if self.mode.endswith("-checkpointing"):
            self.row["stage"] = "checkpointing"
            _checkpoint(model, True)
            if not any(bool(getattr(m, "gradient_checkpointing", False)) for m in model.modules()):
                raise Unsupported("no module of this model has checkpointing")
            self.row["checkpointing_difference"] = _distance(first, self._gradient(model, trained))
            self.check("checkpointing", self.row["checkpointing_difference"] <= 10 * noise + 1e-3)
            _checkpoint(model, False)
            if isinstance(self.library, LoraKit) and self.mode.startswith("prefix"):
                self.row["stage"] = "checkpointing before"
                other = self._checkpointed_before(model)
                held = {name: p for name, p in other.named_parameters() if p.requires_grad}
                self.row["checkpointing_difference"] = max(
                    self.row["checkpointing_difference"], _distance(first, self._gradient(other, held))
                )
                self.check("checkpointing", self.row["checkpointing_difference"] <= 10 * noise + 1e-3)
        if isinstance(self.library, LoraKit):
            self._lean(model, trained, first, noise)
        return first, noise

    def _lean(self, model: Any, trained: dict[str, Any], first: dict[str, torch.Tensor], noise: float) -> None:
        """Other forms of the step give the same gradients; the model is left in the form that it came in."""
        from lora_kit.lean.switch import enable

        self.row["stage"] = "lean"
        found = []
        for form in (False, "low-memory", True):
            enable(model, form)
            found.append(_distance(first, self._gradient(model, trained)))
        with _dropping(model):
            enable(model, False)
            dropped = self._gradient(model, trained)
            noise = max(noise, _distance(dropped, self._gradient(model, trained)))  # Reformer draws seeds of its own
            enable(model, True)
            found.append(_distance(dropped, self._gradient(model, trained)))
        enable(model, True)
        self.row["lean_difference"] = max(found)
        self.check("lean", max(found) <= 10 * noise + (3e-2 if _bits(self.mode) else 1e-3))

    def _checkpointed_before(self, model: Any) -> Any:
        """The same trained model, whose base had checkpointing switched on before it was adapted."""
        base = self.recipe.build()
        _checkpoint(base, True)
        other = self.library.adapt(lambda: base, self.mode, self.folder, type(base))
        other.load_state_dict(model.state_dict())
        return other

    def _prefix(self, model: Any) -> None:
        """Every attention's own part of the prefix must be reached."""
        if not isinstance(self.library, LoraKit):
            return
        from lora_kit import attention

        weight = model.prompt_encoder["default"].embedding.weight
        sites = attention.find(self.recipe.build()).sites
        self.row["sites"] = len(sites)
        self.row["plain_peft"] = model.lora_kit_record.facts["prefix"]["plain_peft"]
        parts = weight.grad.split([site.size for site in sites] + [weight.shape[1] - sum(s.size for s in sites)], 1)
        silent = [site.path for site, part in zip(sites, parts, strict=False) if not part.any()]
        self.row["without_gradient"] = sorted({_short(path) for path in silent})[:6]
        self.check("every adapter", not silent)

    def _in_plain_peft(self, fresh: Callable[[], Any], saved: Path, expected: torch.Tensor) -> None:
        import peft

        plain = peft.PeftModel.from_pretrained(fresh(), saved).eval()
        self.row["plain_peft_difference"] = float((tiny.logits_of(plain, self.recipe.batch) - expected).abs().max())
        self.check("plain PEFT", self.row["plain_peft_difference"] <= CLOSE)

    def _coverage(self, model: Any, base: Any) -> None:
        """Counted here once more, from the modules: what is adapted, and what is left out without a word."""
        from torch import nn

        getters = [m.get_output_embeddings for m in base.modules() if hasattr(m, "get_output_embeddings")]
        heads = {id(head) for head in (getter() for getter in getters) if head is not None}
        tied = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        known = self.library.left_out(model)
        adapted = total = quantized = 0
        stays = self.library.unquantized(model)
        silent: Counter[str] = Counter()
        plain: Counter[str] = Counter()
        stacks: Counter[bool] = Counter()
        inner = model.get_base_model()
        for path, module in inner.named_modules():
            if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd) or "modules_to_save" in path:
                continue
            if "original_module" in path or "lora_" in path:
                continue
            clean = path.replace(".base_layer", "")
            for name, weight in module._parameters.items():
                if weight is None or id(weight) in tied or _is_head(base, heads, clean):
                    continue
                size = _entries(module, name, weight)
                if size is None or any(word in name for word in NO_MATRIX):
                    continue
                total += size
                if "xpert" in type(module).__name__ and not isinstance(module, nn.Linear | nn.ModuleList):
                    stacks[_carries(inner, path, name)] += 1
                if not weight.is_floating_point() or hasattr(weight, "quant_state"):
                    quantized += size
                elif f"{clean}.{name}" not in stays:
                    plain[_short(f"{clean}.{name}")] += size
                if _carries(inner, path, name):
                    adapted += size
                elif f"{clean}.{name}" not in known:
                    silent[_short(f"{clean}.{name}")] += size
        self.row["share"] = round(adapted / total, 4) if total else None
        self.row["quantized_share"] = round(quantized / total, 4) if total else None
        self.row["stacks"] = f"{stacks[True]} of {stacks.total()}" if stacks else ""
        self.row["left_out"] = dict(Counter(known.values()))
        self.row["without_reason"] = dict(silent.most_common(6))
        if _bits(self.mode):
            self.row["unquantized"] = dict(Counter(stays.values()))
            self.row["unquantized_without_reason"] = dict(plain.most_common(6))
            self.check("quantized", total > 0 and (quantized >= 0.9 * total or not plain))
        self.check("coverage", total > 0 and (adapted >= 0.95 * total or not silent))


def _is_head(base: Any, heads: set[int], path: str) -> bool:
    """An output head, by its place in the untouched model."""
    try:
        return id(base.get_submodule(path)) in heads
    except AttributeError:
        return False


def _entries(module: Any, name: str, weight: Any) -> int | None:
    """Entries of a matrix or a stack, behind its packing; None for vectors."""
    packed = module.__dict__.get("lora_kit_packed", {}).get(name)
    if packed is not None:
        return torch.Size(packed.shape).numel()
    state = getattr(weight, "quant_state", None)
    shape = state.shape if state is not None else weight.shape
    return shape.numel() if len(shape) >= 2 and min(shape[-2:]) > 1 else (shape.numel() if len(shape) == 2 else None)


def _carries(inner: Any, path: str, name: str) -> bool:
    """Whether a LoRA layer sits around this weight."""
    if not path.endswith("base_layer"):
        return False
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
        wrapper = inner.get_submodule(path)
        if getattr(wrapper, "parameter_name", name) == name:
            return True
    return False


class Unsupported(Exception):
    """Asked for what transformers does not have."""


def _checkpoint(model: Any, on: bool) -> None:
    word = "enable" if on else "disable"
    old = getattr(model, f"gradient_checkpointing_{word}")
    getattr(model, f"activation_checkpointing_{word}", old)()


def _drops(name: str) -> bool:
    return "drop" in name and "layer" not in name and "path" not in name


@contextmanager
def _dropping(model: Any, share: float = 0.1) -> Iterator[None]:
    """Dropout, which the tiny configs switch off, is on inside: torch's modules and numbers that modules have of it."""
    before: list[tuple[Any, str, float]] = []
    for module in model.modules():
        names = ["p"] if isinstance(module, torch.nn.Dropout) else []
        names += [name for name, value in vars(module).items() if isinstance(value, float) and _drops(name)]
        before += [(module, name, getattr(module, name)) for name in names]
    try:
        for module, name, _ in before:
            setattr(module, name, share)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative L2 distance of two sets of gradients."""
    if a.keys() != b.keys():
        return float("inf")
    apart = sum(float((a[name] - b[name]).pow(2).sum()) for name in a)
    size = sum(float(a[name].pow(2).sum()) for name in a)
    return (apart / max(size, 1e-30)) ** 0.5


def _weight_of(name: str) -> str:
    """Path, in the untouched model, of the module that an adapter's tensor belongs to."""
    return name[: name.index(".lora_")].removeprefix("base_model.model.").replace(".base_layer", "")


def _short(name: str) -> str:
    return ".".join("N" if piece.isdigit() else piece for piece in name.split("."))


def forked(job: Callable[[], dict[str, Any]], seconds: int) -> dict[str, Any]:
    """Run `job` in a process of its own: a hang, a crash or an out-of-memory costs one cell."""
    with tempfile.NamedTemporaryFile() as result:
        child = os.fork()
        if child == 0:
            try:
                silent = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silent, 1)
                os.dup2(silent, 2)
                resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
                Path(result.name).write_text(json.dumps(job()))
            finally:
                os._exit(0)
        deadline = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return {"status": "error", "reason": f"not finished after {seconds} s"}
            time.sleep(0.01)
        text = Path(result.name).read_text()
        return json.loads(text) if text else {"status": "error", "reason": "the process died"}


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return row["library"], row["task"], row["architecture"], row["mode"]


def sweep(
    library: str, tasks: list[str], modes: list[str], only: list[str], rows: Path, share: tuple[int, int], again: bool
) -> None:
    """Run every cell that has no row yet, or each `again`; `share` is (this worker, workers)."""
    import bitsandbytes  # noqa: F401 (imported once, before the cells fork)
    import peft  # noqa: F401

    from lora_kit import adapt, load, save  # noqa: F401

    done = set() if again else {_key(r) for r in read(rows)}
    everything = [(task, arch) for task in tasks for arch in tiny.architectures(task) if not only or arch in only]
    commit = provenance()["commit"]
    for task, architecture in everything[share[0] :: share[1]]:
        key = {"library": library, "task": task, "architecture": architecture, "commit": commit}
        todo = [mode for mode in modes if (library, task, architecture, mode) not in done]
        if not todo:
            continue
        try:
            recipe = tiny.recipe(architecture, task)
        except tiny.CannotBuild as error:
            for mode in todo:
                write(rows, {**key, "mode": mode, "status": "not built", "reason": str(error)})
            continue
        folder = Path(tempfile.mkdtemp())
        for mode in todo:
            result = forked(Cell(recipe, library, mode, folder).run, 90)
            write(rows, {**key, "mode": mode, **result})
            print(
                f"{library} {task} {architecture} {mode}: {result['status']} {result.get('reason', '')[:100]}",
                flush=True,
            )
        shutil.rmtree(folder, ignore_errors=True)


def read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def write(rows: Path, row: dict[str, Any]) -> None:
    with rows.open("a") as file:  # one short write a row: workers may share the file
        file.write(json.dumps(row) + "\n")


FIELDS = ("library", "task", "architecture", "mode", "status", "failed", "stage", "reason", "share", "quantized_share")
FIELDS += ("stacks", "sites", "plain_peft")
COUNTS = ("left_out", "unquantized", "without_gradient")
FIELDS += (*COUNTS, "reload_difference", "merge_difference", "evaluation_difference", "checkpointing_difference")
FIELDS += ("lean_difference",)
FIELDS += ("seconds", "commit")


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """The rows as CSV, in order; what is no single value is JSON."""
    latest = {_key(row): row for row in rows}
    rows = [latest[key] for key in sorted(latest)]
    with file.open("w", newline="") as stream:
        table = csv.DictWriter(stream, FIELDS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for row in rows:
            texts = {key: json.dumps(row[key]) if row.get(key) else "" for key in (*COUNTS, "failed")}
            table.writerow({**row, **texts})


def read_table(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="") as stream:
        return [{**row, "failed": json.loads(row["failed"] or "[]")} for row in csv.DictReader(stream)]


def passed(row: dict[str, Any], checks: tuple[str, ...] | None = None) -> bool:
    late = row["status"] == "error" and row["stage"] in ("evaluation", "merge")
    if checks is not None and (row["status"] == "failed" or late):
        return not set(row["failed"]) & set(checks)
    return row["status"] == "ok"


def report(rows: list[dict[str, Any]]) -> str:
    """The tables, and every miss with its cause."""
    lines = []
    for title, tasks in (("", FIRST_TASKS), ("Other tasks", OTHER_TASKS)):
        mine = [r for r in rows if r["task"] in tasks]
        if not mine:
            continue
        built = len({(r["task"], r["architecture"]) for r in mine if r["status"] != "not built"})
        of = len({(r["task"], r["architecture"]) for r in mine})
        names = ", ".join(
            f"{t} {len({r['architecture'] for r in mine if r['task'] == t and r['status'] != 'not built'})}"
            for t in tasks
        )
        lines += [f"{title + ': ' if title else ''}{built} of {of} architectures could be built ({names}).", ""]
        lines += ["| | " + " | ".join(MODES) + " |", "|---" * (len(MODES) + 1) + "|"]
        for library, label, checks in (
            ("lora_kit", "lora_kit, all checks", None),
            ("peft", "PEFT, all checks", None),
            ("peft", "PEFT, as first measured", LENIENT),
        ):
            counts = []
            for mode in MODES:
                cells = [
                    r for r in mine if r["library"] == library and r["mode"] == mode and r["status"] != "not built"
                ]
                none = sum(r["status"] == "unsupported" for r in cells)
                good = sum(passed(r, checks) for r in cells)
                counts.append(f"{good} of {len(cells) - none}" if cells else "–")
            if set(counts) != {"–"}:
                lines.append(f"| {label} | " + " | ".join(counts) + " |")
        lines.append("")
    for library in ("lora_kit", "peft"):
        held = [
            r["stacks"].split(" of ")
            for r in rows
            if r["library"] == library and r["task"] == "causal-lm" and r["mode"] == "lora" and r.get("stacks")
        ]
        if held:
            whole = sum(some == total for some, total in held)
            lines.append(
                f"{library}: {len(held)} causal models hold experts as stacks of matrices; every stack is adapted in "
                f"{whole} of them."
            )
    lines.append("")
    lines += ["All checks:", "", *(f"* {name}: {words}" for name, words in CHECKS.items()), ""]
    lines += [f"As first measured: {', '.join(LENIENT)}.", ""]
    lines += [
        'PEFT: `target_modules="all-linear"`, and its prefix tuning in the key/value cache; checkpointing is switched '
        "on after wrapping, for lora_kit's prefix before it, too. Not counted: what transformers does not have for an "
        f"architecture, and prefix tuning where no token attends to another ({', '.join(WITHOUT_ATTENTION)}).",
        "",
    ]
    lines += _of_prefixes(rows)
    lines += [f"Cells of commit {', '.join(sorted({r['commit'] for r in rows}))}; versions in provenance.json.", ""]
    misses = [r for r in rows if r["library"] == "lora_kit" and r["status"] in ("error", "failed")]
    lines += ["## Misses of lora_kit", "", "| task | architecture | mode | cause |", "|---|---|---|---|"]
    for r in misses:
        cause = ", ".join(r.get("failed") or []) or f"{r.get('stage')}: {r.get('reason')}"
        lines.append(f"| {r['task']} | {r['architecture']} | {r['mode']} | {cause.replace('|', '/')} |")
    lines += ["", "## Not built", ""]
    for task, arch, reason in sorted(
        {(r["task"], r["architecture"], r["reason"]) for r in rows if r["status"] == "not built"}
    ):
        lines.append(f"* {task}, {arch}: {reason}")
    return "\n".join(lines) + "\n"


def _of_prefixes(rows: list[dict[str, Any]]) -> list[str]:
    """What becomes of lora_kit's prefix files in plain PEFT, in words."""
    said = Counter(
        row["plain_peft"]
        for row in rows
        if row["library"] == "lora_kit" and row["mode"] == "prefix" and row.get("plain_peft")
    )
    if not said:
        return []
    several = Counter({reason: n for reason, n in said.items() if not reason[0].isdigit()})
    several["fewer or more attentions than layers"] = said.total() - several.total()
    others = ", ".join(f"{n} {reason}" for reason, n in several.most_common() if reason != "equal" and n)
    return [
        f"Prefix files that plain PEFT uses with equal logits: {said['equal']} of {said.total()}. Not: {others}.",
        "",
    ]


def provenance() -> dict[str, Any]:
    from lora_kit.comparison.cell import machine
    from lora_kit.storage.manifest import versions

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {**versions(), **machine("cpu"), "commit": commit.stdout.strip()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default="lora_kit", choices=("lora_kit", "peft"))
    parser.add_argument("--tasks", default=",".join((*FIRST_TASKS, *OTHER_TASKS)))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--archs", default="", help="comma-separated model types; default: all")
    parser.add_argument("--output", default="runs/coverage", help="folder for rows and tables")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help="run cells anew that have a row")
    parser.add_argument("--report", action="store_true", help="only write the tables")
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "cells.jsonl"
    if options.worker:
        torch.set_num_threads(1)
        share = tuple(int(x) for x in options.worker.split("/"))
        only = [a for a in options.archs.split(",") if a]
        sweep(
            options.library,
            options.tasks.split(","),
            options.modes.split(","),
            only,
            rows,
            (share[0], share[1]),
            options.again,
        )
        return
    if not options.report:
        workers = [
            subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--worker", f"{i}/{options.jobs}"])
            for i in range(options.jobs)
        ]
        for worker in workers:
            worker.wait()
        (folder / "provenance.json").write_text(json.dumps(provenance(), indent=2) + "\n")
    if rows.exists():
        write_table(folder / "cells.csv", read(rows))
    found = read_table(folder / "cells.csv")
    (folder / "report.md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
