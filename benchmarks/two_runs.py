"""Two runs started in one folder, the second at a random time of the first: one of them is refused, with one line that names
the other, and the other equals a run that was left alone, to the bit.

A trial is a run and a second one, started a random time behind a step that is drawn uniformly (in a tenth of the trials at the
same moment). Compared are the final weights, and every loss of training and evaluation. Trials are forks of a
process that has imported everything, so that most of their time is training.
"""

import os
import random
import re
import tempfile
import time
from functools import partial
from pathlib import Path

from _bench import arguments, bar, finish
from _trials import complete, fork
from crash_test import STEPS, look, outcome, words

from neobert.config.load import load_config
from neobert.errors import UserError
from neobert.tasks.pretraining import task as pretraining

REFUSED = re.compile(
    r"trainer\.output_dir: another run is writing in .* \(process (\d+) on [^,]+, since [^)]+\); wait for it.*"
)


def run(folder: Path, said: Path) -> int:
    """Train anew; a refusal is written to `said`. Returns the exit status."""
    try:
        return pretraining.run(load_config([], [*words(folder), "trainer.resume_from_checkpoint=null"])).exit_code
    except UserError as error:
        said.write_text(str(error))
        return 2


def wait_for(folder: Path, steps: int) -> None:
    """Until the run in a folder has logged so many steps."""
    path = folder / "metrics.jsonl"
    while steps and not (path.is_file() and path.read_text().count('"kind": "train"') >= steps):
        time.sleep(0.002)


def trial(home: Path, steps: int, seconds: float) -> tuple[int, int]:
    """(runs refused in one line that names the run that was not, runs that came to their end), the second `seconds` after the
    first has made so many steps."""
    runs = {}
    for number in range(2):
        said = home / f"said{number}"
        runs[fork(home / str(number), partial(run, home / "out", said))] = said
        if not number:
            wait_for(home / "out", steps)
            time.sleep(seconds)
    codes = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in runs}
    num_refused = 0
    for pid, said in runs.items():
        named = REFUSED.fullmatch(said.read_text()) if codes[pid] == 2 and said.exists() else None
        num_refused += named is not None and codes.get(int(named[1])) == 0 and int(named[1]) != pid
    return num_refused, list(codes.values()).count(0)


def main() -> None:
    options = arguments(__doc__, trials={"type": int, "default": 50}, seed={"type": int, "default": 0})
    trials, draw = 5 if options.quick else options.trials, random.Random(options.seed)
    refused = equal = 0
    with tempfile.TemporaryDirectory() as name:
        for folder in ("warm", "whole"):
            complete(Path(name), partial(run, Path(name) / folder, Path(name) / "said"))
        wanted = outcome(Path(name) / "whole")
    for number in range(trials):
        with tempfile.TemporaryDirectory() as name:
            steps, seconds = draw.randrange(STEPS - 4), draw.uniform(0, 0.1)
            counts = trial(Path(name), *((0, 0.0) if number % 10 == 0 else (steps, seconds)))
            refused += counts == (1, 1)
            folder = Path(name) / "out"
            equal += counts[1] == 1 and look(folder)[0] and outcome(folder) == wanted
    print(
        f"{trials} pairs of runs of {STEPS} steps: in {refused} one was refused, in {equal} the other was equal to the bit"
    )
    bar("two_runs_refused", refused / trials, 1.0)
    bar("two_runs_equal", equal / trials, 1.0)
    finish()


if __name__ == "__main__":
    main()
