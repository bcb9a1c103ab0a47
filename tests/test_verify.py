"""`verify`: every planted mistake is found, no clean set-up is accused, and the model is what it was, bit by bit."""

import functools
import random
import re
import types

import lean_models
import numpy
import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kit import adapt, load, param_groups, save
from lora_kit.checks import stored
from lora_kit.checks.report import Check, Report
from lora_kit.checks.verify import verify
from lora_kit.errors import DataError, LoraKitError, NonFiniteError, NothingToTrainError, OptionError


def adam(model, lr=None):
    return torch.optim.AdamW(param_groups(model, lr))


def lora(family="llama", **options):
    torch.manual_seed(0)
    dtype = options.pop("dtype", torch.float32)
    return adapt(tiny.build(family, dtype=dtype), "lora", **options)


def plain(family="llama", *, base=None, **options):
    """Plain PEFT, as people write it."""
    torch.manual_seed(0)
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], **options}
    return peft.get_peft_model(base or tiny.build(family), peft.LoraConfig(**fields))


def recompute(model, *, reentrant):
    """Checkpointing on, by the name that this transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})


def changed(family="llama", **entries):
    """The family's batch with these entries instead; None leaves one out."""
    batch = {**tiny.batch(family), **entries}
    return {key: value for key, value in batch.items() if value is not None}


# --- planted mistakes -----------------------------------------------------------------------------------------------

# each gives (model, batch) or (model, batch, what else verify takes), and stands for the check that must find it
PLANTED: dict[str, tuple[str, str]] = {}
BUILD = {}


def planted(check, status="failed"):
    def note(build):
        PLANTED[build.__name__] = (check, status)
        BUILD[build.__name__] = build
        return build

    return note


@planted("trainable")
def loaded_to_be_used(folder):
    save(lora(), folder / "adapter")
    return load(folder / "adapter", tiny.build("llama")), tiny.batch("llama")


@planted("trainable")
def continued_from_plain_peft(folder):
    plain().save_pretrained(folder)
    return peft.PeftModel.from_pretrained(tiny.build("llama"), folder), tiny.batch("llama")


@planted("trainable")
def prepared_for_kbit_after_wrapping(folder):
    return peft.prepare_model_for_kbit_training(plain()), tiny.batch("llama")


@planted("trainable", "warned")
def some_adapters_frozen(folder):
    model = plain()
    for name, p in model.named_parameters():
        if "layers.0" in name:
            p.requires_grad_(False)
    return model, tiny.batch("llama")


@planted("trainable")
def a_frozen_model(folder):
    return tiny.build("llama").requires_grad_(False).train(), tiny.batch("llama")


@planted("trainable")
def alpha_zero(folder):
    return plain(lora_alpha=0), tiny.batch("llama")


@planted("trainable")
def merged_and_trained_on(folder):
    model = lora()
    model.merge_adapter()
    return model, tiny.batch("llama")


@planted("trainable")
def every_weight_of_a_quantized_model(folder):
    model = lora(quantization="4bit").unload()
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())
    return model.train(), tiny.batch("llama")


@planted("heads")
def random_head_frozen(folder):
    base = tiny.build("bert")
    nn.init.zeros_(base.classifier.bias)
    return plain(base=base, target_modules=["query"]), tiny.batch("bert")


@planted("heads", "warned")
def trained_head_frozen(folder):
    return plain("bert", target_modules=["query"]), tiny.batch("bert")


@planted("heads")
def random_head_adapted(folder):
    base = tiny.build("bert")
    nn.init.zeros_(base.classifier.bias)
    return plain(base=base, target_modules=["query", "classifier"]), tiny.batch("bert")


@planted("targets")
def misspelt_target(folder):
    return plain(target_modules=["q_proj", "v_prj"]), tiny.batch("llama")


@planted("targets")
def misspelt_module_to_save(folder):
    return plain(modules_to_save=["lm_haed"]), tiny.batch("llama")


@planted("targets")
def a_layer_that_is_not_there(folder):
    return plain(layers_to_transform=[0, 99]), tiny.batch("llama")


@planted("targets", "warned")
def rank_above_the_matrix(folder):
    return plain(r=512), tiny.batch("llama")


