"""What the networks cost: parameters, FLOPs, throughput, memory, and how far that is from possible.

The parts: `networks` (names and twins), `flops` (counting), `roofline` (what a device allows),
`hardware`, `bench_model` and `timing` (measuring), `measure` (one result from all of them), `plan`,
`tables`, `plot` and `profiling` (showing it), `options` and `command`. `int8` serves the export.
"""
