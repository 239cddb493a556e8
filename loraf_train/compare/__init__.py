"""`loraf-train compare`: methods side by side on the same tasks, each with its own settings, over several seeds.

settings.py    what tasks.yaml may say under `compare:`
methods.py     the methods, each behind the same few calls
protocols.py   single (each task from the base) and sequence (one after the other), run by run: general.py measures the
               drift of the base, meter.py time and memory, stored.py keeps finished runs
results.py     what was measured, as JSON                               ← what everything below reads
statistics.py  means over seeds, the numbers of continual learning, intervals
tables.py      for the terminal, and as Markdown: cells.py, sheets.py, sheets_sequence.py say what stands in them
pictures.py    PNG and SVG: bars.py, maps.py, on figures of canvas.py
"""
