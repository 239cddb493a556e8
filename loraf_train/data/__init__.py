"""From files and datasets to token ids with a loss mask.

records (any file format) → forms (templates, and conversations in `chat`) → examples (token ids); `task_data` runs them
for all sources of a task. A new file format belongs in `records`, a new kind of record in `forms`, a new way to write a
conversation in `messages`. Nothing here trains or scores.
"""