@planted("saved")
def base_unfrozen_beside_the_adapter(folder):
    return lora().requires_grad_(True), tiny.batch("llama")


@planted("tied weights", "warned")
def tied_head_adapted(folder):
    base = lean_models.build("qwen2")
    return plain(base=base, target_modules=["q_proj", "lm_head"]), lean_models.batch("qwen2")


@planted("tied weights", "warned")
def both_tied_sides_adapted(folder):
    base = lean_models.build("qwen2")
    return plain(base=base, target_modules=["q_proj", "embed_tokens", "lm_head"]), lean_models.batch("qwen2")


@planted("weights")
def nan_in_the_base(folder):
    model = lora()
    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.data[3, 5] = float("nan")
    return model, tiny.batch("llama")


@planted("weights")
def nan_in_the_scales(folder):
    model = lora(quantization="8bit")
    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.SCB[3] = float("nan")
    return model, tiny.batch("llama")


@planted("weights")
def infinity_in_the_adapter(folder):
    model = lora()
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.data[0, 0] = float("inf")
    return model, tiny.batch("llama")


@planted("precision")
def float16_trained(folder):
    model = tiny.build("llama", dtype=torch.float16).train()
    return model, tiny.batch("llama")


@planted("precision")
def bfloat16_at_a_small_rate(folder):
    model = tiny.build("llama", dtype=torch.bfloat16).train()
    return model, tiny.batch("llama"), {"lr": 1e-5}


@planted("precision", "warned")
def bfloat16_at_a_rate_that_loses_some(folder):
    model = tiny.build("llama", dtype=torch.bfloat16).train()
    return model, tiny.batch("llama"), {"lr": 3e-4}


@planted("optimizer")
def optimizer_built_before_adapt(folder):
    base = tiny.build("llama")
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    return adapt(base), tiny.batch("llama"), {"optimizer": optimizer}


@planted("optimizer")
def optimizer_without_the_head(folder):
    model = lora("bert")
    some = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    return model, tiny.batch("bert"), {"optimizer": torch.optim.AdamW(some, lr=1e-3)}


@planted("learning rate", "warned")
def the_rate_of_full_fine_tuning(folder):
    return lora(), tiny.batch("llama"), {"lr": 5e-4}


@planted("learning rate")
def a_rate_of_one(folder):
    return lora(), tiny.batch("llama"), {"lr": 1.0}


@planted("learning rate")
def a_rate_of_zero(folder):
    model = lora()
    optimizer = adam(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return model, tiny.batch("llama"), {"optimizer": optimizer}


@planted("labels")
def no_labels(folder):
    return lora(), changed(labels=None)


@planted("labels")
def labels_as_a_list(folder):
    return lora("bert"), changed("bert", labels=[0, 1, 2])


@planted("labels")
def every_label_masked(folder):
    return lora(), changed(labels=torch.full((3, 11), -100))


@planted("labels")
def one_row_masked(folder):
    labels = tiny.batch("llama")["labels"].clone()
    labels[1, 1:] = -100
    return lora(), changed(labels=labels)


@planted("labels")
def a_class_too_many(folder):
    return lora("bert"), changed("bert", labels=torch.tensor([0, 3, 1]))


@planted("labels")
def every_class_masked(folder):
    return lora("bert"), changed("bert", labels=torch.tensor([-100, -100, -100]))


@planted("labels")
def classes_as_numbers(folder):
    return lora("bert"), changed("bert", labels=torch.tensor([0.0, 2.0, 1.0]))


@planted("labels")
def whole_numbers_for_regression(folder):
    base = tiny.build("bert")
    base.config.problem_type = "regression"
    return adapt(base), tiny.batch("bert")


@planted("labels")
def labels_shorter_than_the_text(folder):
    return lora(), changed(labels=tiny.batch("llama")["labels"][:, :-1])


@planted("labels")
def minus_one_for_what_is_ignored(folder):
    labels = tiny.batch("llama")["labels"]
    return lora(), changed(labels=labels.masked_fill(labels == -100, -1))


@planted("labels")
def labels_beyond_the_vocabulary(folder):
    labels = tiny.batch("llama")["labels"].clone()
    labels[0, 4] = tiny.VOCABULARY + 3
    return lora(), changed(labels=labels)


@planted("token ids")
def ids_beyond_the_vocabulary(folder):
    ids = tiny.batch("llama")["input_ids"].clone()
    ids[2, 4] = tiny.VOCABULARY
    return lora(), changed(input_ids=ids)


@planted("token ids")
def rows_longer_than_the_positions(folder):
    batch = tiny.batch("bert", length=600)
    return lora("bert"), batch


@planted("token ids")
def a_segment_too_many(folder):
    return lora("bert"), changed("bert", token_type_ids=torch.full((3, 11), 2))


@planted("token ids", "warned")
def no_mask_beside_padding(folder):
    return lora(), changed(attention_mask=None)


@planted("padding")
def padding_trained(folder):
    batch = tiny.batch("llama")
    return lora(), changed(labels=batch["input_ids"])


@planted("padding")
def padding_trained_by_a_decoder(folder):
    batch = tiny.batch("t5")
    return lora("t5"), changed("t5", labels=batch["input_ids"])


@planted("padding side")
def padded_on_the_left(folder):
    batch = {key: value.flip(1) for key, value in tiny.batch("gpt2").items()}
    return lora("gpt2"), batch


@planted("end of text", "warned")
def padding_is_the_end_token(folder):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    batch = tiny.batch("llama")
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, tokenizer.eos_token_id)
    return lora(), changed(input_ids=ids), {"tokenizer": tokenizer}


