"""Everything that is specific to vLLM; no other room imports it. One folder for each process.

    engine/      the service's process: an engine as a backend
    http/        the same process: vLLM's own OpenAI app on that engine
    worker/      vLLM's worker processes, for every backend
    slots/       workers of the slots backend: a LoRA slot for each task set
    resident/    workers of the resident backend: one adapter for every task set
    stock/       a stock `vllm serve`
    forms/       forms of answers (structured output), in the service's process, one of its own, and the engine core
    plugin       the entry point that vLLM calls in each of its processes
    naming       names that these processes share
    relied_on    what LoRAF relies on inside vLLM, in words and checks

Imports: http → engine; engine and stock → slots and resident → worker → naming; engine and plugin → forms.
"""
