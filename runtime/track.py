"""--track: the numbers of metrics.jsonl and eval.jsonl in TensorBoard or Weights & Biases, too.

    tracker = Tracker("tensorboard", out, settings, first_step=0, evaluates_first=True)
    tracker.add("metrics", {"step": 1, "loss": 2.5, ...})       # a line, as it is written

A number has the same name as in the file. One inside an object has the path to it as its name, such as
data/test/completion/nll_token_mean. Both packages are optional, and only rank 0 makes a Tracker that does
anything. A resumed run adds to what is there, and has each step once, as its files do.
"""
from collections.abc import Iterator
from pathlib import Path


class Tracker:
    def __init__(self, kind: str, out: Path, settings: dict, first_step: int, evaluates_first: bool) -> None:
        """kind: --track, or "none"; out: the run's folder; settings: its flags; first_step: how many steps
        are trained already; evaluates_first: whether that step is evaluated (again). ValueError if wandb
        refuses to start, as without a login."""
        self.writers, self.run = {}, None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            # What an interrupted run wrote from this step on is dropped when the files are read.
            starts = {"metrics": first_step + 1, "eval": first_step + (not evaluates_first)}
            self.writers = {name: SummaryWriter(str(out / "tensorboard" / name), purge_step=step)
                            for name, step in starts.items()}
        elif kind == "wandb":
            import wandb
            # wandb keeps a run's folder under its id. It ignores steps that the run has already.
            before = sorted((out / "wandb").glob("*run-*-*"))
            try:
                self.run = wandb.init(dir=str(out), name=out.name, config=settings, resume="allow",
                                      id=before[-1].name.rpartition("-")[2] if before else None)
            except wandb.Error as error:
                raise ValueError(f"--track wandb: {error} (WANDB_MODE=offline needs no login)") from None

    def add(self, file: str, record: dict) -> None:
        """Add a line of a file: metrics or eval."""
        numbers = dict(_numbers(record))
        step = numbers.pop("step")
        if writer := self.writers.get(file):
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
        if self.run:
            self.run.log(numbers, step=step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        if self.run:
            self.run.finish()


def _numbers(record: dict, path: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{path}{name}/")
        elif isinstance(value, int | float):
            yield f"{path}{name}", value
