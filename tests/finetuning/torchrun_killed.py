"""A fit with a checkpoint, of which one process is killed in the third epoch."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torchrun_cases import digest, of_classes, this_rank

from skltl.finetuning._checkpoint import Checkpoint
from skltl.finetuning._training import StageTrainer

STEPS, SAVES = [], []
train_step, save = StageTrainer._train_step, Checkpoint.save


def counted_step(self, *batch):
    STEPS.append(1)
    is_first_run = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if is_first_run and this_rank() == 1 and len(STEPS) == 22:  # of 9 per epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, *batch)


def counted_save(self, state):
    SAVES.append(1)
    return save(self, state)


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    StageTrainer._train_step, Checkpoint.save = counted_step, counted_save
    fitted = of_classes(folder, batch_size=7, checkpoint=folder / "checkpoint")
    found = {"digest": digest(fitted), "n_steps": len(STEPS), "n_saves": len(SAVES)}
    found["losses"] = [record["loss"] for record in fitted.history_]
    (folder / f"{this_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
