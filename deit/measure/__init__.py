"""What the networks cost: parameters, FLOPs, throughput, memory, and how far that is from possible.

The parts: `published` (facts), `networks` (names and twins), `flops` and `formula` (two ways to
count), `roofline` (what a device allows), `hardware`, `subject` and `timing` (measuring), `measure`
(one result from all of them), `tables`, `plot` and `profiling` (showing it), `command`.
"""