@planted("start of text", "warned")
def two_start_tokens(folder):
    ids = tiny.batch("llama")["input_ids"].clone()
    ids[:, :2] = tiny.IDS["bos_token_id"]
    return lora(), changed(input_ids=ids)


@planted("mode", "warned")
def evaluation_mode(folder):
    return lora().eval(), tiny.batch("llama")


@planted("forward")
def ids_and_embeddings_at_once(folder):
    return lora(), changed(inputs_embeds=torch.zeros(3, 11, 64))


@planted("forward")
def rows_of_two_numbers(folder):
    batch = tiny.batch("bert")
    return lora("bert"), changed("bert", attention_mask=batch["attention_mask"][:2])


@planted("loss")
def a_loss_that_overflows(folder):
    base = tiny.build("llama")
    base.lm_head.weight.data.mul_(1e38)
    return adapt(base), tiny.batch("llama")


@planted("loss")
def gradients_that_point_uphill(folder):
    model = lora(lean=False)
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda g: -g)
    return model, tiny.batch("llama")


@planted("loss", "warned")
def gradients_that_are_too_large(folder):
    model = lora(lean=False)
    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda g: 100 * g)
    return model, tiny.batch("llama")


@planted("gradients")
def a_hidden_state_detached(folder):
    model = lora()
    model.get_base_model().model.norm.register_forward_hook(lambda module, inputs, output: output.detach())
    return model, tiny.batch("llama")


@planted("gradients")
def gradients_that_are_nan(folder):
    model = lora()
    weight = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight
    weight.register_hook(lambda g: g * float("nan"))
    return model, tiny.batch("llama")


@planted("gradients")
def checkpointing_cuts_the_graph(folder):
    model = plain()
    recompute(model.get_base_model(), reentrant=True)
    model.get_base_model().disable_input_require_grads()  # what a loop of one's own forgets to switch on
    return model, tiny.batch("llama")


@planted("gradients")
def checkpointing_cuts_the_graph_below_a_trained_head(folder):
    model = plain("bert", target_modules=["query"], task_type="SEQ_CLS")
    recompute(model.get_base_model(), reentrant=True)
    model.get_base_model().disable_input_require_grads()  # what a loop of one's own forgets to switch on
    return model, tiny.batch("bert")


@planted("gradients", "warned")
def a_target_that_is_never_used(folder):
    base = tiny.build("llama")
    base.model.layers[0].spare = nn.Linear(64, 64)
    return plain(base=base, target_modules=["q_proj", "spare"]), tiny.batch("llama")


@planted("start")
def loaded_onto_nothing(folder):
    model = plain()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.02)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    renamed = {k.replace("model.layers", "model.language_model.layers"): v for k, v in load_file(file).items()}
    save_file(renamed, file)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        return peft.PeftModel.from_pretrained(tiny.build("llama"), folder), tiny.batch("llama")


