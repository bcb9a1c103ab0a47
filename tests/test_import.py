"""Importing lora_kit and calling adapt leave the process as it was."""

import json
import subprocess
import sys

SNAPSHOT = """
import json, logging, os, sys, warnings
def state():
    torch = sys.modules.get("torch")
    flags = {}
    if torch is not None:
        flags = {
            "default dtype": str(torch.get_default_dtype()),
            "grad": torch.is_grad_enabled(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul": torch.get_float32_matmul_precision(),
            "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
            "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic],
            "threads": torch.get_num_threads(),
            "default device": str(torch.get_default_device()),
            "functions": [id(torch.nn.functional.cross_entropy), id(torch.nn.Linear.forward), id(torch.matmul)],
        }
    loggers = {
        name: [logger.level, len(logger.handlers), len(logger.filters), logger.disabled, logger.propagate]
        for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)
    }
    return {
        "environment": dict(os.environ),
        "root logger": [logging.root.level, len(logging.root.handlers), len(logging.root.filters)],
        "loggers": loggers,
        "filters": [str(f) for f in warnings.filters],
        "torch": flags,
        "hooks": [id(sys.excepthook), id(sys.stdout), id(sys.stderr)],
    }
"""


def run(code):
    done = subprocess.run([sys.executable, "-c", SNAPSHOT + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_import_is_inert_and_light():
    found = json.loads(
        run(
            "before = state(); known = set(sys.modules); import lora_kit; after = state()\n"
            "print(json.dumps([before == after, sorted(m for m in set(sys.modules) - known if '.' not in m)]))"
        )
    )
    assert found[0]
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy", "sklearn", "typer"}
    assert not heavy & set(found[1]), found[1]


def test_every_public_name_is_there():
    code = (
        "import lora_kit\n"
        "for n in lora_kit.__all__: getattr(lora_kit, n)\n"
        "print(set(lora_kit.__all__) <= set(dir(lora_kit)))"
    )
    assert run(code) == "True"
    assert "no attribute 'adopt'" in run("import lora_kit\ntry: lora_kit.adopt\nexcept AttributeError as e: print(e)")


def test_adapt_leaves_the_process_alone():
    """Environment, loggers, warning filters, torch's flags and functions are the same around adapt, save and load."""
    done = run(
        "import sys, tempfile; sys.path.insert(0, 'tests')\n"
        "import torch, transformers, peft, bitsandbytes, accelerate, tiny\n"
        "import lora_kit\n"
        "for warm in range(2):\n"  # libraries set up their own loggers at their first use
        "    before = state()\n"
        "    for method, base in (('lora', '4bit'), ('prefix', '8bit'), ('full', None)):\n"
        "        model = lora_kit.adapt(tiny.build('llama'), method, quantization=base)\n"
        "        with tempfile.TemporaryDirectory() as folder:\n"
        "            lora_kit.save(model, folder)\n"
        "    after = state()\n"
        "print(json.dumps([k for k in before if before[k] != after[k]]))"
    )
    assert json.loads(done) == []
