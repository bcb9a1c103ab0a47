"""One of two processes of `test_lean_loops.test_two_processes`: compares its gradients with those of one process."""

import sys

import lean_models as models
import torch
from torch import distributed


def halves(inputs, rank):
    return {key: value[2 * rank : 2 * rank + 2] for key, value in inputs.items()}


def main(wrapping):
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    inputs = models.batch("llama", rows=4)
    inputs["labels"][:, 3:] = inputs["input_ids"][:, 3:]  # as many labels in each half
    inputs["attention_mask"][:] = 1
    expected = models.step(models.adapted("llama", lean=False), inputs, factor=1)[1]
    model = models.adapted("llama", lean=True)
    if wrapping.startswith("ddp"):
        wrapped = torch.nn.parallel.DistributedDataParallel(
            model, static_graph="static" in wrapping, find_unused_parameters=False
        )
    else:
        from torch.distributed.fsdp import fully_shard

        base = model.get_base_model()
        for layer in base.model.layers:
            if "parts" in wrapping:
                fully_shard(layer.mlp.gate_proj)
                fully_shard(layer.input_layernorm)
            fully_shard(layer)
        if "parts" in wrapping:
            fully_shard(base.lm_head)
        fully_shard(model)
        wrapped = model
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(**halves(inputs, rank)).loss.backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        gradient = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        right = expected[name]
        if (gradient.double() - right).norm() > 1e-5 * right.norm():
            raise AssertionError(f"{name}: {(gradient - right).norm() / right.norm()}")
        compared += 1
    if compared != len(expected):
        raise AssertionError(f"{compared} gradients of {len(expected)}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