@planted("start", "warned")
def half_of_the_file_fits(folder):
    model = plain()
    for name, p in model.named_parameters():
        if "lora_B" in name and "layers.0" in name:
            p.data.normal_(0, 0.02)
    return model, tiny.batch("llama")


@planted("save and load")
def adapted_twice(folder):
    inner = plain()
    with pytest.warns(UserWarning):
        outer = peft.get_peft_model(inner, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    return outer, tiny.batch("llama")


@planted("merge", "warned")
def an_update_that_merging_rounds_away(folder):
    model = lora(dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.fill_(1e-6)
    return model, tiny.batch("llama")


@functools.cache
def report_of(name, folder):
    """Each planted mistake is looked at once."""
    model, batch, *more = BUILD[name](folder)
    return verify(model, batch, **(more[0] if more else {}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tmp_path_factory.mktemp(name) for name in PLANTED}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*", "ignore:.*Unsupported layer type.*")
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found(mistake, folders):
    check, status = PLANTED[mistake]
    report = report_of(mistake, folders[mistake])
    assert report[check].status == status, f"\n{report}"
    assert report.ok == (not report.failed)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*", "ignore:.*tied.*")
def test_remedies_carry_a_number_and_code(folders):
    """What happened, the number that proves it, the line to write instead."""
    seen = set()
    for mistake in PLANTED:
        for check in (*report_of(mistake, folders[mistake]).failed, *report_of(mistake, folders[mistake]).warned):
            seen.add(check.name)
            assert re.search(r"\d", check.found), f"{mistake}: {check}"
            assert re.search(r"\w\(.*\)|\S = \S|\w=\S", check.remedy), f"{mistake}: {check}"
            assert not check.found.endswith("."), check
        for check in report_of(mistake, folders[mistake]).passed:
            assert check.found and not check.remedy
    assert len(PLANTED) >= 20 and len(seen) >= 15


# --- clean set-ups --------------------------------------------------------------------------------------------------

METHODS = {
    "lora": ("lora", {}),
    "dora": ("lora", {"dora": True}),
    "rslora": ("lora", {"rslora": True, "dropout": 0.1}),
    "prefix": ("prefix", {"num_virtual_tokens": 4}),
    "full": ("full", {}),
    "ia3": (peft.IA3Config(target_modules="all-linear", feedforward_modules=[]), {}),
}
ARCHITECTURES = dict.fromkeys(tiny.FAMILIES, (tiny.build, tiny.batch))
ARCHITECTURES |= dict.fromkeys(("gemma3", "mixtral", "qwen2"), (lean_models.build, lean_models.batch))
# full does not train integers; DoRA and dropout act on the inputs of layers, which stacks of experts have not; PEFT
# loses the scales of 8-bit weights after DoRA's first step on a CPU
LEFT_OUT = {("full", "8bit"), ("full", "4bit"), ("dora", "8bit"), ("dora", "mixtral"), ("rslora", "mixtral")}
LEFT_OUT |= {("rslora", "8bit"), ("ia3", "8bit")}  # possible, and like plain LoRA there
CLEAN = [
    (method, quantization, family)
    for method in METHODS
    for quantization in (None, "8bit", "4bit")
    for family in ARCHITECTURES
    if (method, quantization) not in LEFT_OUT and (method, family) not in LEFT_OUT
]


@pytest.mark.parametrize(("method", "quantization", "family"), CLEAN)
def test_a_clean_setup_is_not_accused(method, quantization, family):
    build, batch = ARCHITECTURES[family]
    word, options = METHODS[method]
    torch.manual_seed(0)
    model = adapt(build(family), word, quantization=quantization, **options)
    report = verify(model, batch(family), optimizer=adam(model), tokenizer=None)
    assert not report.failed and not report.warned, f"\n{report}"
    ran = {check.name for check in report.passed}
    assert {"forward", "gradients", "loss", "save and load", "weights", "optimizer", "saved", "labels"} <= ran


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_a_clean_16_bit_base(method, dtype):
    model = adapt(tiny.build("llama", dtype=dtype), method)
    report = verify(model, tiny.batch("llama"), optimizer=adam(model))
    assert not report.failed and not report.warned, f"\n{report}"


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_a_trained_model_is_not_accused(method, models):
    """Mid-training, with a schedule that is still warming up, checkpointing on and rows of a chat masked."""
    model = adapt(tiny.on_disk("llama", models), method)
    optimizer = adam(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10))
    recompute(model.get_base_model() if method != "full" else model, reentrant=False)
    batch = tiny.batch("llama")
    batch["labels"][:, :5] = -100
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        schedule.step()
    report = verify(model, batch, optimizer=optimizer, tokenizer=tiny.tokenizer())
    assert not report.failed and not report.warned, f"\n{report}"
    if method == "lora":
        assert "has been trained" in report["start"].found and report["merge"].status == "passed"


def test_left_padding_is_right_where_positions_are_relative():
    batch = {key: value.flip(1) for key, value in tiny.batch("llama").items()}
    report = verify(lora(), batch)
    assert report["padding side"].status == "passed" and "2 of 3 rows" in report["padding side"].found


def test_a_tied_head_that_is_trained_whole_is_saved_and_merged_right():
    base = lean_models.build("qwen2")
    with pytest.warns(UserWarning, match="tie"):
        report = verify(plain(base=base, modules_to_save=["lm_head"]), lean_models.batch("qwen2"))
    assert not report.failed and not report.warned, f"\n{report}"
    assert "1 of 2 sides trained whole (lm_head)" in report["tied weights"].found


@pytest.mark.parametrize("labels", [None, "regression", "several"])
def test_other_labels_that_are_right(labels):
    base = tiny.build("bert")
    batch = tiny.batch("bert")
    if labels == "regression":
        base.config.problem_type, base.config.num_labels, base.num_labels = "regression", 3, 3
        batch["labels"] = torch.randn(3, 3)
    if labels == "several":
        batch["labels"] = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1]])
    report = verify(adapt(base), batch)
    assert not report.failed and not report.warned, f"\n{report}"


