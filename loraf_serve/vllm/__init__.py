"""Everything that is particular to vLLM: the only place that imports it.

    engine       a vLLM engine as a backend: its life, its streams, its workers
    backend      the slots and the resident backend
    options      the user's vLLM options → the engine's arguments
    environment  the environment of vLLM's processes
    admission    which sets have a slot, which wait
    convert      requests and answers, to vLLM's types and back
    naming       how a task set is named inside vLLM
    support      can vLLM serve this model, and how?
    relied_on    what is relied on inside vLLM, in words and checks

In vLLM's own processes:

    plugin       the entry point: leave the terminal's process group, end with the service
    remote       what a backend may call in its workers
    store        checkpoints in memory, read and prepared beside the engine's loop
    targets      which of vLLM's layers an adapter's modules are
    extension    slots: what is put in the place of vLLM's parts
    worker       slots: a task set becomes a LoRA model
    punica_cpu   slots: LoRA products on the CPU
    resident/    one adapter for every task set

In a stock `vllm serve`:

    stock              what the plugin changes there, and when
    stock_checkpoints  `--lora-modules` read, verified, or refused
    stock_models       task sets as model names
    stock_worker       task sets beside PEFT adapters
"""
