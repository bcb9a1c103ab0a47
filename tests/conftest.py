"""Nothing here touches the network, and bitsandbytes does not repeat itself at every layer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import logging

import pytest
import torch

# tiny tensors: a second thread costs more than it gives
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _quiet_bitsandbytes():
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folder that tiny models are saved to once, by `tiny.on_disk`."""
    return tmp_path_factory.mktemp("models")
