"""The quality table: what removing layers costs SmolLM2-135M-Instruct, by method, training budget and seed.

    make quality                 # every row that is not in the file yet; hours long, stops and goes on at any time
    make quality QUICK=1         # the same machinery on a small table, about 10 minutes on 2 cores
    make quality ARGS=--list     # the rows in the order in which they run, with their estimated time
    make quality-report          # docs/quality.md, the README's table, plots, and a JSON line against the targets

`table.py` says which rows there are, `rows.py` what a row is, `work.py` how one is made (by calling the library),
`store.py` where they are kept, `figures.py` what follows from them, `report.py` and `plots.py` how it is shown.
"""
