"""Does a run that an earlier version began go on here to the bit?

Each task is trained by the earlier commit in one go; here its run is taken up from the checkpoint in the middle. What the last
checkpoints hold (weights, optimizer, position of the data) is compared byte by byte. Later versions compute attention in
float32 with another kernel, which rounds otherwise, so it is also compared with the earlier kernel chosen by hand.

    python benchmarks/old_checkpoint.py --commit ac63e8d
"""

import shutil
import sys
import tempfile
from pathlib import Path

from _bench import arguments, bar, finish, neobert, run, table
from safetensors.numpy import load_file
from two_versions import SMALL, TASKS, unpack

STEPS, MIDDLE = 8, 4
TINY = [
    "model.hidden_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.intermediate_size=128",
]
EARLIER_KERNEL = (
    "import sys; from neobert.model import attention; attention.uses_buckets = lambda dtype: True\n"
    "from neobert.cli.main import main; sys.argv = ['neobert', *sys.argv[1:]]; main()"
)


def main() -> None:
    commit = arguments(__doc__, commit={"default": "ac63e8d", "help": "the earlier version"}).commit
    rows, figures = [("", "kernel", "files that differ", "largest difference of a weight")], {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        source = unpack(commit, home / "earlier")
        for name in TASKS:
            old = begin(name, source, home)
            for kernel, command in (("earlier", [sys.executable, "-c", EARLIER_KERNEL]), ("today's", neobert())):
                new = take_up(old, home / f"{name} {kernel}", command)
                differing = compare(old / f"checkpoints/{STEPS}", new / f"checkpoints/{STEPS}")
                weights = [load_file(run / f"checkpoints/{STEPS}/model.safetensors") for run in (old, new)]
                most = max(float(abs(weights[0][key] - weights[1][key]).max()) for key in weights[0])
                rows.append((name, kernel, ", ".join(differing) or "none", f"{most:.1e}"))
                figures[name, kernel] = len(differing), most
    table(rows)
    for (name, kernel), (count, most) in figures.items():
        if kernel == "earlier":
            bar(f"{name}_files_that_differ", count, 0, at_most=True)
        else:
            bar(f"{name}_difference_with_todays_kernel", most, 1e-3, at_most=True)
    finish()


def begin(name: str, source: Path, home: Path) -> Path:
    """The whole run, by the earlier version."""
    out = home / name
    (home / "config.yaml").write_text("task: pretraining\n")
    words = [*SMALL, *TASKS[name], *TINY, f"trainer.max_steps={STEPS}", f"trainer.output_dir={out}"]
    words += ["trainer.save_model=true", "trainer.save_strategy=steps", f"trainer.save_steps={MIDDLE}"]
    words += ["optimizer.name=muonclip"] if name == "pretraining" else []
    run(neobert("run", home / "config.yaml", *words), PYTHONPATH=str(source))
    return out


def take_up(old: Path, new: Path, command: list[object]) -> Path:
    """The second half of a run, here."""
    shutil.copytree(old, new)
    shutil.rmtree(new / f"checkpoints/{STEPS}")
    for pointer in ("latest", "best"):
        (new / "checkpoints" / pointer).unlink(missing_ok=True)
    words = [f"trainer.output_dir={new}", "trainer.resume_from_checkpoint=latest"]
    run([*command, "run", new / "config.yaml", *words])
    return new


def compare(old: Path, new: Path) -> list[str]:
    """Files with numbers that are not the same, byte by byte."""
    names = sorted(str(path.relative_to(old)) for path in old.rglob("*.safetensors"))
    return [name for name in names if not (new / name).is_file() or load_bytes(old / name) != load_bytes(new / name)]


def load_bytes(path: Path) -> dict[str, bytes]:
    """A file's tensors; what its header says besides does not count."""
    return {name: tensor.tobytes() for name, tensor in load_file(path).items()}


if __name__ == "__main__":
    main()
