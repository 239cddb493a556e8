"""From files and datasets to token ids with a loss mask.

records (any file format) → forms (templates, chats) → examples (token ids). A new data format belongs in `records`, a
new kind of record in `forms`. Knows the settings of data; nothing here trains or scores.
"""
