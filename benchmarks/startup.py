"""What one waits for at the prompt: `neobert --help` and `neobert config check`, wall-clock, median of several runs."""

import time

from _bench import QUICKSTART, alternate, arguments, bar, finish, neobert, run, table


def wall(*words: object) -> float:
    start = time.perf_counter()
    run(neobert(*words))
    return time.perf_counter() - start


def main() -> None:
    repeats = 3 if arguments(__doc__).quick else 11
    seconds = alternate({"help": lambda: wall("--help"), "check": lambda: wall("config", "check", QUICKSTART)}, repeats)
    table([("", "seconds"), *[(name, f"{value:.3f}") for name, value in seconds.items()]])
    bar("help_seconds", seconds["help"], 0.3, at_most=True)
    bar("config_check_seconds", seconds["check"], 0.7, at_most=True)
    finish()


if __name__ == "__main__":
    main()
