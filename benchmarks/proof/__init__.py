"""Can the comparison be believed? Trials whose truth is known, on a small engine: `make bench-proof`.

    python -m benchmarks.proof            # the trials that are missing, under two hours on 2 cores; then the table
    python -m benchmarks.proof --quick    # a few of each, about ten minutes; keeps nothing
    python -m benchmarks.proof --report   # the table and docs/proof.md from what is there

- *same*: an engine against itself, on the machine as it is and under a background load. Any claim is wrong.
- *slower*: every call of one of the two is made 5% longer (it waits in it; the other waits after it, off the clock).
  Found when "not slower" fails in 60 s.
- *faster*: every call of dense is made 20% longer. Confirmed when "at least 15% faster" passes in what
  a comparison has by default, two minutes; what it had after one is told, too.

Every trial is a line of benchmarks/results/proof-<cpu>.jsonl with each replicate's log ratios, of which its answer is
derived. What stands there is not made again, so a stopped run goes on. Trials of earlier code stay, are counted as
such, and are made again with --redo-stale.
"""