# --- nothing is changed ---------------------------------------------------------------------------------------------


def everything(model):
    """All that verify might have touched, by value."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": {name: (id(p), p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "gradients": {
            n: None if p.grad is None else (p.grad.data_ptr(), p.grad.clone()) for n, p in model.named_parameters()
        },
        "modes": {name: m.training for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "hooks": {n: [len(h) for k, h in vars(m).items() if k.endswith("_hooks")] for n, m in model.named_modules()},
        "scales": {
            n: [m.weight.CB is None, m.weight.SCB is None, m.state.CB is None, m.state.SCB is None]
            for n, m in model.named_modules()
            if type(getattr(m, "weight", None)).__name__ == "Int8Params" and hasattr(m, "state")
        },
        "config": dict(model.config.to_dict()),
        "adapter": {k: c.to_dict() for k, c in model.peft_config.items()} if hasattr(model, "peft_config") else {},
        "random": [torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]],
    }


def assert_same(a, b, at=""):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, at
        raw = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        assert torch.equal(*raw), at
    elif isinstance(a, numpy.ndarray):
        assert (a == b).all(), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), (at, a.keys() ^ b.keys())
        for key in a:
            assert_same(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at}/{i}")
    else:
        assert a == b, at


SUBJECTS = {
    "lora": lambda: lora(dropout=0.1),
    "lora 8bit": lambda: lora(quantization="8bit"),
    "lora 4bit": lambda: lora("gpt2", quantization="4bit"),
    "dora": lambda: lora(dora=True),
    "dora 4bit": lambda: lora(dora=True, quantization="4bit"),
    "dora 8bit": lambda: lora(dora=True, quantization="8bit"),
    "prefix": lambda: adapt(tiny.build("llama"), "prefix", num_virtual_tokens=4),
    "prefix through a network": lambda: adapt(tiny.build("t5"), "prefix", num_virtual_tokens=4, reparametrization=8),
    "full": lambda: adapt(tiny.build("llama"), "full"),
    "full bf16": lambda: tiny.build("gpt2", dtype=torch.bfloat16).train(),
    "head": lambda: lora("bert"),
    "plain peft": plain,
    "merged": lambda: BUILD["merged_and_trained_on"](None)[0],
    "frozen": lambda: lora().requires_grad_(False),
    "evaluation": lambda: lora().eval(),
    "experts": lambda: adapt(lean_models.build("mixtral"), "lora", quantization="8bit"),
}


def batch_for(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.model_type == "mixtral":
        return lean_models.batch("mixtral")
    return tiny.batch(base.config.model_type)


# a forward that raises leaves by other ways
LEAVING = [(subject, False) for subject in SUBJECTS]
LEAVING += [(subject, True) for subject in ("lora", "lora 8bit", "prefix", "full", "head")]


@pytest.mark.parametrize(("subject", "broken"), LEAVING, ids=[s + " broken" * b for s, b in LEAVING])
def test_nothing_is_changed(subject, broken):
    model = SUBJECTS[subject]()
    batch = batch_for(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for i, p in enumerate(trainable):
        if i % 2:
            p.grad = torch.full_like(p, 0.25)  # half way through an accumulation
    called = []
    for p in trainable:
        p.register_post_accumulate_grad_hook(called.append)
    before = everything(model)
    with torch.no_grad():
        report = verify(model, {**batch, "inputs_embeds": torch.zeros(3, 11, 64)} if broken else batch)
    assert_same(before, everything(model))
    assert not called, "a hook that may step an optimizer was called"
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in trainable)
    assert torch.is_grad_enabled()
    assert not broken or report["forward"].status == "failed"


def test_plain_4_bit_weights_are_not_repacked():
    """bitsandbytes repacks them for a CPU at the first evaluation, and trains through a kernel without gradients."""
    model = lora(quantization="4bit")
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True  # as it is before `adapt` has settled it
    before = everything(model)
    verify(model, tiny.batch("llama"))
    assert_same(before, everything(model))
    assert all(layer.support_avx512bf16_for_cpu for layer in layers)


def test_recording_hooks_are_not_doubled():
    """Neither `adapt` nor `verify` leaves transformers' hooks behind, which it would hang there once more."""
    untouched, model = lean_models.build("mixtral"), adapt(lean_models.build("mixtral"), "lora")
    verify(model, lean_models.batch("mixtral"))
    counts = []
    for each in (untouched, model):
        each.train()(**lean_models.batch("mixtral"))
        counts.append(sum("capturing" in hook.__name__ for m in each.modules() for hook in m._forward_hooks.values()))
    assert counts[0] == counts[1]


