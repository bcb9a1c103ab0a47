"""Which servers load a saved adapter, and with which flag: vLLM and llama.cpp, by the rules in their sources.

Neither says no to everything it cannot do: both ignore a scale of a single layer, llama.cpp also rsLoRA's, and answer
with another model. Rules as of vLLM 0.27 (`vllm/lora/peft_helper.py`, `vllm/config/lora.py`) and of llama.cpp's
`convert_lora_to_gguf.py` in 2026; neither was run here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import StorageError
from lora_kit.storage import config as settings
from lora_kit.storage import manifest, rows, stored, units

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank; 16 is its default."""


@dataclass(frozen=True)
class Serving:
    """What each server makes of a folder: empty reasons mean that it loads it."""

    path: Path
    vllm: tuple[str, ...]
    """Why vLLM does not serve it."""
    vllm_flags: str
    """What to start vLLM with."""
    llama_cpp: tuple[str, ...]
    """Why llama.cpp does not serve it."""
    mergeable: bool
    """Whether `merge` can make a plain model of it."""

    def __str__(self) -> str:
        merge = f"; merge({str(self.path)!r}, out) makes a plain model that it serves" if self.mergeable else ""
        lines = []
        for name, reasons, how in (
            ("vLLM", self.vllm, f"ok with {self.vllm_flags}"),
            ("llama.cpp", self.llama_cpp, f"ok: convert_lora_to_gguf.py {self.path}"),
        ):
            lines.append(f"{name}: no ({'; '.join(reasons)}){merge}" if reasons else f"{name}: {how}")
        return "\n".join(lines)


def check_serving(path: str | Path) -> Serving:
    """Say whether vLLM and llama.cpp load the adapter in a folder as it was trained.

    Raises:
        StorageError: the folder holds no adapter, or a damaged one.
    """
    folder = units.current(Path(path))
    if not (folder / settings.NAME).exists():
        raise StorageError(
            f"{path} has no {settings.NAME}, so it holds no adapter. A whole model needs none of these rules; for an "
            "adapter pass what save(model, path) wrote."
        )
    facts = manifest.facts(folder)
    tensors = stored.read(folder)
    content: dict[str, Any] = manifest.read_json(folder / settings.NAME, settings.LARGEST)
    kind = str(content.get("peft_type"))
    if kind != "LORA":
        why = (f"it is {kind}, and only LoRA is served",)
        return Serving(Path(path), why, "", why, not settings.read(folder, tensors).is_prompt_learning)

    rank = int(content.get("r") or 0)
    uneven = sorted({str(other) for other in (content.get("rank_pattern") or {}).values()} - {str(rank)})
    both: list[str] = []
    whole = sorted({name for name in tensors if ".lora_" not in name})
    if content.get("use_dora"):
        both.append("DoRA")
    if whole:
        both.append(f"{len(whole)} tensors are trained whole, such as {whole[0]}")
    if content.get("trainable_token_indices") or facts.get("rows") or (folder / rows.NAME).exists():
        both.append("rows of the embeddings are trained or changed")
    if content.get("target_parameters"):
        both.append(f"{len(content['target_parameters'])} parameters of experts are adapted as stacks")
    if content.get("alpha_pattern"):
        both.append(f"{len(content['alpha_pattern'])} layers have an alpha of their own, which would be ignored")
    vllm = list(both)
    if uneven:
        vllm.append(
            f"layers have ranks {', '.join(uneven)} beside {rank}, and the scale of {rank} would be used for all"
        )
    if rank > VLLM_RANKS[-1]:
        vllm.append(f"rank {rank} is above {VLLM_RANKS[-1]}")
    if content.get("bias", "none") != "none":
        vllm.append(f"bias={content['bias']!r}")
    gguf = list(both)
    if content.get("use_rslora"):
        gguf.append(f"rsLoRA, whose scale it would take for alpha / {rank}")
    flag = next((size for size in VLLM_RANKS if size >= max(rank, 8)), VLLM_RANKS[-1])
    return Serving(Path(path), tuple(vllm), f"--enable-lora --max-lora-rank {flag}", tuple(gguf), True)
