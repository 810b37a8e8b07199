"""The scheduling core: pure functions that decide what runs when.

Theory of operation
-------------------
A *view* (`view`) is a snapshot of one replica: its running decoders with their next deadlines, its prefills with their
first-token deadlines, its KV blocks, and its performance model (`perf_model`, fitted by `fit`, published ones in
`presets`). Time is an argument, ids are opaque strings, results are return values; nothing here logs, waits or reads a
clock.

`simulate` runs the batch former forward over a view in a compact state (time, decoders and least slack per tier) and
`memory` looks ahead in steps (KV blocks, decode time); together they are the one feasibility test (`feasibility`).
Everything else asks it:

* `batch.form_batch` is the first batch of the simulated plan: the hook calls it before every engine step (`filling`
  turns it into ids, `skipping` leaves decoders out to save a prefill, `batch_plan` is the result);
* `admission.decide` asks which unpromised requests the plan holds: the planner on arrival, the hook at every batch
  boundary. `solver` runs greedy and Moore-Hodgson (`selection`) over all duration caps, `dp_solver` the dynamic program
  (`dp`) over its stated model (`fluid`). `constraint` and `explain` say why a request does not fit, with numbers;
* `quote` says what would fit, and `retry` when.

Around them: `slo` (stages, tiers, deadlines), `stages` (where a stage ends, from token ids alone), `verdict` (when an
answer becomes a promise), `lost` (promises that no plan can keep any more), `duration_cap` (how long batches may last),
`floors` (who must not pay for everybody), `speculation` and `drafts` (tokens verified per step and tier), `lengths`
(output forecasts), `pausing` (which decoders can do without their memory for a while), `placement` (which replica to
ask first), `best_effort` (what waits without a promise).

`columns` and `problem` hold the struct-of-arrays form that the compiled kernels read, `compiled` is the door to numba,
`warm` compiles ahead, `roofline` is the arithmetic that kernels and plain Python share, `nnls` the solver of `fit`,
`errors` the typed errors. Kernels live in `problem`, `simulate`, `memory`, `feasibility`, `selection`, `solver`,
`fluid`, `dp` and `dp_solver`; a process that only needs a prediction or a deadline now and then imports none of them
and does not pay for a compiler. docs/core.md has the formulas and the measurements.
"""