def test_statistics_of_a_batch_norm_are_put_back():
    base = tiny.build("bert")
    base.dropout = nn.Sequential(nn.BatchNorm1d(64))
    base.train()
    before = everything(base)
    assert verify(base, tiny.batch("bert")).ok
    assert_same(before, everything(base))


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_training_goes_on_as_if_nothing_had_been(method):
    """The same steps with a verify between them and without give the same weights, to the last bit."""
    found = []
    for looks in (False, True):
        torch.manual_seed(5)
        model = adapt(tiny.build("llama"), method, **({"dropout": 0.2} if method == "lora" else {}))
        optimizer = adam(model)
        for _ in range(3):
            if looks:
                verify(model, tiny.batch("llama"), optimizer=optimizer)
            model(**tiny.batch("llama")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert_same(*found)


def test_no_second_model(monkeypatch):
    """An adapter's check copies what is trained, and no matrix of the base."""
    model = lora()
    base = {p.data_ptr(): name for name, p in model.named_parameters() if not p.requires_grad and p.numel() > 100}
    copied = []
    clone = torch.Tensor.clone

    def watch(tensor, *args, **kwargs):
        copied.append(base.get(tensor.data_ptr()))
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", watch)
    monkeypatch.setattr(nn.Module, "__deepcopy__", lambda *a: pytest.fail("a module was copied"), raising=False)
    assert verify(model, tiny.batch("llama")).ok
    assert not [name for name in copied if name]


# --- the report and its edges ---------------------------------------------------------------------------------------


def test_wrong_use_is_one_clear_error():
    model = lora()
    for given, words in (
        (("llama", {}), "verify takes a loaded model, got a str"),
        ((model, [1, 2]), "got a list"),
        ((model, {}), "got an empty one"),
    ):
        with pytest.raises(OptionError, match=words):
            verify(*given)
    with pytest.raises(OptionError, match="optimizer must be a torch optimizer, got a float"):
        verify(model, tiny.batch("llama"), optimizer=1e-3)
    for wrong in (0, -1e-3, float("nan"), "1e-4", True):
        with pytest.raises(OptionError, match="lr must be a number above 0"):
            verify(model, tiny.batch("llama"), lr=wrong)
    with pytest.raises(OptionError, match="not both"):
        verify(model, tiny.batch("llama"), lr=1e-3, optimizer=adam(model))


def test_report_reads_like_a_table(folders):
    report = report_of("padding_trained", folders["padding_trained"])
    text = str(report)
    assert text.splitlines()[0].startswith(f"{len(report.passed)} passed, 1 failed, ")
    assert "✗ padding" in text and "4 of 4 padded positions have a label" in text
    assert '→ batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)' in text
    assert max(map(len, text.splitlines())) <= 120
    assert not report.ok and Report(()).ok
    with pytest.raises(AttributeError):
        report.checks = ()
    with pytest.raises(OptionError, match=r"no check is called 'label'.* Did you mean 'labels'\?"):
        report["label"]


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ("a_frozen_model", NothingToTrainError),
        ("nan_in_the_base", NonFiniteError),
        ("every_label_masked", DataError),
        ("float16_trained", LoraKitError),
    ],
)
def test_a_failure_can_be_raised(mistake, error, folders):
    report = report_of(mistake, folders[mistake])
    with pytest.raises(error, match=re.escape(report.failed[0].found)):
        report.raise_if_failed()
    Report((Check("mode", "warned", "1", "model.train()"),)).raise_if_failed()


