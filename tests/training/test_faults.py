"""Faults of a run on real processes and folders: signals in every phase, damaged checkpoints, what is left of a killed run; and
safety: nothing is executed that came with data, names stay names, secrets of the environment stay there.
"""

import contextlib
import datetime
import functools
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from helpers.commands import run_neobert, start_function, start_neobert
from helpers.runs import ROOT, TEXT, TINY, TOKENIZER
from neobert.checkpoints.format import list_steps, verify_checkpoint
from neobert.checkpoints.locate import find_checkpoint
from neobert.config.load import load_config
from neobert.data.tokenizer import load_tokenizer
from neobert.errors import CheckpointError, ConfigError, DataError
from neobert.tasks.pretraining import task as pretraining
from neobert.training import processes as signals
from neobert.training.loop import Interrupt
from neobert.training.processes import stop_signals


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of the steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("faults") / "out"
    words = [*TINY, "trainer.save_steps=2", "trainer.eval_steps=100", f"trainer.output_dir={folder}"]
    pretraining.run(load_config([], words))
    return folder


# --- signals -----------


def start(folder, *words, **environment):
    (folder / "config.yaml").write_text("task: pretraining\n")
    words = [*TINY, *words, f"trainer.output_dir={folder / 'out'}"]
    return start_neobert("run", folder / "config.yaml", *words, env=environment, unbuffered=True)


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.errors()
        time.sleep(0.002)


PHASES = {  # phase: (words, when to send, what is left)
    "compiling": (["trainer.torch_compile=true"], lambda out: (out / "environment.json").is_file(), "a checkpoint"),
    "saving": (["trainer.save_steps=1"], lambda out: list(out.glob("checkpoints/.*.tmp")), "a checkpoint"),
    "tokenising": (
        ["dataset.pre_tokenize=true", "dataset.num_proc=2"], lambda out: list(out.glob("tokenized/train/plan.json")),
        "nothing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_to_all_processes_of_a_run(phase, tmp_path):
    """As a scheduler sends it: to every process of the job, twice. Saved where there is something to save."""
    words, is_time, left = PHASES[phase]
    process = start(tmp_path, "trainer.max_steps=100000", "trainer.eval_steps=100000", "dataset.num_workers=1", *words)
    wait_for(process, lambda: is_time(tmp_path / "out"))
    if phase == "compiling":
        time.sleep(2)  # into the first step
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):  # it may have ended by the second one
            os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.1)
    output, errors = process.communicate(timeout=240)
    assert process.returncode % 256 in (128 + signal.SIGTERM, 256 - signal.SIGTERM), errors  # 143 to a shell
    assert "Traceback" not in errors
    steps = list_steps(tmp_path / "out/checkpoints")
    if left == "nothing":
        assert not steps
        assert "nothing had to be saved" in output
    elif steps:
        assert f"stopped at step {steps[-1]}: received SIGTERM" in output
        verify_checkpoint(find_checkpoint("latest", tmp_path / "out/checkpoints"))
    else:
        assert phase == "compiling"  # it came before the first step
        assert "nothing had to be saved" in output


def compile_with(compiler, folder):
    """A block's library, compiled by the only g++ on the way."""
    os.environ.update(PATH=f"{compiler}:{os.environ['PATH']}", TORCHINDUCTOR_CACHE_DIR=str(folder))
    run = pretraining.run(load_config([], [*TINY, "trainer.torch_compile=true", "trainer.max_steps=1",
                                           f"trainer.output_dir={folder / 'out'}"]))  # fmt: skip
    assert run.state.step == 1


def test_a_compiler_that_was_killed_leaves_no_library(tmp_path):
    """Inductor takes a library that is there for whole, in every later run. The first compiler is killed as it writes."""
    compiler = tmp_path / "bin/g++"
    compiler.parent.mkdir()
    compiler.write_text(
        "#!/bin/bash\nwhile [ $# -gt 0 ]; do case $1 in -o) out=$2;; *main.cpp) source=$1;; esac; shift; done\n"
        f'if [ "$source" ] && mkdir {tmp_path}/killed 2>/dev/null; then : > "$out"; kill -KILL $$; fi\n'
    )
    real = shutil.which("g++")
    text = compiler.read_text().replace("#!/bin/bash\n", '#!/bin/bash\nall=("$@")\n') + f'exec {real} "${{all[@]}}"\n'
    compiler.write_text(text)
    compiler.chmod(0o755)
    first = start_function(compile_with, compiler.parent, tmp_path / "cache")
    first.communicate(timeout=240)
    assert (tmp_path / "killed").exists()
    assert first.returncode
    assert not [path for path in (tmp_path / "cache").rglob("*.so") if not path.stat().st_size]
    second = start_function(compile_with, compiler.parent, tmp_path / "cache")
    second.communicate(timeout=240)
    assert second.returncode == 0, second.errors()


