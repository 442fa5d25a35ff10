#!/usr/bin/env python3
"""Singular values and vectors of weights in PyTorch: svd_lowrank of rank 16 after two iterations, and the full ones.

    svd.py [--device cuda] [--toy]
"""

import torch

import timing


def main():
    args = timing.arguments(__doc__)
    shapes = [(224, 64), (64, 128)] if args.toy else [(14336, 4096), (4096, 8192)]
    drivers = [None] if args.device == "cpu" else ["gesvda", "gesvdj", "gesvd"]
    cases = []
    for rows, columns in shapes:
        w = torch.randn(rows, columns, device=args.device)
        low = timing.attempt(lambda: torch.svd_lowrank(w, q=16, niter=2), args.device)
        cases.append({"case": f"svd_lowrank/{rows}×{columns}, rank 16", **low})
        for driver in drivers:
            name = f"linalg.svd/{rows}×{columns}, {driver or 'lapack'}"
            # Seconds each: one call is enough.
            try:
                if args.device == "cuda":
                    torch.cuda.synchronize()
                once = timing.sample(lambda: torch.linalg.svd(w, full_matrices=False, driver=driver), args.device, 1)
                cases.append({"case": name, "seconds": once})
            except RuntimeError as error:
                cases.append({"case": name, "failed": str(error).splitlines()[0]})
    timing.report(args.device, cases)


main()
