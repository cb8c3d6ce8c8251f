"""Benchmarks: each module is one command, ends with one JSON line and keeps it in `results/`.

    python -m benchmarks.resnet56_main            # all rows, resuming where an earlier run stopped
    python -m benchmarks.resnet56_main --only base
    python -m benchmarks.resnet56_main --quick    # minutes to seconds; stored apart

The real data sets are looked for in the folder that LACONIC_DATA names, else in `../shared/data`.
"""
