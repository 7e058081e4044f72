"""How much a busy machine slows a compression: `slim` on the bundled model, alone and beside one spinning process per core.

    python benchmarks/busy.py [--model examples/pystd-5m] [--recipe slim] [--rounds 3] [--threads 0 1] [--spin]

Each run is a process of its own: idle and busy by turns, with each number of threads (0: torch's default). Seconds are the wall
clock's, of the call alone (imports are not in it). A spinning process takes all that the system gives it, so a program of one
thread takes at least twice as long beside them where the system is fair. Ratios are those of the two runs of a round; medians
are printed, and written to benchmarks/results/busy.json. Other programs disturb the idle runs most: run it on a quiet machine.
The first line of the output gives the load before it began. With --spin threads wait as they would without slimlm's choice
(slimlm.runtime.waiting), which can take very long.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import slimlm
from results_file import Results, this_run
from slimlm.runtime import waiting

RESULTS = Path(__file__).parent / "results" / "busy.json"
_GNU_SPINS = "300000"
"""What GNU's OpenMP takes where nothing is set."""
EXAMPLE = Path(__file__).parent.parent / "examples" / "pystd-5m"


def compress_once(model: str, recipe: str, samples: int, length: int) -> float:
    """Seconds of one compression in this process."""
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        slimlm.compress(
            model, Path(folder) / "out", recipe=recipe, data="stdlib", samples=samples, length=length, progress=False
        )
        return time.perf_counter() - began


def measured(arguments: argparse.Namespace, threads: int) -> float:
    """Seconds of one compression in a process of its own; 0 threads are torch's default."""
    environment = dict(os.environ)
    for name, value in waiting.BRIEFLY.items():
        if environment.get(name) == value:
            del environment[name]  # set by importing slimlm here; the child decides for itself
    if arguments.spin:
        environment["GOMP_SPINCOUNT"] = _GNU_SPINS
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, __file__, "--once", "--model", arguments.model, "--recipe", arguments.recipe]
    command += ["--samples", str(arguments.samples), "--length", str(arguments.length)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Within this context so many processes spin."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(EXAMPLE))
    parser.add_argument("--recipe", default="slim")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1], help="0: torch's default")
    parser.add_argument("--neighbours", type=int, default=os.cpu_count() or 1, help="spinning processes")
    parser.add_argument("--spin", action="store_true", help="let waiting threads spin, as without slimlm's choice")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(compress_once(arguments.model, arguments.recipe, arguments.samples, arguments.length)))
        return
    print(f"load before: {os.getloadavg()[0]:.1f}, cores: {os.cpu_count()}, spinning processes: {arguments.neighbours}")
    idle: dict[int, list[float]] = {threads: [] for threads in arguments.threads}
    beside: dict[int, list[float]] = {threads: [] for threads in arguments.threads}
    for round_ in range(arguments.rounds):
        for threads in arguments.threads:
            idle[threads].append(measured(arguments, threads))
            with busy(arguments.neighbours):
                beside[threads].append(measured(arguments, threads))
            seconds = f"{idle[threads][-1]:.1f} s alone, {beside[threads][-1]:.1f} s beside them"
            print(f"round {round_ + 1}, threads {threads or 'default'}: {seconds}", flush=True)
    results = Results(RESULTS, ("model", "recipe", "threads", "neighbours", "spin"), this_run("busy.py"))
    for threads in arguments.threads:
        ratio = statistics.median(b / a for a, b in zip(idle[threads], beside[threads], strict=True))
        alone, other = statistics.median(idle[threads]), statistics.median(beside[threads])
        print(f"threads {threads or 'default'}: {alone:.1f} s alone, {other:.1f} s beside them, ratio {ratio:.2f}")
        results.add(
            {
                "model": Path(arguments.model).name,
                "recipe": arguments.recipe,
                "samples": arguments.samples,
                "length": arguments.length,
                "threads": threads,
                "neighbours": arguments.neighbours,
                "spin": arguments.spin,
                "seconds_alone": idle[threads],
                "seconds_beside": beside[threads],
                "ratio": ratio,
            }
        )
    results.write()


if __name__ == "__main__":
    main()
