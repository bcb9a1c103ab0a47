"""One architecture for each way in which today's tools fail, through every check of `benchmarks/coverage.py`."""

import importlib.util
import warnings
from pathlib import Path

import architectures
import pytest
import torch

from lora_kit import LoRA, adapt
from lora_kit import quantization as bits
from lora_kit.errors import OptionError, UnsupportedError

spec = importlib.util.spec_from_file_location(
    "architecture_coverage", Path(__file__).parents[1] / "benchmarks/coverage.py"
)
sweep = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sweep)

# architecture → what goes wrong with it elsewhere
CHOSEN = {
    ("causal-lm", "mixtral"): "PEFT's conversion empties the targets; experts not quantized",
    ("causal-lm", "qwen2_moe"): "shared experts redirected to the experts; a gate with one output",
    ("causal-lm", "deepseek_v3"): "four-dimensional inputs of 8-bit layers; dense layers redirected",
    ("causal-lm", "gpt_oss"): "experts transposed, with biases",
    ("causal-lm", "llama4_text"): "a router that is a linear layer and returns a tuple",
    ("causal-lm", "deepseek_v4"): "a linear layer that works in groups",
    ("causal-lm", "falcon"): "a subclass of nn.Linear, quantized by nobody",
    ("causal-lm", "gpt2"): "Conv1D",
    ("causal-lm", "mamba"): "fused kernels read the weights",
    ("causal-lm", "nemotron_h"): "PEFT refuses every out_proj",
    ("causal-lm", "zamba"): "layers that share weights",
    ("causal-lm", "rwkv"): "weights halved in place before an evaluation",
    ("causal-lm", "jetmoe"): "experts in attention, no checkpointing",
    ("causal-lm", "gemma3n_text"): "weights clamped in place",
    ("causal-lm", "gemma3"): "a vision tower that text does not run",
    ("causal-lm", "bart"): "cross-attention that is never used",
    ("causal-lm", "recurrent_gemma"): "state set from outside",
    ("causal-lm", "git"): "embeddings changed in place under checkpointing",
    ("causal-lm", "laguna"): "tensors renamed and lost at load",
    ("causal-lm", "xlnet"): "3-d weights that are no stacks",
    ("causal-lm", "youtu"): "the padding row zeroed at load",
    ("seq2seq-lm", "t5"): "layers kept in float32",
    ("classification", "ibert"): "no nn.Linear at all",
    ("classification", "reformer"): "reversible layers",
    ("classification", "distilbert"): "two heads",
    ("classification", "modernvbert"): "a head whose name another module has",
    ("token-classification", "deberta-v2"): "a quantized head",
    ("token-classification", "squeezebert"): "convolutions of width 1 for linear layers",
    ("question-answering", "albert"): "one layer run many times",
    ("question-answering", "big_bird"): "a head inside a head",
    ("question-answering", "t5"): "a head without a backbone",
    ("image-text", "blip"): "arguments of text that are passed on where none is taken",
    ("image-text", "pp_formulanet"): "input embeddings that cannot be asked for",
    ("image-text", "qwen2_vl"): "several towers",
    ("image-text", "udop"): "several embeddings, changed in place",
    ("speech", "cohere_asr"): "batch statistics that move in training",
    ("speech", "whisper"): "no input_ids",
}


@pytest.fixture(scope="module")
def recipes():
    """(task, architecture) → recipe, made once."""
    made = {}

    def get(task, architecture):
        if (task, architecture) not in made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made[task, architecture] = architectures.recipe(architecture, task)
        return made[task, architecture]

    return get


