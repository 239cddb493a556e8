"""One phase of optimizer steps: transformers' Trainer on the layers that are attached.

`loop` runs a phase, `order` and `packing` decide what a batch holds, `trackers` report. Calibration and training both
run here; which layers train and what comes before or after is for `sequence` to say.
"""
