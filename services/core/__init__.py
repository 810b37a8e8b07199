"""The scheduling core: pure functions that decide what runs when.

Theory of operation
-------------------
A *view* (`view`) is a snapshot of one replica: its running decoders with their next deadlines, its prefills with their
first-token deadlines, its KV blocks, and its performance model (`perf_model`, fitted by `fit`, published ones in
`presets`). Time is an argument, ids are opaque strings, results are return values; nothing here logs, waits or reads a
clock.

`simulate` runs the batch former forward over a view in a compact state (time, decoders and least slack per tier) and
`memory` looks ahead in steps (KV blocks, decode time). Everything else asks these two:

* `batch.form_batch` is the first batch of the simulated plan: the hook calls it before every engine step;
* `admission.decide` asks which unpromised requests the plan holds: the planner on arrival, the hook at every batch
  boundary; `constraint` says why one does not fit, with numbers.

Around them: `slo` (stages, tiers, deadlines), `stages` (where a stage ends, from token ids alone), `speculation`
(tokens verified per step and tier), `lengths` (output forecasts), `placement` (which replica to ask first),
`best_effort` (what waits without a promise). `columns` holds the struct-of-arrays form that the compiled kernels read;
`roofline` the arithmetic that kernels and plain Python share; `errors` the typed errors.

Only `simulate`, `memory` and their callers import numba; a process that needs a prediction or a deadline now and then
does not pay for a compiler.
"""
