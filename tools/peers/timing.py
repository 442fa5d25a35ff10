"""How long a call takes: the median of ten samples, by events on a CUDA device, by the clock on the CPU."""

import argparse
import json
import re
import statistics
import sys
import time

import torch

SAMPLES = 10
#: A sample is as many calls as fill this many seconds, one at least.
FILL = 0.03


def sample(run, device, calls):
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begun) / calls


def seconds(run, device):
    """The median time of `run()`, after it has been warmed up."""
    for _ in range(2):
        once = sample(run, device, 1)
    calls = max(1, min(1000, round(FILL / max(once, 1e-7))))
    return statistics.median(sample(run, device, calls) for _ in range(SAMPLES))


def attempt(run, device):
    """Seconds of `run()`, or why there are none."""
    try:
        return {"seconds": seconds(run, device)}
    except (RuntimeError, NotImplementedError) as error:
        torch.cuda.empty_cache()
        return {"failed": str(error).strip().splitlines()[0]}


def arguments(doc, cases=False):
    """The options that peers share; a peer without a list of cases takes --toy."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    if cases:
        parser.add_argument("--cases", required=True, help="what our bench wrote")
    else:
        parser.add_argument("--toy", action="store_true", help="sizes for a machine without a GPU")
    torch.manual_seed(0)
    return parser.parse_args()


def asked(file, pattern):
    """The names of our cases in `file` that match `pattern`, each with its groups."""
    for row in json.load(open(file))["cases"]:
        if found := re.search(pattern, row["case"]):
            yield row["case"], found.groups()


def report(device, cases, **more):
    """Prints what a peer measured as one JSON line."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, **more}
    json.dump({"device": name, "versions": versions, "cases": cases}, sys.stdout)
    print()
