"""Checkpoints in transformers' `Trainer`: its own moments to save and to resume, our files."""

from pathlib import Path
from typing import Any

from lora_kit.errors import OptionError, ResumeError
from lora_kit.messages import say
from lora_kit.storage import checkpoints, states, units

FOLDER = "checkpoints"
_STATE = "trainer_state.json"


def with_checkpoints(kind: Any, folder: Path, *, keep: int, run: dict[str, Any]) -> Any:
    """A subclass of a `Trainer` class that writes checkpoints below `folder` and resumes from them.

    When to save is Trainer's (`save_strategy`, `save_steps`). A checkpoint is an adapter, or a whole model, as `save`
    writes it, with the states of optimizer, schedule, scaler and random generators in safetensors and JSON.
    """

    class Checkpointing(kind):
        """`Trainer` whose checkpoints are whole or not there."""

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            if not self.args.should_save:
                return
            scaler = getattr(self.accelerator, "scaler", None)
            self.state.save_to_json(str(self._scratch_state()))
            state = {
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.lr_scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "random": states.random_states(),
                "trainer": self._scratch_state().read_text(),
            }
            checkpoints.write(folder, self.state.global_step, self.model, state, run, keep=keep)

        def _scratch_state(self) -> Path:
            return Path(self.args.output_dir) / _STATE

        def go_on_from(self, root: Path) -> Any:
            """Train from a checkpoint on, after it was checked."""
            checkpoints.check(root, self.model, run)
            self._resumed = states.read(root)
            self._resumed_from = root
            # Trainer reads how far the run was from a folder
            self._scratch_state().write_text(self._resumed["trainer"])
            return self.train(resume_from_checkpoint=str(self.args.output_dir))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            checkpoints.put_back(self._resumed_from, self.model)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is None:
                return
            try:
                self.optimizer.load_state_dict(self._resumed["optimizer"])
                self.lr_scheduler.load_state_dict(self._resumed["schedule"])
            except (KeyError, ValueError, TypeError) as error:
                raise ResumeError(
                    f"the optimizer of this run cannot take the state in {self._resumed_from} ({error}). Give the same "
                    "optimizer, or start anew from its weights: load(path, base, train=True)."
                ) from None

        def _load_scaler(self, checkpoint: str | None) -> None:
            scaler = getattr(self.accelerator, "scaler", None)
            if checkpoint is not None and scaler is not None and self._resumed["scaler"] is not None:
                scaler.load_state_dict(self._resumed["scaler"])

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                states.set_random_states(self._resumed["random"])

    return Checkpointing


def to_go_on_from(resume: bool | str | Path, folder: Path) -> Path | None:
    """The checkpoint that `resume` means: True the newest below `folder`, a path that one; None to start anew.

    Raises:
        OptionError: `resume` is neither.
        ResumeError: the path is no checkpoint, or none below `folder` is whole.
    """
    if resume is False or resume is None:
        return None
    if isinstance(resume, str | Path):
        path = Path(resume)
        if not path.is_dir():
            raise ResumeError(f"resume={str(resume)!r} is no folder; resume=True takes the newest of {folder}.")
        return checkpoints.newest(path) if checkpoints.numbered(path) else units.current(path)
    if resume is not True:
        raise OptionError(f"resume must be True, False or the path of a checkpoint, got {resume!r}.")
    there = checkpoints.numbered(folder)
    found = checkpoints.newest(folder)
    if found is None and any(any(path.iterdir()) for path in there.values()):
        say(f"none of {len(there)} checkpoints in {folder} is whole: starting from step 0")
    elif found is None:
        say(f"no checkpoint in {folder}: starting from step 0")
    return found