@pytest.mark.parametrize("mode", sweep.MODES)
@pytest.mark.parametrize(("task", "architecture"), CHOSEN, ids=[f"{t}-{a}" for t, a in CHOSEN])
def test_every_check_holds(task, architecture, mode, recipes, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # models of all ages have much to say
        row = sweep.Cell(recipes(task, architecture), "lora_kit", mode, tmp_path).run()
    if row["status"] == "unsupported":
        checkpointing = mode.endswith("-checkpointing") and "transformers has no" in row["reason"]
        assert checkpointing or (mode.startswith("prefix") and architecture in sweep.WITHOUT_ATTENTION), row["reason"]
        return
    if mode.startswith("prefix") and architecture == "reformer":
        assert "in a way that has no place for a prefix" in row["reason"]
        return
    assert row["status"] == "ok", {key: row[key] for key in row if key in ("failed", "reason", "where", "stage")}


def test_the_sweep_can_fail(recipes, tmp_path, monkeypatch):
    """A planted error in each place is seen by the check that is there for it."""
    recipe = recipes("causal-lm", "mixtral")

    def failed(mode="lora"):
        return sweep.Cell(recipe, "lora_kit", mode, tmp_path).run()["failed"]

    with monkeypatch.context() as plant:
        plant.setattr(sweep.LoraKit, "left_out", lambda self, model: {})
        plant.setattr(LoRA, "target_modules", ("q_proj",))
        plant.setattr(sweep.LoraKit, "adapt", lambda self, fresh, *_: adapt(fresh(), rank=4, target_modules=["q_proj"]))
        assert "coverage" in failed()
    with monkeypatch.context() as plant:

        def load_other(self, fresh, mode, folder, cls, base):
            model = adapt(fresh(), rank=4)
            return model

        plant.setattr(sweep.LoraKit, "load", load_other)
        assert "reloads" in failed()
    with monkeypatch.context() as plant:

        def adapt_and_cut(self, fresh, *_):
            model = adapt(fresh(), rank=4)
            model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").set_adapter([])
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
            return model

        plant.setattr(sweep.LoraKit, "adapt", adapt_and_cut)
        assert "every adapter" in failed()


def test_a_tower_of_a_multimodal_model(recipes):
    """The language model by default; another tower, or all, when asked for."""
    build = recipes("image-text", "qwen2_vl").build
    paths = {}
    for where in ("language", "vision", "all"):
        model = adapt(build(), rank=4, where=where)
        paths[where] = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert paths["language"] and all("language_model" in path for path in paths["language"])
    assert paths["vision"] and all("visual" in path for path in paths["vision"])
    assert paths["all"] == paths["language"] | paths["vision"]


def test_the_report_names_what_it_leaves_out(recipes, capsys):
    model = adapt(recipes("image-text", "qwen2_vl").build(), rank=4)
    said = capsys.readouterr().err
    assert "language: 14 of 14 linear layers (100.0 % of matmul weights); vision left out (where='vision' or" in said
    assert set(model.lora_kit_record.left_out.values()) == {"vision tower"}
    adapt(recipes("causal-lm", "mamba").build(), rank=4)
    assert "left out: weight read directly by the module around it (" in capsys.readouterr().err
    adapt(recipes("causal-lm", "qwen2_moe").build(), rank=4, quantization="4bit")
    said = capsys.readouterr().err
    assert "expert stacks (" in said and "left out: routers" in said
    assert "of matmul weights stay: " in said and "smaller than 32" in said


def test_a_tower_that_is_not_there(recipes):
    with pytest.raises(UnsupportedError, match=r"where='audio', but .* has no such tower; it has: language, vision"):
        adapt(recipes("image-text", "qwen2_vl").build(), where="audio")
    with pytest.raises(OptionError, match=r"unknown where 'visual'; accepted: language, vision, audio, all"):
        LoRA(where="visual")


def test_experts_can_be_left_alone_and_chosen(recipes):
    build = recipes("causal-lm", "mixtral").build
    names = [n for n, _ in adapt(build(), rank=4, experts=False).named_parameters() if "lora_" in n]
    assert names and not any("experts" in name for name in names)
    model = adapt(build(), rank=4, target_modules=["q_proj", "experts.down_proj"])
    assert model.peft_config["default"].target_parameters == [
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)
    ]
    names = [n for n, _ in model.named_parameters() if "lora_A" in n]
    assert len(names) == 4 and sum("experts" in name for name in names) == 2