def take_signals():
    interrupt = Interrupt()
    interrupt.has_started = True
    signals.ONE_STOP_SECONDS = 0.2
    with stop_signals(interrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        print("noted", flush=True)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_a_second_signal_ends_the_run_at_once():
    """Only when it is one more, not the same one from a launcher as well."""
    process = start_function(take_signals)
    assert process.communicate(timeout=120)[0] == "noted\n"
    assert process.returncode == -signal.SIGTERM


def wait_for_others():
    with stop_signals(Interrupt()):
        print("waiting", flush=True)
        dist.TCPStore("localhost", 0, 2, True, datetime.timedelta(seconds=100), wait_for_workers=True)


def test_a_signal_ends_a_process_that_waits_for_others_outside_of_python():
    """As at the start of a run on several processes, when one of them has died before it connected."""
    process = start_function(wait_for_others)
    assert process.stdout.readline() == "waiting\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_a_step_ends_behind_it(number, tmp_path):
    def stop(batch, step):
        if step == 2:
            os.kill(os.getpid(), number)

    run = pretraining.run(load_config([], [*TINY, f"trainer.output_dir={tmp_path}"]), stop)
    assert (run.exit_code, run.state.step) == (128 + number, 2)
    assert list_steps(tmp_path / "checkpoints") == [2]
    with stop_signals(Interrupt()):
        pass  # handlers are those of before
    assert signal.getsignal(number) not in (None, stop_signals)


# --- what a run starts, and what is left of it -----------


def test_a_script_without_a_main_guard_trains(tmp_path):
    """`pretraining.run` from the top level of a script: no process that tokenises imports the script again."""
    words = [*TINY, "dataset.streaming=true", "dataset.num_workers=2", f"trainer.output_dir={tmp_path / 'out'}"]
    (tmp_path / "script.py").write_text(
        "from neobert.config.load import load_config\nfrom neobert.tasks.pretraining import task as pretraining\n"
        f"open({str(tmp_path / 'imported')!r}, 'a').write('once')\npretraining.run(load_config([], {words!r}))\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert list_steps(tmp_path / "out/checkpoints") == [6]
    assert (tmp_path / "imported").read_text() == "once"


@pytest.mark.parametrize("moment", ["starting", "training"])
def test_nothing_is_left_of_a_launcher_that_was_killed(moment, tmp_path):
    """SIGKILL to the launcher alone, as soon as its processes exist or between two steps: they end, files in /tmp too."""
    (tmp_path / "tmp").mkdir()
    process = start(tmp_path, "trainer.max_steps=100000", "--nproc", "2", TMPDIR=str(tmp_path / "tmp"))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(process, lambda: len(children.read_text().split()) == 2)
    if moment == "training":
        wait_for(process, lambda: (tmp_path / "out/metrics.jsonl").is_file())
    process.kill()
    process.communicate(timeout=60)  # behind the end of all that write to the pipe
    assert not os.path.exists(f"/proc/{process.pid}")
    assert not processes_of(tmp_path)
    assert not list((tmp_path / "tmp").iterdir())


def processes_of(folder):
    """Processes whose command line names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


# --- damaged checkpoints -----------


def damages(folder, other):
    """(what is damaged, how) for every file of a checkpoint; `other` is the checkpoint before it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, path in enumerate(files):
        name, whole = str(path.relative_to(folder)), path.read_bytes()
        places = (0, len(whole) // 4, len(whole) // 2, 3 * len(whole) // 4, len(whole) - 1)
        flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
        shorter = [whole[:length] for length in (0, len(whole) // 2, len(whole) - 1)]
        swapped = [files[(number + 1) % len(files)].read_bytes(), (other / name).read_bytes()]
        for content in [*flipped, *shorter, whole + b"\n", *swapped]:
            if content != whole:
                yield name, functools.partial(path.write_bytes, content)
        yield name, path.unlink
    first, second = folder / "optimizer/rank00000.safetensors", folder / "optimizer/rank00001.safetensors"
    yield second.name, functools.partial(shutil.copy, first, second)
    yield "6", lambda: (shutil.rmtree(folder), shutil.copytree(other, folder))


def test_damaged_checkpoints_are_named_before_training_starts(trained, tmp_path):
    """Every file truncated, flipped, swapped, lengthened, deleted; each is found, named, and the step before is offered."""
    out = shutil.copytree(trained, tmp_path / "out")
    folder, config = out / "checkpoints/6", load_config([], [*TINY, f"trainer.output_dir={out}",
                                                             "trainer.resume_from_checkpoint=6"])  # fmt: skip
    count = 0
    for name, damage in list(damages(folder, out / "checkpoints/4")):
        damage()
        with pytest.raises(CheckpointError) as error:
            verify_checkpoint(folder)
        message = str(error.value)
        assert name.rpartition("/")[2] in message
        assert "the checkpoint before it is step 4" in message
        count += 1
        if count % 20 == 0:
            with pytest.raises(CheckpointError, match=re.escape(message)):
                pretraining.run(config)
        shutil.rmtree(folder)
        shutil.copytree(trained / "checkpoints/6", folder)
    print(f"{count} damaged checkpoints, all named")
    assert count >= 100
    verify_checkpoint(folder)


@pytest.mark.parametrize("name", ["../4/model.safetensors", "/etc/hostname", "..", "tokenizer/../../4/config.json"])
def test_a_checkpoint_names_no_files_outside(name, trained, tmp_path):
    from neobert.checkpoints.format import checksum
    from neobert.files import write_json

    folder = shutil.copytree(trained / "checkpoints/6", tmp_path / "6")
    state = json.loads((folder / "state.json").read_text())
    del state["checksum"]
    state["sha256"][name] = "0" * 64
    write_json(folder / "state.json", {**state, "checksum": checksum(state)})
    with pytest.raises(CheckpointError, match="is not a file of the checkpoint"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("text", ["../../elsewhere", "/etc", "\xff\xfe", ""])
def test_pointers_lead_to_steps_only(text, trained, tmp_path):
    root = shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(root / "4", tmp_path.parent / "elsewhere", dirs_exist_ok=True)
    for pointer in ("latest", "best"):
        (root / pointer).write_text(text, encoding="latin-1")
    assert find_checkpoint("latest", root) == root / "6"
    (root / "latest").write_text(
        "4\n"
    )  # as after a kill just before it was replaced, or a run that ended with its best
    assert find_checkpoint("latest", root) == root / "4"
    assert find_checkpoint("latest", root, to_resume=True) == root / "6"
    with pytest.raises(CheckpointError, match="no checkpoint 'best'"):
        find_checkpoint("best", root)


# --- safety -----------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_that_comes_with_data_is_executed(trained, tmp_path):
    """Pickles and Python files in a checkpoint, a tokenizer folder and a corpus; tags in YAML."""
    exploded = tmp_path / "exploded"
    bomb, code = pickle.dumps(Bomb(exploded)), f"import os\nos.mkdir({str(exploded)!r})\n"
    tokenizer = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization.Bomb", "tokenization.Bomb"]}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings))
    corpus = shutil.copytree(TEXT, tmp_path / "corpus")
    out = shutil.copytree(trained, tmp_path / "out")
    for folder in (tokenizer, corpus, out / "checkpoints/6", out):
        for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "dataset.pkl"):
            (folder / name).write_bytes(bomb)
        for name in ("tokenization.py", "modeling.py", "corpus.py", "conftest.py", "sitecustomize.py"):
            (folder / name).write_text(code)
    words = [*TINY, f"dataset.path={corpus}", f"tokenizer.path={tokenizer}", f"trainer.output_dir={out}"]
    with contextlib.suppress(DataError):
        load_tokenizer("", str(tokenizer))
    (corpus / "dataset.pkl").unlink()
    pretraining.run(load_config([], [*words, "trainer.max_steps=2"]))
    result = run_neobert("fill-mask", out, "The [MASK] of the people.")
    assert result.returncode == 0, result.stderr
    for tag in ("!!python/object/apply:os.mkdir", "!!python/name:os.mkdir"):
        (tmp_path / "bomb.yaml").write_text(f"seed: {tag} ['{exploded}']\n")
        with pytest.raises(ConfigError):
            load_config([str(tmp_path / "bomb.yaml")], [])
    assert not exploded.exists()


@pytest.mark.parametrize("name", ["../../elsewhere", "a/b", "..", "a\\b"])
@pytest.mark.parametrize("key", ["wandb.project", "wandb.name"])
def test_names_do_not_lead_elsewhere(key, name):
    with pytest.raises(ConfigError, match=f"{key}: .* is not a name"):
        load_config([], [f"{key}={json.dumps(name)}"])


SECRETS = {
    name: f"secret-{number}-{'x' * 12}"
    for number, name in enumerate(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"))
}


def test_secrets_of_the_environment_stay_there(tmp_path):
    words = [*TINY, f"trainer.output_dir={tmp_path / 'out'}", "debug=true"]
    (tmp_path / "config.yaml").write_text("task: pretraining\n")
    good = run_neobert("run", tmp_path / "config.yaml", *words, env=SECRETS, real=True)
    bad = run_neobert("run", tmp_path / "config.yaml", *words, "trainer.stpes=3", env=SECRETS)
    assert (good.returncode, bad.returncode) == (0, 2), good.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"environment.json", "report.html", "config.yaml", "state.json", "metrics.jsonl"} <= {p.name for p in files}
    for name, secret in SECRETS.items():
        assert secret not in good.stdout + good.stderr + bad.stdout + bad.stderr, name
        assert not [path for path in files if secret.encode() in path.read_bytes()], name


# --- SIGKILL -----------


@pytest.mark.parametrize(("kills", "nproc"), [(10, 1), (3, 2)])
def test_killed_at_random_moments_and_resumed(kills, nproc):
    """Kills over training, evaluation and saving, of a process, a launcher or all: nothing is left of them, and every
    resumed run equals the uninterrupted one to the bit.
    """
    command = [
        sys.executable,
        ROOT / "benchmarks/crash_test.py",
        "--kills",
        str(kills),
        "--nproc",
        str(nproc),
        "--steps",
        "18",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{kills} equal to the bit, {kills} readable" in done.stdout
