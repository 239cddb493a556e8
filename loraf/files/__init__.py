"""Files that are read without trust and written so that a crash leaves the old or the new one, never a part.

bounded_file, durable_folder, folder_lock    opening, naming and locking
strict_json, strict_safetensors              two formats, of which only what has one meaning is accepted
sealed_json                                  JSON that carries its own digest
"""
