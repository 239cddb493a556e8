"""Everything that is particular to vLLM: the only place that imports it. One folder for each process.

    engine/      the service's process: an engine as a backend
    worker/      vLLM's worker processes, for every backend
    slots/       workers of the slots backend
    resident/    workers of the resident backend: one adapter for every task set
    stock/       a stock `vllm serve`
    plugin       the entry point that vLLM calls in each of its processes
    naming       names that these processes share
    relied_on    what is relied on inside vLLM, in words and checks

Arrows: engine and stock → slots and resident → worker → naming.
"""
