"""Runs one phase of optimizer steps: transformers' Trainer on the model's trainable parameters.

`loop` runs a phase; `order`, `batches` and `packing` decide what a batch holds; `randomness` makes what is drawn depend
on the tokens alone; `master_weights` trains bfloat16 weights; `trackers` report to TensorBoard and W&B.
Calibration and training both run here; `sequence` decides which layers train and what happens before and after.
"""