def test_a_whole_model_that_is_too_large_is_not_written(monkeypatch):
    monkeypatch.setattr(stored, "LARGEST", 1000)
    report = verify(adapt(tiny.build("llama"), "full"), tiny.batch("llama"))
    assert report.ok and "save() re-reads what it writes" in report["save and load"].found


def test_a_full_disk_is_said(monkeypatch):
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    report = verify(lora(), tiny.batch("llama"))
    assert report["save and load"].status == "skipped" and "room for 0 MB" in report["save and load"].found

    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(stored, "save", refuse)
    report = verify(lora(), tiny.batch("llama"))
    assert report["save and load"].status == "skipped" and "No space left" in report["save and load"].found


def test_a_file_that_is_not_what_is_in_memory(monkeypatch):
    def spoil(model, path):
        folder = save(model, path)
        content = bytearray((folder / "adapter_model.safetensors").read_bytes())
        content[-9] ^= 1
        (folder / "adapter_model.safetensors").write_bytes(content)
        return folder

    monkeypatch.setattr(stored, "save", spoil)
    check = verify(lora(), tiny.batch("llama"))["save and load"]
    assert check.status == "failed" and "1 of 28 tensors in the file differ" in check.found


def test_out_of_memory_is_a_finding(monkeypatch):
    model = lora()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More follows.")

    model.forward = full
    check = verify(model, tiny.batch("llama"))["forward"]
    assert check.status == "failed" and "out of memory" in check.found and "(3, 11)" in check.found


def test_a_compiled_model_is_looked_through():
    model = lora()
    report = verify(torch.compile(model, backend="eager"), tiny.batch("llama"))
    assert report.ok and report["saved"].status == "passed"


def test_a_part_that_was_compiled_before_the_model_was_adapted():
    """Its names are mended when they are saved."""
    base = tiny.build("llama")
    base.model = torch.compile(base.model, backend="eager")
    check = verify(plain(base=base), tiny.batch("llama"))["save and load"]
    assert check.status == "passed" and "without the compiler's wrapper" in check.found


def test_a_model_of_no_library():
    """No config, no task: what can be said is said, and nothing is raised."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(4, 2)

        def forward(self, x, labels):
            return {"loss": nn.functional.cross_entropy(self.map(x), labels), "logits": self.map(x)}

    report = verify(Own().train(), {"x": torch.randn(5, 4), "labels": torch.tensor([0, 1, 0, 1, 0])})
    assert report["gradients"].status == report["loss"].status == "passed", f"\n{report}"
