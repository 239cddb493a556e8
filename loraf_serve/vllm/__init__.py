"""Everything that is particular to vLLM: the only place that imports it.

    backend      the slots backend: task sets as LoRA slots of a vLLM engine
    options      the user's vLLM options → the engine's arguments
    environment  the environment of vLLM's processes
    admission    which sets have a slot, which wait
    convert      requests and answers, to vLLM's types and back
    naming       how a task set is named inside vLLM
    support      can vLLM serve this model?
    relied_on    what is relied on inside vLLM, in words and checks

In vLLM's own processes:

    plugin       the entry point: leave the terminal's process group, end with the service
    extension    what is added to a worker, and what is put in the place of vLLM's parts
    worker       a task set becomes a LoRA model; which layers take LoRA
    store        resident checkpoints, A and B of a set
    punica_cpu   LoRA products on the CPU
"""
