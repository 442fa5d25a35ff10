"""Builds the miniature of the demo: trains the base, and writes model, tokenizer and data into a folder.

    python tools/demo/build.py --out assets/demo
"""

import argparse
import platform
import time
from pathlib import Path

import torch

import base
import data
import model
import tokenizer

LIMIT = 8 << 20  # bytes that the folder may take


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "assets" / "demo")
    parser.add_argument("--seed", type=int, default=0, help="of the base's training")
    parser.add_argument("--world", type=int, default=0, help="seed of the private facts and of all items")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stages", type=Path, help="folder that keeps the weights after each stage of training")
    parser.add_argument("--data-only", action="store_true", help="leave the base as it is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    files = data.make(options.world)
    data.check(files)
    data.save(files, options.out)
    tokenizer.save(options.out / "base")
    if not options.data_only:
        begun = time.time()
        weights = base.train(options.seed, log=lambda line: print(line, flush=True), folder=options.stages)
        model.save(weights, options.out / "base")
        print(f"trained in {time.time() - begun:.0f} s, torch {torch.__version__}, Python {platform.python_version()}")
    weights = model.load(options.out / "base")
    marks = {name: round(100 * base.accuracy(weights, exam), 1) for name, exam in base.examination().items()}
    size = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    print(f"general facts, weights as stored: {marks}; {size / 1e6:.1f} MB")
    assert size <= LIMIT, "the folder is too large"


if __name__ == "__main__":
    main()
