"""Nothing is made on the CPU by mistake: the library on a second device that takes no tensor from there."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

PARTS = ("steps", "life", "variants", "guarded", "control")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
@pytest.mark.parametrize("part", PARTS)
def test_on_another_device(part):
    script = Path(__file__).parent / "on_another_device.py"
    done = subprocess.run([sys.executable, script, part], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
