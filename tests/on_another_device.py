"""What `test_another_device` runs, in a process of its own: one part, named on the command line."""

import sys
import tempfile

import lean_models as models
import pretend
import torch

from lora_kit import Full, adapt, guard, load, merge, param_groups, save, verify
from lora_kit.errors import NonFiniteError
from lora_kit.lean import layers


def there(architecture, **options):
    model = models.build(architecture, **options).to(pretend.NAME)
    model.tie_weights()
    if architecture == "mixtral":
        model.set_experts_implementation("eager")  # the others count with integers, which the CPU cannot
    return model


def batch(architecture, **options):
    return {name: tensor.to(pretend.NAME) for name, tensor in models.batch(architecture, **options).items()}


def inputs(architecture):
    return {name: tensor for name, tensor in batch(architecture).items() if name != "labels"}


def train(model, architecture, steps=2):
    optimizer = torch.optim.AdamW(param_groups(model))
    for _ in range(steps):
        model(**batch(architecture)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.device.type == pretend.NAME for p in model.parameters())
    return model.eval()


def logits(model, architecture):
    with torch.no_grad():
        return model(**inputs(architecture)).logits.cpu()


def steps():
    """Loss and gradients are those of the same step on the CPU."""
    for architecture in models.MODELS:
        for method in ("lora", "prefix", "full"):
            options = {"dropout": 0.1} if method == "lora" and architecture != "mixtral" else {}
            found = []
            for place in ("cpu", pretend.NAME):
                model = models.adapted(architecture, lean=True, method=method, **options)
                base = model if method == "full" else model.get_base_model()
                if architecture == "mixtral":
                    base.set_experts_implementation("eager")
                model.to(place)
                base.tie_weights()
                given = {name: tensor.to(place) for name, tensor in models.batch(architecture).items()}
                loss, gradients = models.step(model, given)
                found.append((loss.cpu(), {n: g.cpu() for n, g in gradients.items() if not n.endswith("key.bias")}))
            difference = models.overall(found[1], found[0])
            print(architecture, method, f"{difference:.1e}")
            # torch has fused attention on the CPU, and composes it elsewhere
            assert difference <= 1e-5 and found[0][0].isclose(found[1][0], rtol=2e-6)


def life():
    """Adapted, checked, trained, saved, loaded, merged and generated from where the model is."""
    for architecture in ("llama", "gpt2", "bert"):
        for method in ("lora", "prefix", "full"):
            model = adapt(there(architecture), method)
            report = verify(model, batch(architecture))
            assert report.ok, report
            train(model, architecture)
            with tempfile.TemporaryDirectory() as folder:
                save(model, folder)
                again = load(folder).to(pretend.NAME) if method == "full" else load(folder, there(architecture))
                assert torch.equal(logits(again.eval(), architecture), logits(model, architecture))
                if method == "lora":
                    merge(model, f"{folder}/merged", bound=1.0)
            print(architecture, method)


def variants():
    """Other options, each trained for two steps."""
    for method, options in (
        ("lora", {"dora": True}),
        ("lora", {"rslora": True, "lora_plus": 4.0}),
        ("lora", {"new_tokens": [5, 7]}),
        ("prefix", {"init": "random"}),
        ("prefix", {"init_text": [3, 4, 5], "reparametrization": 16}),
    ):
        train(adapt(there("llama"), method, **options), "llama")
    train(adapt(there("llama", dtype=torch.bfloat16), "lora", dropout=0.1), "llama")
    train(adapt(there("llama", dtype=torch.bfloat16), Full(weights="stochastic")), "llama")
    train(adapt(there("mixtral"), "lora"), "mixtral")
    nothing = adapt(there("llama"), "lora")(**batch("llama", labels="none")).loss
    assert nothing.isnan()
    checkpointed = adapt(there("bert"), "lora", dropout=0.1)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    train(checkpointed.train(), "bert")
    for method in ("lora", "prefix"):
        model = adapt(there("llama"), method).eval()
        made = model.generate(input_ids=batch("llama")["input_ids"][:1, :5], max_new_tokens=4, do_sample=False)
        assert made.shape == (1, 9)


def guarded():
    """A guarded loop: it runs, and a number that is none is found and named."""
    model = adapt(there("llama"), "lora")
    optimizer = torch.optim.AdamW(param_groups(model))
    with guard(model, optimizer):
        for _ in range(2):
            model(**batch("llama")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    broken = next(p for name, p in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        broken.fill_(float("nan"))
    try:
        with guard(model, optimizer):
            model(**batch("llama")).loss.backward()
            optimizer.step()
    except NonFiniteError as error:
        assert "lora_B" in str(error)
    else:
        raise AssertionError("nothing was said of NaN")


def control():
    """A tensor on the CPU is refused, in the forward and in the backward pass."""
    x = torch.zeros(3, 4, device=pretend.NAME, requires_grad=True)
    try:
        x + torch.ones(4)
    except RuntimeError as error:
        assert "on the CPU among tensors" in str(error)
    else:
        raise AssertionError("operands on two devices were taken")
    planted = layers._pull
    layers._pull = lambda base, dy: planted(base, dy) + torch.ones(1)
    model = adapt(there("llama"), "lora")
    try:
        train(model, "llama")
    except RuntimeError as error:
        assert "on the CPU among tensors" in str(error)
    else:
        raise AssertionError("a planted tensor on the CPU was not seen")


if __name__ == "__main__":
    kept = pretend.install()
    whole = layers._whole
    layers._whole = lambda weight: isinstance(weight, pretend.There) or whole(weight)
    with pretend.Here():
        {part.__name__: part for part in (steps, life, variants, guarded, control)}[sys.argv[1]]()