@pytest.mark.parametrize("option", [{"dropout": 0.1}, {"dora": True}, {"pissa": True}])
def test_what_experts_cannot_do(option, recipes):
    model = recipes("causal-lm", "mixtral").build()
    (name, value), before = next(iter(option.items())), model.state_dict().keys()
    with pytest.raises(UnsupportedError, match=rf"{name}={value} does not work on 'model.layers.0.mlp.experts"):
        adapt(model, rank=4, **option)
    assert model.state_dict().keys() == before
    adapt(model, rank=4, experts=False, **option)


def test_at_least_nine_tenths_of_the_bytes_in_4_bit(recipes):
    """Of the matmul weights, on models that elsewhere keep their experts, or everything, in 16 bit."""
    for architecture in ("mixtral", "gpt_oss", "falcon", "llama4_text", "jetmoe"):
        model = recipes("causal-lm", architecture).build()
        choice = bits.choose(model, [])
        quantized = sum(p.entries for p in (*choice.linear, *choice.stacks))
        assert quantized >= 0.9 * sum(p.entries for p in choice.parts), architecture
        done = bits.quantize_(model, bits.resolve("4bit"), [])
        packed, total = bits.quantized_bytes(done)
        left = sum(p.numel() * p.element_size() for p in done.parameters() if p.is_floating_point())
        assert packed + left == total and packed >= quantized // 2 * 0.99


def test_probing_leaves_no_trace(recipes):
    """Random state, modes, gradients, kept state and quantization constants are as before the trial forward."""
    from lora_kit import probe

    for architecture, base in (("recurrent_gemma", None), ("mixtral", "8bit"), ("bart", None)):
        model = recipes("causal-lm", architecture).build()
        if base:
            bits.quantize_(model, bits.resolve(base), [])
        linear = {path: m for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        before = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
        kept = {module: set(vars(module)) for module in model.modules()}
        modes = [module.training for module in model.modules()]
        torch.manual_seed(7)
        state = torch.get_rng_state()
        used = probe.used(model, linear)
        assert used is not None and used <= set(linear)
        if architecture == "bart":
            assert not any("encoder_attn" in path for path in used) and any("self_attn" in path for path in used)
        assert torch.equal(torch.get_rng_state(), state)
        assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == before
        assert [module.training for module in model.modules()] == modes
        assert {module: set(vars(module)) for module in model.modules()} == kept
        assert not any(module._forward_hooks for path, module in model.named_modules() if base is None)


RESULTS = Path(__file__).parents[1] / "benchmarks/results/coverage"


def test_the_table_is_made_from_its_cells():
    assert (RESULTS / "report.md").read_text() == sweep.report(sweep.read_table(RESULTS / "cells.csv"))


@pytest.mark.parametrize("tasks", [sweep.FIRST_TASKS, sweep.OTHER_TASKS], ids=["first", "other"])
def test_what_the_committed_cells_hold(tasks):
    """Every architecture that can be built trains by LoRA and in full, and at least 98.5 % on a quantized base."""
    cells = [r for r in sweep.read_table(RESULTS / "cells.csv") if r["library"] == "lora_kit" and r["task"] in tasks]
    built = [r for r in cells if r["status"] != "not built"]
    assert all(r["reason"] for r in cells if r["status"] == "not built"), "each says why"
    for mode, share in {
        "lora": 1,
        "full": 0.98,
        "lora-4bit": 0.985,
        "lora-8bit": 0.985,
        "lora-checkpointing": 1,
        "prefix": 0.96,
        "prefix-checkpointing": 0.96,
    }.items():
        mine = [r for r in built if r["mode"] == mode and r["status"] != "unsupported"]
        good = sum(sweep.passed(r) for r in mine)
        assert good >= share * len(mine), (mode, good, len(mine))
        least = {"lora-checkpointing": 310, "prefix": 335, "prefix-checkpointing": 305}.get(mode, 340)
        assert len(mine) >= least or tasks == sweep.OTHER_TASKS
        assert mode != "prefix" or good >= 320 or tasks == sweep.OTHER_TASKS
        assert mode != "full" or tasks == sweep.OTHER_TASKS or good == len(mine)
    assert all(r["commit"] for r in cells)
