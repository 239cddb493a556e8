"""What people and programs read of a comparison: derived from `results` and `statistics`, and from nothing else.

tables.py    for a terminal, and as Markdown: cells.py, sheets.py and sheets_*.py decide their contents
pictures.py  PNG and SVG: bars.py, maps.py, on figures of canvas.py
numbers.py   the same for other programs, stored with the results
"""
