"""Runs one phase of optimizer steps: transformers' Trainer on the model's trainable parameters.

`loop` runs a phase, `order` and `packing` decide what a batch holds, `trackers` report to TensorBoard and W&B.
Calibration and training both run here; `sequence` decides which layers train and what happens before and after.
"""
