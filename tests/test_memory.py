"""Live bytes against counts made by hand, and against torch's own profiler."""

import gc

import tiny
import torch

from lora_kit import adapt, param_groups
from lora_kit.memory.tracker import PeakBytes, resident_tensors


def test_births_deaths_views_and_peaks():
    x = torch.ones(1000)
    with PeakBytes("cpu", [x]) as memory:
        y = x + 1  # 4000 more
        z = y.view(10, 100)[2:]  # no storage of its own
        del y, z
        w = torch.zeros(500)  # 2000: below the peak
        w += 1
    assert memory.peak == 8000


def test_what_was_not_named_does_not_count():
    x = torch.ones(1000)
    with PeakBytes("cpu") as memory:
        x.mul_(2)
        x[:10] + 1
    assert memory.peak == 40


def test_nothing_is_kept_alive():
    x = torch.ones(1000)
    with PeakBytes("cpu", [x]) as memory:
        del x
        gc.collect()
        torch.ones(100)
    assert memory.peak == 4000


def profiled(step):
    """Peak of what torch's own profiler sees the CPU allocator give and take."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [(e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(events):
        live += size
        peak = max(peak, live)
    return peak


def test_a_training_step_against_the_profiler():
    """An independent counter in the allocator itself agrees within a hundredth."""
    model = adapt(tiny.build("llama"), "lora")
    batch = tiny.batch("llama", rows=5, length=37)
    optimizer = torch.optim.AdamW(param_groups(model))

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    resident = sum(
        {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in resident_tensors(model, optimizer)}.values()
    )
    with PeakBytes("cpu", resident_tensors(model, optimizer)) as memory:
        step()
    beyond = memory.peak - resident
    expected = profiled(step)
    assert abs(beyond - expected) < 0.01 * expected, (beyond, expected)


def test_resident_tensors_of_a_quantized_model():
    """Weights, quantization constants, optimizer states: each byte once."""
    model = adapt(tiny.build("llama"), "lora", quantization="4bit")
    optimizer = torch.optim.AdamW(param_groups(model))
    model(**tiny.batch("llama")).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    found = {t.untyped_storage()._cdata for t in resident_tensors(model, optimizer)}
    for parameter in model.parameters():
        assert parameter.untyped_storage()._cdata in found
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            assert {state.absmax.untyped_storage()._cdata, state.state2.absmax.untyped_storage()._cdata} <= found
    for state in optimizer.state.values():
        assert state["exp_avg"].untyped_storage()._cdata in found


def test_constants_of_packed_stacks_are_resident():
    """The scales of 4-bit experts lie beside the stack's parameter, under whatever name that has."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = adapt(transformers.MixtralForCausalLM(config), "lora", quantization="4bit")
    experts = next(m for m in model.modules() if "lora_kit_packed" in vars(m))
    name, weight = next((n, p) for n, p in experts._parameters.items() if hasattr(p, "quant_state"))
    state = weight.quant_state
    found = {t.data_ptr() for t in resident_tensors(model)}
    assert name != "weight" and {state.absmax.data_ptr(), state.state2.absmax.data_ptr()} <= found
