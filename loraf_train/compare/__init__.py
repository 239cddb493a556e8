"""`loraf-train compare`: compares methods on the same tasks, each with its own settings, over several seeds.

methods/       the methods, each behind the same few calls
protocols.py   single (each task from the base) and sequence (one after the other), run by run: general.py measures the
               drift of the base, meter.py time and memory, stored.py keeps finished runs
results.py     what was measured, as JSON                               ← all below reads this
statistics.py  means over seeds, the numbers of continual learning, intervals; by_place.py: by place in the sequence
report/        what people read of it: tables, pictures, numbers for other programs

The section `compare:` of a tasks.yaml is in loraf_train.settings.comparison.
"""
