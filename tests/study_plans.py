"""Plans of studies whose runs die or never end, for workers that import nothing else than a study does.

    python tests/study_plans.py FOLDER      a study in FOLDER whose only run never ends
"""
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import train  # noqa: E402
from eval import study_runs  # noqa: E402


class Deadly(study_runs.Plan):
    """Kills the process that would start the run with lr 2, and measures nothing of others."""

    def run_folder(self, run: study_runs.Run) -> Path:
        if run.lr == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run_folder(run)


class Counting(study_runs.Plan):
    """Writes down how many threads PyTorch has."""

    def run_folder(self, run: study_runs.Run) -> Path:
        (self.folder / "threads").write_text(str(torch.get_num_threads()))
        return super().run_folder(run)


class Sleeper(study_runs.Plan):
    """Of runs that never end."""

    def run_folder(self, run: study_runs.Run) -> Path:
        (self.folder / "pid").write_text(str(os.getpid()))
        time.sleep(600)


def plan(kind: type[study_runs.Plan], folder: Path) -> study_runs.Plan:
    return kind(folder, train.Config(device="cpu"), {}, [], "", "", 0, 0, [], False)


if __name__ == "__main__":
    waiting = iter([study_runs.Run(None)])
    study_runs.run_in_workers(plan(Sleeper, Path(sys.argv[1])), 1, lambda: next(waiting, None), print)
